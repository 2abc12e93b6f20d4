"""The engine: prompts in, answers out as they end, whatever else runs beside them.

with Engine(model, tokenizer) as engine:
    for index, answer in engine.generate(prompts, end_ids={tokenizer.eos_token_id}):
        ...
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import torch

from gendistill.errors import GendistillError
from gendistill.generation.likelihood import Pair, Pass, passes, readings
from gendistill.generation.recording import ran_out
from gendistill.generation.request import Answer, Prompt, Stats
from gendistill.generation.runner import Chosen, Runner
from gendistill.generation.sampling import Sampling
from gendistill.generation.schedule import Row, Schedule, pieces
from gendistill.generation.stops import Ending
from gendistill.ops.paged import PAGE

# rows at a time, and tokens of a pass over prompts, where nothing else is said
_ROWS = {"cuda": 512, "cpu": 16}
_PASS_TOKENS = {"cuda": 8192, "cpu": 1024}
# steps that a GPU may be ahead of the host
_AHEAD = {"cuda": 1, "cpu": 0}
# what of a device's free memory goes to rows; the rest is for passes
_SHARE = 0.8
# rows of logits at a time that are scored
_LOGITS = 1024

Result = tuple[int, Answer]
Watch = Callable[[int, int], None]


class OutOfMemory(GendistillError, torch.OutOfMemoryError):
    """Memory that does not suffice for a single row; who has some to give may ask again."""


class Engine:
    """A causal language model that answers many prompts at a time.

    Its layers run fused while the engine is open, and as before when it is closed. A model that is being trained and
    runs fused already may be given: every call takes over its weights as they are.

    Args:
        model: A teacher's or a student's, of a supported family, on the device and in the dtype to run it with.
        tokenizer: Its tokenizer; None for answers without text.
        max_rows: Most rows at a time; by default as many as memory allows, up to 512 on a GPU and 16 on a CPU.
        pass_tokens: Most tokens of prompts that are read in one pass.
        memory_bytes: For keys, values and states; by default most of what is free.
        learns: Whether the model is being trained: its parameters stay where they are, beside copies of them.
        capture: Whether decode steps on a GPU are CUDA graphs.

    Attributes:
        stats: Of the last call.

    Raises:
        GendistillError: The model's layers cannot run fused; says why.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_rows: int | None = None,
        pass_tokens: int | None = None,
        memory_bytes: int | None = None,
        learns: bool = False,
        capture: bool = True,
    ) -> None:
        for name, value in (
            ("max_rows", max_rows),
            ("pass_tokens", pass_tokens),
            ("memory_bytes", memory_bytes),
        ):
            if value is not None and value < 1:
                raise GendistillError(f"{name} must be at least 1, got {value}")
        self.model, self.tokenizer = model, tokenizer
        self._runner = Runner(model, learns=learns, capture=capture)
        kind = self._runner.device.type
        self._max_rows = max_rows or _ROWS.get(kind, 16)
        self._pass_tokens = pass_tokens or _PASS_TOKENS.get(kind, 1024)
        self._memory_bytes = memory_bytes
        self._ahead = _AHEAD.get(kind, 0)
        self._runs = self._closed = False
        self._watch: Watch | None = None
        self.stats = Stats()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let all memory go, and the model run as it did before; whoever takes further answers of a call is told so."""
        self._closed = True
        self._runner.close()

    def _check_open(self, otherwise: str = "the engine was closed") -> None:
        if self._closed:
            raise GendistillError(otherwise, hint="open an engine on the model again")

    def free(self) -> None:
        """Let the memory of rows go until the next call.

        Raises:
            GendistillError: A call has not ended, whose rows are there.
        """
        if self._runs:
            raise GendistillError(
                "rows are there whose answers have not been taken: take them all, or close it"
            )
        self._runner.forget_all()

    # ----- answers -----

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        end_ids: Collection[int],
        sampling: Sampling | None = None,
        watch: Watch | None = None,
    ) -> Iterator[Result]:
        """Yield index and answer of every prompt as it ends.

        A prompt that cannot be answered has an answer with an ``error``; it changes nothing for the others. The same
        prompt has the same answer beyond rounding, whatever runs beside it, also if memory is short.

        Args:
            prompts: In the order in which they are begun.
            end_ids: Tokens that end an answer; none for answers of full length.
            sampling: How tokens are chosen; None for the likeliest.
            watch: Called with a prompt's index and every token of its answer as it comes, an end token included.
        Raises:
            OutOfMemory: Memory does not suffice for a single row.
            GendistillError: Another call has not ended.
        """
        self._check_open()
        if self._runs:
            raise GendistillError(
                "an engine runs one call at a time: take all answers of the last, or close it"
            )
        self._runs, began, self.stats = True, time.perf_counter(), Stats()
        self._watch = watch
        try:
            rows = []
            for index, prompt in enumerate(prompts):
                error = self._why_not(prompt)
                if error is not None:
                    yield index, Answer(error=error)
                else:
                    ending = self._ending(prompt, end_ids)
                    rows.append(Row(index, prompt, ending, list(prompt.token_ids)))
            if rows:
                self._runner.refresh()
                yield from self._answer(rows, sampling or Sampling())
        finally:
            self._runs = False
            self.stats.seconds = time.perf_counter() - began

    def _why_not(self, prompt: Prompt) -> str | None:
        config = self.model.config
        known = self._num_known
        limit = getattr(config, "max_position_embeddings", None)
        total = len(prompt.token_ids) + prompt.max_new_tokens
        if not prompt.token_ids:
            return "the prompt has no token"
        if "" in prompt.stop:
            return "a stop text must have a character"
        if prompt.max_new_tokens < 1:
            return f"max_new_tokens must be at least 1, got {prompt.max_new_tokens}"
        least, most = min(prompt.token_ids), max(prompt.token_ids)
        if least < 0 or most >= known:
            worst = most if least >= 0 else least
            return f"the prompt has token {worst:,}, and the model knows tokens 0 to {known - 1:,}"
        if not -(2**63) <= prompt.seed < 2**63:
            return f"seeds are whole numbers from -2**63 to 2**63 - 1, got {prompt.seed}"
        if limit and total > limit:
            return (
                f"the prompt has {len(prompt.token_ids):,} tokens and its answer up to {prompt.max_new_tokens:,}; "
                f"the model has {limit:,} positions"
            )
        return None

    @property
    def _num_known(self) -> int:
        """Tokens that can be read and chosen."""
        return min(self.model.lm_head.out_features, len(self.model.model.embed_tokens.weight))

    def _ending(self, prompt: Prompt, end_ids: Collection[int]) -> Any:
        if self.tokenizer is None:
            if prompt.stop:
                raise GendistillError("stop texts need a tokenizer: Engine(model, tokenizer)")
            return _Counted(end_ids, prompt.max_new_tokens)
        return Ending(
            self.tokenizer, end_ids=end_ids, stop=tuple(prompt.stop), max_new_tokens=prompt.max_new_tokens
        )

    def _answer(self, rows: list[Row], sampling: Sampling) -> Iterator[Result]:
        slots, pages = self._make_room(rows, min(self._max_rows, len(rows)))
        schedule = Schedule(rows, slots=slots, pages=pages, page=PAGE)
        flying: deque[Chosen] = deque()
        while True:
            try:
                yield from self._run(schedule, flying, sampling)
                return
            except Exception as error:
                if not ran_out(error):
                    raise
                reason = str(error)
            yield from self._halve(schedule, flying, reason)

    def _run(self, schedule: Schedule, flying: deque[Chosen], sampling: Sampling) -> Iterator[Result]:
        while flying or not schedule.is_done:
            self._check_open("the engine was closed before all answers were taken")
            ahead = len(flying) > self._ahead
            if flying and (ahead or not any(row.wants_more for row in schedule.running)):
                yield from self._receive(flying.popleft())
                continue
            self._let_go(schedule)
            if self._admit(schedule, flying, sampling):
                continue
            if not schedule.running:
                if schedule.waiting:
                    row = schedule.waiting.popleft()
                    yield row.index, Answer(error=self._too_large(row, schedule))
                continue
            if not self._grow(schedule, flying):
                yield from self._receive_all(flying)
                self._let_go(schedule)
                self._make_way(schedule)
                continue
            flying.append(self._runner.step(schedule.running, sampling=sampling))
            self.stats.steps += 1
            self.stats.rows += len(schedule.running)
            for row in schedule.running:
                row.read += 1
                row.launched += 1

    def _receive(self, chosen: Chosen) -> Iterator[Result]:
        for row, token, log_prob, finite in chosen.read():
            if row.over:
                continue
            if not finite:
                row.over = True
                yield row.index, Answer(error="the model gives logits that are not finite")
                continue
            row.tokens.append(token)
            row.log_probs.append(log_prob)
            self.stats.new_tokens += 1
            if self._watch is not None:
                self._watch(row.index, token)
            if row.ending.add(token):
                row.over = True
                ending: Any = row.ending
                yield (
                    row.index,
                    Answer(tuple(ending.token_ids), ending.text, ending.ended, tuple(row.log_probs)),
                )

    def _receive_all(self, flying: deque[Chosen]) -> Iterator[Result]:
        while flying:
            yield from self._receive(flying.popleft())
        self._check_open("the engine was closed before all answers were taken")

    def _let_go(self, schedule: Schedule) -> None:
        if any(row.over for row in schedule.running):
            moves = schedule.leave()
            self._runner.move(moves, len(schedule.running))

    def _admit(self, schedule: Schedule, flying: deque[Chosen], sampling: Sampling) -> bool:
        """Read prompts that wait, if there is room for them."""
        before = len(schedule.running)
        admitted = schedule.admit()
        if not admitted:
            return False
        slots = range(before, before + len(admitted))
        self._runner.place(slots, admitted)
        sizes = [(slot, len(row.tokens)) for slot, row in zip(slots, admitted, strict=True)]
        for part in pieces(sizes, self._pass_tokens):
            chosen = self._runner.read(part, schedule.running, sampling=sampling)
            if chosen is not None:
                flying.append(chosen)
        for row in admitted:
            row.read = len(row.tokens)
            row.launched += 1
            self.stats.prompt_tokens += row.read
        return True

    def _grow(self, schedule: Schedule, flying: deque[Chosen]) -> bool:
        """Give every row a page that needs one for its next token; False if there are not enough."""
        grown = []
        enough = True
        for slot, row in enumerate(schedule.running):
            had = len(row.pages)
            if row.wants_more and not schedule.grow(row):
                enough = False
                break
            if len(row.pages) > had:
                grown.append((slot, had, row.pages[-1]))
        if grown:
            self._runner.add_pages(grown)
        return enough

    def _make_way(self, schedule: Schedule) -> None:
        """Have rows wait again until one page is free, if none is."""
        while schedule.running and not schedule.has_page:
            row = schedule.put_back()
            row.launched = len(row.log_probs)
            self.stats.put_back += 1
        self._runner.move([], len(schedule.running))

    def _halve(self, schedule: Schedule, flying: deque[Chosen], reason: str) -> Iterator[Result]:
        """Go on with half the rows."""
        yield from self._receive_all(flying)
        self._let_go(schedule)
        for row in schedule.running:
            row.launched = len(row.log_probs)
        schedule.put_all_back()
        slots, pages = self._make_less_room(schedule.waiting, schedule.slots, reason)
        schedule.resize(slots=slots, pages=pages)

    # ----- likelihood -----

    def log_probs(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[float]]]:
        """Yield the number of every pair and the natural-log probability of every token of its continuation.

        Args:
            pairs: Token ids of a context and of what continues it, at least one each; no longer than the model's
                positions.
        Raises:
            GendistillError: A context or a continuation without a token, or a token that the model does not know.
        """
        for number, values, _ in self.scores(pairs):
            yield number, values

    def scores(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, list[float], bool]]:
        """Yield as ``log_probs`` does, and beside it whether greedy decoding of the context gives the continuation.

        Args:
            pairs: As for ``log_probs``, whose errors it raises.
        """
        self._check_open()
        known = self._num_known
        for number, (context, continuation) in enumerate(pairs):
            if not context or not continuation:
                what = "continuation" if context else "context"
                raise GendistillError(f"its {what} has no token", where=f"pair {number}")
            ends = min(*context, *continuation), max(*context, *continuation)
            for token in ends:
                if not 0 <= token < known:
                    raise GendistillError(
                        f"it has token {token:,}, and the model knows tokens 0 to {known - 1:,}",
                        where=f"pair {number}",
                    )
        self._runner.refresh()
        for taken in passes(readings(pairs), self._pass_tokens):
            what = Pass.of(taken, pairs, self._runner.device)
            values = iter(self._score(what))
            for number, length in what.pairs:
                found = [next(values) for _ in range(length)]
                yield number, [log_prob for log_prob, _ in found], all(greedy for _, greedy in found)

    def _score(self, what: Pass) -> list[tuple[float, bool]]:
        try:
            return self._runner.score(what, most=_LOGITS)
        except Exception as error:
            # rows of an earlier call still have memory, and nobody is in it
            if not ran_out(error) or self._runs or self._runner.memory is None:
                raise
        self.free()
        torch.cuda.empty_cache()
        return self._runner.score(what, most=_LOGITS)

    # ----- for benches -----

    def fits(self, tokens: int, rows: int) -> bool:
        """Say whether so many rows of so many tokens fit into memory at once."""
        sizes = self._runner.sizes()
        pages = (rows * -(-tokens // PAGE) + 1) if sizes.attention else 0
        return rows * sizes.slot_bytes + pages * sizes.page_bytes <= self._budget()

    def rows_at(self, context: int, rows: int, *, steps: int) -> Callable[..., None]:
        """Return a decode step of rows that have so many tokens behind them, all of them zeros in memory.

        With ``take=False`` it leaves there what was chosen, and so waits for nothing.

        Args:
            context: Tokens behind each row.
            rows: At a time.
            steps: That will be taken at most.
        """
        self._check_open()
        tokens = [0] * (context + steps + self._ahead)
        made = [Row(index, Prompt(tokens, 1), _Counted((), steps), tokens) for index in range(rows)]
        self._runner.refresh()
        slots, pages = self._make_room(made, rows)
        schedule = Schedule(made, slots=slots, pages=pages, page=PAGE)
        while schedule.waiting:
            before = len(schedule.running)
            admitted = schedule.admit()
            if not admitted:
                raise GendistillError(f"{rows} rows of {context:,} tokens do not fit into memory")
            self._runner.place(range(before, before + len(admitted)), admitted)
        self._runner.begin_at(rows, context)
        flying: deque[Chosen] = deque()

        def step(*, take: bool = True) -> None:
            flying.append(self._runner.step(schedule.running, sampling=Sampling()))
            while take and len(flying) > self._ahead:
                flying.popleft().read()

        return step

    # ----- memory -----

    def _make_less_room(self, rows: Sequence[Row], slots: int, reason: str) -> tuple[int, int]:
        """Make memory for half as many rows as were too many."""
        self._runner.forget_all()
        torch.cuda.empty_cache()
        if slots == 1:
            raise OutOfMemory(
                f"the device's memory does not suffice for a single row: {reason}",
                hint="give fewer pass_tokens, shorter prompts, or a larger device",
            )
        self.stats.halved += 1
        return self._make_room(rows, slots // 2)

    def _make_room(self, rows: Sequence[Row], most: int) -> tuple[int, int]:
        """Make memory for up to so many rows; returns how many, and their pages."""
        sizes = self._runner.sizes()
        # a step may be ahead of what is known
        longest = [len(row.prompt.token_ids) + row.prompt.max_new_tokens + self._ahead + 1 for row in rows]
        needs = sorted((-(-tokens // PAGE) for tokens in longest), reverse=True)
        if not sizes.attention:
            needs = [0] * len(needs)
        # rounded up, so that a conversation that grows need not have new memory at every turn
        width = 1 << (needs[0] - 1).bit_length() if needs[0] else 0
        wanted = 1 + max(width, sum(needs[:most]))
        if self._runner.has_room(slots=most, pages=wanted, width=width):
            self._runner.make_room(slots=most, pages=wanted, width=width)
            return most, wanted if sizes.attention else 0
        budget, slots, slot_bytes = self._budget(), most, sizes.slot_bytes
        while slots > 1 and slots * slot_bytes + (needs[0] + 1) * sizes.page_bytes > budget:
            slots //= 2
        pages = 1 + max(width, sum(needs[:slots]))
        if sizes.page_bytes:
            pages = min(pages, max(2, (budget - slots * slot_bytes) // sizes.page_bytes))
        try:
            self._runner.make_room(slots=slots, pages=pages, width=width)
        except torch.OutOfMemoryError as error:
            reason = str(error)
        else:
            return slots, pages if sizes.attention else 0
        return self._make_less_room(rows, slots, reason)

    def _budget(self) -> int:
        """Bytes for rows and pages: the spare slot takes what it takes."""
        return (self._memory_bytes or self._free_bytes()) - self._runner.sizes().slot_bytes

    def _free_bytes(self) -> int:
        device = self._runner.device
        if device.type != "cuda":
            return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * _SHARE / 4)
        there = self._runner.memory
        free, _ = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        whole = free + idle + (there.num_bytes if there else 0)
        return for_rows(whole, self._runner.working_bytes(self._pass_tokens, self._max_rows))

    def _too_large(self, row: Row, schedule: Schedule) -> str:
        return (
            f"its {len(row.tokens):,} tokens and the next need more memory than there is for keys and values: "
            f"{schedule.num_pages * PAGE:,} tokens"
        )


def for_rows(free: int, working: int) -> int:
    """Return how many of a device's free bytes rows may have, where passes and steps need so many to work with."""
    return max(0, min(int(free * _SHARE), free - working))


class _Counted:
    """The end of an answer that has no text."""

    text = ""

    def __init__(self, end_ids: Collection[int], max_new_tokens: int) -> None:
        self.token_ids: list[int] = []
        self.ended = False
        self._ends, self._most = end_ids, max_new_tokens

    def add(self, token: int) -> bool:
        """Take the next token; says whether the answer is over."""
        if token in self._ends:
            self.ended = True
            return True
        self.token_ids.append(token)
        return len(self.token_ids) == self._most
