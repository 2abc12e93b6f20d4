"""Passes that are captured and launched again, where a launch repeats what was captured and knows no batch but its own.

CUDA graphs need a GPU (``test_gpu_capture.py``). Here a capture is a call whose effects are undone, and a launch calls
the same function on the same static batch again: what a graph would not know, such a launch does not know either.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn

from gendistill.data.batch import IGNORE, Unknown, with_room
from gendistill.losses.logits import LogitObjective
from gendistill.ops.types import UnknownLengths
from gendistill.training.capture import (
    CapturedPasses,
    HeldGradients,
    changed,
    kind_of,
    static_copy,
    tensors_of,
    why_not_captured,
)
from gendistill.training.clock import StepClock
from gendistill.training.step import StepRunner


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(97, 6, dtype=torch.float64)
        self.head = nn.Linear(6, 97, dtype=torch.float64)


class Repeated(CapturedPasses):
    """Calls in the place of graphs."""

    captures = 0

    def _capture(self, batch):
        type(self).captures += 1
        before = self.held.whole.clone()
        values = self.passes(batch)
        self.held.whole.copy_(before)
        return values, lambda: values.copy_(self.passes(batch))


def starts(lengths, device):
    """A table of documents, in the place of a kernel's."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return (ends[:-1].to(device), None, 3)


