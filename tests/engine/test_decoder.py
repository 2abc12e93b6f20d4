"""Decoders that run fused: what they compute is what the family's modules do, on every family and kind of layer."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from gendistill.data.batch import Batch, model_inputs, with_room
from gendistill.engine.decoder import fuse, is_fused, release, unfused, why_not
from gendistill.engine.linear import GatheredLinear, PackedLinear, pack
from gendistill.mixers.base import SequenceInfo
from gendistill.models import HybridConfig, HybridForCausalLM
from gendistill.ops import Segments

LENGTHS = [5, 11, 16, 9, 7, 16]
TOKENS = 32
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True),
    "llama with far positions": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    ),
    "mistral with a window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 with windows in its last layers": Qwen2Config(
        **SIZES, use_sliding_window=True, max_window_layers=2, sliding_window=6
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "qwen3 with windows and other heads": Qwen3Config(
        **{**SIZES, "num_key_value_heads": 1},
        head_dim=20,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention"] * 2,
    ),
    "llama beyond its positions": LlamaConfig(
        **{**SIZES, "max_position_embeddings": 8},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    ),
}
STUDENTS = {
    "kda": ["kda", "full", "kda", "kda"],
    "all kinds": ["sink", "kda", "swa", "full"],
    "every layer": ["kda"] * 4,
}
DROPPED = ("model_type", "architectures", "layer_types", "_name_or_path", "quantization_config")


def packed_batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 97, (2, TOKENS), generator=generator)
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).view(2, TOKENS)
    return Batch(ids, ids.clone(), positions, Segments(LENGTHS), 64, 64)


def disturbed(model):
    """Move every parameter, so that norms and biases count."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def make_teacher(family):
    torch.manual_seed(0)
    return disturbed(AutoModelForCausalLM.from_config(FAMILIES[family]))


def make_student(mixers, family="qwen3", **settings):
    torch.manual_seed(0)
    config = FAMILIES[family]
    given = {key: value for key, value in config.to_dict().items() if key not in DROPPED}
    given |= {"base_model_type": config.model_type, "mixers": STUDENTS[mixers], **settings}
    return disturbed(HybridForCausalLM(HybridConfig(**given)))


def run(model):
    """Return hidden states of packed documents and the gradients of a fixed sum of them."""
    model.zero_grad()
    hidden = model.model(**model_inputs(packed_batch())).last_hidden_state
    generator = torch.Generator().manual_seed(2)
    (hidden * torch.randn(hidden.shape, generator=generator, dtype=hidden.dtype)).sum().backward()
    return hidden.detach(), {
        name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None
    }


def distance(x, y):
    return ((x.double() - y.double()).norm() / (y.double().norm() + 1e-30)).item()


def compare(model, limit):
    hidden, grads = run(model)
    assert why_not(model, device=torch.device("cpu"), dtype=torch.float32) is None
    fuse(model, torch.float32)
    fused_hidden, fused_grads = run(model)
    assert is_fused(model)
    assert distance(fused_hidden, hidden) < limit
    assert grads.keys() == fused_grads.keys()
    assert {name: d for name in grads if (d := distance(fused_grads[name], grads[name])) > 10 * limit} == {}
    release(model)
    again, _ = run(model)
    assert torch.equal(again, hidden)
    left = [
        module for module in model.modules() if {"forward", "packed", "_fused_decoder"} & vars(module).keys()
    ]
    assert left == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_transformer_computes_what_its_family_does(family):
    compare(make_teacher(family), 1e-6)


@pytest.mark.parametrize("family", ["llama with biases", "qwen2", "qwen3"])
@pytest.mark.parametrize("mixers", ["kda", "every layer"])
def test_a_fused_student_computes_what_its_modules_do(mixers, family):
    compare(make_student(mixers, family), 1e-6)


@pytest.mark.parametrize("mixers", STUDENTS)
def test_every_kind_of_layer_runs_beside_fused_ones(mixers):
    family = "mistral with a window"
    compare(make_student(mixers, family), 1e-6)


