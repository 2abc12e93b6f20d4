"""The probe measures what it says, and stops a student that predicts no better than guessing."""

import math
import re

import pytest
import torch
from rich.console import Console

from gendistill.checkpoints.resolve import load_causal_lm
from gendistill.conversion.probe import check_probe, probe_student, render_probe
from gendistill.data.batch import IGNORE, Batch
from gendistill.errors import CheckpointError
from gendistill.ops import Segments
from gendistill.teachers.live import LiveTeacher


def batch_of(lengths, *, rows=2, ignored=0, seed=0):
    """Pack documents of the given lengths into every row; the first ``ignored`` positions have no label."""
    generator = torch.Generator().manual_seed(seed)
    width = sum(lengths)
    ids = torch.randint(3, 97, (rows, width), generator=generator)
    labels = ids.roll(-1, dims=1)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1).contiguous()
    labels[positions.roll(-1, dims=1) == 0] = IGNORE
    labels[:, :ignored] = IGNORE
    segments = Segments(list(lengths) * rows)
    return Batch(ids, labels, positions, segments, int((labels != IGNORE).sum()), ids.numel())


@pytest.fixture
def pair(save_teacher, convert):
    teacher, folder = save_teacher("qwen3", initializer_range=0.05)
    student = load_causal_lm(convert(folder, "kda kda full kda", mixers={"kda": {"half_life": [4, 64]}}))
    return teacher, student


def test_layer_errors_match_running_each_document_alone(pair):
    """Oracle: every document by itself, on the inputs that the teacher's hidden states record."""
    teacher, student = pair
    batch = batch_of([9, 14], ignored=3)
    result = probe_student(student, LiveTeacher(teacher), [batch])
    assert [layer["layer"] for layer in result["layers"]] == [0, 1, 3]
    dots, norms, errors = [], 0.0, 0.0
    for row in range(2):
        for start, end in ((0, 9), (9, 23)):
            with torch.no_grad():
                hidden = teacher.model(batch.input_ids[row : row + 1, start:end], output_hidden_states=True)
                x = teacher.model.layers[1].input_layernorm(hidden.hidden_states[1])
                rotary = teacher.model.rotary_emb(x, torch.arange(end - start)[None])
                wanted = teacher.model.layers[1].self_attn(
                    x, position_embeddings=rotary, attention_mask=None
                )[0]
                got = student.model.layers[1].self_attn(x)[0]
            counted = batch.labels[row, start:end] != IGNORE
            got, wanted = got[0, counted], wanted[0, counted]
            dots.append(torch.cosine_similarity(got, wanted, dim=-1))
            errors += float((got - wanted).square().sum())
            norms += float(wanted.square().sum())
    assert result["layers"][1]["cosine"] == pytest.approx(float(torch.cat(dots).mean()), rel=1e-4)
    assert result["layers"][1]["relative_error"] == pytest.approx(math.sqrt(errors / norms), rel=1e-4)
    assert result["layers"][1]["kind"] == "kda"
    assert result["impl"] == f"kda={student.model.layers[0].self_attn.impl}"


def test_half_lives_at_zero_input_are_those_asked_for(pair):
    teacher, student = pair
    quantiles = probe_student(student, LiveTeacher(teacher), [batch_of([12])])["half_life"]["quantiles"]
    assert list(quantiles) == ["5", "25", "50", "75", "95"]
    for name, value in quantiles.items():
        assert value == pytest.approx(4 * 16 ** (int(name) / 100), rel=0.1)


def test_teacher_against_itself_is_perfect(save_teacher, convert):
    teacher, folder = save_teacher()
    student = load_causal_lm(convert(folder, "full"))
    result = probe_student(student, LiveTeacher(teacher), [batch_of([10, 6])])
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["student_ce"] == result["teacher_ce"]
    assert result["top1_agreement"] == 1.0
    assert result["layers"] == []
    assert result["half_life"] == {"quantiles": {}, "on_text": {}}
    assert result["impl"] == "no linear layers"


