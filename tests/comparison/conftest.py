"""Folders as lm-eval writes them with --log_samples, by hand, with scores chosen by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from gendistill_evals import results

COUNTS = {"extraction_failures": 0, "truncated": 0, "eos_rate": 1.0, "mean_new_tokens": 4.0, "seconds": 1.0}
DATE = "2026-01-02T03-04-05.678901"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def a_ranked_row(
    doc_id: int, right: float, *, metrics: Sequence[str] = ("acc", "acc_norm")
) -> dict[str, Any]:
    """A line of a multiple-choice task with two options, of which the first is right."""
    doc = {"question": f"question {doc_id}?", "choices": ["yes", "no"], "passage": f"passage {doc_id // 3}"}
    scores = ["-1.0", "-2.0"] if right else ["-2.0", "-1.0"]
    prompt = f"Question: question {doc_id}?\nAnswer:"
    row = {
        "doc_id": doc_id,
        "doc": doc,
        "target": "0",
        "arguments": {
            f"gen_args_{place}": {"arg_0": prompt, "arg_1": f" {option}"}
            for place, option in enumerate(doc["choices"])
        },
        "resps": [[[score, "False"]] for score in scores],
        "filtered_resps": [[score, "False"] for score in scores],
        "filter": "none",
        "metrics": list(metrics),
        "doc_hash": sha(json.dumps(doc, indent=2)),
        "prompt_hash": sha(prompt),
        "target_hash": sha("0"),
    }
    return row | dict.fromkeys(metrics, right)


def a_written_row(doc_id: int, right: float, *, filter: str = "strict-match") -> dict[str, Any]:
    """A line of a task whose answers are written."""
    doc = {"question": f"how many, {doc_id}?", "answer": f"so it is #### {doc_id}"}
    prompt = f"Q: how many, {doc_id}?\nA:"
    answer = f" It is {doc_id if right else 'unknown'}."
    row = {
        "doc_id": doc_id,
        "doc": doc,
        "target": str(doc_id),
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {"until": ["\n"], "do_sample": False}}},
        "resps": [[answer]],
        "filtered_resps": [answer.strip()],
        "filter": filter,
        "metrics": ["exact_match"],
        "doc_hash": sha(json.dumps(doc, indent=2)),
        "prompt_hash": sha(prompt),
        "target_hash": sha(str(doc_id)),
    }
    return row | {"exact_match": right}


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@pytest.fixture
def make_lm_eval(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of one model: by task its scores of the items, or its rows."""

    def make(name: str, tasks: dict[str, Sequence[float] | list[dict[str, Any]]], **results: Any) -> Path:
        folder = tmp_path / name / f"org__{name}"
        for task, scores in tasks.items():
            rows = [
                one if isinstance(one, dict) else a_ranked_row(place, float(one))
                for place, one in enumerate(scores)
            ]
            write_lines(folder / f"samples_{task}_{DATE}.jsonl", rows)
        content = {
            "results": {task: {"alias": task} for task in tasks},
            "versions": dict.fromkeys(tasks, 1.0),
            "n-shot": dict.fromkeys(tasks, 0),
            "higher_is_better": {task: {"acc": True, "acc_norm": True} for task in tasks},
            "config": {"model": "hf", "limit": None},
            "model_name": f"org/{name}",
            "chat_template": None,
            "chat_template_sha": None,
            "system_instruction_sha": None,
            "fewshot_as_multiturn": False,
        }
        (folder / f"results_{DATE}.json").write_text(json.dumps(content | results))
        return folder.parent

    return make


@pytest.fixture
def make_ours(tmp_path: Path) -> Callable[..., Path]:
    """Write an eval folder of ours: by task the scores by likelihood and by generation, None for none."""

    def make(
        name: str, tasks: dict[str, tuple[Sequence[int] | None, Sequence[int] | None]], **content: Any
    ) -> Path:
        folder = tmp_path / name
        entries, rows = [], []
        for task, pair in tasks.items():
            scores = dict(zip(("likelihood", "generation"), pair, strict=True))
            num_items = len(next(one for one in pair if one is not None))
            entry = {"task": task, "kind": "multiple_choice", "metric": "acc", "n": num_items, "limit": None}
            entry |= {"items_sha256": "a" * 64, "prompt_sha256": "b" * 64}
            for protocol, right in scores.items():
                entry[protocol] = right and {"value": sum(right) / num_items, "n": num_items, **COUNTS}
            entries.append(entry)
            for place in range(num_items):
                row = {"task": task, "id": f"{place:03}", "group": f"{place:03}", "gold": "yes"}
                row |= {
                    "prompt": f"question {place}?",
                    "options": ["yes", "no"],
                    "likelihood": None,
                    "generation": None,
                }
                if pair[0] is not None:
                    row["likelihood"] = {"correct": bool(pair[0][place]), "choice": 1 - pair[0][place]}
                if pair[1] is not None:
                    row["generation"] = {
                        "correct": bool(pair[1][place]),
                        "text": "it is yes" if pair[1][place] else "no",
                        "extracted": "yes" if pair[1][place] else "no",
                    }
                rows.append(row)
        settings = {"max_new_tokens": 64, "chat_template_sha256": "c" * 64, "batch_size": 8}
        head = {"schema": results.SCHEMA, "model": f"models/{name}", "settings": settings}
        results.write_samples(folder, rows)
        results.write_results(folder, head | {"tasks": entries} | content)
        return folder

    return make


@pytest.fixture
def samples_of() -> Callable[..., Path]:
    """Find the samples file of a task."""

    def find(folder: Path, task: str = "quiz") -> Path:
        return next(folder.glob(f"*/samples_{task}_*.jsonl"))

    return find


@pytest.fixture
def ranked_row() -> Callable[..., dict[str, Any]]:
    """Write a line of a multiple-choice task."""
    return a_ranked_row


@pytest.fixture
def written_row() -> Callable[..., dict[str, Any]]:
    """Write a line of a task whose answers are written."""
    return a_written_row
