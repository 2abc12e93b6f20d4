"""Answers on the terminal as they grow: to texts of a command line, and turn by turn in a chat. Imports no torch."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

from gendistill.errors import GendistillError
from gendistill.text import harmless, printable, printable_lines
from gendistill_evals import EvalError, Message

if TYPE_CHECKING:
    from gendistill.generation.request import Answer, Prompt
    from gendistill.runs.answering import Answerer

# thoughts that a model writes before its answer; chat templates leave them out of earlier turns
_THOUGHTS_END = "</think>"
_COMMANDS = "/reset begins anew, /exit or Ctrl-D leaves, Ctrl-C ends an answer"


@dataclass(frozen=True, slots=True)
class Asking:
    """What holds for every answer.

    Attributes:
        max_new_tokens: Longest answer; None for 512, or as many as the model has positions left.
        stop: Texts that end it.
        seed: The n-th answer draws with this seed plus n.
    """

    max_new_tokens: int | None
    stop: tuple[str, ...]
    seed: int

    def prompt(self, answerer: Answerer, asked: Any, number: int) -> Prompt:
        """Make the prompt of the n-th answer, from 0."""
        return answerer.prompt(
            asked, max_new_tokens=self.max_new_tokens, stop=self.stop, seed=self.seed + number
        )


class _Stopped(Exception):
    """An answer that Ctrl-C has ended."""


def answer_texts(answerer: Answerer, asking: Asking, texts: Sequence[str]) -> int:
    """Answer texts, all at a time, and write the answers in their order.

    Returns: The exit code.
    """
    _say_if_raw(answerer)
    prompts = [asking.prompt(answerer, text, number) for number, text in enumerate(texts)]
    page = _Page(answerer, prompts, titles=texts if len(texts) > 1 else [])
    for number, answer in answerer.answers(prompts, watch=page.add):
        page.end(number, answer)
    if len(texts) > 1:
        stats = answerer.engine.stats
        _say(
            f"{len(texts):,} answers, {stats.new_tokens:,} tokens, {stats.new_tokens / stats.seconds:,.1f} tokens/s"
        )
    return page.exit_code


def chat(answerer: Answerer, asking: Asking, *, name: str) -> int:
    """Talk until the user leaves; without a chat template, complete a text at a time.

    Returns: The exit code.
    """
    with contextlib.suppress(ImportError):
        # gives input() a history and editing
        import readline  # noqa: F401
    _say(f"{printable(name)}: {_COMMANDS}")
    _say_if_raw(answerer)
    turns: list[Message] = []
    number = 0
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            _say("/exit or Ctrl-D leaves")
            continue
        word = text.strip()
        if word == "/exit":
            return 0
        if word == "/reset":
            turns.clear()
            _say("what was said is forgotten")
        elif word:
            asked = [*turns, Message(role="user", content=text)]
            said = _answer(answerer, asking, text if answerer.is_raw else asked, number)
            number += 1
            if said is not None:
                turns = [*asked, Message(role="assistant", content=said.rpartition(_THOUGHTS_END)[2].strip())]


def _answer(answerer: Answerer, asking: Asking, asked: Any, number: int) -> str | None:
    """Write an answer as it grows; returns it as far as it came, None where there is none."""
    try:
        prompts = [asking.prompt(answerer, asked, number)]
        page = _Page(answerer, prompts)
        with _until_ctrl_c() as is_stopped:

            def watch(place: int, token: int) -> None:
                page.add(place, token)
                if is_stopped():
                    raise _Stopped

            try:
                for place, answer in answerer.answers(prompts, watch=watch):
                    page.end(place, answer)
            except _Stopped:
                page.end(0, None)
    except (GendistillError, EvalError) as error:
        print(printable_lines(str(error)), file=sys.stderr)
        return None
    return page.text if page.exit_code == 0 else None


class _Page:
    """Standard output, where the first answer that is not over grows and later ones wait for their turn.

    Args:
        answerer: Who answers.
        prompts: What is answered.
        titles: Of the prompts, where there are several.

    Attributes:
        text: All that was written of answers.
        exit_code: 1 if a prompt had no answer.
    """

    def __init__(self, answerer: Answerer, prompts: Sequence[Prompt], *, titles: Sequence[str] = ()) -> None:
        self._prompts, self._titles = prompts, titles
        self._streams = [answerer.stream(prompt) for prompt in prompts]
        self._waiting = [""] * len(prompts)
        self._clocks = [_Clock() for _ in prompts]
        self._over: dict[int, Answer | None] = {}
        self._place = 0
        self.text = ""
        self.exit_code = 0
        self._title()

    def add(self, number: int, token: int) -> None:
        """Take a token of an answer."""
        self._clocks[number].tick()
        self._put(number, self._streams[number].add(token))

    def end(self, number: int, answer: Answer | None) -> None:
        """Take the end of an answer; None where the user has ended it."""
        if answer is None or answer.error is None:
            self._put(number, self._streams[number].rest())
        self._over[number] = answer
        while self._place in self._over:
            self._close(self._over[self._place])
            self._place += 1
            if self._place < len(self._prompts):
                self._title()
                self._write(self._waiting[self._place])

    def _title(self) -> None:
        if self._titles:
            _say(f"> {printable(self._titles[self._place], longest=100)}")

    def _put(self, number: int, text: str) -> None:
        if number == self._place:
            self._write(text)
        else:
            self._waiting[number] += text

    def _write(self, text: str) -> None:
        if text:
            self.text += text
            sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)
            sys.stdout.flush()

    def _close(self, answer: Answer | None) -> None:
        from gendistill.runs.answering import why

        if answer is not None and answer.error is not None:
            self.exit_code = 1
            print(f"no answer: {printable_lines(answer.error)}", file=sys.stderr)
            return
        print(flush=True)
        clock = self._clocks[self._place]
        reason = "ended by Ctrl-C" if answer is None else why(self._prompts[self._place], answer)
        _say(f"{clock.in_words(alone=not self._titles)}, {reason}")


class _Clock:
    """The time that the tokens of an answer take."""

    def __init__(self) -> None:
        self._times: list[float] = [time.monotonic()]

    def tick(self) -> None:
        self._times.append(time.monotonic())

    def in_words(self, *, alone: bool) -> str:
        """Say how many tokens there are; of an answer alone, also how fast they came."""
        tokens = len(self._times) - 1
        said = f"{tokens:,} token{'' if tokens == 1 else 's'}"
        if alone and tokens:
            said += f", first after {self._times[1] - self._times[0]:.2f} s"
            seconds = self._times[-1] - self._times[1]
            if tokens > 1 and seconds > 0:
                said += f", then {(tokens - 1) / seconds:,.1f} tokens/s"
        return said


@contextmanager
def _until_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Give what tells whether Ctrl-C was pressed meanwhile; pressed again, it interrupts as ever."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _say_if_raw(answerer: Answerer) -> None:
    if answerer.is_raw and not answerer.manner.raw:
        _say("the tokenizer has no chat template: texts are completed as they are, as with --raw")


def _say(text: str) -> None:
    """Tell about answers, apart from them."""
    print(f"\033[2m{text}\033[0m" if sys.stderr.isatty() else text, file=sys.stderr, flush=True)
