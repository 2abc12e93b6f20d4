"""Model FLOPs against torch's own counter, on tiny models of every family."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gendistill.anatomy.cost import forward_flops, peak_flops, step_flops
from gendistill.anatomy.family import layer_geometry
from gendistill.anatomy.kda import KDA, KDASettings
from gendistill.anatomy.spec import causal_pairs
from gendistill.config.schema import StageConfig
from gendistill.mixers import kda
from gendistill.testing import FAMILIES, tiny_student, tiny_teacher
from gendistill.training.adapters import insert_adapters
from gendistill.training.freeze import apply_freeze

LENGTH, ROWS = 12, 2
DOCUMENTS = {LENGTH: ROWS}
TOKENS = LENGTH * ROWS
PLACEMENT = ["kda", "full", "kda", "full"]


def ids(vocab):
    return torch.randint(3, vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def all_pairs(config):
    """What eager attention computes beyond the pairs that a causal mask leaves."""
    heads = config.num_attention_heads * config.head_dim
    kept = sum(
        kind != "kda" for kind in getattr(config, "mixers", None) or ["full"] * config.num_hidden_layers
    )
    return kept * ROWS * 4 * heads * (LENGTH**2 - causal_pairs(LENGTH))


@pytest.fixture
def no_mixing(monkeypatch):
    """KDA layers without their recurrence, whose products in chunks are more than the model's."""

    def values(*arguments, **settings):
        q, _, v = arguments[:3]
        given = [each for each in (*arguments, *settings.values()) if isinstance(each, torch.Tensor)]
        out = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
        return out * sum(each.sum() for each in given), None

    monkeypatch.setattr(kda, "chunk_kda", values)
    monkeypatch.setattr(type(KDA), "mixing_flops", lambda *_: 0)


def counted(work):
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_pass_costs_what_torch_counts(family):
    teacher = tiny_teacher(family=family, attn_implementation="eager")
    teacher.set_attn_implementation("eager")
    found = counted(lambda: teacher.model(ids(teacher.config.vocab_size)))
    # the table of rotations is a product, too
    rotary = 2 * teacher.config.head_dim // 2 * LENGTH
    expected = forward_flops(teacher.config.to_dict(), DOCUMENTS) + all_pairs(teacher.config)
    assert found - expected in (0, rotary)


TRAINED = {
    "all": lambda name: True,
    "mixers, MLPs and norms": lambda name: "embed" not in name and "layers.1.self_attn" not in name,
    "the upper half": lambda name: "layers.2" in name or "layers.3" in name,
    "one matrix": lambda name: name == "model.layers.2.mlp.up_proj.weight",
    "the last matrix of a layer": lambda name: name == "model.layers.2.mlp.down_proj.weight",
    "the head": lambda name: name == "lm_head.weight",
}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_costs_what_torch_counts(family, trained, no_mixing):
    student = tiny_student(family, mixers=PLACEMENT, tie_word_embeddings=False)
    student.set_attn_implementation("eager")
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(TRAINED[trained](name))
    names = {name for name, parameter in student.named_parameters() if parameter.requires_grad}

    def step():
        hidden = student.model(ids(student.config.vocab_size)).last_hidden_state
        (hidden @ student.lm_head.weight.T).square().sum().backward()

    found = counted(step)
    flops = step_flops(student.config.to_dict(), None, documents=DOCUMENTS, num_labels=TOKENS, trained=names)
    # what the mask hides costs one pass where nothing before it learns, else three
    upper = dict.fromkeys(("the upper half", "one matrix", "the last matrix of a layer"), 1 + 3)
    passes = {**upper, "the head": 1 + 1}.get(trained, 3 + 3)
    extra = passes * all_pairs(student.config) // 2
    rotary = 2 * student.config.head_dim // 2 * LENGTH
    assert found - flops.student - flops.loss - extra in (0, rotary)
    assert flops.teacher == 0


