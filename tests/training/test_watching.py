"""What is looked at while a stage trains: true, at its moments, and without a trace in what is trained."""

import gc
import json
import weakref
from collections import Counter
from io import StringIO
from types import SimpleNamespace

import pytest
import torch

from gendistill.anatomy.cost import step_flops
from gendistill.checkpoints.resolve import load_tokenizer
from gendistill.config.watch import WatchConfig
from gendistill.errors import TrainingError
from gendistill.runs.examiner import TaskExaminer
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import save_tiny_checkpoint, tiny_student, tiny_teacher
from gendistill.training import stage
from gendistill.training.clock import StepClock
from gendistill.training.layers import compare_layers
from gendistill.training.monitors import speed, weights

NOTHING = WatchConfig(speed=False, groups=False)
STEPS = {"steps": 4, "save_every_steps": 3, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def asked(tiny, tmp_path_factory):
    """Questions and a task for the tiny models, and a tokenizer that they share."""
    folder = tmp_path_factory.mktemp("asked")
    save_tiny_checkpoint(folder / "teacher")
    (folder / "open.jsonl").write_text(
        '{"id": "why", "question": "Why?"}\n{"id": "who", "question": "Who?"}\n'
    )
    items = [{"question": f"Colour {i}?", "options": ["red", "blue"], "gold": "red"} for i in range(3)]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    task = {"items": "items.jsonl", "kind": "multiple_choice", "prompt": "{question}", "max_new_tokens": 3}
    (folder / "colours.yaml").write_text(json.dumps(task))
    tokenizer = load_tokenizer(folder / "teacher")
    sizes = {"num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    return SimpleNamespace(
        tokenizer=tokenizer,
        student=lambda: tiny_student(seed=3, mixers=["kda", "full"], **sizes),
        teacher=lambda: tiny_teacher(seed=4, **sizes),
        questions=str(folder / "open.jsonl"),
        task=str(folder / "colours.yaml"),
    )


@pytest.fixture
def everything(tiny, asked):
    """Make the fields of a job that looks at everything in every second step."""

    def make():
        every = dict.fromkeys(("layers_every_steps", "answers_every_steps", "score_every_steps"), 2)
        return {
            "watch": WatchConfig(questions=asked.questions, task=asked.task, **every),
            "examiner": TaskExaminer(
                asked.teacher(), asked.tokenizer, questions=asked.questions, answer_tokens=4
            ),
        }

    return make


def student_with_dropout(asked):
    """Make a student whose steps draw random numbers."""
    student = asked.student()
    for layer in student.model.layers:
        layer.mlp.register_forward_hook(
            lambda module, _inputs, output: torch.nn.functional.dropout(output, 0.1, module.training)
        )
    return student


def models(asked):
    """Make the pair of models that the tokenizer belongs to."""
    return {"student": asked.student(), "teacher": asked.teacher()}


def losses(tiny, folder):
    return [(row["loss"], row["grad_norm"]) for row in tiny.rows(folder)]


@pytest.mark.parametrize("changes", [{}, {"compute_dtype": "bfloat16"}, {"gradient_checkpointing": True}])
def test_watching_changes_no_bit_of_what_is_trained(tiny, tmp_path, asked, everything, changes):
    def run(name, job):
        models = {"student": student_with_dropout(asked), "teacher": asked.teacher()}
        return tiny.run_stage(tmp_path / name, job=job, **models, **STEPS, **changes)[1]

    alone, watched = run("a", {"watch": NOTHING}), run("b", everything())
    assert losses(tiny, tmp_path / "a") == losses(tiny, tmp_path / "b")
    for name, value in alone.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name
    row = tiny.rows(tmp_path / "b")[1]
    assert {"groups", "layers", "score"} <= row.keys()
    assert not [hook for module in watched.modules() for hook in module._forward_pre_hooks]


def test_writing_leaves_random_numbers_modes_and_gradients(tiny, tmp_path, asked, everything, monkeypatch):
    from gendistill.training.monitors import writing

    kept = []

    def watch(run, work):
        frozen = run.module.model.layers[0].mlp.eval()
        before = torch.get_rng_state(), [p.grad.clone() for p in run.trained.values()]
        found = undisturbed(run, lambda student: (torch.rand(3), work(student))[1])
        assert torch.equal(before[0], torch.get_rng_state())
        assert all(torch.equal(a, b.grad) for a, b in zip(before[1], run.trained.values(), strict=True))
        assert run.module.training
        assert not frozen.training
        assert not torch.is_autocast_enabled("cpu")
        frozen.train()
        kept.append(found)
        return found

    undisturbed = writing.undisturbed
    monkeypatch.setattr(writing, "undisturbed", watch)
    tiny.run_stage(tmp_path, job=everything(), **models(asked), **STEPS)
    assert len(kept) == 4


def test_answers_stand_beside_the_teachers_and_are_those_of_the_step(tiny, tmp_path, everything, asked):
    out, job = StringIO(), everything()
    _, student = tiny.run_stage(tmp_path, job=job, out=out, **models(asked), **STEPS)
    path = tmp_path / "stages/tiny/answers.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row["id"]) for row in rows] == [(2, "why"), (2, "who"), (4, "why"), (4, "who")]
    again = job["examiner"].answers(student)
    assert [{**row, "step": 4} for row in again] == rows[2:]
    assert [row["teacher"] for row in rows[:2]] == [row["teacher"] for row in rows[2:]]
    assert 'tiny  4  "Why?"  student: "' in out.getvalue()
    # a resume from step 3 asks step 4 again, and writes it once
    (tmp_path / "stages/tiny/checkpoints/step-000004/state.json").unlink()
    path.write_text(path.read_text() + "half a li")
    tiny.run_stage(tmp_path, job=everything(), **models(asked), **STEPS)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows


def test_answers_may_hold_any_line_separator_of_unicode(tmp_path):
    from gendistill.training.monitors import writing

    path = tmp_path / "answers.jsonl"
    rows = [{"step": step, "student": f"a{mark}b"} for step, mark in enumerate("\u2028\u2029\x85")]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [json.loads(line) for line in writing._earlier(path, 2)] == rows[:2]


def test_the_score_is_that_of_the_evaluation(tiny, tmp_path, everything, asked):
    from gendistill_evals import evaluate_model

    _, student = tiny.run_stage(tmp_path, job=everything(), **models(asked), **STEPS)
    results = evaluate_model(
        student, asked.tokenizer, tasks=[asked.task], out_dir=tmp_path / "eval", model_name="tiny"
    )
    score = tiny.rows(tmp_path)[-1]["score"]
    assert score["value"] == results["tasks"][0]["generation"]["value"]
    assert (score["n"], score["best"]) == (3, score["value"])


class Scripted:
    """An examiner whose scores are known beforehand: by how often it was asked."""

    def __init__(self, *scores):
        self.scores, self.asked = list(scores), []

    def score(self, student, task, limit):
        self.asked.append((task, limit))
        return {"value": self.scores[len(self.asked) - 1], "n": 10}

    def answers(self, student):
        raise AssertionError


STOP = {"task": "everyday", "limit": 10, "every_steps": 2, "patience": 2, "gain": 0.05}


def test_a_stage_ends_once_its_score_has_stopped_rising(tiny, tmp_path):
    out, examiner = StringIO(), Scripted(0.2, 0.4, 0.42, 0.44, 0.9)
    result, _ = tiny.run_stage(tmp_path, job={"examiner": examiner}, steps=20, stop_early=STOP, out=out)
    assert result.steps == 8
    assert examiner.asked == [("everyday", 10)] * 4
    scores = [row["score"] for row in tiny.rows(tmp_path) if "score" in row]
    assert [(each["value"], each["best"], each["since"]) for each in scores] == [
        (0.2, 0.2, 0),
        (0.4, 0.4, 0),
        (0.42, 0.4, 1),
        (0.44, 0.4, 2),
    ]
    assert (
        "score ends the stage at step 8 of 20: 2 scores of everyday in a row did not rise above"
        in out.getvalue()
    )
    assert "score 44.0%" in out.getvalue()


def test_a_slow_rise_counts_once_it_has_added_up_and_some_steps_are_taken_anyway(tiny, tmp_path):
    slow = Scripted(0.20, 0.23, 0.26, 0.28, 0.31, 0.31, 0.31)
    result, _ = tiny.run_stage(tmp_path / "slow", job={"examiner": slow}, steps=30, stop_early=STOP)
    assert result.steps == 14
    early = {**STOP, "min_steps": 7}
    result, _ = tiny.run_stage(
        tmp_path / "early", job={"examiner": Scripted(*[0.0] * 9)}, steps=30, stop_early=early
    )
    assert result.steps == 8


@pytest.mark.parametrize("stopped_at", [4, 6])
def test_a_resumed_stage_ends_at_the_same_step(tiny, tmp_path, stopped_at):
    """The scores of a stage are part of its checkpoints: by how far training is, not by how often one asked."""

    class BySteps(Scripted):
        def score(self, student, task, limit):
            self.asked.append(1)
            return {"value": self.scores[int(student.steps_taken) // 2 - 1], "n": 10}

    def run(folder, until=None):
        student = tiny.make_student()
        student.steps_taken = 0
        real = stage.StageRun.step

        def step(self):
            if until is not None and self.progress.step == until:
                raise KeyboardInterrupt
            real(self)
            student.steps_taken = self.progress.step

        stage.StageRun.step = step
        try:
            job = {"examiner": BySteps(0.2, 0.4, 0.41, 0.42, 0.9)}
            return tiny.run_stage(
                folder, student=student, job=job, steps=20, stop_early=STOP, save_every_steps=3
            )[0]
        finally:
            stage.StageRun.step = real

    whole = run(tmp_path / "whole")
    assert whole.steps == 8
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", until=stopped_at)
    assert run(tmp_path / "stopped").steps == 8
    assert tiny.rows(tmp_path / "stopped") == tiny.rows(tmp_path / "whole")


def test_who_asks_without_an_examiner_is_told(tiny, tmp_path):
    with pytest.raises(TrainingError, match=r"stages\.tiny\.stop_early asks the student to write"):
        tiny.run_stage(tmp_path, stop_early=STOP)


def raw_rows(folder):
    return [json.loads(line) for line in (folder / "stages/tiny/metrics.jsonl").read_text().splitlines()]


def test_speed_is_the_operations_of_the_interval_over_its_time(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "StageRun", type("Timed", (stage.StageRun,), {}))
    tiny.run_stage(tmp_path, steps=4, log_every_steps=2)
    rows = raw_rows(tmp_path)
    student, teacher = tiny.make_student(), tiny.make_teacher()
    stream = tiny.TinyStream()
    batches = [batch for _ in range(2) for batch in next(stream)]
    operations = step_flops(
        student.config.to_dict(),
        teacher.config.to_dict(),
        documents=Counter(length for batch in batches for length in batch.segments.lengths),
        num_labels=sum(batch.num_labels for batch in batches),
        trained={name for name, _ in student.named_parameters()},
    ).total
    assert rows[0]["speed"].keys() == {"tflops"}  # a CPU has no peak of its own in the table
    # the interval that speed sees ends a moment before that of the line
    assert rows[0]["speed"]["tflops"] * 1e12 * rows[0]["seconds"] == pytest.approx(operations, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, {"teacher", "mixers", "student", "loss", "optimizer", "other"}),
        ({"objective": {"kind": "ce"}}, {"teacher", "mixers", "student", "loss", "optimizer", "other"}),
        (
            {"objective": {"kind": "mixer_output"}, "train": ["mixer"]},
            {"teacher", "mixers", "student", "optimizer", "other"},
        ),
        (
            {"objective": {"kind": "block_output"}, "train": ["mixer", "mlp"]},
            {"teacher", "mixers", "student", "optimizer", "other"},
        ),
        ({"gradient_checkpointing": True}, {"teacher", "mixers", "student", "loss", "optimizer", "other"}),
    ],
)
def test_the_shares_of_a_step_are_all_of_it(tiny, tmp_path, changes, parts):
    tiny.run_stage(tmp_path, steps=3, log_every_steps=3, **changes)
    (row,) = raw_rows(tmp_path)
    assert row["shares"].keys() == parts
    assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-6)
    assert all(share >= 0 for share in row["shares"].values())
    assert row["shares"]["mixers"] > 0.05


