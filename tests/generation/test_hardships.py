"""The engine where memory is short, weights move, and others use the same model."""

from __future__ import annotations

import weakref

import pytest
import torch

from gendistill.engine.decoder import fuse, is_fused, release
from gendistill.errors import GendistillError
from gendistill.generation import runner as runners
from gendistill.generation.engine import Engine
from gendistill.generation.memory import Memory
from gendistill.generation.request import Prompt
from gendistill.generation.runner import Runner
from gendistill.testing import tiny_student, tiny_teacher

NEW = 10


@pytest.fixture
def student():
    made = tiny_student("qwen3", "mixed")
    made.generation_config.eos_token_id = None
    return made


def prompts(lengths=(4, 70, 9, 17), new=NEW):
    maker = torch.Generator().manual_seed(3)
    return [Prompt(torch.randint(0, 97, (length,), generator=maker).tolist(), new) for length in lengths]


def tokens(found):
    found = dict(found)
    return [found[index].token_ids for index in range(len(found))]


def answers(model, asked, **settings):
    with Engine(model, **settings) as engine:
        return tokens(engine.generate(asked, end_ids=()))


# ----- memory -----


def test_old_memory_is_gone_before_there_is_a_larger_one(student, monkeypatch):
    """Both together would not fit: the new one is planned for what the old one has."""
    alive, make, made = [], Memory.__init__, []

    def watched(self, *args, **settings):
        alive.append(sum(each() is not None for each in made))
        make(self, *args, **settings)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Memory, "__init__", watched)
    with Engine(student) as engine:
        list(engine.generate(prompts((4,)), end_ids=()))
        list(engine.generate(prompts((300, 20)), end_ids=()))
    assert alive == [0, 0]


def test_memory_that_cannot_be_made_is_made_for_fewer_rows(student, monkeypatch):
    asked, make, slots = prompts(), Memory.__init__, []
    plain = answers(student, asked)

    def short(self, sizes, **settings):
        slots.append(settings["slots"])
        if settings["slots"] > 1:
            raise torch.OutOfMemoryError("no more")
        make(self, sizes, **settings)

    monkeypatch.setattr(Memory, "__init__", short)
    with Engine(student) as engine:
        assert tokens(engine.generate(asked, end_ids=())) == plain
        assert engine.stats.halved == 2
    assert slots == [4, 2, 1]

    def none(self, sizes, **settings):
        raise torch.OutOfMemoryError("nothing")

    monkeypatch.setattr(Memory, "__init__", none)
    with Engine(student) as engine:
        with pytest.raises(GendistillError, match="single row: nothing") as caught:
            list(engine.generate(asked, end_ids=()))
        # a stage that is asked for its memory by such an error gives some, and asks again
        assert isinstance(caught.value, torch.OutOfMemoryError)
        monkeypatch.setattr(Memory, "__init__", make)
        assert tokens(engine.generate(asked, end_ids=())) == plain


def test_memory_for_places_that_runs_out_leaves_nothing_half_made(student, monkeypatch):
    asked, make = prompts(), runners._Places.of
    plain = answers(student, asked)

    def none(*_):
        raise torch.OutOfMemoryError("nothing")

    with Engine(student) as engine:
        list(engine.generate(asked[:1], end_ids=()))
        monkeypatch.setattr(runners._Places, "of", none)
        with pytest.raises(GendistillError, match="single row"):
            list(engine.generate(asked, end_ids=()))
        monkeypatch.setattr(runners._Places, "of", make)
        assert tokens(engine.generate(asked, end_ids=())) == plain


@pytest.mark.parametrize("when", range(1, 8))
def test_memory_that_runs_out_in_a_pass_over_prompts_loses_nothing(student, monkeypatch, when):
    asked, read, passes = prompts((60, 61, 5, 62, 3, 130)), Runner.read, []
    plain = answers(student, asked)

    def short(self, pieces, rows, **settings):
        passes.append(len(pieces))
        if len(passes) == when:
            raise torch.OutOfMemoryError("no more")
        return read(self, pieces, rows, **settings)

    monkeypatch.setattr(Runner, "read", short)
    seen = {}
    with Engine(student, max_rows=4, pass_tokens=50) as engine:
        # a step ahead, as on a GPU
        engine._ahead = 1
        found = engine.generate(
            asked, end_ids=(), watch=lambda index, token: seen.setdefault(index, []).append(token)
        )
        assert tokens(found) == plain
        assert engine.stats.halved == 1
        assert engine.stats.new_tokens == sum(map(len, plain))
    assert [tuple(seen[index]) for index in range(len(asked))] == plain


