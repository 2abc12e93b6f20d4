"""The engine on a GPU: kernels, CUDA graphs, and weights that change in place."""

from __future__ import annotations

import threading

import pytest
import torch

from gendistill.bench.pair import for_inference
from gendistill.engine.decoder import fuse, release
from gendistill.generation.engine import Engine
from gendistill.generation.request import Prompt
from gendistill.generation.runner import Runner
from gendistill.generation.sampling import Sampling
from gendistill.testing import FAMILIES, PLACEMENTS, tiny_student, tiny_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPU = torch.device("cuda")


def prompts(lengths=(3, 70, 1, 17, 130, 64, 9, 200), new=40):
    maker = torch.Generator().manual_seed(0)
    return [
        Prompt(torch.randint(0, 97, (length,), generator=maker).tolist(), new + index % 3, seed=index)
        for index, length in enumerate(lengths)
    ]


def ready(model):
    # rounds eight times as finely as bfloat16, so that what is wrong stands out
    return for_inference(model.to(GPU), torch.float16)


def make(kind, name, **sizes):
    big = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 192, **sizes}
    return ready(tiny_teacher(name, **big) if kind == "teacher" else tiny_student("qwen3", name, **big))


def alike(found, expected):
    """Within rounding: what went wrong at a single token would be about one.

    Sharp attention makes much of little: on a CPU, steps and packed passes of a llama in float16 differ by up to 0.023,
    by 0.004 on average; on an H200 by 0.035, and by more than 0.01 on average.
    """
    apart = (torch.tensor(found) - torch.tensor(expected)).abs()
    return bool(apart.max() < 0.25) and bool(apart.mean() < 0.03)


def check(model, found, asked):
    """The engine's own packed passes find the log-probabilities that its steps found."""
    with Engine(model) as engine:
        pairs = [(prompt.token_ids, answer.token_ids) for prompt, answer in zip(asked, found, strict=True)]
        scored = dict(engine.log_probs(pairs))
    for index, answer in enumerate(found):
        assert len(answer.token_ids) == asked[index].max_new_tokens
        assert alike(answer.log_probs, scored[index])


def answers(model, asked, *, sampling=None, **settings):
    with Engine(model, **settings) as engine:
        found = dict(engine.generate(asked, end_ids=(), sampling=sampling))
    return [found[index] for index in range(len(asked))]


@pytest.mark.parametrize("capture", [True, False])
@pytest.mark.parametrize(
    ("kind", "name"),
    [*(("teacher", name) for name in FAMILIES), *(("student", name) for name in PLACEMENTS)],
)
def test_steps_find_what_packed_passes_find(kind, name, capture):
    model, asked = make(kind, name), prompts()
    found = answers(model, asked, max_rows=3, pass_tokens=100, capture=capture)
    check(model, found, asked)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("teacher", "qwen2"), ("teacher", "mistral"), *(("student", name) for name in PLACEMENTS)],
)
def test_passes_that_are_repeated_as_graphs_find_the_same(kind, name):
    model = make(kind, name)
    with Engine(model, pass_tokens=256) as engine:
        passes = engine._runner._passes
        for turn in range(4):
            # of one size, and of other lengths each time
            asked = prompts([length + turn for length in (3, 70, 1, 17, 130, 64, 9, 200)])
            found = dict(engine.generate(asked, end_ids=()))
            pairs = [(prompt.token_ids, found[index].token_ids) for index, prompt in enumerate(asked)]
            scored = dict(engine.log_probs(pairs))
            for index in range(len(asked)):
                assert alike(found[index].log_probs, scored[index]), turn
        assert bool(passes.graphs) is (passes.why_not is None)
        assert (passes.why_not is None) is ("sinks" not in name)


def test_sampled_answers_are_those_of_packed_passes_and_repeat():
    model, asked = make("student", "mixed"), prompts()
    sampling = Sampling(temperature=0.8, top_k=50, top_p=0.95)
    found = answers(model, asked, sampling=sampling)
    check(model, found, asked)
    again = answers(model, asked, sampling=sampling)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in again]
    assert len({answer.token_ids for answer in found}) == len(found)


def test_memory_that_is_short_changes_no_answer():
    model, asked = make("student", "mixed"), prompts((60, 61, 62, 3, 17, 120))
    with Engine(model) as engine:
        sizes = engine._runner.sizes()
    found = answers(model, asked, max_rows=3, memory_bytes=4 * sizes.slot_bytes + 6 * sizes.page_bytes)
    check(model, found, asked)


def test_graphs_take_over_weights_that_change_in_place():
    model, asked = make("student", "mixed"), prompts((4, 90))
    other = make("student", "mixed", initializer_range=0.2)
    fuse(model, torch.float16)
    with Engine(model) as engine:
        first = dict(engine.generate(asked, end_ids=()))
        graphs = dict(engine._runner._graphs)
        with torch.no_grad():
            for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
                parameter.copy_(new)
        second = dict(engine.generate(asked, end_ids=()))
        assert engine._runner._graphs == graphs
        assert graphs
    release(model)
    assert first[0].token_ids != second[0].token_ids
    check(other, [second[index] for index in range(2)], asked)