def test_a_clock_sees_where_the_time_goes():
    """Against parts that sleep; hooks see both passes."""
    import time

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            time.sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(ctx.seconds)
            return gradient, None

    class Mixer(torch.nn.Module):
        def forward(self, hidden_states):
            return Slow.apply(hidden_states, 0.04), None

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = Mixer()

        def forward(self, x):
            return Slow.apply(x + self.self_attn(hidden_states=x)[0], 0.02)

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Block(), Block()])
            self.start = torch.nn.Parameter(torch.ones(3))

        def forward(self):
            x = self.start * 1
            for layer in self.layers:
                x = layer(x)
            return SimpleNamespace(last_hidden_state=x)

    decoder, clock = Decoder(), StepClock(torch.device("cpu"))
    blocks = list(decoder.layers)
    for measured in (False, True):
        # whoever measures a step from outside counts it once
        with clock.step(decoder, blocks, measured=measured), clock.step(decoder, blocks, measured=measured):
            with clock.part("teacher"):
                time.sleep(0.03)
            with clock.part("student"):
                loss = Slow.apply(decoder().last_hidden_state, 0.05).sum()
            with clock.part("student", backward=True):
                loss.backward()
            with clock.part("optimizer"):
                time.sleep(0.02)
            time.sleep(0.03)
        if not measured:
            assert clock.read() == {}
    found = clock.read()
    seconds = found.pop("seconds")
    wanted = {"teacher": 0.03, "mixers": 0.16, "student": 0.08, "loss": 0.1, "optimizer": 0.02, "other": 0.03}
    assert {name: share * seconds for name, share in found.items()} == pytest.approx(wanted, abs=0.03)
    assert clock.read() == {}


