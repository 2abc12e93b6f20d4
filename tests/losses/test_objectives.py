"""Objectives against sums written out by hand on tiny models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from gendistill.config.objectives import (
    BlockOutputConfig,
    CEConfig,
    JSDConfig,
    KLConfig,
    MixConfig,
    MixerOutputConfig,
)
from gendistill.data.batch import IGNORE, Batch, model_inputs
from gendistill.errors import RecipeError
from gendistill.losses.build import build_objective
from gendistill.ops import Segments
from gendistill.teachers.base import Needs, check_vocabulary
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import tiny_student, tiny_teacher

LINEAR = (0, 2)  # of the placement "mixed"


def make_batch(rows=2, tokens=12, seed=0):
    """Rows of one document each, so that a plain causal model is the oracle; some labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (rows, tokens), generator=generator)
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), IGNORE)], 1)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = IGNORE
    return Batch(
        input_ids=ids,
        labels=labels,
        position_ids=torch.arange(tokens).repeat(rows, 1),
        segments=Segments([tokens] * rows),
        num_labels=int((labels != IGNORE).sum()),
        num_tokens=rows * tokens,
    )


@pytest.fixture
def student():
    return tiny_student(seed=1)


@pytest.fixture
def teacher():
    return tiny_teacher(seed=2)


def evaluate(config, student, teacher, batch):
    objective, teacher = build_objective(config), LiveTeacher(teacher)
    objective.bind(student.config, teacher.facts)
    objective.calibrate(teacher, batch)
    return objective, objective(student, teacher.signals(batch, objective.needs), batch)


def needs(config, student, teacher):
    objective = build_objective(config)
    objective.bind(student.config, LiveTeacher(teacher).facts)
    return objective.needs


def test_needs_name_what_the_teacher_must_show(student, teacher):
    kl, ce = KLConfig(), CEConfig()
    for config, wanted in (
        (kl, Needs(hidden=True)),
        (ce, Needs()),
        (MixConfig(terms=(ce, ce)), Needs()),
        (MixConfig(terms=(ce, kl)), Needs(hidden=True)),
        (MixerOutputConfig(), Needs(mixer_io=LINEAR)),
        (BlockOutputConfig(), Needs(block_io=LINEAR)),
    ):
        assert needs(config, student, teacher) == wanted
        assert bool(wanted) == (config not in (ce, MixConfig(terms=(ce, ce))))


def test_mix_is_the_weighted_sum_of_dense_terms(student, teacher):
    batch = make_batch()
    config = MixConfig(
        terms=(
            KLConfig(temperature=2.0, weight=0.5),
            KLConfig(direction="reverse"),
            JSDConfig(beta=0.3, weight=2.0),
            CEConfig(weight=0.1),
        )
    )
    objective, term = evaluate(config, student, teacher, batch)
    counted = batch.labels != IGNORE
    with torch.no_grad():
        s = student(**model_inputs(batch)).logits[counted].double()
        t = teacher(**model_inputs(batch)).logits[counted].double()
    q, p = s.softmax(-1), t.softmax(-1)
    warm_q, warm_p = (s / 2).softmax(-1), (t / 2).softmax(-1)
    m = 0.3 * p + 0.7 * q
    expected = {
        "kl": 4 * (warm_p * (warm_p / warm_q).log()).sum(),
        "reverse_kl": (q * (q / p).log()).sum(),
        "jsd": 0.3 * (p * (p / m).log()).sum() + 0.7 * (q * (q / m).log()).sum(),
        "ce": F.cross_entropy(s, batch.labels[counted], reduction="sum"),
    }
    assert objective.part_names == tuple(expected)
    for name, value in expected.items():
        assert term.parts[name].item() == pytest.approx(value.item(), rel=1e-5)
    weighted = 0.5 * expected["kl"] + expected["reverse_kl"] + 2 * expected["jsd"] + 0.1 * expected["ce"]
    assert term.total.item() == pytest.approx(weighted.item(), rel=1e-5)
    assert term.count.item() == batch.num_labels


def test_equal_terms_keep_their_own_parts(student, teacher):
    objective, term = evaluate(
        MixConfig(terms=(KLConfig(), KLConfig(temperature=3.0))), student, teacher, make_batch()
    )
    assert objective.part_names == ("kl", "kl_2")
    assert term.parts["kl"].item() != term.parts["kl_2"].item()