def test_probe_changes_nothing(pair):
    teacher, student = pair
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    probe_student(student, LiveTeacher(teacher), [batch_of([8])])
    assert student.training
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any(layer.self_attn._forward_hooks for layer in teacher.model.layers)


def test_layers_are_compared_on_the_first_positions_only(pair, monkeypatch):
    teacher, student = pair
    first, second = batch_of([8]), batch_of([8], seed=1)
    alone = probe_student(student, LiveTeacher(teacher), [first])["layers"]
    assert probe_student(student, LiveTeacher(teacher), [first, second])["layers"] != alone
    monkeypatch.setattr("gendistill.training.layers._MOST_POSITIONS", first.num_labels)
    assert probe_student(student, LiveTeacher(teacher), [first, second])["layers"] == alone


def test_teacher_of_another_depth_is_scored_without_layers(pair, save_teacher):
    _, student = pair
    other, _ = save_teacher(num_hidden_layers=2, name="other")
    result = probe_student(student, LiveTeacher(other), [batch_of([8])])
    assert result["layers"] == []
    assert math.isfinite(result["kl"])
    assert set(result["half_life"]["quantiles"]) == {"5", "25", "50", "75", "95"}


def healthy(**changes):
    layers = [
        {"layer": layer, "kind": "kda", "cosine": 0.9 - layer / 10, "relative_error": layer / 10}
        for layer in range(5)
    ]
    return {
        **{
            "teacher_ce": 2.0,
            "student_ce": 3.0,
            "kl": 1.0,
            "top1_agreement": 0.5,
            "ln_vocab": 4.5,
            "num_tokens": 9,
        },
        "layers": layers,
        "half_life": {"quantiles": {"5": 4.0, "50": 30.0, "95": 500.0}, "on_text": {"50": 20.0}},
        "impl": "kda=reference",
        **changes,
    }


WORST = r"worst layers: 1 \(cosine 0\.80\), 4 .*, 3 .*half-life 30\.0"


def broken(ce):
    result = healthy(student_ce=ce)
    result["layers"][1]["relative_error"] = math.nan if not math.isfinite(ce) else 9.0
    return result


@pytest.mark.parametrize("ce", [math.nan, math.inf])
def test_student_without_a_finite_loss_is_stopped_with_its_worst_layers(ce):
    with pytest.raises(CheckpointError, match=WORST) as caught:
        check_probe(broken(ce))
    assert "student.mixers.kda" in (caught.value.hint or "")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (("teacher_ce",), "teacher_ce"),
        (("kl",), "kl"),
        (("layers", 2, "cosine"), "cosine of layer 2"),
        (("layers", 0, "relative_error"), "relative_error of layer 0"),
        (("half_life", "on_text", "50"), "half_life on_text 50"),
    ],
)
def test_numbers_beyond_the_finite_ones_are_named(place, name, value):
    """They can be written to no JSON file, and no later number would mean anything."""
    result = healthy()
    *path, last = place
    holder = result
    for step in path:
        holder = holder[step]
    holder[last] = value
    with pytest.raises(CheckpointError, match=name) as caught:
        check_probe(result)
    assert caught.value.hint


@pytest.mark.parametrize("ce", [4.5, 17.0])
def test_student_that_guesses_is_warned_about(ce):
    assert check_probe(healthy()) is None
    warning = check_probe(broken(ce))
    assert re.search(WORST, warning or "")
    assert "student.mixers.kda" in warning


def test_student_of_an_untrained_teacher_may_guess():
    assert check_probe(healthy(student_ce=4.6, teacher_ce=4.55)) is None
    with pytest.raises(CheckpointError):
        check_probe(healthy(student_ce=math.nan, teacher_ce=4.55))


def test_probe_table_shows_impl_layers_and_half_lives():
    console = Console(width=120)
    with console.capture() as captured:
        console.print(render_probe(healthy()))
    text = captured.get()
    assert "CE 3.000 (teacher 2.000, guessing 4.50), KL 1.000" in text
    assert "half-lives at zero input: 4.0 / 30.0 / 500.0" in text
    assert "impl: kda=reference" in text
    assert text.count("kda") == 6