def test_a_recording_that_ends_in_another_error_because_memory_ran_out_halves_the_rows(student, monkeypatch):
    asked, step, steps = prompts(), Runner.step, []
    plain = answers(student, asked)

    def short(self, rows, **settings):
        steps.append(len(rows))
        if len(steps) != 3:
            return step(self, rows, **settings)
        try:
            raise torch.OutOfMemoryError("no more")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(Runner, "step", short)
    with Engine(student) as engine:
        assert tokens(engine.generate(asked, end_ids=())) == plain
        assert engine.stats.halved == 1


def test_likelihood_takes_the_memory_of_rows_that_nobody_is_in(student, monkeypatch):
    pairs = [([1, 2, 3], [4]), ([5], [6, 7])]
    score = Runner.score

    def short(self, what, **settings):
        if self.memory is not None:
            raise torch.OutOfMemoryError("no more")
        return score(self, what, **settings)

    with Engine(student) as engine:
        plain = dict(engine.log_probs(pairs))
        monkeypatch.setattr(Runner, "score", short)
        running = engine.generate(prompts(), end_ids=())
        next(running)
        with pytest.raises(torch.OutOfMemoryError):
            list(engine.log_probs(pairs))
        running.close()
        assert dict(engine.log_probs(pairs)) == plain


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_short_memory_and_steps_ahead_change_no_token(student, ahead, rows):
    asked = [
        prompt._replace(max_new_tokens=1 + 9 * index % 40)
        for index, prompt in enumerate(prompts((60, 1, 61, 120, 3, 64, 63, 17, 128)))
    ]
    plain = answers(student, asked)
    ends = {token for each in plain for token in each[5:7]}
    with Engine(student) as engine:
        right = dict(engine.generate(asked, end_ids=ends))
    with Engine(student, max_rows=rows) as engine:
        sizes = engine._runner.sizes()
        engine._memory_bytes = (rows + 1) * sizes.slot_bytes + (4 + rows) * sizes.page_bytes
        engine._ahead = ahead
        for end_ids in (ends, (), ends):
            found = tokens(engine.generate(asked, end_ids=end_ids))
            assert found == ([right[index].token_ids for index in range(len(asked))] if end_ids else plain)


# ----- calls that do not end -----


def test_a_call_after_one_that_was_left_or_failed_is_as_any(student):
    asked = prompts()
    plain = answers(student, asked)

    def fails(index, token):
        if index == 1:
            raise KeyError("the watcher's own")

    with Engine(student, max_rows=3) as engine:
        engine._ahead = 1
        list(engine.generate(prompts((30, 31, 32)), end_ids=()))
        for _ in range(2):
            left = engine.generate(asked, end_ids=())
            next(left)
            left.close()
            assert tokens(engine.generate(asked[:2], end_ids=())) == plain[:2]
        with pytest.raises(KeyError, match="own"):
            list(engine.generate(asked, end_ids=(), watch=fails))
        assert tokens(engine.generate(asked, end_ids=())) == plain


def test_a_closed_engine_says_so(student):
    with Engine(student) as engine:
        list(engine.generate(prompts((3,)), end_ids=()))
    engine.close()
    for call in (engine.generate(prompts((3,)), end_ids=()), engine.log_probs([([1], [2])])):
        with pytest.raises(GendistillError, match="was closed"):
            list(call)


def test_a_closed_engine_says_so_where_others_keep_its_model_fused(student):
    fuse(student, torch.float32)
    engine = Engine(student)
    engine.close()
    for call in (engine.generate(prompts((3,)), end_ids=()), engine.log_probs([([1], [2])])):
        with pytest.raises(GendistillError, match="the engine was closed"):
            list(call)
    with pytest.raises(GendistillError, match="the engine was closed"):
        engine.rows_at(10, 1, steps=1)
    assert engine._runner.memory is None
    release(student)