def outputs_by_hand(student, teacher, batch, *, whole_block):
    """Walk through the teacher layer by layer, without hooks, and run the student's layers on its inputs."""
    hidden = teacher.model.embed_tokens(batch.input_ids)
    tables = teacher.model.rotary_emb(hidden, batch.position_ids)
    pairs = {}
    for layer, block in enumerate(teacher.model.layers):
        arguments = {
            "position_embeddings": tables,
            "attention_mask": None,
            "position_ids": batch.position_ids,
        }
        out = block(hidden, **arguments)
        if layer in LINEAR and whole_block:
            pairs[layer] = (student.model.layers[layer](hidden, **arguments), out, out - hidden)
        elif layer in LINEAR:
            normed = block.input_layernorm(hidden)
            target = block.self_attn(normed, **arguments)[0]
            pairs[layer] = (student.model.layers[layer].self_attn(normed, **arguments)[0], target, target)
        hidden = out
    return pairs


@pytest.mark.parametrize("norm", ["mse", "l2", "relative"])
@pytest.mark.parametrize("config", [MixerOutputConfig, BlockOutputConfig])
def test_layerwise_matches_a_walk_through_the_teacher(student, teacher, config, norm):
    batch = make_batch()
    objective, term = evaluate(config(norm=norm), student, teacher, batch)
    counted = batch.labels != IGNORE
    values = []
    with torch.no_grad():
        pairs = outputs_by_hand(student, teacher, batch, whole_block=config is BlockOutputConfig)
    for ours, theirs, target in pairs.values():
        error, target = (ours - theirs)[counted].double(), target[counted].double()
        values.append(
            {
                "mse": error.square().mean(-1).sum(),
                "l2": error.norm(dim=-1).sum(),
                "relative": error.square().sum() / target.square().sum(-1).mean(),
            }[norm]
        )
    assert objective.part_names == ("layer_0", "layer_2")
    for part, value in zip(term.parts.values(), values, strict=True):
        assert part.item() == pytest.approx(value.item(), rel=1e-5)
    assert term.total.item() == pytest.approx(torch.stack(values).mean().item(), rel=1e-5)
    assert term.count.item() == batch.num_labels


def test_relative_error_of_a_silent_mixer_is_one(student, teacher):
    for layer in LINEAR:
        torch.nn.init.zeros_(student.model.layers[layer].self_attn.o_proj.weight)
    _, term = evaluate(MixerOutputConfig(), student, teacher, make_batch())
    assert (term.total / term.count).item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("config", [MixerOutputConfig(), BlockOutputConfig()])
def test_the_teachers_own_layers_score_zero(student, teacher, config):
    for layer in LINEAR:
        student.model.layers[layer] = teacher.model.layers[layer]
    _, term = evaluate(config, student, teacher, make_batch())
    assert term.total.item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("config", [MixerOutputConfig(), BlockOutputConfig()])
def test_gradients_flow_exactly_where_reaches_says(student, teacher, config):
    objective, term = evaluate(config, student, teacher, make_batch())
    term.total.backward()
    for name, parameter in student.named_parameters():
        assert (parameter.grad is not None) == objective.reaches(name), name


def test_layers_learn_independently(student, teacher):
    """The loss of one layer must not change when another layer of the student does."""
    batch = make_batch()
    _, before = evaluate(MixerOutputConfig(), student, teacher, batch)
    torch.nn.init.zeros_(student.model.layers[0].self_attn.o_proj.weight)
    _, after = evaluate(MixerOutputConfig(), student, teacher, batch)
    assert before.parts["layer_0"] != after.parts["layer_0"]
    assert before.parts["layer_2"] == after.parts["layer_2"]


@pytest.mark.parametrize("config", [KLConfig(), MixerOutputConfig(), BlockOutputConfig(norm="l2")])
def test_rows_add_up_whatever_the_split(student, teacher, config):
    whole = make_batch(rows=4)
    objective, term = evaluate(config, student, teacher, whole)
    totals, counts = [], []
    for first in range(4):
        part = Batch(
            *(tensor[first : first + 1] for tensor in (whole.input_ids, whole.labels, whole.position_ids)),
            segments=Segments([12]),
            num_labels=int((whole.labels[first] != IGNORE).sum()),
            num_tokens=12,
        )
        one = objective(student, LiveTeacher(teacher).signals(part, objective.needs), part)
        totals.append(one.total.item())
        counts.append(one.count.item())
    assert sum(totals) == pytest.approx(term.total.item(), rel=1e-5)
    assert sum(counts) == term.count.item()


def test_a_bfloat16_teacher_can_be_aligned_and_imitated(student, teacher):
    batch = make_batch()
    for config in (KLConfig(), MixerOutputConfig(), BlockOutputConfig()):
        _, exact = evaluate(config, student, teacher.float(), batch)
        _, rounded = evaluate(config, student, teacher.bfloat16(), batch)
        assert rounded.total.dtype == torch.float32
        assert rounded.total.item() == pytest.approx(exact.total.item(), rel=0.1)


def test_alignment_without_linear_layers_is_refused(teacher):
    with pytest.raises(RecipeError, match="the placement has none"):
        build_objective(MixerOutputConfig()).bind(teacher.config, LiveTeacher(teacher).facts)


def test_alignment_with_a_teacher_of_another_shape_is_refused(student):
    for other in (tiny_teacher(num_hidden_layers=3), tiny_teacher(hidden_size=16)):
        with pytest.raises(RecipeError, match="teacher of its own shape"):
            build_objective(BlockOutputConfig()).bind(student.config, LiveTeacher(other).facts)


def test_vocabulary_mismatch_names_both_sizes():
    with pytest.raises(RecipeError, match=r"151,936.*152,064"):
        check_vocabulary(SimpleNamespace(vocab_size=151_936), SimpleNamespace(vocab_size=152_064))


@pytest.mark.parametrize("norm", ["mse", "l2", "relative"])
def test_what_does_not_count_may_overflow_in_the_teacher(student, teacher, norm):
    batch = make_batch()
    objective = build_objective(MixerOutputConfig(norm=norm))
    live = LiveTeacher(teacher)
    objective.bind(student.config, live.facts)
    objective.calibrate(live, batch)
    signals = live.signals(batch, objective.needs)
    grads = []
    for value in (None, float("inf"), float("nan")):
        for io in signals.mixers.values():
            if value is not None:
                io.output[batch.labels == IGNORE] = value
        for places in (None, batch.num_labels + 2):
            student.zero_grad()
            term = objective(student, signals, replace(batch, places=places))
            term.total.backward()
            grads.append([each.grad.clone() for each in student.parameters() if each.grad is not None])
    assert grads[0]
    for other in grads[1:]:
        assert all(torch.equal(one, two) for one, two in zip(grads[0], other, strict=True))


class Captured:
    """A batch as a captured pass sees it: the host does not know how many labels count."""

    def __init__(self, batch, places):
        self.batch, self.places = batch, places

    def __getattr__(self, name):
        assert name not in ("num_labels", "num_tokens"), f"{name} differs between batches of a captured pass"
        return getattr(self.batch, name)


OBJECTIVES = [
    KLConfig(),
    CEConfig(),
    MixConfig(terms=(KLConfig(direction="reverse", temperature=2.0), JSDConfig(beta=0.3), CEConfig())),
    *(
        kind(norm=norm)
        for kind in (MixerOutputConfig, BlockOutputConfig)
        for norm in ("mse", "l2", "relative")
    ),
]


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "config", OBJECTIVES, ids=lambda config: f"{config.kind} {getattr(config, 'norm', '')}"
)
def test_places_give_the_same_loss_without_knowing_how_many_count(student, teacher, config, double):
    student, teacher = (model.double() if double else model for model in (student, teacher))
    batch, live, objective = make_batch(), LiveTeacher(teacher), build_objective(config)
    objective.bind(student.config, live.facts)
    objective.calibrate(live, batch)
    signals = live.signals(batch, objective.needs)

    def step(batch):
        student.zero_grad()
        term = objective(student, signals, batch)
        term.total.backward()
        grads = {name: p.grad.double() for name, p in student.named_parameters() if p.grad is not None}
        return term, grads

    limit = 1e-12 if double else 1e-6
    expected, gradients = step(batch)
    assert expected.count.item() == batch.num_labels < batch.labels.numel()
    for places in (batch.num_labels, batch.num_labels + 2, batch.labels.numel()):
        assert step(replace(batch, places=places))[0].total.item() == pytest.approx(
            expected.total.item(), rel=limit
        )
        term, found = step(Captured(batch, places))
        assert (term.count.item(), term.count.dtype) == (batch.num_labels, torch.int64)
        torch.testing.assert_close(term.total, expected.total, rtol=limit, atol=0)
        torch.testing.assert_close(term.parts, expected.parts, rtol=limit, atol=0)
        assert found.keys() == gradients.keys()
        # of all parameters together: single ones may be sums that cancel
        whole, difference = (
            torch.stack([each.norm() for each in grads]).norm()
            for grads in (gradients.values(), [found[name] - gradients[name] for name in gradients])
        )
        assert difference <= limit * whole


def test_a_batch_in_which_nothing_counts_scores_nothing(student, teacher):
    batch = make_batch()
    live, objective = LiveTeacher(teacher), build_objective(MixerOutputConfig(norm="l2"))
    objective.bind(student.config, live.facts)
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORE), num_labels=0)
    for places in (None, 2):
        batch = replace(empty, places=places)
        term = objective(student, live.signals(batch, objective.needs), batch)
        term.total.backward()
        assert (term.total.item(), term.count.item()) == (0.0, 0)
        assert all(each.grad is None or not each.grad.any() for each in student.parameters())
