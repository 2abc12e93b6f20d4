"""Make tasks of long context: find a number in a text of a chosen length in tokens. Imports no torch.

Everything is generated from word lists and a seed, without a corpus. Filler holds neither digits nor words of keys,
so that the number asked for stands in the text once. Lengths are tokens of the model's own tokenizer, everything
that its chat template adds and the longest answer included.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from gendistill_evals.errors import EvalError
from gendistill_evals.haystack import KEYS, filler, keys
from gendistill_evals.reading import shorten

# Raised whenever the same seed makes another text.
GENERATOR = 1
NEEDLE, MULTI_KEY, VARIABLES, MQAR = "needle", "multi_key", "variables", "mqar"
# What each kind takes beside lengths, per_cell and seed, with its default.
_SETTINGS: dict[str, dict[str, Any]] = {
    NEEDLE: {"depths": [0, 25, 50, 75, 100]},
    MULTI_KEY: {"depths": [0, 25, 50, 75, 100], "keys": 16},
    VARIABLES: {"chains": 4, "hops": 3},
    MQAR: {"depths": [0, 25, 50, 75, 100]},
}
SHORTEST = 64
_NUM_DISTRACTORS = 3
_NAME_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"
_HINT = "write generate: {task: needle, lengths: [1024, 2048], per_cell: 4}"

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Synthesis:
    """The way in which a task's items are generated.

    Attributes:
        task: ``needle``: one number in filler. ``multi_key``: one of many numbers, asked for by its key.
            ``variables``: the value at the end of a chain of assignments among other chains. ``mqar``: a value in a
            list of pairs that fills the whole length, asked for by its key.
        lengths: Tokens of prompt and longest answer together.
        depths: Percent of the text before what is asked for; empty for ``variables``.
        per_cell: Items for each length and depth. Those of ``mqar`` with one length and number share a list.
        seed: Of everything that is drawn.
        keys: Keys in a ``multi_key`` text.
        chains, hops: Chains of a ``variables`` text, and assignments after the first of each.
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[int, ...]
    per_cell: int
    seed: int
    keys: int = 1
    chains: int = 1
    hops: int = 0

    @property
    def num_items(self) -> int:
        """How many items there will be."""
        return len(self.lengths) * max(len(self.depths), 1) * self.per_cell

    def identity(self) -> list[Any]:
        """Return plain data that decides the items of a tokenizer."""
        return [
            GENERATOR,
            self.task,
            self.lengths,
            self.depths,
            self.per_cell,
            self.seed,
            self.keys,
            self.chains,
            self.hops,
        ]

    def at_lengths(self, lengths: Sequence[int], where: str) -> Synthesis:
        """Return the same at other lengths.

        Raises:
            EvalError: Lengths that are not whole numbers of a size that holds a question.
        """
        return replace(self, lengths=_lengths(list(lengths), where))


