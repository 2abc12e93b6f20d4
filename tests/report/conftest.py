"""Synthetic run folders with numbers chosen by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gendistill.report import plots
from gendistill_evals.results import SCHEMA

SETTINGS = {
    "do_sample": False,
    "max_new_tokens": 64,
    "chat_template_sha256": "c" * 64,
    "batch_size": 8,
    "overrode": {},
}


QUESTION = {"prompt": "Question\nAnswer:", "options": ["alpha", "beta"], "gold": 1}
COUNTS = {"extraction_failures": 1, "truncated": 2, "eos_rate": 0.75, "mean_new_tokens": 4.0, "seconds": 1.0}
HASHES = {"items_sha256": "a" * 64, "prompt_sha256": "b" * 64}

# Correctness per item, by task: (likelihood, generation). On quiz the two are equal by likelihood, and by
# generation the student loses 8 of 20 items.
Scores = dict[str, tuple[list[int] | None, list[int] | None]]
TEACHER: Scores = {"quiz": ([1] * 12 + [0] * 8, [1] * 16 + [0] * 4), "sums": (None, [1, 1, 1, 0])}
STUDENT: Scores = {"quiz": ([1] * 12 + [0] * 8, [1] * 8 + [0] * 12), "sums": (None, [1, 0, 1, 0])}


def _sample(task: str, index: int, likelihood: int | None, generation: int | None) -> dict[str, Any]:
    row: dict[str, Any] = {
        "task": task,
        "id": f"{index:03d}",
        **QUESTION,
        "likelihood": None,
        "generation": None,
    }
    if likelihood is not None:
        row["likelihood"] = {"correct": bool(likelihood), "choice": likelihood, "scores": [-1.0, -2.0]}
    if generation is not None:
        word = QUESTION["options"][generation]
        row["generation"] = {"correct": bool(generation), "text": f"it is {word}", "extracted": word}
        row["generation"] |= {"truncated": False, "ended": True, "num_tokens": 4}
    return row


def _entry(task: str, likelihood: list[int] | None, generation: list[int] | None) -> dict[str, Any]:
    num_items = len(likelihood or generation or [])
    entry = {
        "task": task,
        "kind": "multiple_choice",
        "metric": "acc",
        **HASHES,
        "n": num_items,
        "limit": None,
    }
    entry["likelihood"] = likelihood and {
        "value": sum(likelihood) / num_items,
        "n": num_items,
        "seconds": 1.0,
    }
    entry["likelihood_reason"] = None if likelihood else "the answer is a number"
    entry["generation"] = generation and {"value": sum(generation) / num_items, "n": num_items, **COUNTS}
    return entry


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_eval(run_dir: Path, role: str, scores: Scores) -> None:
    rows = [
        _sample(task, index, likelihood and likelihood[index], generation and generation[index])
        for task, (likelihood, generation) in scores.items()
        for index in range(len(likelihood or generation or []))
    ]
    write_lines(run_dir / "eval" / role / "samples.jsonl", rows)
    head = {"schema": SCHEMA, "model": f"models/{role}", "role": role, "date": "2026-01-02", "versions": {}}
    head |= {"device": "cpu", "dtype": "float32", "settings": SETTINGS, "transcripts": None}
    tasks = [_entry(task, *vectors) for task, vectors in scores.items()]
    (run_dir / "eval" / role / "results.json").write_text(json.dumps({**head, "tasks": tasks}))


def heldout(kl: float) -> dict[str, Any]:
    scores = {"teacher_ce": 2.5, "student_ce": 2.5 + kl, "kl": kl, "top1_agreement": 1 / (1 + kl)}
    return {**scores, "ln_vocab": 10.8, "num_tokens": 32_768}


def write_training(run_dir: Path, name: str) -> None:
    manifest: dict[str, Any] = {"name": name, "date": "2026-01-02", "command": f"gendistill run {name}"}
    manifest |= {
        "versions": {"torch": "2.13.0"},
        "commit": "0123abc",
        "device": "2 CPU cores",
        "dtype": "float32",
        "impl": "reference",
    }
    manifest["teacher"] = {
        "spec": "org/teacher",
        "fingerprint": "f",
        "num_layers": 4,
        "num_parameters": 135_000_000,
    }
    manifest["student"] = {"placement": ["kda", "full", "kda", "full"], "num_parameters": 140_000_000}
    manifest["cache_bytes"] = [{"tokens": t, "teacher": 4096 * t, "student": 1024 * t} for t in (512, 4096)]
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    stages = "stages:\n  project: {}\n  distill: {}\n"
    (run_dir / "recipe.yaml").write_text(f"schema: 1\n{stages}eval:\n  limit: 200\n")
    layers = [{"layer": layer, "kind": "kda", "cosine": 0.5, "relative_error": 0.9} for layer in (0, 2)]
    (run_dir / "convert").mkdir()
    (run_dir / "convert" / "probe.json").write_text(json.dumps({**heldout(4.0), "layers": layers}))
    for stage, objective, kl in (("project", "mixer_output", 2.0), ("distill", "kl", 0.8)):
        rows = [
            {"step": step, "tokens": 512 * step, "loss": 1 / step, "lr": {"mixer": 1e-3}}
            for step in range(1, 11)
        ]
        write_lines(run_dir / "stages" / stage / "metrics.jsonl", rows)
        result = {"stage": stage, "objective": objective, "steps": 10, "tokens": 5120, "seconds": 90.0}
        result |= {"loss_first": 1.0, "loss_last": 0.1, "heldout": heldout(kl)}
        (run_dir / "stages" / stage / "result.json").write_text(json.dumps(result))


def _transcript(answer: str, *, repeated: float, nll: float) -> dict[str, Any]:
    row = {"id": "q1", "question": "What is the capital of France?", "answer": answer, "num_tokens": 3}
    return {**row, "truncated": False, "repeated_4gram_share": repeated, "teacher_nll": nll}


@pytest.fixture
def quick_figures(monkeypatch):
    """Draw the letters of a PDF as shapes: to embed a part of a font takes half the time of a report."""
    monkeypatch.setitem(plots._STYLE, "pdf.fonttype", 3)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a complete run folder; ``teacher=`` and ``student=`` replace a model's scores, None leaves it out."""

    def make(name: str = "demo", **scores: Scores | None) -> Path:
        run_dir = tmp_path / name
        run_dir.mkdir()
        for role, vectors in {"teacher": TEACHER, "student": STUDENT, **scores}.items():
            if vectors is not None:
                write_eval(run_dir, role, vectors)
        write_training(run_dir, name)
        write_lines(
            run_dir / "eval/teacher/transcripts.jsonl", [_transcript("Paris.", repeated=0.0, nll=0.25)]
        )
        write_lines(
            run_dir / "eval/student/transcripts.jsonl",
            [_transcript("Rome & Rome.", repeated=0.5, nll=0.75)],
        )
        return run_dir

    return make


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[Any], object]], None]:
    """Change a JSON file in place."""

    def edit(path: Path, change: Callable[[Any], object]) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit
