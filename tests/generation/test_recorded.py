"""Passes and steps that are repeated as graphs, which are played on the host: what a graph reads anew, and what not."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from gendistill.generation import reading
from gendistill.generation.engine import Engine
from gendistill.generation.reading import Passes, Reading
from gendistill.generation.request import Prompt
from gendistill.generation.runner import Runner
from gendistill.generation.sampling import Sampling
from gendistill.generation.schedule import Piece, Row
from gendistill.ops.types import Segments, UnknownLengths
from gendistill.testing import FAMILIES, PLACEMENTS, tiny_student, tiny_teacher


class Played(Segments):
    """Segments that lie in tensors; the ops of a host may read lengths there, as kernels read tables."""

    lengths = property(lambda self: self.cu_seqlens.diff().tolist(), lambda self, _: None)

    @property
    def longest(self):
        raise UnknownLengths

    def table(self, build):
        if build not in self._tables:
            raise UnknownLengths
        return self._tables[build]

    def chunks(self, size):
        self._layouts.clear()
        return super().chunks(size)

    def taps(self, history):
        self._taps.clear()
        return super().taps(history)


def played(reading):
    static = reading.segments.static()
    segments = Played._of(None, static.num_tokens, None, static.cu_seqlens, static.tables, static.room)
    return replace(reading, numbers=reading.numbers.clone(), segments=segments)


class Graph:
    """Work that runs again, and overwrites what all graphs before have made: they share their memory."""

    made: list

    def __init__(self, work, out=None):
        self.work, self.out = work, out

    def replay(self):
        for other in self.made:
            other.fill_(torch.nan)
        out = self.work()
        if self.out is not None:
            self.out.copy_(out)


class Recording:
    """In place of a recorder: nothing of what it records has run afterwards."""

    def __init__(self, runner, graph):
        self.runner, self.graph, self.errors = runner, graph, []

    def __call__(self, work):
        memory = self.runner.memory
        parts = [*memory._stacks, *memory._keys.values(), *memory._values.values()]
        parts += self.runner._places.by_slot
        kept = [part.clone() for part in parts]
        if self.errors:
            raise self.errors.pop()
        try:
            out = work()
        finally:
            for part, value in zip(parts, kept, strict=True):
                part.copy_(value)
        out.fill_(torch.nan)
        self.graph.made.append(out)
        return out, self.graph(work, out)

    def forget(self):
        self.graph.made.clear()


@pytest.fixture
def open_engine(monkeypatch):
    monkeypatch.setattr(Reading, "static", played)

    def open_engine(model, **settings):
        engine = Engine(model, **settings)
        runner, graph = engine._runner, type("G", (Graph,), {"made": []})
        runner.captures = runner._passes._captures = True
        runner._recorder = runner._passes._recorder = Recording(runner, graph)
        runner._record = lambda size, sampling: graph(lambda: runner._step(size, sampling))
        engine._ahead = 1
        return engine

    return open_engine


def ready(model):
    model.generation_config.eos_token_id = None
    return model


def tokens(found):
    found = dict(found)
    return [found[index].token_ids for index in range(len(found))]


def draw(maker, number):
    """Draw prompts of all lengths, those at the ends of pages and passes more often."""
    lengths = [maker.choice([1, 3, 64, 65, 128, maker.randint(1, 300)]) for _ in range(number)]
    return [
        Prompt([maker.randrange(97) for _ in range(length)], maker.randint(1, 9), seed=maker.randrange(99))
        for length in lengths
    ]


KDA = [{}, {"rope": True}, {"conv_size": 0}, {"output_gate": "none"}]


@pytest.mark.parametrize("seed", range(12))
def test_any_engine_says_what_one_row_at_a_time_says(open_engine, seed):
    maker = random.Random(seed)
    kinds = [("teacher", name) for name in FAMILIES] + [("student", name) for name in PLACEMENTS]
    kind, name = kinds[seed % len(kinds)]
    if kind == "teacher":
        model = ready(tiny_teacher(name).eval())
    else:
        model = ready(tiny_student(maker.choice(["qwen3", "llama", "qwen2"]), name, kda=maker.choice(KDA)))
    settings = {
        "max_rows": maker.randint(1, 9),
        "pass_tokens": maker.choice([13, 50, 64, 100, 256, 600]),
    }
    runner = Runner(model)
    sizes = runner.sizes()
    runner.close()
    if maker.random() < 0.5:
        settings["memory_bytes"] = maker.randint(3, 9) * sizes.slot_bytes + 8 * sizes.page_bytes
    calls = [draw(maker, maker.randint(1, 6)) for _ in range(3)]
    asks = {
        "end_ids": set(maker.sample(range(97), 3)) if maker.random() < 0.5 else (),
        "sampling": Sampling(temperature=1.2, top_k=20) if maker.random() < 0.4 else None,
    }
    with Engine(model, max_rows=1) as engine:
        right = [tokens(engine.generate(asked, **asks)) for asked in calls]
    with open_engine(model, **settings) as engine:
        seen = {}
        for _ in range(2):
            for asked, expected in zip(calls, right, strict=True):
                seen.clear()
                found = engine.generate(
                    asked, **asks, watch=lambda index, token: seen.setdefault(index, []).append(token)
                )
                assert tokens(found) == expected
                for index, answer in enumerate(expected):
                    assert tuple(seen[index][: len(answer)]) == answer
        assert "sink" in name or engine._runner._passes.why_not is None


def one(length, seed=0):
    maker = random.Random(seed)
    return [Prompt([maker.randrange(97) for _ in range(length)], 3)]


@pytest.mark.parametrize("name", ["sinks", "sinks alone"])
def test_passes_whose_tables_no_graph_can_read_go_on_without(open_engine, name):
    model = ready(tiny_student("qwen3", name))
    with Engine(model) as engine:
        right = [tokens(engine.generate(one(20 + turn), end_ids=())) for turn in range(4)]
    with open_engine(model) as engine:
        found = [tokens(engine.generate(one(20 + turn), end_ids=())) for turn in range(4)]
        assert found == right
        assert "list" in engine._runner._passes.why_not


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no more"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("operation not permitted when stream is capturing"),
    ],
)
def test_a_pass_that_cannot_be_recorded_has_run_all_the_same(open_engine, error):
    model = ready(tiny_student("qwen3", "mixed"))
    asked = [one(length, length)[0] for length in (20, 30, 70, 90)]
    with Engine(model) as engine:
        right = tokens(engine.generate(asked, end_ids=()))
    with open_engine(model) as engine:
        runner = engine._runner
        runner._recorder.errors = [error]
        assert tokens(engine.generate(asked, end_ids=())) == right
        with pytest.warns(UserWarning, match="passes over prompts run without CUDA graphs"):
            assert tokens(engine.generate(asked, end_ids=())) == right
        for _ in range(2):
            assert tokens(engine.generate(asked, end_ids=())) == right
            # memory for rows is as it was, and no row was read twice
            assert engine.stats.halved == 0
            assert engine.stats.prompt_tokens == sum(len(prompt.token_ids) for prompt in asked)
        assert str(error) in runner._passes.why_not
        assert not runner._passes.graphs


def test_graphs_go_where_memory_does_not_suffice_for_one_more(open_engine):
    model = ready(tiny_student("qwen3", "mixed"))
    with open_engine(model) as engine:
        runner = engine._runner
        for _ in range(3):
            list(engine.generate(one(20), end_ids=()))
        assert runner._passes.graphs
        assert runner._graphs
        runner._recorder.errors = [torch.OutOfMemoryError("no more")]
        list(engine.generate(one(200), end_ids=()))
        gone = []
        forget = runner._recorder.forget
        runner._recorder.forget = lambda: gone.append(dict(runner._graphs)) or forget()
        list(engine.generate(one(200), end_ids=()))
        assert gone == [{}]
        assert not runner._passes.graphs


def test_a_graph_of_inference_mode_runs_outside_of_it(open_engine):
    model = ready(tiny_student("qwen3", "mixed"))
    with Engine(model) as engine:
        right = tokens(engine.generate(one(20), end_ids=()))
    with open_engine(model) as engine:
        for _ in range(3):
            with torch.inference_mode():
                assert tokens(engine.generate(one(20), end_ids=())) == right
        assert engine._runner._passes.graphs
        assert tokens(engine.generate(one(20), end_ids=())) == right


def test_a_pass_of_prompts_that_go_on_is_another_than_one_of_prompts_that_begin(open_engine):
    model = ready(tiny_student("qwen3", "mixed"))
    calls = [one(64), one(64, 1), one(192, 2), one(64, 3), one(192, 4), one(192, 5)]
    with Engine(model) as engine:
        right = [tokens(engine.generate(asked, end_ids=())) for asked in calls]
    with open_engine(model, pass_tokens=64) as engine:
        assert [tokens(engine.generate(asked, end_ids=())) for asked in calls] == right
        assert len(engine._runner._passes.graphs) == 2


def table(lengths, device):
    return torch.tensor(lengths, device=device)


def test_with_as_many_graphs_as_there_may_be_other_sizes_run_as_they_are(open_engine, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_GRAPHS", 1)
    engine = open_engine(tiny_student("qwen3", "pure"))
    passes = engine._runner._passes
    for length in (40, 40, 300, 300, 300):
        (answer,) = dict(engine.generate([Prompt([1] * length, 2)], end_ids=())).values()
        assert answer.error is None
    assert len(passes.graphs) == 1
    assert passes.size([Piece(0, 0, 40)]) is not None
    assert passes.size([Piece(0, 0, 300)]) is None


def test_a_table_that_only_some_passes_ask_for_is_read_anew():
    lengths = []

    def run(reading):
        lengths.append(reading.segments.lengths)
        # as sinks do
        if len(reading.segments.lengths) > 1:
            return reading.segments.table(table).clone()
        return torch.zeros(1)

    class Plays:
        def __call__(self, work):
            out = work()
            return out, Graph(work, out)

    Graph.made = []
    played = 0
    passes = Passes(run, Plays(), captures=True, make_way=lambda: None)
    for turn in range(5):
        rows = [Row(0, Prompt([1] * (20 + turn), 1), None, [1] * (20 + turn))]
        pieces = [Piece(0, 0, 20 + turn)]
        size = passes.size(pieces)
        found = passes(Reading.of(pieces, rows, spare=1, size=size, to_device=torch.tensor))
        played += turn > 1
        if size is not None:
            # two sequences fill it up
            assert found.tolist() == [20 + turn, (45 - turn) // 2, (44 - turn) // 2, 0]
    assert len(passes.graphs) == 1
    # as it is, filled up, recorded
    assert len(lengths) == 3 + played
