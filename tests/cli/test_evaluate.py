"""``gendistill eval MODEL``: what is refused before a model is loaded, and where results go."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gendistill.runs import scoring
from gendistill.testing import save_tiny_checkpoint
from gendistill_evals.results import SCHEMA, write_results

TASK = 'kind: exact_match\nitems: rows.jsonl\nprompt: "{question}"\nmax_new_tokens: 2\n'


@pytest.fixture
def asked(monkeypatch):
    """What reaches the pipeline, which loads no model."""
    calls = []

    def record(model, **settings):
        calls.append({"model": model, **settings})
        return {"tasks": []}

    monkeypatch.setattr(scoring, "score_checkpoint", record)
    return calls


@pytest.fixture
def task(workspace) -> Path:
    (workspace / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"{n}?", "gold": "b"}) + "\n" for n in range(3))
    )
    path = workspace / "mine.yaml"
    path.write_text(TASK)
    return path


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["x", "--tasks", "copy,copy"], "two tasks have the name copy", 2),
        (["x", "--tasks", "copy, copy"], "two tasks have the name copy", 2),
        (["x", "--tasks", "mine.yaml,./mine.yaml"], "two tasks have the name mine", 2),
        (["x", "--tasks", "copi"], 'did you mean "copy"', 2),
        (["x", "--tasks", " , ,"], "nothing to score", 2),
        (["x", "--tasks", "gone.yaml"], "there is no file", 2),
        (["x", "--tasks", "~nobody-of-that-name/x.yaml"], "is not a name or a path", 2),
        (["x", "--tasks", "a\0b.yaml"], "NUL", 2),
        (["x", "--tasks", "a\udc80b.yaml"], "not UTF-8", 2),
        (["x", "--tasks", "n" * 5_000 + ".yaml"], "is not a name or a path", 2),
        (["x", "--questions", "dmo"], 'did you mean "demo"', 2),
        (["x", "--questions", ""], "--questions", 2),
        (["x", "--questions", "a\udc80.jsonl"], "--questions", 2),
        (["", "--tasks", "copy"], "is empty", 2),
        (["a\0b", "--tasks", "copy"], "NUL", 2),
        (["a\udc80b", "--tasks", "copy"], "not UTF-8", 2),
        (["~nobody-of-that-name/x", "--tasks", "copy"], "is not a name or a path", 2),
        (["n" * 5_000, "--tasks", "copy"], "is not a name or a path", 2),
        (["x", "--tasks", "copy", "--teacher", ""], "--teacher", 2),
        (["x", "--tasks", "copy", "--teacher", "~nobody-of-that-name/x"], "--teacher", 2),
        (["x", "--tasks", "copy", "--teacher", "a\udc80b"], "--teacher", 2),
        (["x", "--tasks", "copy", "--out", ""], "--out", 2),
        (["x", "--tasks", "copy", "--out", "mine.yaml"], "is not a folder", 2),
        (["x", "--tasks", "copy", "--out", "mine.yaml/inner"], "is not a folder", 2),
        (["x", "--tasks", "copy", "--out", "a\0b"], "NUL", 2),
        (["x", "--tasks", "copy", "--limit", "\u00b2"], "not a number above 0", 2),
        (["x", "--tasks", "copy", "--limit", "9" * 5_000], "not a number above 0", 2),
        (["x", "--tasks", "copy", "--limit", "-1"], "not a number above 0", 2),
        (["x", "--tasks", "copy", "--batch-size", "0"], "not a number above 0", 2),
        (["x", "--tasks", "copy", "--batch-size", "1.5"], "not a number above 0", 2),
        (["x", "--tasks", "copy", "--few-shot", "2"], "few_shot asks for 2 examples", 1),
        (["x", "--tasks", "mine.yaml", "--protocols", "likelihood"], "can score none of the tasks", 2),
        (["x", "--suite", "code", "--data", "sample"], "humaneval cannot be scored", 1),
        (["tiny", "eval.tasks=[copy, copy]"], "two tasks have the name copy", 2),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_model_is_loaded(cli, asked, task, words, message, code):
    found, _, err = cli("eval", *words)
    assert found == code, err
    assert message in err
    assert "next:" in err
    assert "internal error" not in err
    assert len(err) < 2_000
    err.encode()
    assert asked == []


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/some.model", "org-some.model"),
        ("..", "model"),
        (".", "model"),
        ("../..", "model"),
        ("../up", "up"),
        ("/abs/olute", "abs-olute"),
        ("~/.cache/x", "cache-x"),
        ("a b\tc", "a-b-c"),
        ("Modell-\u00e4\u4e2d", "Modell"),
        ("with_under", "with-under"),
        ("pypi:thing", "pypi-thing"),
        ("a/./../b", "a-.-..-b"),
        ("-rf", "rf"),
        ("x/" + "n" * 200, "n" * 100),
    ],
)
def test_results_go_to_a_folder_named_after_the_model(cli, asked, workspace, model, name):
    assert cli("eval", "--tasks", "copy", "--", model)[0] == 0
    (call,) = asked
    assert call["out"] == Path("evals") / name
    assert re.fullmatch(r"[A-Za-z0-9.-]+", name)


def test_blanks_between_tasks_do_not_count(cli, asked, task):
    assert cli("eval", "x", "--tasks", " copy, ,mine.yaml ,")[0] == 0
    assert [each.name for each in asked[0]["tasks"]] == ["copy", "mine"]


@pytest.mark.parametrize(("limit", "marked"), [("2", True), ("3", False), ("999999999999", False)])
def test_limit_is_shown_where_items_are_left_out(cli, workspace, task, limit, marked):
    teacher = save_tiny_checkpoint(workspace / "teacher")
    code, out, err = cli("eval", str(teacher), "--tasks", "mine.yaml", "--limit", limit, "--out", "out")
    assert code == 0, err
    assert ("LIMIT" in out) == marked
    entry = json.loads((workspace / "out" / "results.json").read_text())["tasks"][0]
    assert entry["limit"] == (2 if marked else None)


def test_scores_of_another_model_are_not_replaced(cli, asked, workspace):
    write_results(workspace / "out", {"schema": SCHEMA, "model": "org/a", "settings": {}, "tasks": []})
    code, _, err = cli("eval", "org/b", "--tasks", "copy", "--out", "out")
    assert code == 2
    assert "out holds the scores of another model, org/a" in err
    assert asked == []
    assert cli("eval", "org/a", "--tasks", "copy", "--out", "out")[0] == 0
    (workspace / "out" / "results.json").write_text("not JSON")
    assert cli("eval", "org/b", "--tasks", "copy", "--out", "out")[0] == 0


def test_a_model_that_is_a_file_is_refused(cli, workspace, task):
    (workspace / "file").write_text("x")
    code, _, err = cli("eval", "file", "--tasks", "copy")
    assert code == 1
    assert "is a file" in err
