"""What a gate can ask of a run, by name. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gendistill.errors import RecipeError
from gendistill.gates import Gate, GateError, check_gate, parse_gate
from gendistill.report.gap import Estimate, GapReport
from gendistill.report.run_files import RunFiles
from gendistill.text import printable
from gendistill_evals import ProtocolFamily

# name: what it is, for help and messages; gaps are losses, so that less is better
MEASURES = {
    "gap": "points lost by generation",
    "likelihood_gap": "points lost by log-likelihood",
    "hidden_gap": "points lost by generation that log-likelihood does not show",
    "kept": "percent of what the teacher writes correctly that the student does too",
    "kept_above_chance": "the same, above a guess among the options",
    "accuracy": "the student's score by generation, percent",
    "kl": "held-out KL to the teacher at the end, nats per token",
    "perplexity_ratio": "the student's held-out perplexity over the teacher's",
}
_WHOLE_RUN = ("kl", "perplexity_ratio")


def measure(gate: Gate, run: RunFiles, report: GapReport) -> float | None:
    """Return what a gate asks for; None was not measured.

    Raises:
        RecipeError: It asks for a task that the run does not have, or for a task's share of what is of the run.
    """
    if gate.name in _WHOLE_RUN:
        if gate.task is not None:
            raise RecipeError(
                f"{gate.name} is of the whole run, not of a task",
                where="--gate",
                hint=f'--gate "{gate.name}..."',
            )
        return _of_text(gate.name, run)
    ranked, written = (report.leads[family] for family in ProtocolFamily)
    protocol = ranked if gate.name == "likelihood_gap" else written
    if gate.task is None:
        gap, hidden, kept = report.mean_gap(protocol), report.mean_hidden, report.kept.get(protocol)
        scores = [score.value for task in report.tasks if (score := task.student.get(protocol))]
        accuracy = math.fsum(scores) / len(scores) if scores else None
    else:
        found = [task for task in report.tasks if task.task == gate.task]
        if not found:
            known = ", ".join(printable(task.task) for task in report.tasks) or "none"
            raise RecipeError(
                f'the run has no task "{printable(gate.task)}"; tasks: {known}',
                where="--gate",
                hint='--gate "TASK.gap<=3"',
            )
        task = found[0]
        gap, hidden, kept = task.gap.get(protocol), task.hidden, task.kept.get(protocol)
        accuracy = score.value if (score := task.student.get(protocol)) else None
    return {
        "gap": _loss(gap),
        "likelihood_gap": _loss(gap),
        "hidden_gap": _loss(hidden),
        "kept": kept and kept.plain.value,
        "kept_above_chance": kept and kept.above_chance and kept.above_chance.value,
        "accuracy": accuracy,
    }[gate.name]


def _loss(gap: Estimate | None) -> float | None:
    return None if gap is None else -gap.value


def _of_text(name: str, run: RunFiles) -> float | None:
    if not run.heldout:
        return None
    scores = run.heldout[-1][1]
    return scores["kl"] if name == "kl" else math.exp(min(scores["student_ce"] - scores["teacher_ce"], 700.0))


def check_gates(gates: Sequence[str], run: RunFiles, report: GapReport) -> list[str]:
    """Hold a run against gates, all of which are read before the first is held.

    Returns: A line for each.
    Raises:
        RecipeError: A gate that is not one, or a measure or task that there is not.
        GateError: Some are not met; the message says of each what was measured.
    """
    parsed = [parse_gate(text, MEASURES) for text in gates]
    values = [(gate, measure(gate, run, report)) for gate in parsed]
    met, missed = [], []
    for gate, value in values:
        try:
            met.append(check_gate(gate, value, of=report.name))
        except GateError as error:
            missed.append(error)
    if missed:
        raise GateError("; ".join(error.message for error in missed), where=missed[0].where)
    return met
