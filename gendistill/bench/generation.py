"""``gendistill bench generate``: answers of the engine beside transformers, and what a step costs by context."""

from __future__ import annotations

import bisect
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gendistill.bench.clock import Clock
from gendistill.bench.pair import for_inference, make_student, make_teacher
from gendistill.bench.shapes import SHAPES, Shape
from gendistill.errors import GendistillError
from gendistill.generation.engine import Engine
from gendistill.generation.request import Prompt
from gendistill.results.table import ResultRow

# Bars, each for the sizes that it was set for. Answers: tokens a second, the least that the engine is times
# transformers, the least that a hybrid is times its teacher; with short prompts, and with long ones.
ANSWERS = "qwen2.5-0.5b"
ANSWERS_TEXTS, ANSWERS_TOKENS = 660, 384
SPEED_BAR, PEER_BAR, HYBRID_BAR, LONG_BAR = 25_000.0, 5.0, 0.8, 1.5
# times letter likelihood that short answers take
CHOICES_BAR = 1.6
# Latencies: a decode step by context and the first token, in ms; the first token of the teacher over the hybrid's; the
# hybrid's tokens a second over the teacher's with as many rows as fit.
LATENCIES = "qwen3-0.6b"
STEP_BARS = {4096: 1.5, 131_072: 3.0}
TTFT_BARS = {4096: 15.0}
RATIO_BARS = {4096: 1 / 1.15, 32_768: 1.8, 131_072: 2.9}
ROWS_BAR = 3.0
_WARMUP, _STEPS, _REPEATS = 5, 50, 5
_CHOICE_TOKENS = 8
# before a run counts: kernels are compiled in the first, and the second is the last that records graphs of passes
_WARM_RUNS, _RUNS = 2, 3
_LONG = 16_384


@dataclass(frozen=True, slots=True)
class Answered:
    """What a way to generate has made of some texts.

    Attributes:
        seconds: Tokenising and decoding included.
        tokens: Chosen, end tokens included.
        ids: Tokens of each answer, without the one that ended it.
        lengths: How many tokens were chosen for each.
    """

    seconds: float
    tokens: int
    ids: list[list[int]]
    lengths: list[int]

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def read_lines(path: Path, names: Sequence[str]) -> list[str]:
    """Read the first of some fields that every line of a file has.

    Raises:
        GendistillError: A line is not JSON, or has none of them.
    """
    found = []
    # JSON texts may hold the other line separators of Unicode
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise GendistillError(f"line {number} is not JSON: {error}", where=str(path)) from error
        texts = [row[name] for name in names if isinstance(row, dict) and isinstance(row.get(name), str)]
        if not texts:
            raise GendistillError(f"line {number} has no {' or '.join(names)}", where=str(path))
        found.append(texts[0])
    return found


def read_questions(path: Path, tokenizer: Any) -> list[str]:
    """Read ``question`` or ``prompt`` of every line, as the tokenizer's chat template asks it.

    Raises:
        GendistillError: The file has no such lines.
    """
    texts = read_lines(path, ("question", "prompt"))
    if not tokenizer.chat_template:
        return texts
    turns = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in turns]


def by_engine(
    engine: Engine, texts: Sequence[str], *, new_tokens: int | Sequence[int], end_ids: Sequence[int]
) -> Answered:
    """Answer texts by the engine, each with up to so many tokens."""
    most = [new_tokens] * len(texts) if isinstance(new_tokens, int) else new_tokens
    began = time.perf_counter()
    ids = engine.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    prompts = [Prompt(ids[index], most[index]) for index in order]
    found: list[list[int]] = [[] for _ in ids]
    lengths = [0] * len(ids)
    for place, answer in engine.generate(prompts, end_ids=frozenset(end_ids)):
        if answer.error:
            raise GendistillError(answer.error, where=f"text {order[place]}")
        found[order[place]], lengths[order[place]] = list(answer.token_ids), len(answer.log_probs)
    return Answered(time.perf_counter() - began, engine.stats.new_tokens, found, lengths)