def test_a_clock_keeps_no_activations(tiny):
    """Where they are computed again, a mixer's output has those of its block behind it."""
    student, seen = tiny.make_student().train(), []
    clock = StepClock(torch.device("cpu"))
    with clock.step(student.model, [student.model.layers[0]], measured=True):
        student.model.layers[0].self_attn.register_forward_hook(
            lambda module, inputs, output: seen.append(weakref.ref(output[0]))
        )
        with clock.part("student"):
            student.model(torch.arange(8)[None])
        gc.collect()
        assert len(seen) == 1
        assert seen[0]() is None


def test_groups_add_up_to_the_whole_gradient_and_see_what_moves(tiny, tmp_path, monkeypatch):
    tiny.run_stage(tmp_path / "moving", steps=3, grad_clip=0.5)
    for row in tiny.rows(tmp_path / "moving"):
        groups = row["groups"]
        norms = [value for name, value in groups.items() if name.endswith("/grad_norm")]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(row["grad_norm"], rel=1e-5)
        assert row["grad_norm"] > 0.5
        assert len(norms) == 6
        assert groups["mlp/moved"] > 0.99
        assert 1e-4 < groups["mlp/change"] < 1e-2
    monkeypatch.setattr(weights, "_SETTLED_STEPS", 2)
    out, rates = StringIO(), {**dict.fromkeys(tiny.STAGE["train"], 1e-3), "mlp": 1e-30}
    tiny.run_stage(tmp_path / "still", steps=3, lr=rates, out=out)
    assert out.getvalue().count("steps few weights differ from the start (mlp 0%)") == 1
    groups = tiny.rows(tmp_path / "still")[-1]["groups"]
    assert (groups["mlp/moved"], groups["mlp/change"]) == (0, 0)
    assert groups["norm/moved"] > 0.5


