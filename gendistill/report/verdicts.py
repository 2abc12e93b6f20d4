"""What the data allow to be said of a run: the headline, and what a reader must not miss. Imports no torch.

Nothing is called the same, better or worse that the interval leaves open, and a gap that is left open comes with the
number of items that would tell one of its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from gendistill.report.gap import Estimate, GapReport
from gendistill.report.run_files import ROLES, RunFiles
from gendistill.report.tables import signed
from gendistill.text import printable
from gendistill_evals import PROTOCOLS, ProtocolFamily

# How a model is scored, as the verdict says it, most important first.
_HOW = {ProtocolFamily.GENERATION: "Writing its answers", ProtocolFamily.LIKELIHOOD: "By log-likelihood"}
# normal deviates of a two-sided 95% interval, and of it with a power of 80%
_INTERVAL, _POWER = 1.96, 1.96 + 0.8416
# in percentage points: gaps below it are as good as none, and a size is known once the interval reaches no further
_AS_GOOD, _KNOWN = 1.0, 5.0
# below it a gap may be told from zero, and still nothing is known of its size
_FEWEST = 100
# relative; batches in another order move the held-out KL by less
_WORSE = 0.005


def verdict(report: GapReport) -> str:
    """Say what the conversion cost, by generation and by log-likelihood, and how much is kept."""
    return " ".join(verdict_sentences(report))


def verdict_sentences(report: GapReport) -> list[str]:
    """Say it sentence by sentence, the most important first."""
    written, ranked = (_gap_sentence(report, report.leads[family], how) for family, how in _HOW.items())
    return [written, *filter(None, [kept_sentence(report)]), ranked]


def _gap_sentence(report: GapReport, protocol: str, how: str) -> str:
    gap = report.mean_gap(protocol)
    if gap is None:
        return f"The {protocol} gap is not measured."
    by_task = {task.task: found for task in report.tasks if (found := task.gap.get(protocol))}
    interval = f"95% interval {signed(gap.low)} to {signed(gap.high)}"
    over = f"{gap.n:,} {_items(gap.n)}" + (f" of {len(by_task)} tasks" if len(by_task) > 1 else "")
    facts = f"({interval}, {over})"
    size, side = f"{abs(gap.value):.1f} points", "below" if gap.value < 0 else "above"
    apart = _opposites(by_task)
    if gap.excludes_zero:
        text = f"{how}, the student scores {size} {side} its teacher {facts}"
        if gap.n < _FEWEST:
            return (
                f"{text}: too few items to say by how much, about {_to_know(gap)} would say it to 5 points."
            )
        return f"{text}; {apart}." if apart else f"{text}."
    if apart:
        mean = f"the mean, {signed(gap.value)} points {facts}, says nothing of either"
        return f"{how}, the student is not the same as its teacher: {apart}; {mean}."
    if max(-gap.low, gap.high) <= _AS_GOOD:
        reach = math.ceil(10 * max(-gap.low, gap.high)) / 10
        return f"{how}, the student scores like its teacher, to within {reach:.1f} points {facts}."
    if not round(gap.value, 1):
        seen = _spread(by_task) or "no difference is seen"
        reach = max(-gap.low, gap.high)
        return f"{how}, no verdict: {seen} {facts}, and a gap of {reach:.1f} points would not show."
    seen = f"{size} {side} its teacher {facts} may be noise"
    if mixed := _spread(by_task):
        seen += f", with {mixed}"
    if (needed := items_needed(gap)) > gap.n:
        return f"{how}, no verdict: {seen}; about {_about(needed)} items would tell a gap of this size from none."
    return f"{how}, no verdict: {seen}."


def _opposites(by_task: Mapping[str, Estimate]) -> str:
    """Name the tasks that are surely better and those that are surely worse, if there are both."""
    worse = {task: gap for task, gap in by_task.items() if gap.high < 0}
    better = {task: gap for task, gap in by_task.items() if gap.low > 0}
    if not worse or not better:
        return ""
    return f"worse on {_named(worse)} and better on {_named(better)}"


def _spread(by_task: Mapping[str, Estimate]) -> str:
    """Say from where to where the gaps of the tasks go, if some are losses and some gains."""
    if not by_task:
        return ""
    lowest, highest = (end(by_task, key=lambda task: by_task[task].value) for end in (min, max))
    if not (round(by_task[lowest].value, 1) < 0 < round(by_task[highest].value, 1)):
        return ""
    ends = [f"{signed(by_task[task].value)} points on {printable(task)}" for task in (lowest, highest)]
    return f"tasks from {ends[0]} to {ends[1]}"


def _named(gaps: Mapping[str, Estimate], most: int = 3) -> str:
    named = [f"{printable(task)} ({signed(gap.value)})" for task, gap in gaps.items()][:most]
    return ", ".join([*named, *([f"{len(gaps) - most} more"] if len(gaps) > most else [])])


def items_needed(gap: Estimate) -> int:
    """Count the items that would tell a gap of this size from none four times in five.

    Args:
        gap: As seen, not zero. What one item's difference varies by follows from its interval.
    """
    error = (gap.high - gap.low) / (2 * _INTERVAL)
    return math.ceil(gap.n * (_POWER * error / gap.value) ** 2)


def _to_know(gap: Estimate) -> str:
    return _about(max(_FEWEST, math.ceil(gap.n * ((gap.high - gap.low) / (2 * _KNOWN)) ** 2)))


def _about(count: int) -> str:
    """Round up to two digits."""
    step = 10 ** max(0, len(str(count)) - 2)
    return f"{math.ceil(count / step) * step:,}"


def _items(count: int) -> str:
    return "item" if count == 1 else "items"


def kept_sentence(report: GapReport) -> str:
    """Say how much of what the teacher writes correctly the student keeps; empty if that is not measured."""
    protocol = report.leads[ProtocolFamily.GENERATION]
    measured = [task for task in report.tasks if task.gap.get(protocol)]
    lost = [printable(task.task) for task in measured if protocol in task.at_chance]
    kept = report.kept.get(protocol)
    if not measured:
        return ""
    if kept is None:
        where = ", ".join(lost) or "these tasks together"
        return f"What it keeps cannot be said: on {where} the teacher itself is not surely above chance."
    text = f"It keeps {kept.plain.value:.0f}% of what its teacher gets right ({_range(kept.plain)}"
    if kept.above_chance:
        text += f"; above chance {kept.above_chance.value:.0f}%, {_range(kept.above_chance)}"
    without = (
        f", without {', '.join(lost)}, where the teacher itself is not surely above chance" if lost else ""
    )
    return f"{text}){without}."


def _range(kept: Estimate) -> str:
    return f"95% interval {kept.low:.0f}% to {kept.high:.0f}%"


def stage_remarks(run: RunFiles) -> list[str]:
    """Remark on every stage that left the held-out KL to the teacher worse than it found it."""
    return [
        f"stage {printable(name)} made the held-out KL to the teacher worse: {found['kl']:.3g} nats per token after "
        f"it, {before['kl']:.3g} after {printable(earlier)}"
        for (earlier, before), (name, found) in zip(run.heldout, run.heldout[1:], strict=False)
        if found["kl"] > before["kl"] * (1 + _WORSE)
    ]


def warnings(report: GapReport, *, roles: Sequence[str] = ROLES) -> list[str]:
    """List what a reader of the table must not miss, most important first.

    Args:
        report: Behind the table.
        roles: What should have been measured.
    """
    found = []
    ranked, written = report.leads[ProtocolFamily.LIKELIHOOD], report.leads[ProtocolFamily.GENERATION]
    for task in report.tasks:
        if task.hidden and task.hidden.high < 0:
            found.append(
                f"{printable(task.task)}: {ranked} hides {-task.hidden.value:.1f} pp of the {written} gap; "
                f'rank runs by "gap {PROTOCOLS[written].label}"'
            )
        elif task.hidden and task.hidden.low > 0:
            found.append(
                f"{printable(task.task)}: {ranked} overstates the {written} gap by {task.hidden.value:.1f} pp"
            )
    found += [
        f"{printable(task.task)}: by {name} the teacher scores {score.value:.1f}%, "
        + (f"not surely above a guess ({task.chance:.1f}%)" if task.chance else "too little to say more")
        + ", so neither the gap nor what is kept says anything about the student"
        for task in report.tasks
        for name in task.at_chance
        if name in report.protocols and (score := task.teacher.get(name))
    ]
    limits = sorted({task.limit for task in report.tasks if task.limit})
    if limits:
        shown = ", ".join(str(limit) for limit in limits)
        found.append(f"LIMIT {shown}: scored on the first items only; not comparable with published numbers")
    found += [
        f"{printable(task.task)}: no {name} score ({printable(task.reasons[name])})"
        for task in report.tasks
        for name in report.protocols
        if name in task.reasons
    ]
    absent = [role for role in roles if getattr(report, role) is None]
    found += [f"{role}: not measured; score it with gendistill eval" for role in absent]
    return found