def copies(decoder):
    """Count the weights that are in memory twice."""
    pairs = zip(decoder.sources, decoder.targets, strict=True)
    return sum(source.data_ptr() != target.data_ptr() for source, target in pairs)


def test_weights_of_a_model_that_does_not_learn_are_in_memory_once():
    # as transformers loads it: every parameter requires a gradient
    model = make_teacher("qwen3").eval()
    with torch.no_grad():
        hidden = model.model(**model_inputs(packed_batch())).last_hidden_state
        fuse(model, torch.float32, learns=False)
        decoder = vars(model.model)["_fused_decoder"]
        assert copies(decoder) == 0
        with unfused(model):
            pass
        assert copies(vars(model.model)["_fused_decoder"]) == 0
        fused_hidden = model.model(**model_inputs(packed_batch())).last_hidden_state
    assert distance(fused_hidden, hidden) < 1e-6
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_memory_goes_back_piece_by_piece(monkeypatch):
    model = make_teacher("qwen3")
    fuse(model, torch.float32, learns=False)
    matrices = [weakref.ref(packed.matrix) for packed in vars(model.model)["_fused_decoder"].packed]
    most, give = [], PackedLinear.release

    def watched(packed):
        most.append(sum(matrix() is not None for matrix in matrices))
        give(packed)

    monkeypatch.setattr(PackedLinear, "release", watched)
    release(model)
    # a reference lives on while its matrix is given back
    assert most == list(range(len(matrices), 0, -1))
    assert [matrix() for matrix in matrices] == [None] * len(matrices)


