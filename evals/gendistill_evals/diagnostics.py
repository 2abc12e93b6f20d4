"""What lies behind a score: choices that follow places, unread answers, loops, subjects. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gendistill_evals.forms import reordered
from gendistill_evals.items import LETTERS, Item
from gendistill_evals.protocols import ProtocolRun
from gendistill_evals.synthetic import heat_table
from gendistill_evals.task import Task

MOST_PERMUTATIONS = len(LETTERS) - 1
_MOST_EXAMPLES = 20
_LONGEST_EXAMPLE = 300

Sample = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Reordered:
    """A task whose options stand in another order.

    Attributes:
        task: The task, with the items whose options can be put into that order.
        places: Place of each of them in the original task.
        orders: For each, the former place of the option at each place.
        choices: By place in the original task: the order, the chosen place or None, and whether it is right; of the
            items alone whose prompt the order changes.
    """

    task: Task
    places: tuple[int, ...]
    orders: tuple[tuple[int, ...], ...]
    choices: Mapping[int, dict[str, Any]] = field(default_factory=dict)

    def answered(self, samples: Sequence[Sample], first: Sequence[Sample]) -> Reordered:
        """Add what a model chose.

        Args:
            samples: In this order of the options, one per item of ``task``.
            first: In the original order, one per item of the original task.
        """
        return replace(
            self,
            choices={
                place: {"order": list(order), "choice": sample.get("choice"), "correct": sample["correct"]}
                for place, order, sample in zip(self.places, self.orders, samples, strict=True)
                # Where the prompt does not show the options, their order is not to be seen.
                if sample.get("prompt_sha256") != first[place].get("prompt_sha256")
            },
        )


def in_other_orders(task: Task, count: int, *, limit: int | None = None) -> list[Reordered]:
    """Shift the options of a task's items by one place, by two, and so on, in their prompts as well.

    Every option stands at another place in each order, so that an item of n options has n - 1 of them.

    Args:
        task: The task.
        count: Further orders at most.
        limit: Items, from the first; None for all.
    """
    found = []
    for shift in range(1, count + 1):
        places, orders, items = [], [], []
        for place, item in enumerate(task.items[:limit]):
            size = len(item.options or ())
            if shift >= size:
                continue
            order = tuple((start + shift) % size for start in range(size))
            moved = reordered(item, order)
            if moved is not None:
                places.append(place)
                orders.append(order)
                items.append(moved)
        if items:
            found.append(Reordered(replace(task, items=tuple(items)), tuple(places), tuple(orders)))
    return found


def diagnose(
    items: Sequence[Item], done: Mapping[str, ProtocolRun], orders: Mapping[str, Sequence[Reordered]]
) -> dict[str, dict[str, Any]]:
    """Look behind the scores of one task.

    Args:
        items: Those that were scored.
        done: What they were scored by, by protocol.
        orders: The same in other orders of the options, with their choices.
    Returns: By protocol: ``answers`` where a model wrote some, ``subjects`` where items have one, ``lengths`` where
        texts are of chosen lengths, and ``order`` where options were shown in other orders.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, run in done.items():
        entry: dict[str, Any] = {}
        if all("text" in sample and "num_tokens" in sample for sample in run.samples):
            entry["answers"] = answer_statistics(items, run.samples)
        if any(item.subject is not None for item in items):
            entry["subjects"] = by_subject(items, run.samples)
        if heat := heat_table([item.cell for item in items], [sample["correct"] for sample in run.samples]):
            entry["lengths"] = heat
        if orders.get(name):
            entry["order"] = order_statistics(run.samples, [each.choices for each in orders[name]])
        found[name] = entry
    return found


def order_statistics(
    first: Sequence[Sample], others: Sequence[Mapping[int, Mapping[str, Any]]]
) -> dict[str, Any] | None:
    """Compare what a model chooses with what it chooses where the same options stand in other orders.

    Args:
        first: In the original order, one per item.
        others: For each other order, by place of the item: ``order``, ``choice`` and ``correct``.
    Returns: ``n`` items that were seen in several orders, ``answered`` of them in all orders, and of these the share
        whose place never changes (``stickiness``: 1 for a model that always chooses the first). Over all pairs of an
        item and another order: the share whose chosen option changes (``content_changes``, of pairs that were answered
        both times) and the share whose correctness does (``flips``), which is what a comparison of models would take
        for a difference. ``places`` is the share of choices that fell on each place. None where no order was seen.
    """
    shown = sorted({place for choices in others for place in choices})
    if not shown:
        return None
    answered = sticky = pairs = changed = flips = both = 0
    chosen: dict[int, int] = {}
    for place in shown:
        base = first[place]
        seen = [choices[place] for choices in others if place in choices]
        picks = [base["choice"], *(each["choice"] for each in seen)]
        for pick in picks:
            if pick is not None:
                chosen[pick] = chosen.get(pick, 0) + 1
        if None not in picks:
            answered += 1
            sticky += len(set(picks)) == 1
        for each in seen:
            pairs += 1
            flips += each["correct"] != base["correct"]
            if each["choice"] is not None and base["choice"] is not None:
                both += 1
                changed += each["order"][each["choice"]] != base["choice"]
    total = sum(chosen.values())
    return {
        "n": len(shown),
        "answered": answered,
        "stickiness": sticky / answered if answered else None,
        "pairs": pairs,
        "content_changes": changed / both if both else None,
        "flips": flips / pairs,
        "places": {str(place): chosen[place] / total for place in sorted(chosen)},
    }


def answer_statistics(items: Sequence[Item], samples: Sequence[Sample]) -> dict[str, Any]:
    """Describe the answers that a model wrote.

    Args:
        items, samples: One each, in the same order.
    Returns: Shares of answers that nothing could be read from (``unread``, with the first twenty), that the model ended
        (``ended``) and that end in a loop (``looping``, with the ids of the first twenty); and their lengths in tokens.
    """
    unread = [
        {"id": item.id, "text": sample["text"][-_LONGEST_EXAMPLE:], "ended": sample["ended"]}
        for item, sample in zip(items, samples, strict=True)
        if sample["extracted"] is None
    ]
    looping = [item.id for item, sample in zip(items, samples, strict=True) if sample.get("repeats")]
    lengths = sorted(sample["num_tokens"] for sample in samples)
    return {
        "n": len(samples),
        "unread": len(unread) / len(samples),
        "unread_examples": unread[:_MOST_EXAMPLES],
        "ended": sum(sample["ended"] for sample in samples) / len(samples),
        "looping": len(looping) / len(samples),
        "looping_ids": looping[:_MOST_EXAMPLES],
        "num_tokens": {
            "mean": math.fsum(lengths) / len(lengths),
            **{f"p{share}": lengths[(len(lengths) - 1) * share // 100] for share in (5, 50, 95)},
            "max": lengths[-1],
        },
    }


def by_subject(items: Sequence[Item], samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """Score each subject by itself, in the order of their names.

    Args:
        items, samples: One each, in the same order; items without a subject are left out.
    Returns: Value and n by subject.
    """
    found: dict[str, list[float]] = {}
    for item, sample in zip(items, samples, strict=True):
        if item.subject is not None:
            found.setdefault(item.subject, []).append(float(sample["correct"]))
    return {
        subject: {"value": math.fsum(values) / len(values), "n": len(values)}
        for subject, values in sorted(found.items())
    }
