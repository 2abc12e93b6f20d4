"""An evaluation that was killed goes on where it was, and ends as one that was not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gendistill_evals.results import read_results

SCRIPT = Path(__file__).with_name("killed_evaluation.py")
# 11 options of 4 items, 4 answers, 3 open answers and their scores.
NUM_ASKED = 11 + 4 + 3 + 3


@pytest.fixture(scope="module")
def killed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("killed_evaluation", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, chat_tokenizer, colors):
    chat_tokenizer.save_pretrained(colors.parent / "tokenizer")
    names = ("Where?", "Who?", "Why?")
    (colors.parent / "open.jsonl").write_text("".join(f'{{"question": "{name}"}}\n' for name in names))
    return colors.parent


@pytest.fixture
def evaluate(killed, folder, chat_tokenizer, tmp_path):
    """Score in this process; returns what the model was asked."""

    def run(out, **settings):
        model = killed.Slow(chat_tokenizer, lambda number, name: None)
        killed.evaluate(folder, tmp_path / out, model, **settings)
        return model.asked

    return run


@pytest.fixture
def start(folder, tmp_path):
    """Start an evaluation in another process and return when it waits before an answer."""
    started = []

    def run(stop):
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(tmp_path / "out"), str(stop)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def written(out):
    """Read what an evaluation writes, without date and durations."""
    results = read_results(out)
    del results["date"]
    for task in results["tasks"]:
        for name in ("likelihood", "generation"):
            del task[name]["seconds"]
    return results, *((out / f"{name}.jsonl").read_bytes() for name in ("samples", "transcripts"))


# In the middle of each kind of question: options, answers, open answers, the teacher's scores.
@pytest.mark.parametrize("stop", [4, 13, 16, 19])
def test_a_killed_evaluation_goes_on_where_it_was(evaluate, start, tmp_path, stop):
    everything = evaluate("alone")
    assert len(everything) == NUM_ASKED
    process = start(stop)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert evaluate("out") == everything[stop:]
    assert written(tmp_path / "out") == written(tmp_path / "alone")
    assert evaluate("out") == []


def test_a_smaller_run_before_changes_nothing(evaluate, tmp_path):
    everything = evaluate("alone")
    first = evaluate("out", limit=3)
    second = evaluate("out")
    assert sorted(first + second) == sorted(everything)
    assert written(tmp_path / "out") == written(tmp_path / "alone")


def test_several_processes_may_write_at_once(evaluate, start, tmp_path, capsys):
    """Each has looked at what there is, nothing, before any of them writes."""
    processes = [start(0) for _ in range(3)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.wait(60) == 0
    assert len(list((tmp_path / "kept" / "out").glob("log_probs-*"))) == len(processes)
    assert evaluate("out") == []
    evaluate("alone")
    assert written(tmp_path / "out") == written(tmp_path / "alone")
    assert capsys.readouterr().err == ""


def test_what_another_process_has_finished_is_not_asked(evaluate, start, tmp_path, capsys):
    start(6)
    assert evaluate("out") == evaluate("alone")[6:]
    assert written(tmp_path / "out") == written(tmp_path / "alone")
    assert capsys.readouterr().err == ""