def warmed_up(work: Callable[[], Answered]) -> tuple[float, Answered]:
    """Repeat some work until nothing is compiled or recorded any more, and then a few times.

    Returns: Seconds of the first run, and what the run returned that took the middle of the times that count.
    """
    runs = [work() for _ in range(_WARM_RUNS + _RUNS)]
    return runs[0].seconds, sorted(runs[_WARM_RUNS:], key=lambda run: run.seconds)[_RUNS // 2]


def by_transformers(
    model: Any, tokenizer: Any, texts: Sequence[str], *, new_tokens: int, end_ids: Sequence[int], batch: int
) -> Answered:
    """Answer texts by ``model.generate`` in left-padded batches of similar length."""
    began = time.perf_counter()
    ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]), reverse=True)
    pad = tokenizer.pad_token_id or 0
    found: list[list[int]] = [[] for _ in ids]
    lengths = [0] * len(ids)
    for start in range(0, len(order), batch):
        chosen = [ids[index] for index in order[start : start + batch]]
        width = max(map(len, chosen))
        padded = torch.tensor([[pad] * (width - len(each)) + each for each in chosen], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(each)) + [1] * len(each) for each in chosen], device=model.device
        )
        with torch.no_grad():
            out = model.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=list(end_ids) or None,
                pad_token_id=pad,
            )
        for place, row in enumerate(out[:, width:].tolist()):
            length = next((at for at, token in enumerate(row) if token in end_ids), len(row))
            index = order[start + place]
            found[index], lengths[index] = row[:length], min(length + 1, len(row))
            tokenizer.decode(found[index], skip_special_tokens=True)
    return Answered(time.perf_counter() - began, sum(lengths), found, lengths)


def first_differences(
    engine: Engine, texts: Sequence[str], ours: Answered, theirs: Answered
) -> tuple[int, list[float]]:
    """Find where two ways to answer first choose different tokens, and how much likelier ours was to the engine.

    Returns: How many answers are the same, and of those with different tokens the difference of log-probabilities in
        nats: where two tokens are about as likely, rounding decides which is chosen. The rest end elsewhere.
    """
    ids = engine.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    pairs = []
    for prompt, one, other in zip(ids, ours.ids, theirs.ids, strict=True):
        at = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        if at is not None:
            pairs += [(prompt + one[:at], [one[at]]), (prompt + one[:at], [other[at]])]
    scores = {number: values[0] for number, values in engine.log_probs(pairs)}
    same = sum(one == other for one, other in zip(ours.ids, theirs.ids, strict=True))
    return same, [scores[number] - scores[number + 1] for number in range(0, len(pairs), 2)]


def _is_of(model: Any, name: str) -> bool:
    """Say whether a model has the sizes of a shape."""
    config, sizes = model.config, SHAPES[name].sizes
    return all(getattr(config, key, None) == value for key, value in sizes.items() if key in _SIZES)


# what decides how long a step takes
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


