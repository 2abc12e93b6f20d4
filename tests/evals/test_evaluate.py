from __future__ import annotations

import json

import pytest

from gendistill_evals import EvalError, evaluate_model
from gendistill_evals.results import (
    SCHEMA,
    read_json,
    read_results,
    read_samples,
    read_transcripts,
    write_json,
    write_results,
)
from gendistill_evals.stats import gap, hidden_gap


@pytest.fixture
def numbers(write_task):
    rows = [{"question": f"{n} and 1?", "gold": str(n + 1)} for n in range(3)]
    return write_task(rows, stem="numbers", kind="numeric")


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "open.jsonl"
    path.write_text('{"id": "a", "question": "Where?"}\n')
    return path


@pytest.fixture
def evaluate(chat_tokenizer, tmp_path, colors, numbers):
    def run(model, folder="out", **settings):
        settings = {"tasks": [colors, numbers], "model_name": "demo", "batch_size": 2, **settings}
        return evaluate_model(model, chat_tokenizer, out_dir=tmp_path / folder, **settings)

    return run


def correct(folder, protocol, task="colors"):
    return [row[protocol]["correct"] for row in read_samples(folder) if row["task"] == task]


def test_files_have_exactly_the_documented_fields(evaluate, tiny_llama, questions, tmp_path):
    results = evaluate(
        tiny_llama, role="teacher", questions=questions, question_tokens=5, teacher=tiny_llama, limit=2
    )
    folder = tmp_path / "out"
    assert read_results(folder) == results
    assert results.keys() == {
        "schema", "model", "role", "date", "versions", "device", "dtype", "settings", "tasks", "transcripts",
        "diagnostics",
    }  # fmt: skip
    assert (results["schema"], results["model"], results["role"]) == (SCHEMA, "demo", "teacher")
    assert (results["device"], results["dtype"]) == ("cpu", "float32")
    assert results["settings"]["batch_size"] == 2
    assert len(results["settings"]["chat_template_sha256"]) == 64
    assert results["transcripts"] == {"n": 1, "max_new_tokens": 5}
    colors, numbers = results["tasks"]
    assert colors.keys() == {
        "task", "kind", "judge", "metric", "items_sha256", "prompt_sha256", "n", "limit", "likelihood",
        "likelihood_reason", "generation", "generation_reason",
    }  # fmt: skip
    assert (colors["task"], colors["kind"], colors["metric"]) == ("colors", "multiple_choice", "accuracy")
    assert (colors["n"], colors["limit"], colors["judge"]) == (2, 2, "option")
    assert (colors["likelihood_reason"], colors["generation_reason"]) == (None, None)
    assert colors["likelihood"].keys() == {"value", "n", "seconds"}
    assert colors["generation"].keys() == {
        "value", "n", "extraction_failures", "truncated", "eos_rate", "mean_new_tokens", "seconds"
    }  # fmt: skip
    assert numbers["likelihood"] is None
    assert "distractors" in numbers["likelihood_reason"]
    samples = read_samples(folder)
    assert [(row["task"], row["id"]) for row in samples] == [
        ("colors", "banana"), ("colors", "sky"), ("numbers", "0"), ("numbers", "1")
    ]  # fmt: skip
    assert samples[0].keys() == {
        "task", "id", "group", "prompt", "options", "gold", "likelihood", "generation"
    }  # fmt: skip
    assert samples[0]["likelihood"].keys() == {
        "correct", "choice", "scores", "scores_per_token", "scores_per_char", "prompt_sha256"
    }  # fmt: skip
    assert samples[0]["generation"].keys() == {
        "correct", "choice", "text", "extracted", "truncated", "ended", "num_tokens", "repeats", "prompt_sha256"
    }  # fmt: skip
    assert (samples[2]["options"], samples[2]["likelihood"]) == (None, None)
    (transcript,) = read_transcripts(folder)
    assert transcript.keys() == {
        "id", "question", "answer", "num_tokens", "truncated", "repeated_4gram_share", "teacher_nll"
    }  # fmt: skip
    assert transcript["teacher_nll"] > 0


@pytest.mark.parametrize(
    ("limit", "recorded", "n"), [(None, None, 4), (3, 3, 3), (4, None, 4), (10**30, None, 4)]
)
def test_a_limit_is_recorded_where_it_leaves_items_out(evaluate, tiny_llama, limit, recorded, n):
    colors, _ = evaluate(tiny_llama, limit=limit)["tasks"]
    assert (colors["limit"], colors["n"]) == (recorded, n)


def test_a_protocol_that_is_not_asked_for_is_null(evaluate, tiny_llama):
    colors, _ = evaluate(tiny_llama, protocols=["generation"])["tasks"]
    assert colors["likelihood"] is None
    assert colors["likelihood_reason"] == "not asked for"
    assert colors["generation"]["n"] == 4