@pytest.mark.parametrize("where", ["memory runs out", "pages run out"])
def test_an_engine_may_be_closed_wherever_an_answer_comes(student, monkeypatch, where):
    asked = [Prompt([7] * 56, 3 if where == "memory runs out" else 5), *[Prompt([7] * 60, 40)] * 2]
    engine = Engine(student)
    engine._ahead = 1
    if where == "memory runs out":
        step, steps = Runner.step, []

        def short(self, rows, **settings):
            steps.append(rows)
            if len(steps) == 3:
                raise torch.OutOfMemoryError("no more")
            return step(self, rows, **settings)

        monkeypatch.setattr(Runner, "step", short)
    else:
        sizes = engine._runner.sizes()
        engine._memory_bytes = 4 * sizes.slot_bytes + 5 * sizes.page_bytes
    call = engine.generate(asked, end_ids=())
    next(call)
    engine.close()
    with pytest.raises(GendistillError, match="closed before all answers were taken"):
        list(call)


def test_a_model_is_left_as_it_was_if_no_engine_can_be_made(student, monkeypatch):
    def none(*_, **__):
        raise torch.OutOfMemoryError("nothing")

    monkeypatch.setattr(Runner, "_take", none)
    with pytest.raises(torch.OutOfMemoryError):
        Engine(student)
    assert not is_fused(student)


def test_inference_mode_of_one_call_is_nothing_to_the_next(student):
    asked = prompts()
    plain = answers(student, asked)
    with Engine(student) as engine:
        with torch.inference_mode():
            assert tokens(engine.generate(asked, end_ids=())) == plain
        assert tokens(engine.generate(asked, end_ids=())) == plain


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_an_engine_that_is_opened_or_closed_in_inference_mode_runs_outside_of_it(student, kind, learns):
    model = student if kind == "student" else tiny_teacher("qwen3").eval()
    asked, ids = prompts((4, 70)), torch.tensor([[1, 2, 3]])
    plain = answers(model, asked)
    # in another dtype, with a copy of its head
    another = tiny_teacher("llama").eval()
    with torch.inference_mode():
        engine = Engine(model, learns=learns)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            other = Engine(another, learns=learns)
    for _ in range(2):
        assert tokens(engine.generate(asked, end_ids=())) == plain
        list(other.generate(asked, end_ids=()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0)
    with torch.inference_mode():
        engine.close()
        other.close()
    # and the model learns
    model(input_ids=ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)


def test_a_model_that_was_made_in_inference_mode_is_refused_with_the_reason():
    with torch.inference_mode():
        model = tiny_teacher("qwen3").eval()
    with pytest.raises(GendistillError, match="made in inference mode"):
        Engine(model)


# ----- weights -----


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda layer: layer.merge(), "of another kind"),
        (lambda layer: layer.enable_adapters(False), "switched off"),
    ],
)
def test_adapters_that_are_merged_or_switched_off_between_calls_are_not_added_again(student, change, words):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), student)
    asked = prompts((4, 9))
    layers = [layer for layer in student.modules() if isinstance(layer, peft.tuners.lora.Linear)]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.normal_()
    with Engine(student) as engine:
        list(engine.generate(asked, end_ids=()))
        change(layers[-1])
        for call in (engine.generate(asked, end_ids=()), engine.log_probs([([1], [2])])):
            with pytest.raises(GendistillError, match=words):
                list(call)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_stays_where_it_is(fused, tied):
    """Graphs of whoever trains the model, or learns from it, read it there."""
    model = tiny_teacher("qwen3", tie_word_embeddings=tied).eval().requires_grad_(False)
    if fused:
        fuse(model, torch.float32, learns=False)
    place = model.lm_head.weight.data_ptr()
    with Engine(model, learns=True) as engine:
        list(engine.generate(prompts((4,)), end_ids=()))
        assert model.lm_head.weight.data_ptr() == place
    assert model.lm_head.weight.data_ptr() == place
    release(model)


def test_graphs_are_forgotten_where_weights_have_other_memory(student):
    with Engine(student) as engine:
        runner = engine._runner
        runner.refresh()
        for change in (
            lambda: setattr(student.model.norm.weight, "data", student.model.norm.weight.clone()),
            lambda: fuse(student, torch.float32),
        ):
            runner._graphs, runner._recorder._pool = {"a graph": None}, "its pool"
            runner.refresh()
            assert runner._graphs
            assert runner._recorder._pool
            change()
            runner.refresh()
            assert not runner._graphs
            # it has no graph any more, so that none can be added to it
            assert runner._recorder._pool is None


