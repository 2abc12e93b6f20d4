"""What every op returns, which implementation runs, and how packed documents are described."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from enum import StrEnum
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Impl(StrEnum):
    """Name the implementation of an op: eager torch that defines it, or our Triton kernels."""

    REFERENCE = "reference"
    TRITON = "triton"


def is_triton(impl: Impl | str) -> bool:
    """Say whether an op shall run on our kernels; a ValueError says that there is no such implementation."""
    # torch 2.11 cannot trace the class called with one of its members
    chosen = impl if isinstance(impl, Impl) else Impl(impl)
    return chosen is Impl.TRITON


class OpOutput(NamedTuple):
    """Hold an op's output and the state after the last token."""

    out: Tensor
    state: Tensor


def resolve_impl(requested: str, *, op: str, device: torch.device) -> Impl:
    """Turn a recipe's ``impl`` into one implementation.

    ``auto`` is Triton on the GPUs on which our kernels are tested (NVIDIA, compute capability 9.x), and the reference
    elsewhere.

    Args:
        requested: ``auto``, ``reference`` or ``triton``.
        op: Name of the op, for the error.
        device: Where the op will run.
    Raises:
        ValueError: The requested implementation cannot run there.
    """
    if requested == "reference" or (requested == "auto" and device.type != "cuda"):
        return Impl.REFERENCE
    obstacle = _load_triton(device)
    if obstacle is None:
        return Impl.TRITON
    if requested == "auto":
        return Impl.REFERENCE
    raise ValueError(
        f'impl "{requested}" is not available for {op} on {device}: {obstacle}; use "auto" or "reference"'
    )


# Of what happens here a compiler can trace nothing. It may keep the result, but only one that ends before its next
# graph break: torch cannot hand such a constant on.
@torch.compiler.assume_constant_result
def _load_triton(device: torch.device) -> str | None:
    """Import the Triton ops, which a compiler must find imported, or say what keeps them from running there."""
    obstacle = triton_obstacle(device)
    if obstacle is None:
        triton_ops()
    return obstacle


@functools.cache
def triton_obstacle(device: torch.device) -> str | None:
    """Say what keeps our Triton kernels from running there; None if nothing does."""
    for package in ("triton", "gendistill_kernels"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return "our Triton kernels run on NVIDIA GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"our Triton kernels are tested on compute capability 9.x, this GPU has {major}.{minor}"
    return None


_triton_ops: list[Any] = []


def triton_ops() -> Any:
    """Import the Triton ops of the installed package; a student's exported code carries none of its own."""
    if not _triton_ops:
        _triton_ops.append(importlib.import_module("gendistill.ops.triton_ops"))
    return _triton_ops[0]


class Segments:
    """Describe independent sequences laid end to end on one token axis.

    Args:
        lengths: Tokens of each sequence; zero is allowed.
        device: Where index tensors are made.

    Attributes:
        lengths: Tokens of each sequence, on the host.
        num_tokens: Their sum.
        cu_seqlens: ``[N + 1]`` int32, ends of the sequences.
    """

    def __init__(self, lengths: list[int], *, device: torch.device | str = "cpu") -> None:
        self.lengths = lengths
        self.num_tokens = sum(lengths)
        self.device = torch.device(device)
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self.cu_seqlens = ends.to(self.device)
        self._layouts: dict[int, ChunkLayout] = {}
        self._taps: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._tables: dict[Callable[..., Any], Any] = {}

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> Segments:
        """Read sequence ends ``[N + 1]``. Copies them to the host once."""
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or any(right < left for left, right in pairwise(ends)):
            raise ValueError(f"cu_seqlens must start at 0 and never fall, got {ends[:8]}")
        return cls([right - left for left, right in pairwise(ends)], device=cu_seqlens.device)

    def chunks(self, size: int) -> ChunkLayout:
        """Return the layout that cuts every sequence into chunks of ``size`` tokens."""
        if size not in self._layouts:
            self._layouts[size] = ChunkLayout.build(self.lengths, size, self.device)
        return self._layouts[size]

    def table(self, build: Callable[[list[int], torch.device], Any]) -> Any:
        """Return ``build(lengths, device)``, made once; kernels keep their index tensors here."""
        if build not in self._tables:
            self._tables[build] = build(self.lengths, self.device)
        return self._tables[build]

    def taps(self, history: int) -> tuple[Tensor, Tensor, Tensor]:
        """Index the token axis with ``history`` extra slots before every sequence.

        Returns:
            Slots of the tokens ``[num_tokens]``, of the history ``[N, history]``, and of the last ``history``
            positions of each extended sequence ``[N, history]``; all int64.
        """
        if history not in self._taps:
            token, before, last, start = [], [], [], 0
            for length in self.lengths:
                before.append(range(start, start + history))
                token.extend(range(start + history, start + history + length))
                last.append(range(start + length, start + length + history))
                start += history + length
            shape = (len(self.lengths), history)
            indices = (
                torch.tensor(token),
                torch.tensor(before).reshape(shape),
                torch.tensor(last).reshape(shape),
            )
            self._taps[history] = tuple(index.long().to(self.device) for index in indices)  # pyright: ignore
        return self._taps[history]


class ChunkLayout(NamedTuple):
    """Say where chunk-padded tokens come from, with the chunks of one step side by side.

    Sequences are sorted by length, longest first; step ``s`` holds the ``s``-th chunk of every sequence that
    has one. The scan then runs over steps and each step works on a prefix of the sequences.

    Attributes:
        source: ``[num_chunks * size]`` int64, token of each slot; ``num_tokens`` (one past the end) for padding.
        slot: ``[num_tokens]`` int64, the inverse: slot of each token.
        active: Sequences that take part in each step.
        order: ``[N]`` int64, sequences sorted by length, longest first.
        rank: ``[N]`` int64, its inverse.
    """

    source: Tensor
    slot: Tensor
    active: list[int]
    order: Tensor
    rank: Tensor

    @classmethod
    def build(cls, lengths: list[int], size: int, device: torch.device) -> ChunkLayout:
        """Compute the layout on the host.

        Numbers that steer Python are never read from a tensor: a compiler would have to break its graph there.
        """
        count = torch.tensor(lengths, dtype=torch.int64)
        starts = count.cumsum(0) - count
        order = torch.argsort(count, descending=True, stable=True)
        chunks = [(length + size - 1) // size for length in lengths]
        last = [0] * max(chunks, default=0)
        for number in chunks:
            if number:
                last[number - 1] += 1
        active = list(accumulate(reversed(last)))[::-1]
        within = torch.arange(size)
        total = sum(lengths)
        source = []
        for step, number in enumerate(active):
            position = step * size + within.expand(number, size)
            token = starts[order[:number], None] + position
            source.append(torch.where(position < count[order[:number], None], token, total))
        flat = torch.cat(source).flatten() if source else torch.zeros(0, dtype=torch.int64)
        slot = torch.empty(total + 1, dtype=torch.int64)
        slot[flat] = torch.arange(flat.numel())
        rank = torch.argsort(order)
        return cls(flat.to(device), slot[:total].to(device), active, order.to(device), rank.to(device))
