"""What the data allow to say, in sentences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from gendistill.comparison.values import ALL_TASKS, LEVEL, Comparison, HiddenGap, PairScore, Verdict
from gendistill.report.tables import signed
from gendistill.text import printable

_FEW = 100


def headline(comparison: Comparison) -> str:
    """Say in a few sentences what the comparison shows; of many models, which pairs differ."""
    if len(comparison.models) > 2:
        said = [_of_many(comparison, lead) for lead in comparison.leads]
    else:
        pair = comparison.pairs[0]
        said = [_of_pair(comparison.of(pair.first, pair.second, lead)) for lead in comparison.leads]
    return " ".join(filter(None, [*said, _hides(comparison.hidden)]))


def _of_pair(rows: Sequence[PairScore]) -> str:
    if len(rows) == 1:
        return _of_task(rows[0])
    tasks, mean = rows[:-1], rows[-1]
    better = [row for row in tasks if row.verdict is Verdict.BETTER]
    worse = [row for row in tasks if row.verdict in (Verdict.WORSE, Verdict.WORSE_WITHIN)]
    second, first = printable(mean.second), printable(mean.first)
    where = f"({printable(mean.measure)}, {len(tasks)} tasks, {mean.n:,} items)"
    if better and worse:
        return (
            f"{second} is better than {first} on {_named(better)} and worse on {_named(worse)} {where}; the mean of "
            f"{signed(mean.gap.value)} points describes neither."
        )
    interval = _interval(mean)
    if mean.verdict in (Verdict.BETTER, Verdict.WORSE, Verdict.WORSE_WITHIN):
        # The tasks of which each by itself shows it.
        alone, against = (better, worse) if mean.gap.value > 0 else (worse, better)
        shown = f"; by itself each of {_named(alone)} shows it" if alone else "; no task shows it by itself"
        but = f", and {_named(against)} the opposite" if against else ""
        return f"{second} {_difference(mean)} than {first} in the mean {where}: {interval}{shown}{but}."
    seen = [*better, *worse]
    some = f" {second} is {'better' if better else 'worse'} on {_named(seen)}." if seen else ""
    return f"{_undifferent(mean, f'in the mean {where}')}{some}"


def _of_task(row: PairScore) -> str:
    where = f"({printable(row.task)}, {printable(row.measure)}, {row.n:,} items)"
    if row.verdict in (Verdict.BETTER, Verdict.WORSE, Verdict.WORSE_WITHIN):
        within = (
            f"; the loss is less than {row.margin:g} points" if row.verdict is Verdict.WORSE_WITHIN else ""
        )
        return (
            f"{printable(row.second)} {_difference(row)} than {printable(row.first)} {where}: {_interval(row)}, "
            f"exact McNemar {p_text(row.p_holm)}{within}."
        )
    return _undifferent(row, where)


def _difference(row: PairScore) -> str:
    more = "more" if row.gap.value > 0 else "fewer"
    return f"answers {abs(row.gap.value):.1f} points {more} items right"


def _undifferent(row: PairScore, where: str) -> str:
    second, first = printable(row.second), printable(row.first)
    seen = f"the gap is {signed(row.gap.value)} points, {_interval(row)}"
    if row.verdict is Verdict.EQUIVALENT:
        return f"{second} and {first} differ by less than {row.margin:g} points {where}: {seen}."
    if row.verdict is Verdict.NOT_INFERIOR:
        return f"{second} is not worse than {first} by {row.margin:g} points or more {where}: {seen}."
    few = f"{row.n:,} items are few: " if row.n < _FEW else ""
    finds = (
        f" {few}{'they' if few else 'These items'} find a difference of {row.detectable:.1f} points or more four times "
        "in five."
        if row.detectable is not None
        else ""
    )
    return f"The data do not tell {second} from {first} {where}, nor show them alike: {seen}.{finds}"


def _of_many(comparison: Comparison, lead: str) -> str:
    decided, undecided = [], []
    for first, second in combinations(comparison.models, 2):
        row = comparison.of(first, second, lead)[-1]
        (
            undecided
            if row.verdict in (Verdict.UNDECIDED, Verdict.NOT_INFERIOR, Verdict.EQUIVALENT)
            else decided
        ).append(row)
    num_pairs = len(decided) + len(undecided)
    said = [
        f"{printable(row.second if row.gap.value > 0 else row.first)} over "
        f"{printable(row.first if row.gap.value > 0 else row.second)} ({abs(row.gap.value):.1f} points)"
        for row in decided
    ]
    if not said:
        return f"By {printable(lead)}, none of the {num_pairs} pairs can be told apart."
    shown = ", ".join(said[:6]) + (f" and {len(said) - 6} more" if len(said) > 6 else "")
    return f"By {printable(lead)}, {len(said)} of {num_pairs} pairs can be told apart, each by itself at 95%: {shown}."


def _hides(hidden: Sequence[HiddenGap]) -> str:
    hiding = [each for each in hidden if each.hidden.high < 0 and each.by_generation < 0]
    inverted = [each for each in hidden if each.p_inverted is not None and each.p_inverted < LEVEL]
    said = []
    if hiding:
        worst = min(hiding, key=lambda each: each.hidden.value)
        said.append(
            f"Log-likelihood hides {-worst.hidden.value:.1f} points of the loss of {printable(worst.second)} under "
            f"generation on {printable(worst.task)} (95% interval {-worst.hidden.high:.1f} to {-worst.hidden.low:.1f})."
        )
    if inverted:
        pairs = ", ".join(
            f"{printable(each.first)} and {printable(each.second)} on {printable(each.task)}"
            for each in inverted[:4]
        )
        said.append(f"The two protocols rank these the other way round, both significantly: {pairs}.")
    return " ".join(said)


def _named(rows: Sequence[PairScore]) -> str:
    shown = ", ".join(f"{printable(row.task)} ({signed(row.gap.value)})" for row in rows[:6])
    return f"{shown} and {len(rows) - 6} more" if len(rows) > 6 else shown


def _interval(row: PairScore) -> str:
    return f"95% interval {signed(row.gap.low)} to {signed(row.gap.high)}"


def p_text(p: float | None) -> str:
    """Write a p-value for people."""
    if p is None:
        return "p not measured"
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.{4 if p < 0.01 else 3 if p < 0.1 else 2}f}"


def _percent(chance: float) -> str:
    return "over 99%" if chance > 0.99 else "under 1%" if chance < 0.01 else f"{chance:.0%}"


def power_notes(comparison: Comparison) -> list[str]:
    """Say what the items of each pair could show, in a line per measure for the mean or the only task."""
    notes = []
    for first, second in combinations(comparison.models, 2):
        for measure in dict.fromkeys(pair.measure for pair in comparison.pairs):
            rows = comparison.of(first, second, measure)
            if not rows:
                continue
            row = rows[-1]
            of = "" if row.task == ALL_TASKS else f" on {printable(row.task)}"
            line = f"{printable(first)}, {printable(second)}, {printable(measure)}{of}: {row.n:,} items"
            if row.num_groups < row.n:
                line += f" of {row.num_groups:,} questions"
            if row.detectable is not None:
                line += f" find a difference of {row.detectable:.1f} points with a chance of 80%"
            if row.power is not None:
                line += f", and with one of {_percent(row.power)} show that an equal model is within {row.margin:g}"
            if row.verdict is Verdict.UNDECIDED and row.items_needed is not None and row.items_needed > row.n:
                line += f"; a gap as small as this one takes about {row.items_needed:,} items"
            notes.append(line + ".")
    return notes
