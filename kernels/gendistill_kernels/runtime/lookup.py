"""How kernels are launched: a table of plain rows for every family, one lookup. Nothing is tuned at run time.

``gendistill bench tune`` times the rows beside other candidates and prints rows to paste; docs/kernels/tuning.md says
how. tests/ops/test_configs.py compiles every row at the largest sizes that it covers and holds it against the limits of
its architecture, tests/ops/test_gpu_configs.py runs every row of the architecture it is on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch

from gendistill_kernels.runtime.hardware import Architecture, architecture


class Config(NamedTuple):
    """How a kernel is launched.

    Attributes:
        block: How much a program takes at once, as the table's ``kernels`` say; less where there is less.
        warps: Of a program. The convolution gives each a strip of tokens; decode gives each 1024 elements, so that
            programs with less to do have fewer.
        stages: Iterations of the loop whose loads are under way at the same time.
        registers: The most of a thread, so that several programs share a processor.
        programs: The most that share the work of one launch, of kernels that share it.
    """

    block: int
    warps: int
    stages: int = 1
    registers: int | None = None
    programs: int = 0


_forced: dict[str, Config] = {}
_caches: list[Any] = []


def cached(size: int) -> Callable[[Callable[..., Any]], Any]:
    """Remember the last results of a function that depends on the table, until the table is overruled."""

    def decorate(function: Callable[..., Any]) -> Any:
        found = functools.lru_cache(size)(function)
        _caches.append(found)
        return found

    return decorate


class Row(Protocol):
    """What a configuration is for; a family's own columns make up the key of a call."""

    @property
    def kernel(self) -> str:
        """The kernel, by its name in the table."""
        ...

    @property
    def config(self) -> Config:
        """How to launch it."""
        ...

    @property
    def suits(self) -> Callable[..., bool]:
        """Given a key: whether the row is for calls of this sort, whatever their sizes."""
        ...

    @property
    def covers(self) -> Callable[..., bool]:
        """Given a key: whether a call of this sort is not larger than the row allows."""
        ...

    def allowed(self) -> str:
        """Say, for an error, what sizes the row covers."""
        ...

    @property
    def narrowed(self) -> Callable[..., Row]:
        """Given a configuration and a key: a row for such calls and smaller ones, as particular as this one."""
        ...


R = TypeVar("R", bound=Row)


class ByBytes(NamedTuple):
    """A row of a family whose launches depend on nothing but the size of an element.

    Attributes:
        kernel: Its name in the table.
        size: The most bytes of an element of the inputs.
        config: How to launch it.
    """

    kernel: str
    size: int
    config: Config

    def suits(self, size: int) -> bool:
        """As :class:`Row` says."""
        return True

    def covers(self, size: int) -> bool:
        """As :class:`Row` says."""
        return size <= self.size

    def allowed(self) -> str:
        """As :class:`Row` says."""
        return f"up to {self.size} bytes"

    def narrowed(self, config: Config, size: int) -> ByBytes:
        """As :class:`Row` says."""
        return ByBytes(self.kernel, size, config)


def bytes_in_words(size: int) -> str:
    """Say what the key of a :class:`ByBytes` row asks for."""
    return f"elements of {size} bytes"


class Table(Generic[R]):
    """The launch configurations of one family.

    Args:
        kernels: For each of its kernels, what the block of a configuration counts.
        rows: By architecture; the first that covers a call is taken.
        words: Says what a key asks for.
    """

    def __init__(
        self,
        kernels: Mapping[str, str],
        rows: Mapping[Architecture, Sequence[R]],
        words: Callable[..., str],
    ) -> None:
        self.kernels = kernels
        self.rows = rows
        self.words = words
        self.lookup = cached(4096)(self._lookup)

    def _lookup(self, device: torch.device, kernel: str, *key: Any) -> Config:
        """Return how to launch a kernel there; raises as :meth:`find`. What ``lookup`` remembers."""
        if kernel in _forced:
            return _forced[kernel]
        return self.find(architecture(device), kernel, *key).config

    def find(self, where: Architecture, kernel: str, *key: Any) -> R:
        """Return the first row that covers a call.

        Raises:
            ValueError: No row does.
        """
        rows = [row for row in self.rows[where] if row.kernel == kernel and row.suits(*key)]
        for row in rows:
            if row.covers(*key):
                return row
        allowed = dict.fromkeys(row.allowed() for row in rows)
        raise ValueError(
            f"the kernel {kernel} has no configuration for {self.words(*key)} on a GPU of the class {where}: "
            f"allowed are {'; '.join(allowed)}; or use the reference"
        )


@contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Launch a kernel with this configuration, whatever its sizes; for tests and tuning."""
    before = dict(_forced)
    _forced[kernel] = config
    _forget()
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
        _forget()


def _forget() -> None:
    for cache in _caches:
        cache.cache_clear()