def passes_of(model, *, asks=lambda batch: None):
    def passes(batch):
        asks(batch)
        first, *_ = batch.segments.table(starts)
        logits = model.head(model.embed(batch.input_ids)).flatten(0, 1)
        losses = nn.functional.cross_entropy(
            logits, batch.labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
        # a document's first token counts twice, whichever documents there are
        total = losses.sum() + losses[first.clamp(max=len(losses) - 1)].sum()
        total.backward()
        return torch.stack([total.detach(), losses.sum().detach()])

    return passes


def made(model, passes, **more):
    failed = []
    found = Repeated(
        passes,
        models=[model],
        clock=StepClock(torch.device("cpu")),
        device=torch.device("cpu"),
        failed=failed.append,
        **more,
    )
    found.held = HeldGradients(model.parameters())
    return found, failed


@pytest.fixture
def batches(tiny):
    """Of one kind, since few documents and labels differ; all with their table, as the stream packs it."""
    found = [with_room(tiny.batch_of(range(4 * number, 4 * number + 4))) for number in range(24)]
    for batch in found:
        batch.segments.table(starts)
    return found


def test_launches_give_what_eager_passes_give(batches):
    model = Model()
    passes = passes_of(model)
    captured, failed = made(model, passes)
    Repeated.captures = 0
    lengths = {tuple(batch.segments.lengths) for batch in batches}
    labels = {batch.num_labels for batch in batches}
    assert len(lengths) > 5
    assert len(labels) > 3
    for batch in batches:
        captured.held.clear()
        expected = passes(batch)
        gradients = captured.held.whole.clone()
        captured.held.clear()
        assert torch.equal(captured(batch), expected)
        assert torch.equal(captured.held.whole, gradients)
    kinds = {kind_of(batch) for batch in batches}
    assert not failed
    assert len(kinds) < 7
    assert captured.num_graphs == Repeated.captures
    assert 0 < captured.num_graphs <= len(kinds)


def test_the_first_batch_of_a_kind_runs_eagerly_and_the_second_is_captured(batches):
    model, calls = Model(), []
    passes = passes_of(model, asks=lambda batch: calls.append(type(batch.num_labels)))
    captured, _ = made(model, passes)
    same = [batch for batch in batches if kind_of(batch) == kind_of(batches[0])]
    for batch in same[:3]:
        captured(batch)
    # learns which tables are asked for, captures, launches, launches again
    assert calls == [int, Unknown, Unknown, Unknown]
    other = next(batch for batch in batches if kind_of(batch) != kind_of(batches[0]))
    captured(other)
    # of another kind, beside a graph
    assert calls[4:] == [Unknown, Unknown]


def test_batches_without_their_tables_run_eagerly(tiny, batches):
    model = Model()
    captured, failed = made(model, passes_of(model))
    for _ in range(4):
        captured(with_room(tiny.batch_of(range(4))))
    assert captured.num_graphs == 0
    for _ in range(2):
        captured(batches[0])
    assert captured.num_graphs == 1
    assert not failed


@pytest.mark.parametrize(
    ("asks", "said"),
    [
        (lambda batch: sum(batch.segments.lengths), "UnknownLengths"),
        (lambda batch: batch.num_labels > 3, "UnknownLengths"),
        (lambda batch: 1 / batch.num_tokens, "TypeError"),
        (lambda batch: bool(batch.num_labels), "UnknownLengths"),
        (lambda batch: batch.segments.chunks(4), "UnknownLengths"),
    ],
)
def test_what_the_host_alone_knows_keeps_passes_eager_and_right(batches, asks, said):
    model = Model()
    passes = passes_of(model, asks=asks)
    captured, failed = made(model, passes)
    for batch in batches:
        expected = passes(batch)
        assert torch.equal(captured(batch), expected)
    assert captured.given_up
    assert captured.num_graphs == 0
    assert len(failed) == 1
    assert said in failed[0]


def test_a_table_that_is_another_for_every_batch_keeps_passes_eager(monkeypatch, batches):
    monkeypatch.setattr("gendistill.training.capture.MOST_LACKING", 7)
    model = Model()
    passes = passes_of(model, asks=lambda batch: batch.segments.table(lambda lengths, device: (3,)))
    captured, failed = made(model, passes)
    for batch in batches:
        assert torch.equal(captured(batch), passes(batch))
    assert captured.given_up
    assert failed == ["every batch needs a table of documents that no batch before it had"]


def test_a_table_that_a_graph_cannot_read_keeps_passes_eager(batches):
    def listed(lengths, device):
        return [torch.tensor(lengths)]

    model = Model()
    captured, failed = made(model, passes_of(model, asks=lambda batch: batch.segments.table(listed)))
    for batch in batches:
        batch.segments.table(listed)
        captured(batch)
    assert captured.given_up
    assert "a list in it" in failed[0]


def test_a_number_in_a_table_makes_another_kind(batches):
    batch = batches[0]
    first, none, three = batch.segments.tables[starts]
    kind = kind_of(batch)
    batch.segments.tables[starts] = (first, none, three + 1)
    assert kind_of(batch) != kind


def test_a_hook_keeps_passes_eager(batches):
    for hook in (
        lambda model: model.head.register_forward_hook(lambda *_: None),
        lambda model: model.embed.weight.register_hook(lambda _: None),
    ):
        model = Model()
        hook(model)
        captured, failed = made(model, passes_of(model))
        for batch in batches:
            captured(batch)
        assert captured.given_up
        assert "would not be called" in failed[0]


def test_a_static_copy_shares_nothing_and_keeps_the_kind(batches):
    copy = static_copy(batches[0])
    assert kind_of(copy) == kind_of(batches[0])
    for mine, theirs in zip(tensors_of(copy), tensors_of(batches[0]), strict=True):
        assert torch.equal(mine, theirs)
        assert mine.data_ptr() != theirs.data_ptr()
    assert copy.segments.longest == copy.input_ids.shape[1]
    for look in (bool, int, float, hash, lambda one: one == 3, lambda one: one < 3):
        with pytest.raises(UnknownLengths):
            look(copy.num_labels)
    with pytest.raises(TypeError):
        copy.num_tokens + 1
    # on its device already: nothing of it is looked at
    assert copy.to("cpu") is copy


def test_kinds_differ_by_what_a_graph_has_fixed(batches):
    batch = batches[0]
    other = dataclasses.replace(batch, places=batch.labels.numel() + 1)
    assert kind_of(other) != kind_of(batch)


def test_held_gradients_stay_where_they_are():
    model = Model()
    held = HeldGradients(model.parameters())
    places = [parameter.grad.data_ptr() for parameter in model.parameters()]
    model.head(model.embed(torch.arange(5))).sum().backward()
    assert held.whole.abs().sum() > 0
    model.zero_grad()
    held.clear()
    assert places == [parameter.grad.data_ptr() for parameter in model.parameters()]
    assert not held.whole.any()
    first, *_, last = model.parameters()
    last.grad.fill_(1.0)
    assert not first.grad.any()
    assert held.whole.sum() == last.numel()


def test_times_noted_in_a_capture_count_with_every_launch():
    clock = StepClock(torch.device("cpu"))
    model = nn.Linear(2, 2)
    with clock.step(model, [], measured=True):
        with clock.aside() as spans, clock.part("teacher"):
            pass
        clock.add(spans)
        clock.add(spans)
    ((name, start, end),) = spans
    assert name == "teacher"
    found = clock.read()
    assert found["teacher"] * found["seconds"] == pytest.approx(2 * (end - start))


def test_a_step_in_which_passes_are_captured_counts_as_not_measured(batches):
    model = Model()
    captured, _ = made(model, passes_of(model))
    clock, found = captured.clock, []
    for _ in range(4):
        with clock.step(model, [], measured=True), clock.part("student"):
            captured(batches[0])
        found.append(bool(clock.read()))
    assert found == [True, False, True, True]


def test_memory_that_does_not_suffice_keeps_passes_eager(monkeypatch, batches):
    model = Model()
    captured, failed = made(model, passes_of(model))

    def capture(batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(captured, "_capture", capture)
    for batch in batches:
        captured(batch)
    assert captured.given_up
    assert "memory" in failed[0]


def test_what_keeps_passes_from_being_captured_is_said():
    gpu, given = torch.device("cuda"), {"fused": True, "apart": True, "live": True}
    assert why_not_captured(Model(), device=gpu, **given) is None
    for change, word in (
        ({"device": torch.device("cpu")}, "cpu"),
        ({"apart": False}, "processes"),
        ({"live": False}, "teacher"),
        ({"fused": False}, "fused"),
    ):
        assert word in why_not_captured(Model(), **{"device": gpu, **given, **change})
    dropping = nn.Sequential(Model(), nn.Dropout(0.1))
    assert "at random" in why_not_captured(dropping, device=gpu, **given)


def test_where_there_are_enough_graphs_the_one_used_longest_ago_makes_room(monkeypatch, batches):
    monkeypatch.setattr("gendistill.training.capture.MOST_GRAPHS", 2)
    model = Model()
    passes = passes_of(model)
    captured, failed = made(model, passes)
    kinds = [dataclasses.replace(batches[0], places=places) for places in (1000, 2000, 3000)]
    for batch in (kinds[0], *[kinds[0]] * 9, kinds[1], kinds[0], kinds[2]):
        assert torch.equal(captured(batch), passes(batch))
    # none beside graphs ran eagerly, which would take the memory of passes a second time
    assert [key[1] for key in captured.graphs] == [1000, 3000]
    Repeated.captures = 0
    captured(kinds[0])
    captured(kinds[2])
    assert Repeated.captures == 0
    captured(kinds[1])
    assert Repeated.captures == 1
    assert not failed


def test_batches_of_ever_new_kinds_end_graphs(monkeypatch, batches):
    monkeypatch.setattr("gendistill.training.capture.MOST_GRAPHS", 3)
    model = Model()
    passes = passes_of(model)
    captured, failed = made(model, passes)
    captured(batches[0])
    captured(batches[0])
    Repeated.captures = 0
    for places in range(1000, 1040):
        batch = dataclasses.replace(batches[0], places=places)
        assert torch.equal(captured(batch), passes(batch))
    assert captured.given_up
    assert Repeated.captures < 10
    assert failed == ["batches are of too many kinds"]


def launched(model, batches, **more):
    """Return passes with a graph of the first batch."""
    captured, failed = made(model, passes_of(model), **more)
    for _ in range(3):
        captured.look()
        captured(batches[0])
    captured.look()
    assert captured.num_graphs == 1
    return captured, failed


def test_a_hook_that_comes_later_ends_graphs(batches):
    for hook in (
        lambda model, act: model.head.register_forward_hook(act),
        lambda model, act: model.head.register_forward_pre_hook(act),
        lambda model, act: model.head.register_full_backward_hook(act),
        lambda model, act: model.embed.weight.register_hook(act),
        lambda model, act: model.embed.weight.register_post_accumulate_grad_hook(act),
    ):
        model, called = Model(), []
        captured, failed = launched(model, batches)
        hook(model, lambda *_, called=called: called.append(1))
        captured.look()
        captured(batches[0])
        assert called
        assert captured.given_up
        assert "would not be called" in failed[0]


def test_hooks_of_the_clock_end_nothing(batches):
    model = Model()
    captured, failed = launched(model, batches)
    with captured.clock.step(model, [], measured=True):
        captured.look()
    captured.look()
    assert captured.num_graphs == 1
    assert not failed


@pytest.mark.parametrize(
    "change",
    [
        lambda model, aim: setattr(model.head.weight, "data", model.head.weight.data.clone()),
        lambda model, aim: setattr(model.head, "weight", nn.Parameter(model.head.weight.detach().clone())),
        lambda model, aim: model.register_buffer("scale", torch.ones(3)),
        lambda model, aim: model.head.weight.requires_grad_(False),
        lambda model, aim: model.eval(),
        lambda model, aim: setattr(aim, "temperature", 2.0),
        lambda model, aim: aim.weights.append(2.0),
    ],
)
def test_what_graphs_have_fixed_is_captured_anew_once_it_has_changed(batches, change):
    class Aim:
        def __init__(self):
            self.temperature, self.weights = 1.0, [1.0]

    model, aim = Model(), Aim()
    model.register_buffer("scale", torch.ones(3))
    captured, failed = launched(model, batches, objective=aim)
    change(model, aim)
    captured.look()
    assert captured.num_graphs == 0
    assert not failed


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: setattr(model, "calls", model.calls + 1), "calls"),
        (lambda model: setattr(model, "mean", 0.9 * model.mean), "mean"),
        (lambda model: model.kept.append(torch.ones(1)), "kept"),
        (lambda model: model.found.update({0: torch.ones(1)}), "found"),
    ],
)
def test_passes_that_keep_something_in_python_stay_eager(batches, change, name):
    model = Model()
    model.calls, model.kept, model.found = 0, [], {}
    model.register_buffer("mean", torch.ones(3))
    captured, failed = made(model, passes_of(model, asks=lambda batch: change(model)))
    for batch in batches:
        captured(batch)
    assert captured.given_up
    assert name in failed[0]


