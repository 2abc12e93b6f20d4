"""Turn a finished run into a results file: ``python -m gendistill.results.run_results RUN OUT.json``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gendistill.errors import GendistillError, ReportError
from gendistill.report.gap import TaskGap
from gendistill.report.html import paired_transcripts
from gendistill.report.run_files import RunFiles, read_run
from gendistill.report.write import gap_report
from gendistill.results.table import ResultRow, ResultsFile, write_results_json

# what the demo promises; other runs are written without bars
DEMO = "smollm2-135m-kda-cpu"
DEMO_BARS = {
    "layers converted": 0.25,
    "share of the KL left": 0.25,
    "mean answer": 0.7,
    "worst answer": 0.7,
    "most repetitive answer": 0.2,
    "wall time": 600.0,
    "peak memory": 7.0,
}


def run_rows(run: RunFiles) -> list[ResultRow]:
    """List what a run measured; what it did not measure is left out."""
    rows = [*_conversion_rows(run), *_answer_rows(run)]
    for task in gap_report(run).tasks:
        rows += _task_rows(task)
    manifest = run.manifest
    if "seconds" in manifest:
        rows.append(
            _row("wall time", manifest["seconds"], "s", "lower", note="convert, distil, score, report")
        )
    if "peak_memory_bytes" in manifest:
        rows.append(_row("peak memory", manifest["peak_memory_bytes"] / 1e9, "GB", "lower"))
    if run.name != DEMO:
        return rows
    return [row.model_copy(update={"bar": DEMO_BARS.get(row.name, row.bar)}) for row in rows]


def _conversion_rows(run: RunFiles) -> list[ResultRow]:
    rows = []
    if run.placement is not None:
        share = len(run.placement.converted_layers) / len(run.placement.kinds)
        rows.append(_row("layers converted", share, "share", "higher", note=run.placement.counts))
    if run.plan is not None and "num_tensors" in (run.manifest.get("teacher") or {}):
        origins = Counter(tensor["origin"] for tensor in run.plan["tensors"])
        used = {name for tensor in run.plan["tensors"] for name in tensor.get("sources", ())}
        dropped = {tensor["name"] for tensor in run.plan["dropped"]}
        share = len(used | dropped) / run.manifest["teacher"]["num_tensors"]
        counts = ", ".join(
            f"{count} {origin}" for origin, count in [*origins.items(), ("dropped", len(dropped))]
        )
        rows.append(_row("teacher tensors accounted for", share, "share", "higher", bar=1.0, note=counts))
    if run.probe is not None:
        ce, guessing = run.probe["student_ce"], run.probe["ln_vocab"]
        tokens, note = run.probe["num_tokens"], "the bar is guessing"
        rows.append(
            _row(
                "cross-entropy after conversion", ce, "nats/token", "lower", n=tokens, bar=guessing, note=note
            )
        )
        if len(run.heldout) == 1:
            rows.append(
                _row("held-out KL after conversion", run.probe["kl"], "nats/token", "lower", n=tokens)
            )
    if len(run.heldout) > 1:
        first, last = run.heldout[0][1], run.heldout[-1][1]
        tokens = first["num_tokens"]
        rows += [
            _row("held-out KL after conversion", first["kl"], "nats/token", "lower", n=tokens),
            _row("held-out KL at the end", last["kl"], "nats/token", "lower", n=tokens),
        ]
        if first["kl"] > 0:
            rows.append(_row("share of the KL left", last["kl"] / first["kl"], "share", "lower", n=tokens))
    return rows


def _answer_rows(run: RunFiles) -> list[ResultRow]:
    """Compare the open answers by the teacher's own surprise at them."""
    pairs = [pair for pair in paired_transcripts(run) if pair["teacher"] and pair["student"]]
    pairs = [
        pair for pair in pairs if None not in (pair["teacher"]["teacher_nll"], pair["student"]["teacher_nll"])
    ]
    if not pairs:
        return []
    gaps = [pair["student"]["teacher_nll"] - pair["teacher"]["teacher_nll"] for pair in pairs]
    repeated = [pair["student"]["repeated_4gram_share"] for pair in pairs]
    own = max(pair["teacher"]["repeated_4gram_share"] for pair in pairs)
    count = len(pairs)
    return [
        _row(
            "mean answer",
            sum(gaps) / count,
            "nats/token",
            "lower",
            n=count,
            note="teacher NLL above its own answers'",
        ),
        _row(
            "worst answer",
            max(gaps),
            "nats/token",
            "lower",
            n=count,
            note="teacher NLL above its own answer's",
        ),
        _row(
            "most repetitive answer",
            max(repeated),
            "share",
            "lower",
            n=count,
            peer="teacher",
            peer_value=own,
            note="4-grams seen before in the answer",
        ),
    ]


def _task_rows(task: TaskGap) -> list[ResultRow]:
    rows = []
    for protocol, teacher in task.teacher.items():
        student = task.student.get(protocol)
        if teacher is None or student is None:
            continue
        rows.append(
            _row(
                f"{task.task}, {protocol}",
                student.value,
                "%",
                "higher",
                n=student.n,
                ci95=(student.low, student.high),
                peer="teacher",
                peer_value=teacher.value,
            )
        )
    return rows


def _row(name: str, value: float, unit: str, better: Any, **more: Any) -> ResultRow:
    return ResultRow(name=name, value=float(value), unit=unit, better=better, **more)


def _write(run_dir: Path, out: Path, *, commit: str | None) -> ResultsFile:
    run = read_run(run_dir)
    manifest = run.manifest
    if missing := [key for key in ("command", "device", "date", "versions") if not manifest.get(key)]:
        raise ReportError(
            f"the manifest does not say {', '.join(missing)}, which a results file must",
            where=str(run_dir / "manifest.json"),
            hint="name a run that gendistill run has finished",
        )
    return write_results_json(
        out,
        command=manifest["command"],
        commit=commit or manifest.get("commit"),
        device=manifest["device"],
        date=manifest["date"],
        versions=manifest["versions"],
        rows=run_rows(run),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one results file from one run folder."""
    parser = argparse.ArgumentParser(prog="python -m gendistill.results.run_results", allow_abbrev=False)
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("out", type=Path, help="docs/results/<name>.json")
    parser.add_argument("--commit", help="the code that the run used; by default as the run noted it")
    given = parser.parse_args(arguments)
    try:
        results = _write(given.run, given.out, commit=given.commit)
    except GendistillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    missed = [row.name for row in results.rows if row.met is False]
    print(f"wrote {given.out}; bars missed: {', '.join(missed) or 'none'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
