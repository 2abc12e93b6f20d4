"""Measure what the evaluation promises, within minutes on a CPU: ``python tests/evals/evaluation_visit.py --json OUT``.

Rows: labelled answers that are read as they were labelled, intervals that hold the truth, programs that the sandbox
contains, and the time of a comparison. Agreement with lm-eval has slow tests of its own, for it takes models and rows
that are not here: tests/interop/test_two_hundred_items.py and tests/evals/test_instructions_agree.py.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import random
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

from gendistill.cli.main import main as command_line
from gendistill.results.table import ResultRow, write_results_json
from gendistill_evals import sandbox
from gendistill_evals.bbh import bbh_answer, same_answer
from gendistill_evals.extract import find_letter

HERE = Path(__file__).parent
ATTACKS = {
    "a fork bomb": "import os\nwhile True: os.fork()",
    "an endless loop": "while True: pass",
    "a file written outside": "open('/tmp/outside', 'w').write('x')",
    "a network call": "import socket; socket.create_connection(('127.0.0.1', 9), timeout=1)",
    "a memory hog": "x = []\nwhile True: x.append(bytearray(1 << 24))",
}


def load(name: str) -> ModuleType:
    """Load a module of this folder."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def share(name: str, hits: list[bool], **more: Any) -> ResultRow:
    """Make a row of how many were as they should be."""
    return ResultRow(
        name=name, value=100.0 * sum(hits) / len(hits), unit="%", better="higher", n=len(hits), **more
    )


def labelled() -> list[ResultRow]:
    """Read answers that were labelled by hand."""
    letters, answers = load("test_letters"), load("test_bbh")
    return [
        share(
            "letters: answers read as they were labelled",
            [find_letter(row["text"], "ABCD", letters.TEXTS) == row["letter"] for row in letters.LABELLED],
            bar=100.0,
        ),
        share(
            "BIG-Bench-Hard: answers read as they were labelled",
            [_agrees(answers.ITEMS[row["item"]], row) for row in answers.LABELLED],
            bar=100.0,
        ),
    ]


def _agrees(item: Any, row: dict[str, Any]) -> bool:
    found = bbh_answer(item, row["text"])
    if found is None or row["answer"] is None:
        return found is row["answer"]
    return same_answer(found, row["answer"])


def intervals(samples: int) -> list[ResultRow]:
    """Simulate how often intervals of 95% hold the truth; the bar is 93 to 97%."""
    simulation, rows = load("coverage"), []
    for quantity in simulation.QUANTITIES:
        for n in simulation.SIZES:
            held, width = simulation.coverage(quantity, "score", n, samples=samples)
            rows.append(
                ResultRow(
                    name=f"coverage of 95% intervals, {quantity}, {n:,} items: distance from 95%",
                    value=abs(100 * held - 95),
                    unit="points",
                    better="lower",
                    bar=2.0,
                    n=samples,
                    note=f"{100 * held:.1f}%, {100 * width:.1f} points wide",
                )
            )
    return rows


def contained() -> list[ResultRow]:
    """Run programs that try to get out."""
    if reason := sandbox.why_not():
        raise SystemExit(f"the sandbox does not work here: {reason}")
    limits, rows = sandbox.Limits(wall_s=3.0, cpu_s=2), []
    for name, source in ATTACKS.items():
        began = time.perf_counter()
        outcome = sandbox.run(source, limits)
        ended = outcome.ended is not sandbox.Ended.FINISHED
        rows.append(
            share(
                f"sandbox: {name} is contained and reported",
                [ended and not Path("/tmp/outside").exists()],
                bar=100.0,
                note=f"{outcome.ended}: {outcome.reason}; {time.perf_counter() - began:.1f} s",
            )
        )
    return rows


def comparison(items: int = 10_000) -> ResultRow:
    """Time a comparison of two models that lm-eval has written the samples of."""
    maker = random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        folders = []
        for name in "ab":
            folder = Path(place) / name / f"org__{name}"
            folder.mkdir(parents=True)
            rows = [_sample(number, maker.random() < 0.5) for number in range(items)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / "samples_quiz_2026-01-02T03-04-05.678901.jsonl").write_text(lines)
            folders.append(str(folder.parent))
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            code = command_line(["compare", *folders, "--out", str(Path(place) / "out")])
        took = time.perf_counter() - began
        if code or not (Path(place) / "out/index.html").is_file():
            raise SystemExit(f"the comparison ended with {code}")
    return ResultRow(
        name=f"compare: a page of two models, {items:,} items",
        value=took,
        unit="s",
        better="lower",
        bar=10.0,
    )


def _sample(number: int, right: bool) -> dict[str, Any]:
    question = f"Which of these is number {number}? " + "It is one of many. " * 20
    return {
        "doc_id": number, "doc": {"question": question}, "target": "0", "resps": [[["-1.0", "False"]]],
        "filtered_resps": [["-1.0", "False"]], "filter": "none", "metrics": ["acc"], "acc": float(right),
        "doc_hash": f"{number:064x}", "prompt_hash": f"{number:064x}", "target_hash": "0" * 64,
        "arguments": {"gen_args_0": {"arg_0": question, "arg_1": " yes"}},
    }  # fmt: skip


def main() -> None:
    """Measure all, print the rows, and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    rows = [*labelled(), *contained(), comparison(), *intervals(arguments.samples)]
    for row in rows:
        mark = {None: "", True: "met", False: "MISSED"}[row.met]
        print(f"{row.name}: {row.value:.4g} {row.unit} {mark} {row.note or ''}")
    if arguments.json:
        words = (
            f"python tests/evals/evaluation_visit.py --samples {arguments.samples} --json {arguments.json}"
        )
        write_results_json(
            arguments.json, rows=rows, command=words, device="CPU, 2 cores", commit=arguments.commit
        )


if __name__ == "__main__":
    main()