def test_a_model_that_could_not_be_fused_to_the_end_is_as_before(monkeypatch):
    model = make_teacher("qwen3").requires_grad_(False)
    hidden = model.model(**model_inputs(packed_batch())).last_hidden_state
    made = []

    def scarce(*args, **kwargs):
        if len(made) == 5:
            raise torch.OutOfMemoryError("no more")
        made.append(pack(*args, **kwargs))
        return made[-1]

    hooks = len(_global_optimizer_post_hooks)
    monkeypatch.setattr("gendistill.engine.decoder.pack", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        fuse(model, torch.float32)
    assert not is_fused(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model.model(**model_inputs(packed_batch())).last_hidden_state, hidden)
    sizes = {
        value.untyped_storage().nbytes() - value.numel() * 4 for value in model.model.layers.parameters()
    }
    assert sizes == {0}
    assert len(_global_optimizer_post_hooks) == hooks


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_calls_about_anything_else_mean_what_they_mean_to_the_decoder(kind):
    model = (make_teacher("llama") if kind == "teacher" else make_student("kda", "llama")).eval()
    ids, mask = torch.randint(0, 97, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    batch = packed_batch()
    embedded = {
        **model_inputs(batch),
        "input_ids": None,
        "inputs_embeds": model.model.embed_tokens(batch.input_ids),
    }
    with torch.no_grad():

        def answers():
            return [
                model.model(ids, mask).last_hidden_state,
                model.model(ids).last_hidden_state,
                model.model(**embedded).last_hidden_state,
                model.model(**model_inputs(batch), output_hidden_states=True).hidden_states[1],
            ]

        expected = answers()
        fuse(model, torch.float32)
        for found, wanted in zip(answers(), expected, strict=True):
            assert distance(found, wanted) < 1e-6


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_batches_of_training_do_run_fused(kind, monkeypatch):
    model = make_teacher("llama") if kind == "teacher" else make_student("kda", "llama")
    fuse(model, torch.float32)

    def refuse(*args, **kwargs):
        raise AssertionError("the decoder itself ran")

    monkeypatch.setattr(type(model.model), "forward", refuse)
    monkeypatch.setattr(type(model.model.layers[0]), "forward", refuse)
    run(model)


@pytest.mark.parametrize("fused", [False, True])
def test_batches_with_room_are_what_they_are_without(fused):
    model, batch = make_student("all kinds", "mistral with a window"), packed_batch()
    if fused:
        fuse(model, torch.float32)
    with torch.no_grad():
        found, expected = (
            model.model(**model_inputs(each)).last_hidden_state for each in (with_room(batch), batch)
        )
    assert distance(found, expected) < 1e-6


def test_attention_needs_no_lengths_of_documents():
    model, batch = make_teacher("llama"), with_room(packed_batch())
    fuse(model, torch.float32)
    known = batch.segments
    segments = Segments.unknown(len(known.lengths), 2 * TOKENS, TOKENS, known.cu_seqlens, {}, room=known.room)
    unknown = dataclasses.replace(batch, segments=segments)
    with torch.no_grad():
        found, expected = (model.model(**model_inputs(each)).last_hidden_state for each in (unknown, batch))
    assert torch.equal(found, expected)


def test_documents_that_do_not_fill_the_grid_are_refused_as_by_the_student_itself():
    model = make_student("kda")
    batch = packed_batch()
    wrong = {**model_inputs(batch), "sequences": SequenceInfo(Segments([TOKENS]))}
    fuse(model, torch.float32)
    with pytest.raises(ValueError, match="64 cells"):
        model.model(**wrong)
    mask = torch.ones(2, TOKENS, dtype=torch.int64)
    mask[0, 5:] = 0
    with pytest.raises(ValueError, match="must cover"):
        model.model(**{**wrong, "sequences": SequenceInfo.from_mask(mask)})


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_alone_takes_angles_that_its_rows_share(layer):
    model = make_student("kda")
    torch.manual_seed(0)
    stream = torch.randn(2, TOKENS, 48)
    positions = torch.arange(TOKENS)[None]
    inputs = {
        "position_embeddings": model.model.rotary_emb(stream, positions),
        "position_ids": positions.expand(2, -1),
        "sequences": SequenceInfo(Segments([TOKENS, TOKENS])),
    }
    block = model.model.layers[layer]
    expected = block(stream, **inputs)
    fuse(model, torch.float32)
    assert distance(block(stream, **inputs), expected) < 1e-6


def test_a_fused_model_is_neither_copied_nor_pickled():
    model = make_teacher("qwen3")
    fuse(model, torch.float32)
    with pytest.raises(TypeError, match=r"release\(model\)"):
        copy.deepcopy(model)
    with pytest.raises(TypeError, match=r"release\(model\)"):
        pickle.dumps(model)
    release(model)
    hidden, _ = run(model)
    assert torch.equal(run(copy.deepcopy(model))[0], hidden)


def test_a_fused_model_may_be_saved(tmp_path):
    model = make_teacher("qwen3").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fuse(model, torch.float32)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], value) for name, value in before.items())


def test_what_is_split_is_put_together_once_a_pass(monkeypatch):
    layers = [torch.nn.Linear(8, 5), torch.nn.Linear(8, 6, bias=False)]
    expected, plain = PackedLinear(layers, torch.float32, learns=False), GatheredLinear(layers, torch.float32)
    calls, put = [], GatheredLinear._pack
    monkeypatch.setattr(GatheredLinear, "_pack", lambda self, parts: calls.append(1) or put(self, parts))
    x = torch.randn(3, 8, requires_grad=True)
    out = plain(x)
    assert torch.equal(out, expected(x))
    assert len(calls) == 2, "the matrix and the bias"
    out.sum().backward()
    assert len(calls) == 3, "the matrix again"


def test_frozen_parameters_get_no_gradient_and_keep_memory_of_their_own_afterwards():
    model = make_student("kda")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" in name or ".0.self_attn" in name)
    hidden, grads = run(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fuse(model, torch.float32)
    frozen = model.model.layers[1].self_attn
    assert (
        frozen.q_proj.weight.untyped_storage().data_ptr() == frozen.k_proj.weight.untyped_storage().data_ptr()
    )
    fused_hidden, fused_grads = run(model)
    assert distance(fused_hidden, hidden) < 1e-6
    assert fused_grads.keys() == grads.keys()
    release(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 4, name


def test_a_step_of_the_optimizer_is_seen_by_the_next_forward_pass():
    model = make_student("kda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    fuse(model, torch.float32)
    run(model)
    optimizer.step()
    fused_hidden, _ = run(model)
    release(model)
    hidden, _ = run(model)
    assert distance(fused_hidden, hidden) < 1e-6


@pytest.mark.parametrize("learns", [True, False])
def test_other_memory_behind_a_parameter_is_seen(learns):
    model = make_student("kda").requires_grad_(learns)

    def answer():
        with torch.no_grad():
            return model.model(**model_inputs(packed_batch())).last_hidden_state

    fuse(model, torch.float32)
    before = answer()
    flat = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(flat + 0.01, model.parameters())
    fused = answer()
    assert distance(fused, before) > 1e-3
    release(model)
    assert distance(fused, answer()) < 1e-6
    fuse(model, torch.float32)
    answer()
    model.load_state_dict({name: value + 0.01 for name, value in model.state_dict().items()})
    fused = answer()
    release(model)
    assert distance(fused, answer()) < 1e-6


def test_weights_are_cast_once_as_long_as_they_stay():
    model = make_student("kda")
    fuse(model, torch.bfloat16)
    decoder = vars(model.model)["_fused_decoder"]
    run(model)
    packed = decoder.packed[0]
    target = packed.targets[0]
    target.fill_(7)
    run(model)
    assert (target == 7).any(), "it was cast again"
    with torch.no_grad():
        packed.sources[0].add_(1)
    run(model)
    assert not (target == 7).any()


def test_generation_and_padded_batches_run_as_before():
    model = make_student("kda").eval()
    ids = torch.randint(0, 97, (2, 9))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        fuse(model, torch.float32)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
        again = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(again, tokens)


def test_activations_may_be_computed_again():
    model = make_student("kda")
    fuse(model, torch.float32)
    hidden, grads = run(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, recomputed = run(model)
    assert torch.equal(again, hidden)
    assert {name for name in grads if not torch.equal(grads[name], recomputed[name])} == set()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "biases"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_what_cannot_run_fused_is_said(change, reason):
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **change}))
    found = why_not(model, device=torch.device("cpu"), dtype=torch.float32)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize(
    "place", ["norm", "layers.1.mlp", "layers.2.self_attn.q_proj", "layers.0.input_layernorm"]
)
def test_what_would_be_passed_over_keeps_layers_as_they_are(place):
    model = make_teacher("qwen3")
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    module = model.model.get_submodule(place)
    for register in (
        module.register_forward_hook,
        module.register_forward_pre_hook,
        module.register_full_backward_hook,
    ):
        handle = register(lambda *_: None)
        assert f"a hook on {place} would" in (why_not(model, **where) or "")
        handle.remove()
    module.forward = module.forward
    assert f"{place} has a forward pass of its own" in (why_not(model, **where) or "")
    del module.forward
    model.model.register_forward_hook(lambda *_: None)
    model.model.layers[1].register_forward_hook(lambda *_: None)
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: None)
    assert why_not(model, **where) is None
    fuse(model, torch.float32)
    assert why_not(model, **where) is None


def test_bfloat16_stays_close_to_float32():
    model = make_student("kda")
    hidden, grads = run(model)
    fuse(model, torch.bfloat16)
    fused_hidden, fused_grads = run(model)
    assert fused_hidden.dtype == torch.bfloat16
    assert distance(fused_hidden, hidden) < 2e-2
    assert {value.dtype for value in fused_grads.values()} == {torch.float32}
    flat, fused_flat = (
        torch.cat([value.flatten() for value in each.values()]) for each in (grads, fused_grads)
    )
    assert distance(fused_flat, flat) < 4e-2