def test_an_objective_that_counts_its_calls_stays_eager(batches):
    class Aim:
        calls = 0

    model, aim = Model(), Aim()
    passes = passes_of(model, asks=lambda batch: setattr(aim, "calls", aim.calls + 1))
    captured, failed = made(model, passes, objective=aim)
    for batch in batches:
        captured(batch)
    assert captured.given_up
    assert "objective.calls" in failed[0]


def test_nothing_of_a_capture_that_failed_stays_in_memory(batches):
    model, refs = Model(), []

    def asks(batch):
        found = torch.ones(5)
        if isinstance(batch.num_labels, Unknown):
            refs.append(weakref.ref(found))
            bool(batch.num_labels)

    captured, failed = made(model, passes_of(model, asks=asks))
    # as in training, where the collector is kept out of the way
    gc.disable()
    try:
        for _ in range(4):
            captured(batches[0])
        assert failed
        assert refs[0]() is None
    finally:
        gc.enable()


def test_what_is_released_is_captured_anew(batches):
    captured, _ = launched(Model(), batches)
    captured._pool = object()
    captured.release()
    # eager passes may be next, beside which there would be no use for its memory
    assert captured._pool is None
    captured(batches[0])
    assert captured.num_graphs == 1


def test_a_table_and_nothing_are_of_two_kinds(batches):
    batch = batches[0]
    first, none, three = batch.segments.tables[starts]
    kind = kind_of(batch)
    batch.segments.tables[starts] = (none, first, three)
    assert kind_of(batch) != kind