class GenerationBench:
    """Measurements of the engine, as rows of a results file.

    Args:
        console: Where they are shown.
        save: Called with all rows after each.
    """

    def __init__(
        self, console: Console, save: Callable[[Sequence[ResultRow]], None], *, device: torch.device
    ) -> None:
        self.console, self._save, self.device = console, save, device
        self.rows: list[ResultRow] = []

    def add(self, name: str, value: float, unit: str, *, lower: bool = False, **more: Any) -> None:
        """Show and keep a row; bars are those of a GPU."""
        if self.device.type != "cuda":
            more.pop("bar", None)
        row = ResultRow(name=name, value=value, unit=unit, better="lower" if lower else "higher", **more)
        self.rows.append(row)
        mark = {None: "", True: " met", False: " MISSED"}[row.met]
        bar = "" if row.bar is None else f" (bar {row.bar:,.4g}{mark})"
        note = f"; {row.note}" if row.note else ""
        self.console.print(f"{name}: {value:,.4g} {unit}{bar}{note}", markup=False)
        self._save(self.rows)

    # ----- answers -----

    def answers(
        self,
        model: Any,
        tokenizer: Any,
        texts: Sequence[str],
        *,
        name: str,
        new_tokens: int,
        end_ids: Sequence[int],
        batches: Sequence[int],
        student: Any = None,
    ) -> None:
        """Answer texts by the engine, by transformers, and by a student of the same shape on the engine.

        Args:
            model: The teacher.
            tokenizer: Its tokenizer.
            texts: As the model reads them.
            name: Of the model.
            new_tokens: Longest answer.
            end_ids: That end one.
            batches: Of transformers; none leaves it out.
            student: With other mixers, untrained, or None. Its answers have as many tokens as the teacher's.
        """
        settings: dict[str, Any] = {"new_tokens": new_tokens, "end_ids": end_ids}
        with Engine(model, tokenizer) as engine:
            first, ours = warmed_up(lambda: by_engine(engine, texts, **settings))
            stats = engine.stats
        barred = _is_of(model, ANSWERS) and (len(texts), new_tokens) == (ANSWERS_TEXTS, ANSWERS_TOKENS)
        note = (
            f"{len(texts)} texts, {ours.tokens / len(texts):.0f} tokens on average, {ours.seconds:.2f} s "
            f"({first:.2f} s the first time), {stats.steps} steps, {stats.prompt_tokens:,} tokens of prompts"
        )
        self.add(
            f"{name}, engine: tokens/s", ours.speed, "tokens/s", bar=SPEED_BAR if barred else None, note=note
        )
        best: Answered | None = None
        for batch in batches:
            try:
                found = by_transformers(model, tokenizer, texts, batch=batch, **settings)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                self.console.print(f"transformers: batches of {batch} do not fit", markup=False)
                continue
            with Engine(model, tokenizer) as engine:
                same, apart = first_differences(engine, texts, ours, found)
            note = f"{found.seconds:.2f} s; {same / len(texts):.0%} of the answers are those of the engine"
            if apart:
                off = sorted(map(abs, apart))
                note += f", {len(off)} first differ between tokens {statistics.median(off):.2g} nats apart, at most"
                note += f" {off[-1]:.2g}, and {len(texts) - same - len(off)} end elsewhere"
            self.add(
                f"{name}, transformers, batches of {batch}: tokens/s",
                found.speed,
                "tokens/s",
                note=note,
            )
            if best is None or found.speed > best.speed:
                best = found
        if best is not None:
            times = ours.speed / best.speed
            self.add(f"{name}: times transformers", times, "times", bar=PEER_BAR if barred else None)
        if student is not None:
            with Engine(student, tokenizer) as engine:
                _, hybrid = warmed_up(lambda: by_engine(engine, texts, new_tokens=ours.lengths, end_ids=()))
            self.add(f"{name}, hybrid, as many tokens: tokens/s", hybrid.speed, "tokens/s")
            times = hybrid.speed / ours.speed
            self.add(f"{name}: hybrid, times the teacher", times, "times", bar=HYBRID_BAR if barred else None)

    def choices(
        self, model: Any, tokenizer: Any, texts: Sequence[str], *, name: str, end_ids: Sequence[int]
    ) -> None:
        """Answer questions that list options by letter: once by the likelihood of letters, once in a few words.

        Args:
            model: To ask.
            tokenizer: Its tokenizer.
            texts: Each ends where the letter follows.
            name: Of the model.
            end_ids: Tokens that end an answer, beside the end of the line.
        """
        letters = [tokenizer(f" {letter}", add_special_tokens=False)["input_ids"] for letter in "ABCD"]
        seconds: dict[str, list[float]] = {"likelihood": [], "generation": []}
        chosen: list[int] = []
        with Engine(model, tokenizer) as engine:
            for _ in range(_WARM_RUNS + _REPEATS):
                began = time.perf_counter()
                ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
                pairs = [(context, letter) for context in ids for letter in letters]
                scores = {place: sum(values) for place, values in engine.log_probs(pairs)}
                chosen = [
                    max(range(4), key=lambda letter: scores[4 * index + letter]) for index in range(len(ids))
                ]
                seconds["likelihood"].append(time.perf_counter() - began)
                began = time.perf_counter()
                ids = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
                prompts = [Prompt(each, _CHOICE_TOKENS, ("\n",)) for each in ids]
                answers = dict(engine.generate(prompts, end_ids=frozenset(end_ids)))
                seconds["generation"].append(time.perf_counter() - began)
        if errors := [answer.error for answer in answers.values() if answer.error]:
            raise GendistillError(errors[0])
        same = sum(answers[index].text[:1] == "ABCD"[letter] for index, letter in enumerate(chosen))
        took = {kind: statistics.median(times[_WARM_RUNS:]) for kind, times in seconds.items()}
        for kind, value in took.items():
            self.add(f"{name}, {len(texts)} choices by {kind}", value, "s", lower=True)
        self.add(
            f"{name}, {len(texts)} choices: generation, times likelihood",
            took["generation"] / took["likelihood"],
            "times",
            lower=True,
            bar=CHOICES_BAR if _is_of(model, ANSWERS) else None,
            note=f"{same / len(texts):.0%} choose alike; {engine.stats.new_tokens / len(texts):.1f} tokens on average",
        )

    # ----- latency -----

    def latencies(self, shape: Shape, contexts: Sequence[int], *, dtype: torch.dtype) -> None:
        """Time the first token and a decode step of a teacher of a shape and its hybrid, with random weights."""
        longest = max([*contexts, _LONG]) + 1024
        shape = replace(shape, sizes={**shape.sizes, "max_position_embeddings": longest})
        barred = shape.name == LATENCIES
        first: dict[tuple[str, int], float] = {}
        speeds: dict[str, float] = {}
        long: dict[str, float] = {}
        for kind in ("teacher", "hybrid"):
            model = make_teacher(shape, device=self.device, dtype=dtype, seed=0)
            if kind == "hybrid":
                model = for_inference(make_student(model, shape), dtype)
            with Engine(model) as engine:
                for context in contexts:
                    label = f"{shape.name}, {kind}, {context:,} tokens"
                    seconds = self._first_token(engine, context)
                    first[kind, context] = seconds
                    bar = TTFT_BARS.get(context) if barred else None
                    self.add(f"{label}: first token", 1000 * seconds, "ms", lower=True, bar=bar)
                    step, host = self.step_seconds(engine, context, 1)
                    bar = STEP_BARS.get(context) if barred and kind == "hybrid" else None
                    note = f"{1000 * host:.2f} ms of the host"
                    self.add(
                        f"{label}: decode step, batch 1", 1000 * step, "ms", lower=True, bar=bar, note=note
                    )
                    if kind == "hybrid":
                        ratio = first["teacher", context] / seconds
                        self.add(
                            f"{shape.name}, {context:,} tokens: first token, teacher over hybrid",
                            ratio,
                            "times",
                            bar=RATIO_BARS.get(context) if barred else None,
                        )
                rows = self._rows_that_fit(engine, max(contexts))
                speeds[kind] = rows / self.step_seconds(engine, max(contexts), rows)[0]
                self.add(
                    f"{shape.name}, {kind}, {max(contexts):,} tokens, as many rows as fit: decode tokens/s",
                    speeds[kind],
                    "tokens/s",
                    note=f"{rows} rows",
                )
                if max(contexts) >= _LONG:
                    long[kind] = self._together(engine, _LONG, 32, 128)
                    self.add(
                        f"{shape.name}, {kind}, 32 prompts of {_LONG:,} tokens, 128 new: tokens/s",
                        long[kind],
                        "tokens/s",
                    )
            del model
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        name = f"{shape.name}, {max(contexts):,} tokens, as many rows as fit: hybrid, times the teacher"
        self.add(name, speeds["hybrid"] / speeds["teacher"], "times", bar=ROWS_BAR if barred else None)
        if long:
            self.add(
                f"{shape.name}, 32 prompts of {_LONG:,} tokens: hybrid, times the teacher",
                long["hybrid"] / long["teacher"],
                "times",
                bar=LONG_BAR if shape.name == ANSWERS else None,
            )

    def _prompt(self, engine: Engine, context: int, new: int) -> Prompt:
        vocabulary = engine.model.lm_head.out_features
        return Prompt(torch.randint(vocabulary, (context,)).tolist(), new)

    def _first_token(self, engine: Engine, context: int) -> float:
        """Return the median time from a prompt to its first token, in seconds."""
        times = []
        for turn in range(_REPEATS + 2):
            prompt = self._prompt(engine, context, 1)
            began = time.perf_counter()
            list(engine.generate([prompt], end_ids=()))
            if turn >= 2:
                times.append(time.perf_counter() - began)
        return statistics.median(times)

    def step_seconds(self, engine: Engine, context: int, rows: int) -> tuple[float, float]:
        """Return the time of a decode step of rows that have seen so many tokens, and the part that the host works.

        What they have seen is nothing but zeros, which takes as long as anything else.
        """
        clock = Clock(self.device)
        step = engine.rows_at(context, rows, steps=2 * _WARMUP + _STEPS + 2)
        for _ in range(_WARMUP):
            step()
        clock.wait()
        began = time.perf_counter()
        for _ in range(_STEPS):
            step()
        clock.wait()
        took = (time.perf_counter() - began) / _STEPS
        began = time.perf_counter()
        for _ in range(_WARMUP):
            step(take=False)
        host = (time.perf_counter() - began) / _WARMUP
        clock.wait()
        return took, host

    def _rows_that_fit(self, engine: Engine, context: int) -> int:
        """Return the most rows, up to 512, whose keys, values and states fit into memory."""
        return max(
            1, bisect.bisect_left(range(1, 513), True, key=lambda rows: not engine.fits(context + 128, rows))
        )

    def _together(self, engine: Engine, context: int, rows: int, new: int) -> float:
        times = []
        for _ in range(_WARM_RUNS + _RUNS):
            prompts = [self._prompt(engine, context, new) for _ in range(rows)]
            began = time.perf_counter()
            list(engine.generate(prompts, end_ids=()))
            times.append(time.perf_counter() - began)
        return rows * new / statistics.median(times[_WARM_RUNS:])
