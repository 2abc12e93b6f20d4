"""Who runs, who waits, and whose the pages are. Imports no torch.

Rows that run have the slots 0 to n - 1: where one leaves, the last takes its slot. A row's prompt is read as a whole
before anybody takes another step, so that all that run are one token apart from their memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from gendistill.generation.request import Prompt

# page 0 is where rows without a sequence write
_FIRST_PAGE = 1
# a part of the slots that must be free before prompts are read, which stops those that run
_ADMIT = 8
# long prompts that are read side by side, and the least share of a pass that each has; shares are multiples of chunks
# and pages
_SIDE, _LEAST_SHARE, _STEP = 8, 512, 64


class Ending(Protocol):
    """The end of an answer, as ``gendistill.generation.stops`` finds it."""

    def add(self, token: int) -> bool:
        """Take the next token; says whether the answer is over."""
        ...


@dataclass(slots=True, eq=False)
class Row:
    """A sequence on its way.

    Attributes:
        index: Of its prompt.
        ending: Of its answer.
        tokens: Those that are known: the prompt's, and what was chosen.
        pages: In which its keys are, in order.
        read: Tokens whose keys and states are in memory.
        launched: Tokens of the answer that have been chosen or are being chosen.
        log_probs: Of those that were chosen.
        over: Whether nothing more is wanted of it.
    """

    index: int
    prompt: Prompt
    ending: Ending
    tokens: list[int]
    pages: list[int] = field(default_factory=list)
    read: int = 0
    launched: int = 0
    log_probs: list[float] = field(default_factory=list)
    over: bool = False

    @property
    def wants_more(self) -> bool:
        """Whether another token is to be chosen, as far as is known."""
        return not self.over and self.launched < self.prompt.max_new_tokens


class Move(NamedTuple):
    """A row whose slot changes."""

    source: int
    target: int


class Schedule:
    """The rows of an engine, by slot.

    Args:
        rows: That wait, in order.
        slots: That may run at a time.
        pages: In all, the first one excluded from use; 0 if nothing needs pages.
        page: Tokens of a page.

    Attributes:
        waiting: In order.
        running: By slot.
        slots: As given.
        num_pages: That rows may have.
    """

    def __init__(self, rows: Iterable[Row], *, slots: int, pages: int, page: int) -> None:
        self.waiting = deque(rows)
        self.running: list[Row] = []
        self.page = page
        self.resize(slots=slots, pages=pages)

    def resize(self, *, slots: int, pages: int) -> None:
        """Go on with so much; nobody may be running."""
        assert not self.running
        self.slots, self.num_pages = slots, max(0, pages - _FIRST_PAGE)
        self._paged = pages > 0
        self._free = list(range(pages - 1, _FIRST_PAGE - 1, -1))

    @property
    def is_done(self) -> bool:
        """Whether nobody runs or waits."""
        return not self.running and not self.waiting

    @property
    def has_page(self) -> bool:
        """Whether a page is free, if any is needed."""
        return not self._paged or bool(self._free)

    def admit(self) -> list[Row]:
        """Let rows run that wait: those of the first slots that are free, and their prompts are to be read.

        Few at a time cost those that run as much as many, so that none is admitted before some slots are free.
        """
        free = self.slots - len(self.running)
        if self.running and free < max(1, self.slots // _ADMIT) and len(self.waiting) > free:
            return []
        admitted = []
        # rows that may soon want one page more
        growing = sum(self._grows(row) for row in self.running) if self._paged else 0
        while self.waiting and len(self.running) < self.slots:
            row = self.waiting[0]
            need = self._pages_of(len(row.tokens) + 1)
            if self._paged and need + growing > len(self._free):
                break
            self.waiting.popleft()
            row.pages = [self._free.pop() for _ in range(need)]
            self.running.append(row)
            admitted.append(row)
            growing += self._grows(row)
        return admitted

    def grow(self, row: Row) -> bool:
        """Give a row room for one more token; False if there is none."""
        if not self._paged or row.read < len(row.pages) * self.page:
            return True
        if not self._free:
            return False
        row.pages.append(self._free.pop())
        return True

    def put_back(self) -> Row:
        """Have the row of the last slot wait again, the first of all; what it has read is forgotten."""
        row = self.running.pop()
        self._release(row)
        self.waiting.appendleft(row)
        return row

    def put_all_back(self) -> None:
        """Have all that run wait again, in order."""
        while self.running:
            self.put_back()

    def leave(self) -> list[Move]:
        """Let rows go that are over; returns who takes their slots."""
        stay = [slot for slot, row in enumerate(self.running) if not row.over]
        for row in self.running:
            if row.over:
                self._release(row)
        holes = [slot for slot in range(len(stay)) if self.running[slot].over]
        moves = [Move(slot, hole) for slot, hole in zip(reversed(stay), holes, strict=False)]
        for source, target in moves:
            self.running[target] = self.running[source]
        del self.running[len(stay) :]
        return moves

    def _release(self, row: Row) -> None:
        self._free += reversed(row.pages)
        row.pages, row.read = [], 0

    def _grows(self, row: Row) -> bool:
        return len(row.pages) < self._pages_of(len(row.prompt.token_ids) + row.prompt.max_new_tokens)

    def _pages_of(self, tokens: int) -> int:
        return -(-tokens // self.page) if self._paged else 0


class Piece(NamedTuple):
    """Tokens of a row that are read together: from ``start``, so many."""

    slot: int
    start: int
    count: int


def pieces(rows: Sequence[tuple[int, int]], most: int) -> list[list[Piece]]:
    """Cut prompts into passes of at most so many tokens, every pass as full as can be.

    Long prompts are read side by side: a recurrent layer goes through each token after token, and with a single one
    would leave most of a GPU idle.

    Args:
        rows: Slot and number of tokens of each.
        most: Tokens of a pass.
    """
    passes: list[list[Piece]] = []
    left = [(slot, 0, tokens) for slot, tokens in rows if tokens]
    share = max(_LEAST_SHARE, most // _SIDE // _STEP * _STEP)
    while left:
        counts: list[int] = []
        room = most
        for _, start, end in left:
            if not room:
                break
            counts.append(min(end - start, share, room))
            room -= counts[-1]
        # what is over goes to those in front
        for place, (_, start, end) in enumerate(left[: len(counts)]):
            more = min(end - start - counts[place], room)
            counts[place] += more
            room -= more
        taken = list(zip(left, counts, strict=False))
        passes.append([Piece(slot, start, count) for (slot, start, _), count in taken])
        rest = [(slot, start + count, end) for (slot, start, end), count in taken if start + count < end]
        left = rest + left[len(counts) :]
    return passes