def test_a_step_asks_the_device_for_nothing():
    model = make("student", "mixed")
    with Engine(model, capture=False) as engine:
        step = engine.rows_at(200, 4, steps=16)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            # what was chosen comes through pinned memory
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_other_threads_may_allocate_while_steps_are_recorded():
    model, asked = make("student", "mixed"), prompts()
    over, errors, kept = threading.Event(), [], []

    def prepare():
        size = 1 << 20
        try:
            while not over.is_set():
                # of many sizes, so that few come from a cache
                size += 1 << 20
                kept.append(torch.empty(size % (1 << 27), dtype=torch.uint8, pin_memory=True).to(GPU))
                del kept[:-2]
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=prepare)
    thread.start()
    try:
        found = answers(model, asked)
    finally:
        over.set()
        thread.join()
    assert not errors
    check(model, found, asked)


def test_graphs_follow_weights_that_get_other_memory():
    model, asked = make("teacher", "qwen3"), prompts((4, 90))
    with Engine(model) as engine:
        list(engine.generate(asked, end_ids=()))
        with torch.no_grad():
            for norm in (model.model.norm, *(layer.input_layernorm for layer in model.model.layers)):
                old = norm.weight.data
                norm.weight.data = torch.randn_like(old)
                # whoever still reads there finds nothing
                old.fill_(float("nan"))
        found = dict(engine.generate(asked, end_ids=()))
    check(model, [found[index] for index in range(2)], asked)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_model_on_another_device_than_the_current_one():
    model, asked = make("student", "mixed"), prompts()
    right = answers(model, asked)
    with torch.cuda.device(0), Engine(model.to("cuda:1")) as engine:
        # the third time, a pass is a graph
        for _ in range(3):
            found = dict(engine.generate(asked, end_ids=()))
            for index, answer in enumerate(right):
                assert found[index].token_ids == answer.token_ids
        assert engine._runner._passes.graphs
        assert torch.cuda.current_device() == 0


def test_prompts_that_come_one_at_a_time_need_no_tables_that_graphs_can_read():
    model = make("student", "sinks")
    with Engine(model) as engine:
        for turn in range(4):
            asked = prompts((20 + turn,))
            found = dict(engine.generate(asked, end_ids=()))
            (scored,) = engine.log_probs([(asked[0].token_ids, found[0].token_ids)])
            assert alike(found[0].log_probs, scored[1])
        assert engine._runner._passes.why_not is not None


def test_a_recording_that_fails_leaves_stream_and_answers_as_they_were(monkeypatch):
    model, asked = make("student", "mixed"), prompts((20, 30))
    run, where = Runner._read, torch.cuda.current_stream()

    def asks(self, reading):
        out = run(self, reading)
        # waits for the device, which a recording must not
        out.sum().item()
        return out

    monkeypatch.setattr(Runner, "_read", asks)
    with Engine(model) as engine:
        for _ in range(3):
            found = dict(engine.generate(asked, end_ids=()))
            assert torch.cuda.current_stream() == where
        assert "capturing" in engine._runner._passes.why_not
    check(model, [found[index] for index in range(2)], asked)


def test_graphs_share_their_memory():
    model = make("student", "mixed", vocab_size=32_768)
    taken = []
    with Engine(model, max_rows=64) as engine:
        runner = engine._runner
        runner.make_room(slots=64, pages=66, width=1)
        for number in (64, 32, 16, 8, 4):
            runner.begin_at(number, 0)
            runner.step([None] * number, sampling=Sampling())
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            taken.append(torch.cuda.memory_reserved())
    # the largest first: what others need is there
    assert taken[-1] - taken[0] < 16 << 20, taken


def test_memory_that_grows_is_never_there_twice():
    model = make("teacher", "qwen3")
    with Engine(model, memory_bytes=1 << 30) as engine:
        page = engine._runner.sizes().page_bytes
        engine._runner.make_room(slots=4, pages=(1 << 29) // page, width=4)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        engine._runner.make_room(slots=4, pages=(1 << 29) // page + 1, width=4)
        assert torch.cuda.max_memory_allocated() - before < 1 << 28


def test_a_replayed_step_leaves_the_states_of_slots_without_a_sequence_alone():
    model = make("student", "mixed")
    with Engine(model) as engine:
        runner = engine._runner
        runner.make_room(slots=8, pages=10, width=2)
        parts = [part for state in runner.memory._states.values() for part in (state.conv, state.recurrent)]
        for dead in ([1, 3], [0, 3, 7], []):
            alive = [slot for slot in range(8) if slot not in dead]
            runner.begin_at(8, 0)
            runner._places.positions[dead] = -1
            for part in parts:
                part.copy_(torch.randn_like(part))
                part[dead[:1]] = torch.nan
            before = [part.clone() for part in parts]
            runner.step([None] * 8, sampling=Sampling())
            torch.cuda.synchronize()
            assert len(runner._graphs) == 1
            assert runner._places.finite[:8].all()
            for part, old in zip(parts, before, strict=True):
                torch.testing.assert_close(part[dead], old[dead], rtol=0, atol=0, equal_nan=True)
                assert part[alive].isfinite().all()
                assert not torch.equal(part[alive], old[alive])