def test_change_is_from_the_start_of_the_stage_also_after_a_resume(tiny, tmp_path):
    tiny.run_stage(tmp_path / "whole", **STEPS)
    tiny.run_stage(tmp_path / "cut", **STEPS)
    (tmp_path / "cut/stages/tiny/checkpoints/step-000004/state.json").unlink()
    tiny.run_stage(tmp_path / "cut", **STEPS)
    assert tiny.rows(tmp_path / "cut") == tiny.rows(tmp_path / "whole")


def test_a_sample_of_weights_is_not_of_one_layer_or_one_column():
    parameters = [torch.nn.Parameter(torch.full((64, 4096), float(number))) for number in range(84)]
    with torch.no_grad():
        for parameter in parameters:
            parameter += torch.arange(4096) / 4096
    found = weights._sample(parameters)
    kinds = {int(value) % 3 for value in found}
    assert kinds == {0, 1, 2}, "gate, up and down of every block"
    columns = (found.frac() * 4096).round().int()
    assert columns.unique().numel() > 1000
    assert len(found) <= 32 * 2 * 4096
    assert torch.equal(found, weights._sample(parameters))


def test_a_step_that_is_not_finite_has_no_norms_by_group(tiny, tmp_path):
    student, calls = tiny.make_student(), []

    def overflow(gradient):
        calls.append(1)
        # a step has two micro-batches; only this tensor's own gradient is spoilt
        return torch.full_like(gradient, float("inf")) if len(calls) == 3 else gradient

    student.model.norm.weight.register_hook(overflow)
    tiny.run_stage(tmp_path, student=student, steps=3)
    norms = [[name for name in row["groups"] if name.endswith("/grad_norm")] for row in tiny.rows(tmp_path)]
    assert [len(each) for each in norms] == [6, 0, 6]
    assert "mlp/moved" in tiny.rows(tmp_path)[1]["groups"]