def test_a_model_that_is_fused_anew_in_another_dtype_is_run_in_it(student):
    asked = prompts((4, 9))
    half = torch.bfloat16
    with torch.autocast("cpu", dtype=half):
        right = answers(student, asked, learns=True)
    fuse(student, torch.float32)
    with Engine(student) as engine:
        list(engine.generate(asked, end_ids=()))
        fuse(student, half)
        assert tokens(engine.generate(asked, end_ids=())) == right
    release(student)


def test_two_engines_on_one_model(student):
    asked = prompts()
    plain = answers(student, asked)
    with Engine(student) as outer, Engine(student) as inner:
        one = outer.generate(asked, end_ids=())
        first = [next(one)]
        assert tokens(inner.generate(asked, end_ids=())) == plain
        assert tokens([*first, *one]) == plain
    assert not is_fused(student)
    first, second = Engine(student), Engine(student)
    first.close()
    with pytest.raises(GendistillError, match="was closed"):
        list(second.generate(asked, end_ids=()))
    second.close()


# ----- bad input -----


def test_seeds_that_no_tensor_holds_are_refused_alone(student):
    asked = prompts((4,))
    plain = answers(student, asked)
    seeds = (2**63, -(2**63) - 1, 2**63 - 1, -(2**63))
    with Engine(student) as engine:
        found = dict(engine.generate([asked[0]._replace(seed=seed) for seed in seeds], end_ids=()))
    assert [found[index].error is None for index in range(4)] == [False, False, True, True]
    assert found[0].error.startswith("seeds are whole numbers")
    assert found[2].token_ids == found[3].token_ids == plain[0]


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (([], [1]), "context has no token"),
        (([1], []), "continuation has no token"),
        (([1, 97], [1]), "token 97"),
        (([1], [-3]), "token -3"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(student, pair, words):
    with Engine(student) as engine, pytest.raises(GendistillError, match=words) as caught:
        list(engine.log_probs([([1], [2]), pair]))
    assert caught.value.where == "pair 1"


@pytest.mark.parametrize("fused", [True, False])
def test_positions_that_depend_on_company_are_refused(fused):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = tiny_teacher("llama", rope_parameters=rope)
    if fused:
        fuse(model, torch.float32)
    with pytest.raises(GendistillError, match="depend on the longest"):
        Engine(model)


def test_the_dtype_that_is_refused_is_the_one_of_arithmetic(student, monkeypatch):
    asked = []
    monkeypatch.setattr(runners, "why_not_fused", lambda model, *, device, dtype: asked.append(dtype))
    runners.why_not(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        runners.why_not(student)
    assert asked == [torch.float32, torch.bfloat16]


# ----- adapters -----


def adapted(model, *targets):
    peft = pytest.importorskip("peft")
    made = peft.inject_adapter_in_model(peft.LoraConfig(r=3, target_modules=list(targets)), model).eval()
    maker = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=maker) * 0.2)
    return made


def by_transformers(model, asked):
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt.token_ids])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=prompt.max_new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        found.append(tuple(out[0, ids.shape[1] :].tolist()))
    return found


@pytest.mark.parametrize("targets", [("q_proj", "v_proj", "down_proj"), ("embed_tokens",)])
def test_adapters_take_part_and_may_change(student, targets):
    asked, plain = prompts((4, 70)), by_transformers(student, prompts((4, 70)))
    model = adapted(student, *targets)
    right = by_transformers(model, asked)
    assert right != plain
    with Engine(model, learns=True) as engine:
        assert tokens(engine.generate(asked, end_ids=())) == right
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(-1.3)
        changed = tokens(engine.generate(asked, end_ids=()))
    assert changed == by_transformers(model, asked) != right


@pytest.mark.parametrize("fused", [True, False])
def test_adapters_that_are_switched_off_are_refused(student, fused):
    """Packed layers add what adapters say, whatever a switch says."""
    model = adapted(student, "q_proj")
    if fused:
        fuse(model, torch.float32)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.enable_adapters(False)
    with pytest.raises(GendistillError, match="switched off"):
        Engine(model)
    release(model)


def test_an_adapted_head_is_refused_by_name(student):
    with pytest.raises(GendistillError, match="its head is a"):
        Engine(adapted(student, "lm_head"))
