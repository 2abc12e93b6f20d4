"""The library face: ten lines of Python from a teacher to a gap, and what is refused on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import gendistill as gd
from gendistill.api import calls
from gendistill.errors import CheckpointError, GendistillError, OutputError, RecipeError
from gendistill.training.interrupt import StageStopped
from gendistill.training.stage import StageRun
from gendistill_evals.errors import EvalError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [{"text": f"row {index}: " + "abc " * (3 + index % 7)} for index in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.fixture
def task(tmp_path):
    items = [
        {"id": str(i), "question": f"{i} + 1 =", "options": [f"{i + 1}", f"{i}"], "gold": 0} for i in range(4)
    ]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    path = tmp_path / "sums.yaml"
    path.write_text(
        "name: sums\nkind: multiple_choice\nitems: items.jsonl\nprompt: '{question}'\ngold: index\nmax_new_tokens: 4\n"
    )
    return path


def test_ten_lines_lead_from_a_teacher_to_a_gap(rows, task, tmp_path):
    teacher = gd.load("builtin:tiny", dtype="float32")
    student = gd.convert(teacher, "kda full", kda={"half_life": (4, 64)}, impl="reference")
    data = gd.dataset(rows, seq_len=32, heldout_rows=4, heldout_seq_len=32)
    before = gd.probe(student, teacher, data)
    result = gd.distill(
        student, teacher, data, lr=1e-3, steps=3, batch_size=4, micro_batch_size=2, quiet=True
    )
    folder = student.save(tmp_path / "student")
    scores = gd.evaluate(student, teacher=teacher, tasks=[task], limit=2)

    assert "kda" in str(student.plan)
    assert before["kl"] > 0
    assert result.steps == 3
    assert result.heldout["kl"] != before["kl"]
    again = gd.load(folder, dtype="float32")
    assert again.is_student
    assert again.generate("row 1:", max_new_tokens=4) == student.generate("row 1:", max_new_tokens=4)
    ids = torch.arange(5, 25)[None]
    torch.testing.assert_close(again.model(ids).logits, student.model(ids).logits)
    assert [each.task for each in scores.gap.tasks] == ["sums"]
    assert "sums" in str(scores)


def test_nothing_is_written_without_a_folder(rows, task, tmp_path):
    there = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    teacher = gd.load("builtin:tiny")
    student = gd.convert(teacher, "kda", impl="reference")
    data = gd.dataset(rows, seq_len=32, heldout_rows=4)
    gd.distill(student, teacher, data, lr=1e-3, steps=1, batch_size=2, micro_batch_size=2, quiet=True)
    gd.evaluate(student, teacher=teacher, tasks=[task], limit=1)
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == there


def test_a_teacher_alone_is_scored_too(task):
    scores = gd.evaluate(gd.load("builtin:tiny"), tasks=[task], limit=2)
    assert scores.gap.teacher is None
    assert set(scores.results) == {"student"}


def test_prompts_take_a_style_and_options_other_orders(tmp_path):
    (tmp_path / "quiz.jsonl").write_text(
        "".join(
            json.dumps({"question": f"{n}?", "options": ["x", "y"], "gold": "y"}) + "\n" for n in range(3)
        )
    )
    (tmp_path / "quiz.yaml").write_text(
        'kind: multiple_choice\nitems: quiz.jsonl\nprompt: "{question}"\nmax_new_tokens: 2\n'
    )
    style = {"chat_template": "off", "system": "Be short."}
    settings = {"protocols": ["likelihood_letter"], "permutations": 1, **style}
    found = gd.evaluate(
        gd.load("builtin:tiny"), tasks=tmp_path / "quiz.yaml", quiet=True, **settings
    ).results["student"]
    assert found["settings"]["style"] == {**style, "reasoning": False, "few_shot": 0}
    assert found["diagnostics"]["tasks"]["quiz"]["likelihood_letter"]["order"]["n"] == 3
    with pytest.raises(EvalError, match="few_shot asks for 2 examples, and the task has none"):
        gd.evaluate(gd.load("builtin:tiny"), tasks=tmp_path / "quiz.yaml", few_shot=2, quiet=True)


def test_items_may_hold_any_line_separator_of_unicode(task, tmp_path):
    items = [
        {"id": str(i), "question": f"{i}{mark}1 =", "options": ["2", f"3{mark}"], "gold": 0}
        for i, mark in enumerate("\u2028\u2029\x85")
    ]
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    (tmp_path / "items.jsonl").write_text(text, encoding="utf-8")
    scores = gd.evaluate(gd.load("builtin:tiny"), tasks=[task], folder=tmp_path / "kept")
    assert scores.results["student"]["tasks"][0]["generation"]["n"] == 3


def test_a_stage_that_stopped_goes_on_in_its_folder(rows, tmp_path):
    def train(steps, folder):
        teacher = gd.load("builtin:tiny", dtype="float32")
        student = gd.convert(teacher, "kda", impl="reference")
        data = gd.dataset(rows, seq_len=32, heldout_rows=4)
        settings = {"lr": 1e-3, "steps": steps, "batch_size": 2, "micro_batch_size": 2, "quiet": True}
        return gd.distill(student, teacher, data, folder=folder, **settings)

    first = train(2, tmp_path / "stage")
    assert (tmp_path / "stage" / "metrics.jsonl").is_file()
    assert train(2, tmp_path / "stage").heldout == first.heldout


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda t, s, d: gd.convert(t, "kdaa"), "kdaa"),
        (lambda t, s, d: gd.convert(t, "kda", kda={"half_lives": 3}), "half_lives"),
        (lambda t, s, d: gd.convert(t, "kda", gdn={}), "gdn"),
        (lambda t, s, d: gd.convert(t, ["kda"]), "lists 1"),
        (lambda t, s, d: gd.distill(s, t, d, steps=1), "lr"),
        (lambda t, s, d: gd.distill(s, t, d, lr=1e-3), "exactly one of tokens, steps, minutes"),
        (lambda t, s, d: gd.distill(s, t, d, lr=float("nan"), steps=1), "nan"),
        (lambda t, s, d: gd.distill(s, t, d, lr=torch.ones(1), steps=1), "Tensor"),
        (lambda t, s, d: gd.distill(s, t, d, lr=1e-3, steps=1, objective="kll"), "kll"),
        (lambda t, s, d: gd.distill(s, t, d, lr=1e-3, steps=1, train="mixers"), "mixers"),
        (lambda t, s, d: gd.distill(t, t, d, lr=1e-3, steps=1), "not a student"),
        (lambda t, s, d: gd.distill(s, t, d, lr=1e-3, steps=1, watch=5), "watch has to be a Mapping"),
        (
            lambda t, s, d: gd.distill(s, t, d, lr=1e-3, steps=1, watch={"speeed": True}),
            'did you mean "speed"',
        ),
        (
            lambda t, s, d: gd.distill(
                s, t, d, lr=1e-3, steps=1, watch={"score_every_steps": 1, "task": "nothing"}
            ),
            "nothing",
        ),
        (lambda t, s, d: gd.distill(s, t, d, lr=1e-3, steps=1, engine={"blocks": "fast"}), "fast"),
        (lambda t, s, d: gd.distill(s, t, d, lr=1e-3, steps=1, trackers="mlflow"), "mlflow"),
        (lambda t, s, d: gd.distill(s, t, d, lr=1e-3, steps=1, trackers="wandb"), "folder="),
        (lambda t, s, d: gd.run("tiny", watch={"speeed": True}), 'did you mean "speed"'),
        (lambda t, s, d: gd.run(gd.load_recipe("tiny"), engine={"loss": "auto"}), "not with a loaded one"),
        (lambda t, s, d: gd.evaluate(s, tasks=["nothing"]), "nothing"),
        (lambda t, s, d: gd.evaluate(s, tasks=["everyday"], protocols=["letters"]), "letters"),
        (lambda t, s, d: t.save("there"), "not a student"),
        (lambda t, s, d: gd.load("nowhere/at/all"), "nowhere"),
        (lambda t, s, d: gd.load(None), "str or Path, got NoneType"),
        (lambda t, s, d: gd.load("builtin:tiny", dtype="fp16"), "float32"),
        (lambda t, s, d: gd.load("builtin:tiny", device="gpu"), "no device 'gpu'"),
        (lambda t, s, d: gd.convert("builtin:tiny", "kda"), "teacher has to be a Model"),
        (lambda t, s, d: gd.convert(t.model, "kda"), "teacher has to be a Model"),
        (lambda t, s, d: gd.convert(t, None), "placement has to be a str"),
        (lambda t, s, d: gd.convert(t, "kda", kda=3), "kda has to be a Mapping"),
        (lambda t, s, d: gd.convert(s, "kda"), "nowhere on disk"),
        (lambda t, s, d: gd.dataset("rows.jsonl", fromat="messages"), 'did you mean "format"'),
        (lambda t, s, d: gd.dataset("rows.jsonl", mask="answers"), "answers"),
        (lambda t, s, d: gd.dataset(["rows.jsonl"]), "path has to be"),
        (lambda t, s, d: gd.probe(s, t, "rows.jsonl"), "data has to be a Dataset"),
        (lambda t, s, d: gd.distill(s, d, t, lr=1e-3, steps=1), "teacher has to be a Model"),
        (lambda t, s, d: gd.distill(s, t, d, lr=1e-3, steps=1, objective=None), "objective has to be"),
        (lambda t, s, d: gd.evaluate("student", tasks=["copy"]), "model has to be a Model"),
        (lambda t, s, d: gd.evaluate(s, teacher="builtin:tiny", tasks="copy"), "teacher has to be a Model"),
        (lambda t, s, d: gd.evaluate(s, tasks=[]), "nothing to score"),
        (lambda t, s, d: gd.run("nothing"), "nothing"),
    ],
)
def test_what_is_wrong_is_said_as_in_a_recipe(call, said, rows):
    teacher = gd.load("builtin:tiny")
    student = gd.convert(teacher, "kda", impl="reference")
    with pytest.raises((GendistillError, EvalError), match=said):
        call(teacher, student, gd.dataset(rows, seq_len=32, heldout_rows=4))


def test_errors_name_the_function_and_the_setting(rows):
    teacher = gd.load("builtin:tiny")
    with pytest.raises(RecipeError) as caught:
        gd.convert(teacher, "kda", kda={"conv_size": "four"})
    assert "gendistill.convert()  student.mixers.kda.conv_size" in str(caught.value)


def test_what_is_not_a_student_is_never_replaced(tmp_path):
    teacher = gd.load("builtin:tiny")
    student = gd.convert(teacher, "kda", impl="reference")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "work" / "run").mkdir(parents=True)
    teacher.model.save_pretrained(tmp_path / "teacher")
    for there in ("notes.txt", "work", "teacher"):
        with pytest.raises(OutputError, match="not a student"):
            student.save(tmp_path / there)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "work" / "run").is_dir()
    (tmp_path / "empty").mkdir()
    student.save(tmp_path / "empty")
    assert gd.load(student.save(tmp_path / "empty")).is_student


def test_values_show_themselves_in_one_line(rows, task):
    teacher = gd.load("builtin:tiny", dtype="float32")
    student = gd.convert(teacher, "kda full", impl="reference")
    assert repr(teacher) == "<Model builtin:tiny: Qwen3ForCausalLM, 47.7k parameters, float32 on cpu>"
    assert "student KFKF (2 kda, 2 full), 50.8k parameters" in repr(student)
    assert "KFKF" in repr(student.plan)
    data = gd.dataset(rows, seq_len=32, heldout_rows=4)
    result = gd.distill(student, teacher, data, lr=1e-3, steps=1, micro_batch_size=8, quiet=True)
    scores = gd.evaluate(student, teacher=teacher, tasks=task, limit=1)
    assert "held-out KL" in repr(result)
    for value in (teacher, student, student.plan, result, scores):
        assert len(repr(value)) < 160
        assert "\n" not in repr(value)
    assert "sums" in repr(scores)


def test_nothing_is_printed_that_nobody_asked_for(task, tmp_path, capfd):
    teacher = gd.load("builtin:tiny", dtype="float32")
    student = gd.convert(teacher, "kda full", impl="reference")
    gd.load(student.save(tmp_path / "student"))
    gd.evaluate(student, teacher=teacher, tasks=task, limit=1, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert "not measured" not in str(gd.evaluate(teacher, tasks=task, limit=1, quiet=True))


@pytest.mark.parametrize("folder", [None, "stage"])
def test_ctrl_c_says_what_is_left_and_how_to_go_on(rows, monkeypatch, folder):
    teacher = gd.load("builtin:tiny", dtype="float32")
    data = gd.dataset(rows, seq_len=32, heldout_rows=4)
    settings = {"lr": 1e-3, "steps": 3, "batch_size": 2, "micro_batch_size": 2, "quiet": True}
    step = StageRun.step

    def interrupted(run):
        os.kill(os.getpid(), signal.SIGINT)
        return step(run)

    student = gd.convert(teacher, "kda", impl="reference")
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "step", interrupted)
        with pytest.raises(StageStopped) as stopped:
            gd.distill(student, teacher, data, folder=folder, **settings)
    said = str(stopped.value)
    assert "SIGINT at step 1 of 3" in said
    assert "command" not in said
    if folder is None:
        # the temporary folder is gone with all that it held
        assert "saved" not in said
        return
    with pytest.raises(CheckpointError, match="as it was when the stage began"):
        gd.distill(student, teacher, data, folder=folder, **settings)
    again = gd.convert(teacher, "kda", impl="reference")
    assert gd.distill(again, teacher, data, folder=folder, **settings).steps == 3


def test_a_stage_is_watched_tracked_and_computed_as_asked(rows, task, tmp_path, monkeypatch):
    runs = []
    module: Any = ModuleType("wandb")
    module.config = SimpleNamespace(update=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", module)
    real = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: name == "wandb" or real(name))
    jobs = []
    train = calls.train_stage
    monkeypatch.setattr(calls, "train_stage", lambda job, **given: (jobs.append(job), train(job, **given))[1])

    def logs(values, step=None):
        runs[-1].logged.append((step, values))

    teacher = gd.load("builtin:tiny")
    student = gd.convert(teacher, "kda full", impl="reference")
    data = gd.dataset(rows, seq_len=32, heldout_rows=4, heldout_seq_len=32)
    module.init = lambda **_: (
        runs.append(SimpleNamespace(logged=[], log=logs, finish=lambda: None)) or runs[-1]
    )
    (tmp_path / "open.jsonl").write_text('{"id": "why", "question": "Why?"}\n')
    gd.distill(
        student,
        teacher,
        data,
        lr=1e-3,
        steps=2,
        batch_size=4,
        log_every_steps=1,
        folder=tmp_path / "stage",
        watch={
            "answers_every_steps": 2,
            "questions": "open.jsonl",
            "answer_tokens": 3,
            "score_every_steps": 2,
            "task": str(task),
        },
        trackers="wandb",
        engine={"blocks": "fused", "prefetch": 0},
        quiet=True,
    )
    assert (jobs[0].engine.blocks, jobs[0].engine.prefetch) == ("fused", 0)
    (answer,) = map(json.loads, (tmp_path / "stage/answers.jsonl").read_text().splitlines())
    assert (answer["step"], answer["question"]) == (2, "Why?")
    assert answer["num_tokens"] <= 3
    last = json.loads((tmp_path / "stage/metrics.jsonl").read_text().splitlines()[-1])
    assert last["score"]["n"] == 4
    assert [step for step, _ in runs[0].logged] == [1, 2]


def test_a_stage_that_stops_early_does_not_go_on_with_other_items(rows, task, tmp_path):
    teacher = gd.load("builtin:tiny")
    data = gd.dataset(rows, seq_len=32, heldout_rows=4, heldout_seq_len=32)

    def train():
        gd.distill(
            gd.convert(teacher, "kda full", impl="reference"),
            teacher,
            data,
            lr=1e-3,
            steps=2,
            batch_size=4,
            folder=tmp_path / "stage",
            stop_early={"task": str(task), "every_steps": 1},
            quiet=True,
        )

    train()
    items = tmp_path / "items.jsonl"
    items.write_text(items.read_text().replace("+ 1", "+ 2"))
    with pytest.raises(CheckpointError, match="stop_early"):
        train()


def test_how_a_recipe_runs_is_said_in_python_too_and_changes_nothing_that_comes_out(tmp_path):
    output = f"output={tmp_path / 'runs'}"
    first = gd.run("tiny", output, watch={"speed": False, "groups": False}, engine={"blocks": "fused"})
    rows = [json.loads(line) for line in next(first.folder.glob("stages/*/metrics.jsonl")).open()]
    assert not {"speed", "groups"} & rows[0].keys()
    again = gd.run("tiny", output, trackers=[])
    assert [json.loads(line) for line in next(again.folder.glob("stages/*/metrics.jsonl")).open()] == rows


def test_a_recipe_runs_into_its_folder(tmp_path):
    done = gd.run("tiny", f"output={tmp_path / 'runs'}")
    assert done.page.is_file()
    assert done.student().is_student
    assert done.gap().name == "tiny"


def test_everything_that_the_package_names_is_there():
    for name in gd.__all__:
        assert getattr(gd, name) is not None
    assert set(gd.__all__) == set(dir(gd))


def test_prompts_are_answered_many_at_a_time():
    model = gd.load("builtin:tiny", dtype="float32")
    asked = ["one", [{"role": "user", "content": "the second"}], "x" * 4000]
    first, second, long = gd.generate(model, asked, max_new_tokens=20)
    # as transformers answers one
    assert first.text == model.generate("one", max_new_tokens=20).strip()
    assert second.text == model.generate("the second", max_new_tokens=20).strip()
    assert "positions" in long.error
    (alone,) = gd.generate(model, "one", max_new_tokens=20)
    assert alone.token_ids == first.token_ids


def test_answers_are_drawn_and_end_as_asked():
    model = gd.load("builtin:tiny", dtype="float32")
    free = {"max_new_tokens": 16, "end_tokens": []}
    drawn = gd.generate(model, ["one", "one"], temperature=1.0, seed=3, **free)
    assert drawn[0].token_ids != drawn[1].token_ids
    assert gd.generate(model, "one", temperature=1.0, seed=4, **free)[0].token_ids == drawn[1].token_ids
    assert [len(answer.token_ids) for answer in drawn] == [16, 16]
    (whole,) = gd.generate(model, "one", raw=True, **free)
    (stopped,) = gd.generate(model, "one", raw=True, stop=whole.text[4], **free)
    assert stopped.ended
    assert stopped.text == whole.text[: whole.text.index(whole.text[4])]
    assert gd.generate(model, "one", system="Be kind.", **free)[0].token_ids != whole.token_ids


@pytest.mark.parametrize(
    ("asked", "settings", "said"),
    [
        (["one"], {"temperature": -1.0}, "temperature"),
        (["one"], {"top_p": 3.0}, "top_p"),
        (["one"], {"stop": [""]}, "stop text"),
        (["one"], {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (["one"], {"end_tokens": ["no token"]}, "not a token"),
        (["one"], {"raw": True, "system": "x"}, "system"),
        ([[{"role": "user", "content": "x"}]], {"raw": True}, "turns of a chat"),
        ([[{"role": "assistant", "content": "x"}]], {}, "nothing to answer"),
        ([[]], {}, "list of turns"),
        ([[{"role": "user"}]], {}, "list of turns"),
        (["\udc80"], {}, "half of a character"),
        ([3], {}, "list of turns"),
        (7, {}, "prompts has to be a str or Sequence"),
    ],
)
def test_what_cannot_be_answered_is_refused(asked, settings, said):
    with pytest.raises((GendistillError, EvalError), match=said):
        gd.generate(gd.load("builtin:tiny"), asked, **settings)