OBJECTIVES = ({"kind": "kl"}, {"kind": "mixer_output", "norm": "relative"}, {"kind": "block_output"})


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda each: each["kind"])
def test_passes_of_a_stage_leave_everything_as_it_is(
    tiny, monkeypatch, tmp_path, checkpointing, measured, objective
):
    """What a stage's own passes changed would end every stage's graphs."""
    seen, passes = [], StepRunner._passes

    def watched(runner, batch, module=None):
        captured = CapturedPasses(
            runner._passes,
            models=runner._models,
            clock=runner.clock,
            device=runner.device,
            failed=seen.append,
            objective=runner.objective,
        )
        captured.look()
        stands_on, before = captured._stands_on, captured._all_attributes()
        found = passes(runner, batch, module)
        captured.look()
        assert changed(before, captured._all_attributes()) is None
        assert captured._stands_on == stands_on
        assert len(before) > 100
        seen.append(None)
        return found

    monkeypatch.setattr(StepRunner, "_passes", watched)
    tiny.run_stage(
        tmp_path,
        engine={"blocks": "fused"},
        objective=objective,
        train=["mixer"],
        steps=2,
        log_every_steps=1 if measured else 2,
        gradient_checkpointing=checkpointing,
    )
    assert len(seen) > 3
    assert not any(seen)