def test_speed_counts_no_steps_from_before_a_return(tiny, tmp_path, monkeypatch):
    counted = []

    def count(*models, documents, **given):
        counted.append(sum(length * number for length, number in documents.items()))
        return step_flops(*models, documents=documents, **given)

    monkeypatch.setattr(speed, "step_flops", count)
    tiny.run_stage(
        tmp_path,
        student=tiny.spoil(tiny.make_student(), [5, 6, 7]),
        steps=8,
        log_every_steps=4,
        save_every_steps=3,
    )
    step = tiny.BATCH_SIZE * tiny.SEQ_LEN
    # a line after step 4; back from 7 to 3; again one after step 4, then after step 8
    assert counted == [4 * step, 1 * step, 4 * step]


def test_layers_are_compared_as_the_probe_does(tiny, tmp_path):
    out = StringIO()
    _, student = tiny.run_stage(tmp_path, job={"watch": WatchConfig(layers_every_steps=2)}, out=out, **STEPS)
    rows = tiny.rows(tmp_path)
    assert [sorted(row.get("layers", ())) for row in rows][::2] == [[], []]
    found = rows[-1]["layers"]
    sums = compare_layers(student, LiveTeacher(tiny.make_teacher()), [tiny.heldout()[0]])[0]
    assert found["0/cosine"] == pytest.approx(sums.mean_cosine, rel=1e-5)
    assert found["0/error"] == pytest.approx(sums.relative_error, rel=1e-5)
    assert found.keys() == {"0/cosine", "0/error", "0/half_life_5", "0/half_life_50", "0/half_life_95"}
    assert found["0/half_life_5"] < found["0/half_life_50"] < found["0/half_life_95"]
    assert f"worst cosine {found['0/cosine']:.3f} (layer 0)" in out.getvalue()


def test_no_step_asks_the_device_for_a_number(tiny, tmp_path, monkeypatch, asked, everything):
    """Everything is on, every step is measured; what is read is read between steps."""
    found, inside = [], []
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__"):
        real = getattr(torch.Tensor, name)

        def read(self, *arguments, real=real):
            found.extend(inside)
            return real(self, *arguments)

        monkeypatch.setattr(torch.Tensor, name, read)
    step = stage.StageRun.step

    def taken(run):
        run.fetched = run.fetched or next(run.stream)
        inside.append(run.progress.step)
        step(run)
        inside.clear()

    monkeypatch.setattr(stage.StageRun, "step", taken)
    tiny.run_stage(tmp_path, job=everything(), **models(asked), **STEPS)
    # transformers asks once in every forward pass of a model whether positions restart: two models, two micro-batches
    assert max(Counter(found).values()) <= 4


@pytest.mark.gpu
def test_shares_and_speed_on_a_gpu(tiny, tmp_path, asked, everything):
    from gendistill.training.parallel import Single

    parallel = Single(torch.device("cuda"))
    tiny.run_stage(tmp_path / "on", parallel=parallel, job=everything(), **models(asked), **STEPS)
    tiny.run_stage(tmp_path / "off", parallel=parallel, job={"watch": NOTHING}, **models(asked), **STEPS)
    row = raw_rows(tmp_path / "on")[-1]
    assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert row["shares"]["mixers"] > 0
    assert row["speed"]["tflops"] > 0
    on, off = losses(tiny, tmp_path / "on"), losses(tiny, tmp_path / "off")
    for a, b in zip(on, off, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
