"""What a model remembers of the rows that it generates: paged keys and values, and a state of every mixer by slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gendistill.mixers.base import ASIDE
from gendistill.ops.paged import PAGE, Pages, paged_attend
from gendistill.ops.select import Impl


@dataclass(frozen=True, slots=True)
class Sizes:
    """What rows and pages of a model take.

    Attributes:
        attention: Layers whose keys and values are kept.
        heads: Key/value heads of each.
        channels: Of a head.
        dtype: Of keys and values.
        states: Of one sequence, by layer: a named tuple of tensors ``[1, ...]``.
    """

    attention: tuple[int, ...]
    heads: int
    channels: int
    dtype: torch.dtype
    states: Mapping[int, Any]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, over all layers."""
        return 2 * len(self.attention) * PAGE * self.heads * self.channels * self.dtype.itemsize

    @property
    def slot_bytes(self) -> int:
        """Bytes of a slot, over all layers."""
        return sum(part.numel() * part.element_size() for part in _tensors(self.states.values()))


class Memory:
    """The memory of so many rows, for every layer of a model.

    Layers find theirs through :meth:`attend`, :meth:`read` and :meth:`write`, for the rows that were named last.

    Args:
        sizes: Of the model.
        slots: Rows.
        pages: In all; page 0 is where what has no sequence writes.
        device: Where it is.

    Attributes:
        spare: One more slot, for what has no sequence.
    """

    def __init__(self, sizes: Sizes, *, slots: int, pages: int, device: torch.device) -> None:
        self.sizes, self.num_slots, self.num_pages = sizes, slots, pages
        self.spare = slots
        shape = (pages, PAGE, sizes.heads, sizes.channels)
        self._keys = {
            layer: torch.zeros(shape, dtype=sizes.dtype, device=device) for layer in sizes.attention
        }
        self._values = {layer: torch.zeros_like(keys) for layer, keys in self._keys.items()}
        self._stacks, self._states = _by_slot(sizes.states, slots + 1)
        self._pages: Pages | None = None
        self._rows: slice | Tensor = slice(0, 0)
        self._lives: Tensor | None = None
        self._fresh = False

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return self.num_pages * self.sizes.page_bytes + (self.num_slots + 1) * self.sizes.slot_bytes

    def look_at_slots(self, number: int, pages: Pages, lives: Tensor) -> None:
        """Have layers go on with the first so many slots, one token each.

        Args:
            number: Slots.
            pages: Of these.
            lives: ``[number]`` bool, which of them have a sequence.
        """
        self._rows, self._pages, self._lives, self._fresh = slice(0, number), pages, lives, False

    def look_at(self, slots: Tensor, pages: Pages, *, fresh: bool) -> None:
        """Have layers go on with these slots ``[S]`` int64, some tokens each; all of them begin if they are fresh."""
        self._rows, self._pages, self._lives, self._fresh = slots, pages, None, fresh

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        heads: tuple[int, int],
        eps: float,
        window: int | None,
        impl: Impl,
    ) -> Tensor:
        """Attend to what the rows have seen, and keep what is new; arguments as :func:`paged_attend`."""
        assert self._pages is not None
        return paged_attend(
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            self._keys[layer],
            self._values[layer],
            heads=heads,
            eps=eps,
            window=window,
            pages=self._pages,
            impl=impl,
        )

    def read(self, layer: int) -> Any:
        """Return the states of the rows, a named tuple of tensors ``[S, ...]``, to be written in place or not.

        Returns: None if all rows begin.
        """
        if self._fresh:
            return None
        state = _map(self._states[layer], lambda part: part[self._rows])
        # what is kept has none: it is said of the rows of a call
        return state._replace(lives=self._lives) if "lives" in state._fields else state

    def write(self, layer: int, state: Any) -> None:
        """Keep the states of the rows, of a step those of rows that have a sequence."""
        for name, whole in _parts(self._states[layer]):
            new = getattr(state, name)
            if isinstance(self._rows, Tensor):
                whole.index_copy_(0, self._rows, new.to(whole.dtype))
            elif new.data_ptr() != whole.data_ptr():
                rows = whole[self._rows]
                if self._lives is not None:
                    new = torch.where(self._lives.view(-1, *[1] * (new.dim() - 1)), new, rows)
                rows.copy_(new)

    def forget(self, slots: Sequence[int]) -> None:
        """Begin sequences in these slots."""
        places = self._places(slots)
        for stack in self._stacks:
            stack.index_fill_(1, places, 0)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy the states of some slots to others; none is both."""
        if not self._stacks:
            return
        sources_, targets_ = self._places(sources), self._places(targets)
        for stack in self._stacks:
            stack.index_copy_(1, targets_, stack.index_select(1, sources_))

    def snapshot(self, slots: Sequence[int]) -> list[Tensor]:
        """Copy the states of some slots, for :meth:`restore`.

        Keys and values need none: those of tokens that are taken back are written over.
        """
        places = self._places(slots)
        return [stack.index_select(1, places) for stack in self._stacks]

    def restore(self, slots: Sequence[int], snapshot: Sequence[Tensor]) -> None:
        """Return the states of some slots to what they were at :meth:`snapshot`."""
        places = self._places(slots)
        for stack, kept in zip(self._stacks, snapshot, strict=True):
            stack.index_copy_(1, places, kept)

    def _places(self, slots: Sequence[int]) -> Tensor:
        if not self._stacks:
            return torch.empty(0)
        made = torch.tensor(slots, dtype=torch.int64)
        return made.to(self._stacks[0].device, non_blocking=True)


def _parts(state: Any) -> list[tuple[str, Tensor]]:
    """List the tensors of a mixer's state by name."""
    return [
        (name, part)
        for name, part in state._asdict().items()
        if name not in ASIDE and isinstance(part, Tensor)
    ]


def _tensors(states: Any) -> list[Tensor]:
    return [part for state in states for _, part in _parts(state)]


def _map(state: Any, change: Any) -> Any:
    changed = {name: change(part) for name, part in _parts(state)}
    return state._replace(**changed, owned=True)


def _by_slot(states: Mapping[int, Any], slots: int) -> tuple[list[Tensor], dict[int, Any]]:
    """Make states for so many sequences, those of layers that are alike side by side.

    Returns: Tensors ``[layers, slots, ...]``, and the state of every layer as views of them ``[slots, ...]``.
    """
    alike: dict[Any, list[int]] = {}
    for layer, state in states.items():
        shapes = tuple((name, part.shape, part.dtype) for name, part in _parts(state))
        alike.setdefault((type(state), shapes), []).append(layer)
    stacks, made = [], dict(states)
    for layers in alike.values():
        for name, part in _parts(states[layers[0]]):
            stack = part.new_zeros(len(layers), slots, *part.shape[1:])
            stacks.append(stack)
            for layer, view in zip(layers, stack, strict=True):
                made[layer] = made[layer]._replace(**{name: view})
    return stacks, {layer: state._replace(owned=True) for layer, state in made.items()}
