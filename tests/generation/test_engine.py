"""Answers of the engine beside those of ``model.generate``, alone and in company."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gendistill.engine.decoder import fuse, is_fused, release
from gendistill.errors import GendistillError
from gendistill.generation.engine import Engine, for_rows
from gendistill.generation.memory import _parts
from gendistill.generation.reading import Passes
from gendistill.generation.request import Prompt
from gendistill.generation.runner import Runner, why_not
from gendistill.generation.sampling import Sampling
from gendistill.testing import FAMILIES, PLACEMENTS, tiny_student, tiny_teacher

LENGTHS = (3, 70, 1, 17, 130, 9)
NEW = 12


def prompts(lengths=LENGTHS, new=NEW, *, vocab=97, seed=0):
    maker = torch.Generator().manual_seed(seed)
    return [
        Prompt(torch.randint(0, vocab, (length,), generator=maker).tolist(), new + index % 3)
        for index, length in enumerate(lengths)
    ]


def expected(model, asked, end_ids=()):
    """Generate each alone, by transformers."""
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt.token_ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            eos_token_id=list(end_ids) or None,
            pad_token_id=0,
        )
        found.append(tuple(out[0, ids.shape[1] :].tolist()))
    return found


def answers(model, asked, *, end_ids=(), sampling=None, **settings):
    with Engine(model, **settings) as engine:
        found = dict(engine.generate(asked, end_ids=end_ids, sampling=sampling))
        stats = engine.stats
    assert sorted(found) == list(range(len(asked)))
    return [found[index] for index in range(len(asked))], stats


def ends_of(model):
    config = model.generation_config
    config.eos_token_id = None
    return model


@pytest.fixture(
    params=[*(f"teacher {name}" for name in FAMILIES), *(f"student {name}" for name in PLACEMENTS)]
)
def model(request):
    kind, name = request.param.split(" ", 1)
    made = tiny_teacher(name).eval() if kind == "teacher" else tiny_student("qwen3", name)
    return ends_of(made)


def test_tokens_are_those_of_generate(model):
    asked = prompts()
    alone = expected(model, asked)
    assert len({token for tokens in alone for token in tokens}) > 5
    found, stats = answers(model, asked, max_rows=3, pass_tokens=50)
    assert [answer.token_ids for answer in found] == alone
    assert not is_fused(model)
    assert stats.new_tokens == sum(len(tokens) for tokens in alone)
    # and the model is what it was
    assert expected(model, asked[:2]) == alone[:2]


def test_log_probs_are_those_of_logits(model):
    asked = prompts((5, 70, 9), new=1)
    contexts = [list(prompt.token_ids) for prompt in asked]
    # single tokens after one context, a longer one that begins like it, and others
    pairs = [
        (contexts[0], [3]),
        (contexts[1], [1, 2, 3]),
        (contexts[0], [4]),
        (contexts[0] + [3], [7, 8]),
        (contexts[2], [5] * 70),
    ]
    with Engine(model, pass_tokens=60) as engine:
        found = dict(engine.log_probs(pairs))
    for number, (context, continuation) in enumerate(pairs):
        ids = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
        right = [logits[len(context) - 1 + at, token].item() for at, token in enumerate(continuation)]
        assert found[number] == pytest.approx(right, abs=1e-4)


@pytest.fixture
def student():
    return ends_of(tiny_student("qwen3", "mixed"))


@pytest.mark.parametrize(
    "settings",
    [
        {"max_rows": 1},
        {"max_rows": 16, "pass_tokens": 1},
        {"max_rows": 5, "pass_tokens": 1000},
        # for three rows and six pages: rows have to give theirs to others
        {"max_rows": 3, "memory_bytes": (3, 6)},
    ],
)
def test_company_and_memory_change_no_token(student, settings):
    asked = prompts((60, 61, 62, 3, 17, 120), new=20)
    alone, _ = answers(student, asked)
    short = "memory_bytes" in settings
    if short:
        runner, (slots, pages) = Runner(student), settings["memory_bytes"]
        sizes = runner.sizes()
        runner.close()
        settings = {**settings, "memory_bytes": (slots + 1) * sizes.slot_bytes + pages * sizes.page_bytes}
    found, stats = answers(student, asked, **settings)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in alone]
    for one, other in zip(found, alone, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    assert (stats.put_back > 0) == short


def test_end_tokens_end_an_answer(student):
    asked = prompts()
    plain, _ = answers(student, asked)
    end = plain[1].token_ids[7]
    found, _ = answers(student, asked, end_ids={end}, max_rows=2)
    for answer, whole in zip(found, plain, strict=True):
        assert answer.ended == (end in whole.token_ids)
        place = whole.token_ids.index(end) if answer.ended else len(whole.token_ids)
        assert answer.token_ids == whole.token_ids[:place]
        assert len(answer.log_probs) == place + answer.ended


def test_what_cannot_be_answered_says_why_and_changes_nothing_for_others(student):
    asked = prompts((4, 9))
    bad = [
        Prompt([], 4),
        Prompt([1, 2], 0),
        Prompt([1, 2], 4, ("",)),
        Prompt([1, 97], 4),
        Prompt([-1], 4),
        Prompt([1] * student.config.max_position_embeddings, 1),
    ]
    plain, _ = answers(student, asked)
    found, _ = answers(student, [*bad[:4], *asked, *bad[4:]])
    assert [answer.token_ids for answer in found[4:6]] == [answer.token_ids for answer in plain]
    errors = [answer.error for answer in (*found[:4], *found[6:])]
    for error, words in zip(
        errors,
        (
            "no token",
            "at least 1, got 0",
            "a stop text must",
            "knows tokens 0 to 96",
            "token -1",
            "positions",
        ),
        strict=True,
    ):
        assert words in error


def test_logits_that_are_not_finite_end_one_row_alone(student):
    asked = prompts((4, 9, 12))
    plain, _ = answers(student, asked)
    with torch.no_grad():
        student.model.embed_tokens.weight[50] = float("nan")
    found, _ = answers(student, [Prompt([3, 50, 4], 5), *(p for p in asked if 50 not in p.token_ids)])
    assert "not finite" in found[0].error
    assert all(answer.error is None for answer in found[1:])
    del plain


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no more"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_memory_that_runs_out_halves_the_rows(student, monkeypatch, error):
    asked = prompts()
    plain, _ = answers(student, asked)
    step, most = Runner.step, []

    def short(self, rows, **settings):
        most.append(len(rows))
        if len(rows) > 2 and len(most) > 3:
            raise error
        return step(self, rows, **settings)

    monkeypatch.setattr(Runner, "step", short)
    found, stats = answers(student, asked, max_rows=8)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in plain]
    assert stats.halved == 2

    def none(self, rows, **settings):
        raise torch.OutOfMemoryError("nothing")

    monkeypatch.setattr(Runner, "step", none)
    with pytest.raises(GendistillError, match="single row"), Engine(student) as engine:
        list(engine.generate(asked, end_ids=()))


def test_weights_that_change_between_calls_are_taken_over(student):
    asked = prompts((4, 9))
    other = tiny_student("qwen3", "mixed", seed=5)
    right = expected(ends_of(other), asked)
    with Engine(student) as engine:
        first = dict(engine.generate(asked, end_ids=()))
        with torch.no_grad():
            for parameter, new in zip(student.parameters(), other.parameters(), strict=True):
                parameter.copy_(new)
        second = dict(engine.generate(asked, end_ids=()))
    assert [second[index].token_ids for index in range(2)] == right
    assert first[0].token_ids != second[0].token_ids


def test_whoever_watches_sees_every_token_as_it_comes(student):
    seen = {}
    with Engine(student) as engine:
        found = dict(
            engine.generate(
                prompts((4, 9)),
                end_ids=(),
                watch=lambda index, token: seen.setdefault(index, []).append(token),
            )
        )
    assert {index: tuple(tokens) for index, tokens in seen.items()} == {
        index: answer.token_ids for index, answer in found.items()
    }


def test_a_model_that_is_trained_fused_stays_so(student):
    asked = prompts((4, 9))
    right = expected(student, asked)
    fuse(student, torch.float32)
    found, _ = answers(student, asked)
    assert [answer.token_ids for answer in found] == right
    assert is_fused(student)
    release(student)


def test_an_engine_runs_one_call_at_a_time(student):
    with Engine(student) as engine:
        first = engine.generate(prompts(), end_ids=())
        next(first)
        with pytest.raises(GendistillError, match="one call at a time"):
            next(engine.generate(prompts(), end_ids=()))
        first.close()
        assert len(list(engine.generate(prompts((3,)), end_ids=()))) == 1


def test_an_engine_that_is_closed_between_answers_says_so(student):
    engine = Engine(student)
    call = engine.generate(prompts(), end_ids=())
    next(call)
    with pytest.raises(GendistillError, match="take them all, or close it"):
        engine.free()
    engine.close()
    with pytest.raises(GendistillError, match="closed before all answers were taken"):
        list(call)
    assert not is_fused(student)


def test_a_model_that_cannot_run_fused_is_refused_with_the_reason():
    model = tiny_teacher("llama", mlp_bias=True)
    with pytest.raises(GendistillError, match="MLP has biases"):
        Engine(model)


@pytest.mark.parametrize("setting", ["max_rows", "pass_tokens", "memory_bytes"])
def test_settings_below_one_are_refused(student, setting):
    with pytest.raises(GendistillError, match=f"{setting} must be at least 1, got 0"):
        Engine(student, **{setting: 0})


def test_states_return_to_a_snapshot(student):
    runner = Runner(student)
    runner.make_room(slots=3, pages=4, width=2)
    memory = runner.memory
    for layer, state in memory._states.items():
        for part in (state.conv, state.recurrent):
            part.copy_(torch.randn_like(part))
        del layer
    kept = memory.snapshot([2, 0])
    before = {layer: state.recurrent.clone() for layer, state in memory._states.items()}
    memory.forget([0, 2])
    assert all(not state.recurrent[0].any() for state in memory._states.values())
    memory.restore([2, 0], kept)
    for layer, state in memory._states.items():
        assert torch.equal(state.recurrent, before[layer])
    runner.close()


@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_step_leaves_the_states_of_slots_without_a_sequence_alone(name):
    runner = Runner(tiny_student("qwen3", name))
    runner.make_room(slots=4, pages=6, width=2)
    memory, dead = runner.memory, [1, 3]
    runner.begin_at(4, 0)
    runner._places.positions[dead] = -1
    parts = [part for state in memory._states.values() for _, part in _parts(state)]
    for part in parts:
        if part.is_floating_point():
            part.copy_(torch.randn_like(part))
            part[1] = torch.nan
    before = [part.clone() for part in parts]
    rows, sampling = [None] * 4, Sampling()
    chosen = runner.step(rows, sampling=sampling)
    assert runner._places.positions[:4].tolist() == [1, -1, 1, -1]
    assert runner._places.finite[[0, 2]].all()
    assert len(chosen.read()) == 4
    for part, old in zip(parts, before, strict=True):
        torch.testing.assert_close(part[dead], old[dead], rtol=0, atol=0, equal_nan=True)
        assert part[[0, 2]].isfinite().all()
        assert not torch.equal(part[[0, 2]], old[[0, 2]])
    # nor is it part of what is remembered
    assert all(getattr(state, "lives", None) is None for state in memory._states.values())
    runner.close()


def test_passes_that_are_filled_up_change_no_token(model, monkeypatch):
    # what is filled up on a GPU, so that passes of a size can be repeated as a graph, runs anywhere
    monkeypatch.setattr(Passes, "_record", lambda *_: None)
    asked = prompts()
    alone = expected(model, asked)
    filled = []
    with Engine(model, max_rows=3, pass_tokens=50) as engine:
        passes = engine._runner._passes
        passes._captures, run = True, passes._run
        passes._run = lambda reading: filled.append(reading.segments.room) or run(reading)
        for _ in range(2):
            found = dict(engine.generate(asked, end_ids=()))
            assert [found[index].token_ids for index in range(len(asked))] == alone
    assert sum(map(bool, filled)) > len(filled) // 2


def test_steps_find_what_packed_passes_find(model):
    asked = prompts()
    found, _ = answers(model, asked, max_rows=2, pass_tokens=40)
    with Engine(model) as engine:
        scored = dict(
            engine.log_probs(
                [(prompt.token_ids, answer.token_ids) for prompt, answer in zip(asked, found, strict=True)]
            )
        )
    for index, answer in enumerate(found):
        assert answer.log_probs == pytest.approx(scored[index], abs=1e-4)


def test_draws_depend_on_the_seed_and_not_on_company(student):
    sampling = Sampling(temperature=1.5, top_k=30)
    asked = [prompt._replace(seed=index) for index, prompt in enumerate(prompts())]
    twice = [*asked, asked[0], asked[0]._replace(seed=77)]
    found, _ = answers(student, twice, sampling=sampling)
    alone, _ = answers(student, twice, sampling=sampling, max_rows=1)
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in alone]
    assert found[-2].token_ids == found[0].token_ids != found[-1].token_ids
    greedy, _ = answers(student, twice)
    assert greedy[0].token_ids != found[0].token_ids


def test_a_model_whose_parameters_are_shared_among_processes_is_refused(student, monkeypatch):
    from gendistill.generation import runner

    monkeypatch.setattr(runner, "DTensor", torch.nn.Parameter)
    assert "shared among processes" in runner.why_not(student)


def test_arithmetic_is_that_of_autocast(student):
    with torch.autocast("cpu", dtype=torch.bfloat16), Engine(student, learns=True) as engine:
        assert engine._runner.decoder.dtype == torch.bfloat16
        (found,) = [answer for _, answer in engine.generate(prompts((20,)), end_ids=())]
    assert len(found.token_ids) == NEW
    assert student.lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("kind", "words"),
    [("opt", "not a family"), ("gpt2", "no model and lm_head"), ("gpt_neox", "no model and lm_head")],
)
def test_models_of_other_families_are_refused_with_the_reason(kind, words):
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"opt": {"ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 32}}.get(kind, {})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more))
    assert words in why_not(model)
    with pytest.raises(GendistillError, match="transformers"):
        Engine(model)


def test_rows_leave_passes_what_they_need_to_work_with(student):
    runner = Runner(student)
    some = runner.working_bytes(100, 4)
    # more than the stream, the MLP and logits alone
    assert some > 100 * 4 * (2 * 32 + 3 * student.config.intermediate_size) + 4 * 97 * 8
    assert runner.working_bytes(200, 4) > 1.9 * some
    runner.close()
    # a large device gives most of what is free, a small one what is left
    assert for_rows(100 << 30, 2 << 30) == int((100 << 30) * 0.8)
    assert for_rows(6 << 30, 2 << 30) == 4 << 30
    assert for_rows(1 << 30, 2 << 30) == 0