def test_a_graph_stays_from_step_to_step(tiny, monkeypatch, tmp_path):
    """Steps of the optimizer, log lines with all that they look at, and checkpoints end none."""
    looks = []

    class Watching(CapturedPasses):
        def __call__(self, batch):
            self.graphs.setdefault("kept", None)
            return self.passes(batch)

        def look(self):
            super().look()
            looks.append((len(self.graphs), self.given_up))

    monkeypatch.setattr("gendistill.training.step.CapturedPasses", Watching)
    monkeypatch.setattr("gendistill.training.stage.why_not_captured", lambda *_, **__: None)
    result, student = tiny.run_stage(
        tmp_path / "held",
        engine={"blocks": "fused"},
        steps=4,
        log_every_steps=2,
        save_every_steps=2,
        heldout_every=2,
        job=tiny.watching(2),
    )
    assert looks == [(0, False), *[(1, False)] * 3]
    monkeypatch.undo()
    expected, other = tiny.run_stage(
        tmp_path / "eager", engine={"blocks": "fused"}, steps=4, log_every_steps=2, save_every_steps=2
    )
    assert result.loss_last == expected.loss_last
    for one, two in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_capture_that_fails_in_a_measured_step_leaves_no_marks(batches):
    """Marks of a capture are never made: to read them would be an error on a GPU."""
    model, marks = Model(), []
    captured, failed = made(model, passes_of(model, asks=lambda batch: asks(batch)))
    clock = captured.clock

    def asks(batch):
        with clock.part("student", backward=True):
            clock._begin("mixers")
            marks.append(clock._open[1])
            bool(batch.num_labels)

    for number in range(4):
        with clock.step(model, [], measured=True):
            captured(batches[0])
            assert number != 1 or captured.given_up
            used = [mark for _, start, end in clock._spans for mark in (start, end)]
            assert number != 1 or marks[1] not in used
        # a step with a capture says little about others
        assert bool(clock.read()) == (number != 1)
    assert failed


def test_nothing_more_is_remembered_of_batches_once_passes_stay_eager(batches):
    model = Model()
    captured, _ = made(model, passes_of(model, asks=lambda batch: bool(batch.num_labels)))
    captured(batches[0])
    captured(batches[0])
    assert captured.given_up
    captured._seen.clear()
    captured._builders = None
    captured(dataclasses.replace(batches[0], places=1000))
    assert not captured._seen
    assert captured._builders is None


def test_eager_passes_take_no_surplus_positions(tiny, monkeypatch, tmp_path):
    """A stage's batches have room as long as it might be captured; if it is not, the room costs time for nothing."""
    given, call = [], LogitObjective.__call__

    class Roomy(tiny.TinyStream):
        def __next__(self):
            return [with_room(batch) for batch in super().__next__()]

    def watched(objective, student, signals, batch):
        given.append(batch.places)
        return call(objective, student, signals, batch)

    monkeypatch.setattr(LogitObjective, "__call__", watched)
    monkeypatch.setattr(tiny, "TinyStream", Roomy)
    result, _ = tiny.run_stage(tmp_path / "room", steps=2)
    assert given
    assert set(given) == {None}
    monkeypatch.undo()
    expected, _ = tiny.run_stage(tmp_path / "plain", steps=2)
    assert result.loss_last == pytest.approx(expected.loss_last, rel=1e-6)


def test_passes_that_stay_eager_after_all_take_none_either(batches):
    model, places = Model(), []

    def asks(batch):
        places.append(batch.places)
        bool(batch.num_labels)

    captured, _ = made(model, passes_of(model, asks=asks))
    for _ in range(3):
        captured(batches[0])
    assert captured.given_up
    assert places[-1] is None


def test_a_kind_whose_kernels_are_not_there_yet_runs_eagerly_once(batches):
    """Triton loads no kernel while a stream is captured, and a first long document needs others than short ones."""
    model, loaded = Model(), set()

    def asks(batch):
        if isinstance(batch.num_labels, Unknown) and batch.places not in loaded:
            raise RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing")
        loaded.add(batch.places)

    passes = passes_of(model)
    captured, failed = made(model, passes_of(model, asks=asks))
    other = dataclasses.replace(batches[0], places=1000)
    numbers = []
    for batch in (*[batches[0]] * 2, other, other, batches[0]):
        captured.held.clear()
        assert torch.equal(captured(batch), passes(batch))
        numbers.append(captured.num_graphs)
    # the memory of passes is not taken twice
    assert numbers == [0, 1, 0, 1, 2]
    assert not failed


def test_a_kind_that_fails_again_ends_graphs(batches):
    model = Model()

    def asks(batch):
        if isinstance(batch.num_labels, Unknown) and batch.places == 1000:
            raise RuntimeError("never")

    captured, failed = made(model, passes_of(model, asks=asks))
    other = dataclasses.replace(batches[0], places=1000)
    for batch in (batches[0], batches[0], other):
        captured(batch)
    assert not captured.given_up
    captured(other)
    assert captured.given_up
    assert failed == ["RuntimeError: never"]