def read_synthesis(value: Any, where: str) -> Synthesis:
    """Read the key ``generate`` of a task file.

    Args:
        value: What stands there.
        where: Task file, for errors.
    Raises:
        EvalError: An unknown key or kind, or a value of another type.
    """
    if not isinstance(value, dict):
        raise EvalError(
            f'"generate" must hold task and lengths, got {shorten(value)}', where=where, hint=_HINT
        )
    task = value.get("task")
    if task not in _SETTINGS:
        raise EvalError(
            f'"generate.task" must be one of {", ".join(_SETTINGS)}, got {shorten(task)}',
            where=where,
            hint=_HINT,
        )
    own = _SETTINGS[task]
    allowed = ("task", "lengths", "per_cell", "seed", *own)
    for key in value:
        if key not in allowed:
            close = difflib.get_close_matches(str(key)[:100], allowed, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"{task} takes {', '.join(allowed)}"
            raise EvalError(f"unknown key {shorten(f'generate.{key}')}", where=where, hint=hint)

    def number(key: str, default: int, least: int, most: int) -> int:
        found = value.get(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            raise EvalError(
                f'"generate.{key}" must be a whole number from {least} to {most:,}, got {shorten(found)}',
                where=where,
                hint=_HINT,
            )
        return found

    depths = value.get("depths", own.get("depths", []))
    if not isinstance(depths, list) or ("depths" in own and not depths) or not all(map(_is_percent, depths)):
        raise EvalError(
            f'"generate.depths" must be a list of percentages from 0 to 100, got {shorten(depths)}',
            where=where,
            hint="write depths: [0, 25, 50, 75, 100]",
        )
    return Synthesis(
        task=task,
        lengths=_lengths(value.get("lengths"), where),
        depths=tuple(dict.fromkeys(depths)),
        per_cell=number("per_cell", 4, 1, 1_000),
        seed=number("seed", 0, 0, 2**31 - 1),
        keys=number("keys", own.get("keys", 1), 1, 1_000),
        chains=number("chains", own.get("chains", 1), 1, 100),
        hops=number("hops", own.get("hops", 0), 0, 20),
    )


class Cell(NamedTuple):
    """The place of an item in the table of lengths and depths.

    Attributes:
        length: Tokens of prompt and longest answer, at most.
        depth: Percent of the text before what is asked for; None where that is not chosen.
    """

    length: int
    depth: int | None


def make_rows(
    synthesis: Synthesis,
    count_tokens: CountTokens,
    *,
    max_new_tokens: int,
    max_tokens: int | None,
    where: str,
) -> list[dict[str, Any]]:
    """Generate the rows of a task; the first rows hold one item of every length and depth.

    Args:
        synthesis: What is generated.
        count_tokens: Tokens of a question once it is a prompt.
        max_new_tokens: Longest answer, in tokens.
        max_tokens: Longest sequence that the model reads; None if it declares no limit.
        where: Name of the task, for errors.
    Returns: Rows of id, prompt, gold, distractors, context (what a text is called), length and depth.
    Raises:
        EvalError: A length that the model cannot read (exit code 2), or that is too short for the task.
    """
    beyond = [length for length in synthesis.lengths if max_tokens is not None and length > max_tokens]
    if beyond:
        fitting = [str(length) for length in synthesis.lengths if length not in beyond]
        raise EvalError(
            f"texts of {', '.join(f'{length:,}' for length in beyond)} tokens are longer than the model reads: it has "
            f"{max_tokens:,} positions",
            where=where,
            hint=f"--lengths {' '.join(fitting or [str(max_tokens)])}",
            exit_code=2,
        )
    make = {NEEDLE: _needles, MULTI_KEY: _needles, VARIABLES: _variables, MQAR: _mqar}[synthesis.task]
    sizes: dict[int, int] = {}
    rows: list[dict[str, Any]] = []
    for number in range(synthesis.per_cell):
        for length in synthesis.lengths:
            fit = _Fit(count_tokens, length, length - max_new_tokens, sizes, where)
            rows += make(synthesis, number, fit)
    return rows


def heat_table(
    cells: Sequence[tuple[int, int | None] | None], correct: Sequence[float]
) -> dict[str, Any] | None:
    """Arrange how right items were answered as a table of lengths and depths.

    Args:
        cells: Length and depth of each item; None of items without.
        correct: From 0 to 1, in the same order.
    Returns: ``lengths``, ``depths`` (``[None]`` where depth is not chosen), and ``values`` and ``n``: a row per length
        with an entry per depth, whose value is None where no item is; None if no item has a length.
    """
    found: dict[tuple[int, int | None], list[float]] = {}
    for cell, flag in zip(cells, correct, strict=True):
        if cell is not None:
            found.setdefault((cell[0], cell[1]), []).append(float(flag))
    if not found:
        return None
    lengths = sorted({length for length, _ in found})
    depths = sorted({depth for _, depth in found}, key=lambda depth: (depth is not None, depth))
    table = [[found.get((length, depth), []) for depth in depths] for length in lengths]
    return {
        "lengths": lengths,
        "depths": depths,
        "values": [[sum(flags) / len(flags) if flags else None for flags in row] for row in table],
        "n": [[len(flags) for flags in row] for row in table],
    }


@dataclass(frozen=True, slots=True)
class _Fit:
    """The search for the longest text that fits a length; texts of one length have similar sizes."""

    count_tokens: CountTokens
    length: int
    budget: int
    sizes: dict[int, int]
    where: str

    def fits(self, text: str) -> bool:
        return self.count_tokens(text) <= self.budget

    def largest(self, make: Callable[[int], str]) -> int:
        """Find the largest size whose text fits; more size means more tokens."""
        low = self.sizes.get(self.length, 16)
        step = 1
        if self.fits(make(low)):
            while self.fits(make(low + step)):
                low, step = low + step, 2 * step
            high = low + step
        else:
            high = low
            while low > 0 and not self.fits(make(low := max(0, high - step))):
                high, step = low, 2 * step
            if low == 0 and not self.fits(make(0)):
                raise EvalError(
                    f"{self.length:,} tokens are too few: what has to be in the text, the question and the longest "
                    f"answer take {self.count_tokens(make(0)) + self.length - self.budget:,}",
                    where=self.where,
                    hint="give longer texts with --lengths",
                    exit_code=2,
                )
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.fits(make(middle)) else (low, middle)
        self.sizes[self.length] = low
        return low


def _needles(synthesis: Synthesis, number: int, fit: _Fit) -> Iterator[dict[str, Any]]:
    return (_needle(synthesis, f"{fit.length}-{depth}-{number}", depth, fit) for depth in synthesis.depths)


def _needle(synthesis: Synthesis, name: str, depth: int, fit: _Fit) -> dict[str, Any]:
    draw = _drawer(synthesis, name)
    wanted, *others = [keys(index) for index in draw.sample(range(KEYS), synthesis.keys)]
    value, *values = draw.sample(range(10_000, 100_000), synthesis.keys + _NUM_DISTRACTORS)
    hidden = [(depth / 100, wanted, value)]
    hidden += [(draw.random(), key, other) for key, other in zip(others, values, strict=False)]
    placed = [(place, f"The number of the {key} is {found}.") for place, key, found in hidden]
    sentences = filler(draw)

    def body(size: int) -> str:
        return _asked(_insert(sentences(size), placed), f"What is the number of the {wanted}?")

    # The first of the other numbers are those of other keys, where there are any.
    return _row(name, body(fit.largest(body)), value, values[:_NUM_DISTRACTORS], Cell(fit.length, depth))


def _variables(synthesis: Synthesis, number: int, fit: _Fit) -> Iterator[dict[str, Any]]:
    name = f"{fit.length}-{number}"
    draw = _drawer(synthesis, name)
    num_chains = synthesis.chains
    values = draw.sample(range(10_000, 100_000), max(num_chains, 1 + _NUM_DISTRACTORS))
    variables = _variable_names(draw, num_chains * (synthesis.hops + 1))
    placed = []
    for chain, value in zip(range(num_chains), values, strict=False):
        links = variables[chain * (synthesis.hops + 1) :][: synthesis.hops + 1]
        # A variable is assigned before it is used.
        places = sorted(draw.random() for _ in links)
        given = [str(value), *links]
        placed += [
            (place, f"VAR {link} = {given[at]}.")
            for at, (place, link) in enumerate(zip(places, links, strict=True))
        ]
    last = variables[synthesis.hops]
    sentences = filler(draw)

    def body(size: int) -> str:
        return _asked(_insert(sentences(size), placed), f"What number is the value of the variable {last}?")

    prompt = body(fit.largest(body))
    yield _row(name, prompt, values[0], values[1 : 1 + _NUM_DISTRACTORS], Cell(fit.length, None))


def _mqar(synthesis: Synthesis, number: int, fit: _Fit) -> Iterator[dict[str, Any]]:
    context = f"{fit.length}-{number}"
    draw = _drawer(synthesis, context)
    names = draw.sample(range(KEYS), KEYS)
    values = draw.sample(range(10_000, 100_000), KEYS)

    def body(size: int, asked: int = 0) -> str:
        if size > KEYS:
            raise EvalError(
                f"a list of {fit.length:,} tokens needs more than the {KEYS:,} keys that there are",
                where=fit.where,
                hint="give shorter texts with --lengths",
                exit_code=2,
            )
        lines = "\n".join(f"{keys(name)}: {value}" for name, value in zip(names[:size], values, strict=False))
        question = f"Which number stands beside {keys(names[asked])}?"
        return _asked(lines, question, opening="Each line pairs a name with a number.")

    def asked_at(size: int) -> list[int]:
        return [round(depth / 100 * (size - 1)) for depth in synthesis.depths]

    size = fit.largest(body)
    # The names that are asked for differ in length by a few tokens.
    while size > _NUM_DISTRACTORS and not all(fit.fits(body(size, asked)) for asked in asked_at(size)):
        size -= 1
    if size <= _NUM_DISTRACTORS:
        raise EvalError(
            f"{fit.length:,} tokens are too few for a list of pairs",
            where=fit.where,
            hint="give longer texts with --lengths",
            exit_code=2,
        )
    for depth, asked in zip(synthesis.depths, asked_at(size), strict=True):
        others = draw.sample([place for place in range(size) if place != asked], _NUM_DISTRACTORS)
        yield _row(
            f"{fit.length}-{depth}-{number}",
            body(size, asked),
            values[asked],
            [values[place] for place in others],
            Cell(fit.length, depth),
            context=context,
        )


def _drawer(synthesis: Synthesis, name: str) -> random.Random:
    # Seeding with a text hashes it, which gives the same numbers on every machine.
    return random.Random(f"{GENERATOR} {synthesis.task} {synthesis.seed} {name}")


def _insert(sentences: Sequence[str], placed: Sequence[tuple[float, str]]) -> str:
    """Put sentences at shares of the way through others; those of one place keep their order."""
    parts: list[str] = []
    at = 0
    for place, sentence in sorted(placed, key=lambda each: each[0]):
        upto = round(place * len(sentences))
        parts += [*sentences[at:upto], sentence]
        at = upto
    return " ".join([*parts, *sentences[at:]])


def _asked(text: str, question: str, *, opening: str = "Read the text and remember its numbers.") -> str:
    return f"{opening}\n\n{text}\n\n{question} Answer with the number only."


def _variable_names(draw: random.Random, count: int) -> list[str]:
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(draw.choice(_NAME_LETTERS) for _ in range(4))] = None
    return list(names)


def _row(
    name: str, prompt: str, gold: int, distractors: Sequence[int], cell: Cell, *, context: str | None = None
) -> dict[str, Any]:
    return {
        "id": name,
        "prompt": prompt,
        "gold": str(gold),
        "distractors": [str(other) for other in distractors],
        "context": context or name,
        **cell._asdict(),
    }


def _is_percent(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 100


def _lengths(value: Any, where: str) -> tuple[int, ...]:
    if (
        not isinstance(value, list)
        or not value
        or not all(
            isinstance(each, int) and not isinstance(each, bool) and each >= SHORTEST for each in value
        )
    ):
        raise EvalError(
            f"lengths must be whole numbers of tokens from {SHORTEST}, got {shorten(value)}",
            where=where,
            hint="write lengths: [1024, 2048], or --lengths 1024 2048",
            exit_code=2,
        )
    return tuple(dict.fromkeys(value))
