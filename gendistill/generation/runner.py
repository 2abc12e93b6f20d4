"""A model that goes on with the rows of an engine: prompts in passes, then a token of every row in a step.

What a step needs lies on the device and is changed there: a step reads the tokens that the one before has chosen. The
host adds pages and rows, and reads what was chosen when it comes. On a GPU a step of so many rows is a CUDA graph,
which is recorded once and stays right while weights change in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gendistill.engine.adapted import why_not_packed
from gendistill.engine.decoder import FusedDecoder, fuse, go_on, is_fused, refreshed, release
from gendistill.engine.decoder import why_not as why_not_fused
from gendistill.errors import GendistillError
from gendistill.generation.likelihood import Pass
from gendistill.generation.memory import Memory, Sizes
from gendistill.generation.reading import Passes, Reading
from gendistill.generation.recording import Recorder
from gendistill.generation.sampling import Sampling, choose
from gendistill.generation.schedule import Move, Piece, Row
from gendistill.mixers.base import Mixer, SequenceInfo
from gendistill.ops.divergence import unrounded
from gendistill.ops.paged import PAGE, Pages

# steps of a graph before it is recorded, on another stream, so that kernels are compiled
_REHEARSALS = 2


class Chosen:
    """Tokens on their way from the device.

    Args:
        rows: They were chosen for.
        tokens: ``[N]`` int64, their log-probabilities ``[N]`` float32 and whether their logits had a largest ``[N]``.
    """

    def __init__(self, rows: Sequence[Row], tokens: Tensor, log_probs: Tensor, finite: Tensor) -> None:
        self.rows = list(rows)
        self._parts = [_to_host(part) for part in (tokens, log_probs, finite)]
        self._there = None
        if tokens.is_cuda:
            self._there = torch.cuda.Event()
            # the model need not be on the device that is current
            self._there.record(torch.cuda.current_stream(tokens.device))

    def read(self) -> list[tuple[Row, int, float, bool]]:
        """Return row, token, log-probability and whether its logits had a largest; waits for the device."""
        if self._there is not None:
            self._there.synchronize()
        return list(zip(self.rows, *(part.tolist() for part in self._parts), strict=True))


def _to_host(part: Tensor) -> Tensor:
    if not part.is_cuda:
        return part.clone()
    there = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return there.copy_(part, non_blocking=True)


@dataclass(slots=True)
class _Places:
    """What a step reads and changes, by slot; all on the device.

    Attributes:
        tokens: ``[slots]`` int64, to be read next.
        positions: ``[slots]`` int64, of these in their sequences; -1 for a slot without one.
        seeds: ``[slots]`` int64.
        table: ``[slots, pages of a row]`` int32.
        log_probs: ``[slots]`` float32, of the tokens.
        finite: ``[slots]`` bool, whether the logits that they were chosen from had a largest.
    """

    tokens: Tensor
    positions: Tensor
    seeds: Tensor
    table: Tensor
    log_probs: Tensor
    finite: Tensor

    @classmethod
    def of(cls, slots: int, width: int, device: torch.device) -> _Places:
        whole = torch.zeros(slots, dtype=torch.int64, device=device)
        return cls(
            whole,
            torch.full_like(whole, -1),
            whole.clone(),
            torch.zeros(slots, max(1, width), dtype=torch.int32, device=device),
            torch.zeros(slots, dtype=torch.float32, device=device),
            torch.ones(slots, dtype=torch.bool, device=device),
        )

    @property
    def by_slot(self) -> tuple[Tensor, ...]:
        return self.tokens, self.positions, self.seeds, self.table, self.log_probs, self.finite


class Runner:
    """A model's arithmetic, its memory, and the graphs of its steps.

    Args:
        model: Causal language model, with ``model``, ``lm_head`` and ``config``, where it will run.
        learns: Whether it is being trained: its parameters stay where they are, beside copies.
            A model that does not run fused computes in autocast's dtype where autocast is on, else in its own.
        capture: Whether steps are recorded as CUDA graphs where the model is on a GPU.

    Attributes:
        captures: Whether they are.
        memory: Of rows, once room was made for some.

    Raises:
        GendistillError: The model's layers cannot run fused; says why.
    """

    def __init__(self, model: Any, *, learns: bool = False, capture: bool = True) -> None:
        reason = why_not(model)
        if reason is not None:
            raise GendistillError(
                f"the engine cannot run this {model.config.model_type} model: {reason}",
                hint="generate with transformers' model.generate",
            )
        self.model = model
        self.device: torch.device = model.lm_head.weight.device
        self._fuses = not is_fused(model)
        if self._fuses:
            fuse(model, _arithmetic(model), learns=learns)
        self.memory: Memory | None = None
        self.captures = capture and self.device.type == "cuda"
        self._graphs: dict[tuple[int, Sampling], torch.cuda.CUDAGraph] = {}
        # a first token has no time to search them again
        self._modules = list(model.modules())
        self._projections = _projections(model)
        self._addresses: list[int] = []
        self._recorder = Recorder(self.device)
        self._passes = Passes(
            self._read, self._recorder, captures=self.captures, make_way=self._forget_graphs
        )
        try:
            self._take(self._refreshed())
        except BaseException:
            # nobody else could: memory may have run out
            if self._fuses:
                release(model)
            raise

    def _refreshed(self) -> FusedDecoder:
        found = refreshed(self.model)
        if found is None:
            raise GendistillError(
                "the model does not run fused any more: this engine, or what had fused the model, was closed",
                hint="open an engine on the model again",
            )
        # weights that have taken adapters in would have them added once more
        reason = next(filter(None, map(why_not_packed, self._projections)), None)
        if reason is not None:
            raise GendistillError(
                f"the engine cannot go on with this model, which was changed since it was opened: {reason}",
                hint="close it, and open another",
            )
        return found

    @torch.inference_mode(False)
    def _take(self, decoder: FusedDecoder) -> None:
        self.decoder, self._sizes = decoder, None
        weight = self.model.lm_head.weight
        # read where it is, by other people's graphs too; copied for another dtype alone
        self._head = None if weight.dtype == decoder.dtype else torch.empty_like(weight, dtype=decoder.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take over weights that have changed since the last time."""
        decoder = self._refreshed()
        if decoder is not self.decoder:
            # graphs and rows were made for the copies and the dtype of the other one
            self.forget_all()
            self._take(decoder)
        addresses = [
            part.data_ptr()
            for module in self._modules
            for part in (*module._parameters.values(), *module._buffers.values())
            if part is not None
        ]
        if addresses != self._addresses:
            # a graph reads what has no copy where it was
            self._forget_graphs()
            self._addresses = addresses
        if self._head is not None:
            self._head.copy_(self.model.lm_head.weight)

    def close(self) -> None:
        """Forget all rows, and let the model run as it did before."""
        self.forget_all()
        self._head = None
        if self._fuses:
            release(self.model)

    def forget_all(self) -> None:
        """Let the memory of all rows go, and what was recorded with it."""
        self._forget_graphs()
        self.memory = None

    def _forget_graphs(self) -> None:
        self._graphs.clear()
        self._passes.forget()
        self._recorder.forget()

    # ----- memory -----

    @torch.no_grad()
    def sizes(self) -> Sizes:
        """Find out what rows and pages take."""
        if self._sizes is None:
            fused = self.decoder
            geometry, layers = fused.geometry, fused.decoder.layers
            states = _Seen()
            mixers = [index for index, layer in enumerate(layers) if isinstance(layer.self_attn, Mixer)]
            ids = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
            if mixers:
                # the state after one token has the sizes of all later ones
                go_on(fused, ids, ids, sequences=None, memory=states)
            self._sizes = Sizes(
                attention=tuple(index for index in range(len(layers)) if index not in mixers),
                heads=geometry.num_kv_heads,
                channels=geometry.head_dim,
                dtype=fused.dtype,
                states=states.found,
            )
        return self._sizes

    def working_bytes(self, tokens: int, rows: int) -> int:
        """Estimate what passes of so many tokens and steps of so many rows need beside weights and memory."""
        config, geometry = self.model.config, self.decoder.geometry
        heads = (2 * geometry.num_heads + 2 * geometry.num_kv_heads) * geometry.head_dim
        # at the widest place of a layer: the stream twice, queries to outputs, gates, values and their product
        widths = 2 * config.hidden_size + heads + 3 * config.intermediate_size
        # eager passes and graphs have memory of their own
        passes = tokens * widths * self.decoder.dtype.itemsize * (2 if self.captures else 1)
        # logits in float32, and their log-probabilities
        return passes + rows * len(self.model.lm_head.weight) * 8

    # what is made in inference mode cannot be written to outside of it
    @torch.inference_mode(False)
    def make_room(self, *, slots: int, pages: int, width: int) -> None:
        """Make memory for rows, unless what is there is enough; nobody may be in it.

        Args:
            slots: Rows at a time.
            pages: In all, page 0 included.
            width: Pages of the longest row.
        """
        if self.has_room(slots=slots, pages=pages, width=width):
            self._places.positions.fill_(-1)
            return
        # nothing may name the old one here: both are never there at once
        self.forget_all()
        # the spare slot has places, too
        self._places = _Places.of(slots + 1, width, self.device)
        self.memory = Memory(self.sizes(), slots=slots, pages=pages, device=self.device)

    def has_room(self, *, slots: int, pages: int, width: int) -> bool:
        """Say whether memory is there for so many; arguments as :meth:`make_room`."""
        there = self.memory
        if there is None or width > self._places.table.shape[1]:
            return False
        return slots <= there.num_slots and pages <= there.num_pages

    # ----- rows -----

    def place(self, slots: Sequence[int], rows: Sequence[Row]) -> None:
        """Begin rows in these slots."""
        assert self.memory is not None
        places = self._to_device(slots)
        width = self._places.table.shape[1]
        table = [row.pages + [0] * (width - len(row.pages)) for row in rows]
        self._places.table.index_copy_(0, places, self._to_device(table, torch.int32))
        self._places.seeds.index_copy_(0, places, self._to_device([row.prompt.seed for row in rows]))
        self._places.positions.index_fill_(0, places, -1)
        self.memory.forget(slots)

    def begin_at(self, number: int, position: int) -> None:
        """Have the first so many slots read token 0 next, at a position, whatever is in memory before it."""
        self._places.tokens[:number].fill_(0)
        self._places.positions[:number].fill_(position)

    def add_pages(self, grown: Sequence[tuple[int, int, int]]) -> None:
        """Give slots their next page: slot, place in the table, number."""
        slots, places, pages = zip(*grown, strict=True)
        where = self._to_device([slots, places])
        self._places.table.index_put_((where[0], where[1]), self._to_device(pages, torch.int32))

    def move(self, moves: Sequence[Move], number: int) -> None:
        """Have rows take other slots, and empty those from ``number`` on."""
        assert self.memory is not None
        if moves:
            sources, targets = zip(*moves, strict=True)
            self.memory.move(sources, targets)
            source_places, target_places = self._to_device(sources), self._to_device(targets)
            for part in self._places.by_slot:
                part.index_copy_(0, target_places, part.index_select(0, source_places))
        self._places.positions[number:].fill_(-1)

    def _to_device(self, numbers: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        made = torch.tensor(numbers, dtype=dtype)
        return made.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else made

    # ----- passes -----

    @torch.no_grad()
    def read(self, pieces: Sequence[Piece], rows: Sequence[Row], *, sampling: Sampling) -> Chosen | None:
        """Read parts of prompts, and choose the first token of rows whose prompt ends there.

        Args:
            pieces: Of one pass.
            rows: By slot.
            sampling: How tokens are chosen.
        Returns: None if no prompt ends in this pass.
        """
        assert self.memory is not None
        finished = [
            number
            for number, piece in enumerate(pieces)
            if piece.start + piece.count == len(rows[piece.slot].tokens)
        ]
        hidden = self._passes(
            Reading.of(
                pieces,
                rows,
                spare=self.memory.spare,
                size=self._passes.size(pieces),
                to_device=self._to_device,
            )
        )
        if not finished:
            return None
        at, positions_, numbers = self._to_device(
            [
                [pieces[number].slot for number in finished],
                [pieces[number].start + pieces[number].count for number in finished],
                finished,
            ]
        )
        chosen = choose(
            self._logits(hidden[numbers]),
            sampling=sampling,
            seeds=self._places.seeds[at],
            positions=positions_,
        )
        values = (chosen.tokens, positions_, chosen.log_probs, chosen.finite)
        there = self._places
        for part, value in zip(
            (there.tokens, there.positions, there.log_probs, there.finite), values, strict=True
        ):
            part.index_copy_(0, at, value)
        return Chosen([rows[pieces[number].slot] for number in finished], *chosen)

    def _read(self, reading: Reading) -> Tensor:
        """Take a pass; returns the hidden state of the last token of each sequence."""
        assert self.memory is not None
        segments, slots = reading.segments, reading.slots
        ends = segments.cu_seqlens[1:]
        tokens = torch.arange(segments.num_tokens, dtype=torch.int32, device=self.device)
        sequences = torch.searchsorted(ends, tokens, right=True)
        ahead = reading.starts - segments.cu_seqlens[:-1]
        positions = tokens + ahead[sequences]
        table = self._places.table[slots]
        pages = Pages(
            table=table,
            lengths=(ends + ahead).to(torch.int32),
            starts=segments.cu_seqlens,
            cells=_cells(table[sequences, _page_of(positions, table)], positions),
            single=False,
        )
        self.memory.look_at(slots, pages, fresh=reading.fresh)
        return go_on(
            self.decoder,
            reading.tokens[None],
            positions[None],
            sequences=SequenceInfo(segments),
            memory=self.memory,
            # for what is empty the last token of another
            wanted=(ends - 1).clamp(min=0).to(torch.int64),
        )

    @torch.no_grad()
    def step(self, rows: Sequence[Row], *, sampling: Sampling) -> Chosen:
        """Read the last token of all rows, and choose the next."""
        number = len(rows)
        if not self.captures:
            self._step(number, sampling)
        else:
            assert self.memory is not None
            size = min(_bucket(number), self.memory.num_slots)
            self._replay(size, sampling)
        there = self._places
        return Chosen(rows, *(part[:number] for part in (there.tokens, there.log_probs, there.finite)))

    @torch.no_grad()
    def score(self, what: Pass, *, most: int) -> list[tuple[float, bool]]:
        """Return the natural-log probability of every target, and whether no token is likelier, in order.

        Args:
            what: To read and to score.
            most: Logits at a time, in rows.
        """
        out = self.model.model(
            input_ids=what.input_ids,
            position_ids=what.position_ids,
            sequences=what.sequences,
            use_cache=False,
        )
        hidden = out.last_hidden_state[0]
        found: list[Tensor] = []
        first: list[Tensor] = []
        for start in range(0, len(what.places), most):
            rows = slice(start, start + most)
            logits = self._logits(hidden[what.places[rows]])
            chosen = logits.gather(1, what.targets[rows, None])[:, 0]
            found.append(chosen - logits.logsumexp(-1))
            # the first of equals, which is what greedy decoding chooses
            first.append(logits.argmax(-1) == what.targets[rows])
        return list(zip(torch.cat(found).tolist(), torch.cat(first).tolist(), strict=True))

    def _step(self, number: int, sampling: Sampling) -> None:
        assert self.memory is not None
        there = self._places
        tokens, positions, seeds, table = (
            part[:number] for part in (there.tokens, there.positions, there.seeds, there.table)
        )
        lives = positions >= 0
        at = positions.clamp(min=0)
        page = table.gather(1, _page_of(at, table)[:, None])[:, 0]
        cells = torch.where(lives, _cells(page, at), 0)
        lengths = torch.where(lives, at + 1, 0).to(torch.int32)
        starts = torch.arange(number + 1, dtype=torch.int32, device=self.device)
        self.memory.look_at_slots(number, Pages(table, lengths, starts, cells, single=True), lives)
        hidden = go_on(self.decoder, tokens[:, None], at[:, None], sequences=None, memory=self.memory)
        chosen = choose(self._logits(hidden), sampling=sampling, seeds=seeds, positions=at + 1)
        tokens.copy_(torch.where(lives, chosen.tokens, tokens))
        there.log_probs[:number].copy_(chosen.log_probs)
        there.finite[:number].copy_(chosen.finite)
        positions.add_(lives)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.lm_head.weight.detach() if self._head is None else self._head
        return unrounded(hidden, head.T)

    def _replay(self, size: int, sampling: Sampling) -> None:
        """Take a step of so many slots as a graph, which is recorded the first time."""
        key = size, sampling
        if key not in self._graphs:
            self._graphs[key] = self._record(size, sampling)
        self._graphs[key].replay()

    def _record(self, size: int, sampling: Sampling) -> torch.cuda.CUDAGraph:
        assert self.memory is not None
        # rehearsals must change nothing: no slot has a sequence meanwhile, and so no state changes
        kept = [part.clone() for part in self._places.by_slot]
        self._places.positions.fill_(-1)
        aside = self._recorder.stream
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(_REHEARSALS):
                self._step(size, sampling)
        torch.cuda.current_stream(self.device).wait_stream(aside)
        _, graph = self._recorder(lambda: self._step(size, sampling))
        for part, value in zip(self._places.by_slot, kept, strict=True):
            part.copy_(value)
        return graph


def _page_of(positions: Tensor, table: Tensor) -> Tensor:
    # a model without attention has no pages
    return (positions // PAGE).clamp(max=table.shape[1] - 1)


def _cells(pages: Tensor, positions: Tensor) -> Tensor:
    return pages.to(torch.int64) * PAGE + positions % PAGE


def _bucket(number: int) -> int:
    """Round rows up to a size that graphs are recorded for: powers of two, and multiples of 64."""
    return 1 << (number - 1).bit_length() if number <= 64 else -(-number // 64) * 64


def why_not(model: Any) -> str | None:
    """Say what keeps the engine from running a model; None if nothing does.

    Args:
        model: Causal language model, where it will run.
    """
    head = getattr(model, "lm_head", None)
    if not hasattr(model, "model") or head is None:
        return f"{type(model).__name__} has no model and lm_head as the families have them"
    if any(isinstance(part, DTensor) for part in model.parameters()):
        return "its parameters are shared among processes"
    if type(head) is not nn.Linear:
        return f"its head is a {type(head).__module__}.{type(head).__name__}"
    if head.bias is not None:
        return "its head has biases"
    kind = getattr(getattr(model.model, "rotary_emb", None), "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f'its rotary positions ("{kind}") depend on the longest sequence beside'
    if is_fused(model):
        # this may change after layers are packed
        return next(filter(None, map(why_not_packed, _projections(model))), None)
    return why_not_fused(model, device=head.weight.device, dtype=_arithmetic(model))


def _projections(model: Any) -> list[nn.Module]:
    return [layer for name, layer in model.model.named_modules() if name.endswith("_proj")]


def _arithmetic(model: Any) -> torch.dtype:
    """Return the dtype in which a model that does not run fused computes."""
    weight = model.lm_head.weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class _Seen:
    """A memory that keeps what mixers remember after a first token, and nothing else."""

    def __init__(self) -> None:
        self.found: dict[int, Any] = {}

    def attend(self, layer: int, qkv: Tensor, *_: Any, heads: tuple[int, int], **__: Any) -> Tensor:
        number, num_kv = heads
        return qkv.new_zeros(len(qkv), qkv.shape[1] // (number + 2 * num_kv) * number)

    def read(self, layer: int) -> Any:
        return None

    def write(self, layer: int, state: Any) -> None:
        self.found[layer] = state