def test_alignment_costs_the_aligned_layers_alone():
    student, teacher = tiny_student(mixers=PLACEMENT), tiny_teacher()
    config = student.config.to_dict()
    names = {
        name for name, _ in student.named_parameters() if ".0.self_attn." in name or ".2.self_attn." in name
    }
    flops = step_flops(
        config,
        teacher.config.to_dict(),
        documents=DOCUMENTS,
        num_labels=TOKENS,
        trained=names,
        reaches=names.__contains__,
        apart=True,
        compares_logits=False,
    )
    matrices = {
        name: 2 * parameter.numel() * TOKENS
        for name, parameter in student.named_parameters()
        if name in names and parameter.dim() == 2
    }
    inner = sum(
        cost for name, cost in matrices.items() if name.split(".")[-2] in ("o_proj", "f_b_proj", "g_b_proj")
    )
    mixing = 2 * 6 * student.config.num_attention_heads * student.config.head_dim**2 * TOKENS
    assert flops.student == 2 * sum(matrices.values()) + inner + 3 * mixing
    assert flops.teacher == forward_flops(teacher.config.to_dict(), DOCUMENTS)
    assert flops.loss == 0


def test_the_loss_makes_both_logits_at_counted_positions():
    student = tiny_student(tie_word_embeddings=True)
    config = student.config.to_dict()
    one = 2 * student.config.vocab_size * student.config.hidden_size * 7
    ask = {"documents": DOCUMENTS, "num_labels": 7, "trained": {"model.layers.0.mlp.up_proj.weight"}}
    assert step_flops(config, None, **ask).loss == 2 * one
    assert step_flops(config, config, **ask).loss == 3 * one
    ask["trained"] = {"model.embed_tokens.weight"}
    assert step_flops(config, config, **ask).loss == 4 * one


def test_pairs_are_those_that_a_mask_shows():
    for length in (1, 7, 63):
        for window in (1, 5, 64):
            query, key = torch.arange(length)[:, None], torch.arange(length)
            seen = (key <= query) & (query - key < window)
            assert causal_pairs(length, window) == int(seen.sum())
        assert causal_pairs(length) == length * (length + 1) // 2


def test_the_recurrence_costs_three_products_with_the_memory():
    """Counted on the token-by-token definition, written out as matrix products."""
    heads, channels = 3, 8
    memory = torch.zeros(heads, channels, channels)
    token = [torch.randn(heads, 1, channels) for _ in range(3)]

    def step():
        q, k, v = token
        found = k @ memory
        written = memory + k.transpose(1, 2) @ (v - found)
        return q @ written

    geometry = layer_geometry(heads * channels, heads)
    assert counted(step) == KDA.mixing_flops(geometry, KDASettings(), 1)


def test_peaks_are_found_by_the_names_that_devices_give():
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165e12
    for unknown in ("NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "CPU, 2 threads, AVX512", ""):
        assert peak_flops(unknown) is None


@pytest.mark.parametrize("groups", [["attention"], ["mlp"], ["mixer", "attention"]])
def test_gradients_pass_through_what_is_adapted(groups, no_mixing):
    student = tiny_student("qwen3", mixers=PLACEMENT, tie_word_embeddings=False)
    student.set_attn_implementation("eager")
    lora = {"rank": 2, "groups": groups, "only": [r"\.(q|v|o|up|down)_proj\."]}
    config = StageConfig(data="d", steps=1, lr=1e-3, lora=lora)
    apply_freeze(student, config)
    report = insert_adapters(student, config)
    assert report is not None
    names = {name for name, parameter in student.named_parameters() if parameter.requires_grad}

    def step():
        hidden = student.model(ids(student.config.vocab_size)).last_hidden_state
        (hidden @ student.lm_head.weight.T).square().sum().backward()

    found = counted(step)
    flops = step_flops(student.config.to_dict(), None, documents=DOCUMENTS, num_labels=TOKENS, trained=names)
    # the adapters themselves, at most three products of each factor
    thin = 3 * 2 * TOKENS * sum(report.adapters.values())
    hidden_by_the_mask = 3 * all_pairs(student.config)
    assert 0 < found - flops.total <= thin + hidden_by_the_mask
