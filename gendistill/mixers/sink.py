"""Attention to the last tokens and the first ones as a layer, with a state of fixed size.

Keys keep the rotation of the position at which they stood in the text: nothing is moved closer when the window slides,
so that the layer sees exactly what the attention that it replaces sees, less the tokens in between.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gendistill.anatomy.family import Geometry
from gendistill.anatomy.sink import BLOCK, SINK, SinkSettings
from gendistill.mixers.base import Mixer, SequenceInfo, rotate


class SinkState(NamedTuple):
    """What the layer remembers of ``N`` sequences.

    Attributes:
        keys, values: ``[N, sinks + window - 1, Hkv, D]``: a sequence's first tokens, then its last ones, the newest at
            the end. Keys are rotated. Of slots that no token has reached nothing is read.
        seen: ``[N]`` int64, tokens so far.
        owned: As in :class:`~gendistill.mixers.base.MixerState`; nothing is ever written in place here.
    """

    keys: Tensor
    values: Tensor
    seen: Tensor
    owned: bool = False


class Block(NamedTuple):
    """Some consecutive queries of packed documents and the keys that they may see.

    Attributes:
        queries: First and last but one of their tokens.
        keys: ``[K]`` int64, the first tokens of their documents and the tokens of the window before and among them.
        allowed: ``[queries, K]`` bool.
    """

    queries: tuple[int, int]
    keys: Tensor
    allowed: Tensor


class SinkAttention(Mixer):
    """Softmax attention of every token to the last ``window``, itself included, and the first ``sinks``.

    It has the parameters of the attention that it replaces. Arguments are those of
    :class:`~gendistill.mixers.base.Mixer`; settings are the fields of :class:`~gendistill.anatomy.sink.SinkSettings`.

    Source: arXiv 2309.17453, where keys are rotated anew by their place in the cache; here they keep their own.
    """

    spec = SINK
    state_type = SinkState

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.RMSNorm
    k_norm: nn.RMSNorm

    def build(self, geometry: Geometry, settings: SinkSettings) -> None:
        """Make the projections and, for families that have them, the norms of queries and keys."""
        self.window, self.sinks = settings.window, settings.sinks
        for name, parameter in self.table.items():
            owner, _, leaf = name.rpartition(".")
            if leaf == "bias":
                continue
            if owner.endswith("_norm"):
                self.add_module(owner, nn.RMSNorm(parameter.shape[0], eps=geometry.norm_eps))
            else:
                rows, columns = parameter.shape
                self.add_module(owner, nn.Linear(columns, rows, bias=f"{owner}.bias" in self.table))

    def forward(
        self,
        hidden_states: Tensor,
        *,
        sequences: SequenceInfo | None = None,
        state: SinkState | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, SinkState]:
        """Mix a batch of sequences.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            sequences: Padding or packed documents; None when every row is one sequence without padding.
            state: What was remembered of the ``N`` sequences, or None. ``N`` is B, or the number of segments.
            position_embeddings: ``cos`` and ``sin`` ``[B or 1, T, head_dim]``, or None for no positions.
        Returns: ``[B, T, hidden_size]``, zero at padding, and the new state.
        """
        batch, length = hidden_states.shape[:2]
        x = hidden_states if sequences is None else sequences.gather(hidden_states)
        q, k, v = self._project(x)
        if position_embeddings is not None:
            angles = tuple(part.expand(batch, -1, -1) for part in position_embeddings)
            cos, sin = angles if sequences is None else (sequences.gather(part) for part in angles)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if sequences is None:
            out, after = self._attend_rows(q, k, v, None, state)
            return self.o_proj(out.flatten(-2)), after
        out, after = self._attend_sequences(q[0], k[0], v[0], sequences, batch, state)
        y = self.o_proj(out.flatten(-2))[None]
        return sequences.scatter(y, batch, length), after

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q ``[B, T, H, D]``, k and v ``[B, T, Hkv, D]``, all in one dtype."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if "q_norm" in self._modules:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return q, k, v

    def _attend_sequences(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: SequenceInfo,
        batch: int,
        state: SinkState | None,
    ) -> tuple[Tensor, SinkState]:
        """Attend within sequences laid end to end; q ``[M, H, D]``, k and v ``[M, Hkv, D]``."""
        segments = sequences.segments
        at = segments.table(_places)
        if state is None and len(segments.lengths) > batch:
            blocks = segments.table(_blocks(self.window, self.sinks))
            parts = [_attend(q[None, a:b], k[None, keys], v[None, keys], ok) for (a, b), keys, ok in blocks]
            out = torch.cat(parts, dim=1)[0] if parts else torch.zeros_like(q)
            first = self._slots(at.starts, at.lengths)
            return out, SinkState(_take(k, *first), _take(v, *first), at.lengths)
        # short rows are filled up with tokens that no later one of the row follows, so that nobody sees them
        rows = (at.starts[:, None] + torch.arange(segments.longest, device=q.device)).clamp(
            max=max(len(q) - 1, 0)
        )
        if not len(q):
            q, k, v = (part.new_zeros(1, *part.shape[1:]) for part in (q, k, v))
        out, after = self._attend_rows(q[rows], k[rows], v[rows], at.lengths, state)
        return out[at.sequence, at.position], after

    def _slots(self, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Say which token of the axis each slot of a fresh state holds, and which slots hold one."""
        first = torch.arange(self.sinks, device=starts.device).expand(len(starts), -1)
        last = lengths[:, None] - self.window + 1 + torch.arange(self.window - 1, device=starts.device)
        token = torch.cat([first, last], dim=1)
        return starts[:, None] + token, (token >= 0) & (token < lengths[:, None])

    def _attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, state: SinkState | None
    ) -> tuple[Tensor, SinkState]:
        """Attend within rows ``[N, T, ...]``, of which the first ``lengths`` cells are tokens, or all."""
        rows, length = q.shape[:2]
        sinks, past = self.sinks, self.window - 1
        # cells of recent tokens before this one are empty
        oldest = past if state is None else 0
        if state is None:
            empty = k.new_zeros(rows, sinks + past, *k.shape[2:])
            state = SinkState(empty, empty, torch.zeros(rows, dtype=torch.int64, device=q.device))
        seen = state.seen
        count = torch.full_like(seen, length) if lengths is None else lengths
        # cell of a first token, among the cached ones or behind them among the new ones
        token = torch.arange(sinks, device=q.device).expand(rows, -1)
        cell = torch.where(token < seen[:, None], token, sinks + token - seen[:, None])
        cell = cell.clamp(max=max(sinks + length - 1, 0))
        missing = (token >= (seen + count)[:, None])[:, :, None, None]
        kept = count[:, None] + torch.arange(past, device=q.device)
        states, keys, values = [], [], []
        for cached, new, found in ((state.keys, k, keys), (state.values, v, values)):
            first = _pick(torch.cat([cached[:, :sinks], new], dim=1), cell).masked_fill(missing, 0.0)
            recent = torch.cat([cached[:, sinks:], new], dim=1)
            found += [first, recent]
            states.append(torch.cat([first, _pick(recent, kept)], dim=1))
        parts = []
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            query = torch.arange(start, stop, device=q.device)[:, None]
            # cell e of the recent ones is the token seen - past + e, query t the token seen + t
            low, high = max(start, oldest), past + stop
            at = torch.arange(low, high, device=q.device)
            near = (at >= query) & (at <= past + query) & (at - past + seen[:, None, None] >= sinks)
            early = torch.arange(sinks, device=q.device) <= query + seen[:, None, None]
            allowed = torch.cat([early.expand(rows, -1, -1), near], dim=2)[:, None]
            seen_keys, seen_values = (
                torch.cat([found[0], found[1][:, low:high]], dim=1) for found in (keys, values)
            )
            parts.append(_attend(q[:, start:stop], seen_keys, seen_values, allowed))
        out = torch.cat(parts, dim=1) if parts else torch.zeros_like(q)
        return out, SinkState(states[0], states[1], seen + count)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attend; q ``[N, T, H, D]``, k and v ``[N, K, Hkv, D]``, ``allowed`` bool that spreads to ``[N, 1, T, K]``."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1:  # on a GPU, kernels that keep no scores take as many key as query heads
        k, v = k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed).transpose(1, 2)