def test_a_model_against_itself_has_no_gap(evaluate, tiny_llama, tmp_path):
    evaluate(tiny_llama, "teacher", role="teacher")
    evaluate(tiny_llama, "student", role="student")
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    for protocol in ("likelihood", "generation"):
        zero = gap(correct(teacher, protocol), correct(student, protocol))
        assert (zero.value, zero.low, zero.high) == (0.0, 0.0, 0.0)


def test_broken_form_is_a_generation_gap_that_likelihood_hides(evaluate, speaker, right_answer, tmp_path):
    """A student that knows every answer but never says one has lost nothing by log-likelihood."""
    colors = {"protocols": ("likelihood", "generation")}
    evaluate(speaker(right_answer, prefers=right_answer), "teacher", **colors)
    evaluate(
        speaker(lambda prompt: "assistant assistant", prefers=right_answer, ends=False), "student", **colors
    )
    scores = {
        f"{role}_{protocol}": correct(tmp_path / role, protocol)
        for role in ("teacher", "student")
        for protocol in ("likelihood", "generation")
    }
    assert all(scores["teacher_likelihood"])
    assert scores["student_likelihood"] == scores["teacher_likelihood"]
    assert gap(scores["teacher_generation"], scores["student_generation"]).value == -1
    hidden = hidden_gap(**scores)
    assert (hidden.value, hidden.low, hidden.high) == (-1, -1, -1)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(evaluate, speaker, right_answer, tmp_path):
    def interrupt(task, protocol, done, total):
        if (task, protocol, done) == ("colors", "generation", 2):
            raise KeyboardInterrupt

    model = speaker(right_answer, prefers=right_answer)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, progress=interrupt)
    assert not (tmp_path / "out" / "results.json").exists()

    spent = model.num_forwards
    first = evaluate(model)
    assert model.num_forwards > spent
    alone = evaluate(model, "alone")
    assert [entry["generation"] | {"seconds": 0} for entry in first["tasks"]] == [
        entry["generation"] | {"seconds": 0} for entry in alone["tasks"]
    ]
    spent = model.num_forwards
    again = evaluate(model)
    assert model.num_forwards == spent
    assert again["tasks"] == first["tasks"]


def test_progress_ends_at_the_number_of_items(evaluate, tiny_llama, questions):
    last = {}
    evaluate(
        tiny_llama,
        questions=questions,
        question_tokens=2,
        progress=lambda task, protocol, done, total: last.update({(task, protocol): (done, total)}),
    )
    assert last[("colors", "likelihood")] == last[("colors", "generation")] == (4, 4)
    assert last[("numbers", "generation")] == (3, 3)
    assert last[(str(questions), "transcripts")] == (1, 1)


def test_answers_of_an_earlier_evaluation_do_not_stay(evaluate, tiny_llama, questions, tmp_path):
    evaluate(tiny_llama, questions=questions, question_tokens=2)
    assert evaluate(tiny_llama)["transcripts"] is None
    assert read_transcripts(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("settings", "message", "code"),
    [
        ({"protocols": ["likelyhood"]}, "protocols must be", 2),
        ({"protocols": []}, "got none", 2),
        ({"role": "judge"}, "role must be", 2),
        ({"limit": 0}, "limit must be at least 1", 2),
        ({"tasks": ["everydy"]}, "there is no task", 2),
        ({"tasks": ["everyday", "everyday"]}, "two tasks have the name", 2),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_runs(
    evaluate, speaker, right_answer, settings, message, code
):
    model = speaker(right_answer)
    with pytest.raises(EvalError, match=message) as caught:
        evaluate(model, **settings)
    assert caught.value.exit_code == code
    assert model.num_forwards == 0


def test_a_folder_that_cannot_be_written_is_an_error_with_its_path(evaluate, tiny_llama, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EvalError, match="cannot write") as caught:
        evaluate(tiny_llama)
    assert str(tmp_path / "out") in caught.value.where
    assert caught.value.hint


def test_files_that_are_broken_or_of_another_version_are_errors_with_a_next_step(tmp_path):
    with pytest.raises(EvalError, match="no such file"):
        read_results(tmp_path)
    write_json(tmp_path / "results.json", {"schema": 1})
    with pytest.raises(EvalError, match=f"schema 1, this version reads {SCHEMA}") as caught:
        read_results(tmp_path)
    assert "score the model again" in caught.value.hint
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(EvalError, match="not JSON"):
        read_results(tmp_path)
    (tmp_path / "samples.jsonl").write_text(
        json.dumps({"task": "a", "id": "0", "likelihood": None, "generation": None}) + "\n{\n"
    )
    with pytest.raises(EvalError, match="not JSON") as caught:
        read_samples(tmp_path)
    assert caught.value.where.endswith("samples.jsonl:2")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_results(tmp_path, {"schema": 1, "value": 1.0})
    with pytest.raises(ValueError):
        write_results(tmp_path, {"schema": 1, "value": float("nan")})
    assert read_json(tmp_path / "results.json")["value"] == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