def _pick(cells: Tensor, index: Tensor) -> Tensor:
    """Take ``[N, K, ...]`` by ``[N, J]`` to ``[N, J, ...]``."""
    rows = torch.arange(len(cells), device=cells.device)[:, None]
    return cells[rows, index]


def _take(axis: Tensor, index: Tensor, filled: Tensor) -> Tensor:
    """Take ``[M, ...]`` by ``[N, J]`` to ``[N, J, ...]``, zero where a slot is not filled."""
    if not len(axis):
        return axis.new_zeros(*index.shape, *axis.shape[1:])
    taken = axis[index.clamp(0, len(axis) - 1)]
    return taken.masked_fill(~filled[:, :, None, None], 0.0)


class _Places(NamedTuple):
    """Where the tokens of sequences laid end to end stand: all int64, ``[N]`` and ``[M]``."""

    starts: Tensor
    lengths: Tensor
    sequence: Tensor
    position: Tensor


def _places(lengths: list[int], device: torch.device) -> _Places:
    count = torch.tensor(lengths, dtype=torch.int64)
    starts = count.cumsum(0) - count
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), count)
    position = torch.arange(len(sequence)) - starts[sequence]
    return _Places(*(part.to(device, non_blocking=True) for part in (starts, count, sequence, position)))


@functools.cache
def _blocks(window: int, sinks: int) -> Callable[[list[int], torch.device], list[Block]]:
    """Return the function that lays packed documents out in blocks; the same one for the same settings."""

    def build(lengths: list[int], device: torch.device) -> list[Block]:
        starts, count, document, position = _places(lengths, torch.device("cpu"))
        blocks = []
        for start in range(0, len(document), BLOCK):
            stop = min(start + BLOCK, len(document))
            first, last = int(document[start]), int(document[stop - 1])
            heads = [
                torch.arange(begin, begin + min(sinks, size))
                for begin, size in zip(
                    starts[first : last + 1].tolist(), count[first : last + 1].tolist(), strict=True
                )
            ]
            recent = torch.arange(max(int(starts[first]), start - window + 1), stop)
            keys = torch.cat([*heads, recent])
            number = len(keys) - len(recent)
            distance = position[start:stop, None] - position[keys]
            near = (distance < window) & (position[keys] >= sinks)
            # a first token is seen where it stands among the heads
            near[:, :number] = True
            allowed = (document[start:stop, None] == document[keys]) & (distance >= 0) & near
            table = keys.to(device, non_blocking=True), allowed.to(device, non_blocking=True)
            blocks.append(Block((start, stop), *table))
        return blocks

    return build
