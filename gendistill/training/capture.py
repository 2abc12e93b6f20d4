"""The passes of a micro-batch as CUDA graphs: captured once, then launched as a whole, with little for the host to do.

A graph repeats what it was captured with: the same kernels at the same addresses. So gradients stay where they are from
step to step, and what differs from batch to batch goes through tensors that a graph reads: tokens, labels, positions,
and the index tables of documents, which have room for any documents of about as many (:func:`with_room`). What only the
host would know of a batch, lengths of documents and numbers of labels, cannot be read during a capture: it fails, and
the stage goes on without graphs, rather than repeat one batch's numbers for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gendistill.data.batch import Batch, Unknown, without_surplus
from gendistill.engine.graphs import recorded
from gendistill.training.clock import Span, StepClock
from gendistill.training.parallel.copies import Quiet

# Kinds of batches that have a graph at a time: by number of documents, and of labels that count. Plain text has about
# ten, chats with labels on answers alone up to eighty. Each takes memory of its own beside that which all share.
MOST_GRAPHS = 64
# launches that have to make up for a graph that takes another one's place, and how many of them are remembered
LAUNCHES_PER_LOSS, MOST_CREDIT = 3, 256

# batches in a row without a table; a stream that prepares steps ahead needs a few of them to learn what is asked for
MOST_LACKING = 256
# of a stage's first micro-batch: without tables, with them, captured
RUNS_UNTIL_LAUNCHED = 3

Passes = Callable[[Batch], Tensor]
Key = tuple[Any, ...]


@dataclass(slots=True)
class _Graph:
    """What one kind of batch runs as.

    Attributes:
        inputs: What it reads.
        values: What it returns, overwritten by every launch.
        spans: Times that it notes.
        launch: Run it.
    """

    inputs: list[Tensor]
    values: Tensor
    spans: list[Span]
    launch: Callable[[], None]


class CapturedPasses:
    """Forward and backward passes of micro-batches, launched as graphs where a batch's kind has been seen before.

    The first batches run eagerly: they compile kernels and make index tables. From the second of a kind on, passes are
    captured and launched; once there is a graph, batches of other kinds are captured at first sight, for an eager run
    beside graphs would take its memory a second time. If that fails, graphs go, and the kind runs eagerly once: kernels
    that it alone needs cannot be loaded during a capture. Where there are enough graphs, the one used longest ago makes
    room. All share one pool of memory: no two run at a time.

    Args:
        passes: Adds a batch's gradients to ``grad``, which exists, and returns ``[P]`` float32; reads the host for
            nothing but shapes.
        models: Run in the passes; what has been hooked to them would not be called by a graph.
        clock: Whose marks in the passes become parts of a graph.
        device: A GPU.
        failed: Told why once, if passes cannot be captured; everything is eager from then on.
        objective: Minimised in the passes; like the modules of the models, it may read attributes of its own there,
            and change none.
    """

    def __init__(
        self,
        passes: Passes,
        *,
        models: Sequence[nn.Module],
        clock: StepClock,
        device: torch.device,
        failed: Callable[[str], None],
        objective: Any = None,
    ) -> None:
        self.passes, self.clock, self.device = passes, clock, device
        self.failed, self.objective = failed, objective
        # a step has no time to search them again
        self._modules = [
            (name or type(model).__name__, module)
            for model in models
            for name, module in model.named_modules()
        ]
        self._stands_on: list[Any] = []
        self._read: _Attributes = {}
        # the one used longest ago first
        self.graphs: dict[Key, _Graph] = {}
        self._seen: set[Key] = set()
        self.given_up = False
        # what makes the index tables that passes ask for; None until passes have run
        self._builders: set[Callable[..., Any]] | None = None
        self._lacking = self._credit = 0
        self._pool: Any = None

    @property
    def num_graphs(self) -> int:
        """Number of graphs."""
        return len(self.graphs)

    @property
    def num_bytes(self) -> int:
        """Bytes of the pool, all of which passes need at some time."""
        return sum(part["total_size"] for part in self._pool.snapshot()) if self._pool is not None else 0

    def release(self) -> None:
        """Let go of all graphs and of their memory; what comes next is captured anew."""
        self.graphs, self._pool = {}, None

    def look(self) -> None:
        """Look, before a step, whether graphs would still do what passes do, and let go of them if not."""
        if self.given_up:
            return
        stands_on: list[Any] = []
        for _, module in self._modules:
            stands_on.append(module.training)
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    stands_on += (tensor.data_ptr(), tensor.requires_grad)
        read = _attributes([("objective", self.objective)])
        if stands_on != self._stands_on or changed(self._read, read):
            self.release()
        self._stands_on, self._read = stands_on, read
        # the clock's own hooks leave marks in the graph
        if not self.clock.running and (hooked := _hooked(self._modules)):
            self._give_up(f"a hook on {hooked} would not be called")

    def __call__(self, batch: Batch) -> Tensor:
        """Run a batch's passes; what is returned is valid until the next call."""
        if self.given_up:
            return self.passes(without_surplus(batch))
        key = (self.clock.running, *kind_of(batch))
        graph = self.graphs.get(key)
        if graph is not None:
            self._credit = min(self._credit + 1, MOST_CREDIT)
        elif self._may_capture(batch, key):
            graph = self._try_to_capture(batch, key)
            if graph is not None:
                self.graphs[key] = graph
        self._seen.add(key)
        if graph is None:
            return self.passes(without_surplus(batch)) if self.given_up else self._run_eagerly(batch)
        # now the last
        self.graphs[key] = self.graphs.pop(key)
        torch._foreach_copy_(graph.inputs, tensors_of(batch))  # pyright: ignore
        graph.launch()
        self.clock.add(graph.spans)
        return graph.values

    def _may_capture(self, batch: Batch, key: Key) -> bool:
        # the first batches of a stage come without the tables that passes will ask for
        lacks = self._builders is None or not self._builders <= {*batch.segments.builders}
        self._lacking = self._lacking + 1 if lacks else 0
        if self._lacking == MOST_LACKING and not self.given_up:
            self._give_up("every batch needs a table of documents that no batch before it had")
        if self.given_up or lacks or not (self.graphs or key in self._seen):
            return False
        if len(self.graphs) >= MOST_GRAPHS:
            del self.graphs[next(iter(self.graphs))]
            self._credit -= LAUNCHES_PER_LOSS
            if self._credit < 0:
                self._give_up("batches are of too many kinds")
        return not self.given_up

    def _try_to_capture(self, batch: Batch, key: Key) -> _Graph | None:
        # a step in which something is captured says little about others
        self.clock.discard()
        try:
            static = static_copy(batch)
            if not self.clock.running and (hooked := _hooked(self._modules)):
                raise _NotRepeated(f"a hook on {hooked} would not be called")
            before = self._all_attributes()
            with self.clock.aside() as spans:
                values, launch = self._capture(static)
            if other := changed(before, self._all_attributes()):
                raise _NotRepeated(f"{other} is another after every pass, and would stay as it is")
        except torch.OutOfMemoryError:
            reason = "graphs take more memory than there is"
        except _NotRepeated as error:
            reason = str(error)
        except Exception as error:
            # nothing of a capture has run: no gradient has been added to
            reason = _reason(error) if key in self._seen else _NOT_YET
        else:
            reason = None
        # what the error held in memory is gone here
        if reason is _NOT_YET:
            # it runs eagerly once
            self.release()
            return None
        if reason is not None:
            self._give_up(reason)
            return None
        return _Graph(tensors_of(static), values, spans, launch)

    def _all_attributes(self) -> _Attributes:
        return _attributes([*self._modules, ("objective", self.objective)])

    def _give_up(self, reason: str) -> None:
        self.given_up = True
        self.release()
        self.failed(reason)

    def _capture(self, batch: Batch) -> tuple[Tensor, Callable[[], None]]:
        """Capture a batch's passes; returns what they return, and what launches them."""
        graph = torch.cuda.CUDAGraph()
        with recorded(graph, device=self.device, pool=self._get_pool().id):
            values = self.passes(batch)
        return values, graph.replay

    def _get_pool(self) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.MemPool()
        return self._pool

    def _run_eagerly(self, batch: Batch) -> Tensor:
        """Run passes, and learn which tables they ask for."""
        values = self.passes(batch)
        self._builders = (self._builders or set()) | {*batch.segments.builders}
        return values


# of a kind that has not run yet: kernels of its own cannot be loaded while a stream is captured
_NOT_YET = "not yet"


class _NotRepeated(RuntimeError):
    """What somebody does in passes would be left out."""


def _reason(error: BaseException) -> str:
    # the end of a capture that has failed fails, too
    first = error.__context__ or error
    lines = str(first).strip().splitlines()
    return ": ".join([type(first).__name__, *lines[:1]])


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _hooked(modules: Iterable[tuple[str, nn.Module]]) -> str | None:
    """Name a module or parameter that calls somebody else; None if none does."""
    for name, module in modules:
        if any(_loud(getattr(module, kind)) for kind in _HOOKS):
            return name
        for own, parameter in module._parameters.items():
            if parameter is not None and (
                _loud(parameter._backward_hooks) or _loud(parameter._post_accumulate_grad_hooks)
            ):
                return f"{name}.{own}"
    return None


# by whose it is, its name, and the place in it
_Attributes = dict[tuple[str, str, Any], Any]
_PLAIN = (bool, int, float, complex, str, bytes, torch.device)


def _attributes(owners: Iterable[tuple[str, Any]]) -> _Attributes:
    """List what objects have as attributes, and what is in those that are lists and the like."""
    found: _Attributes = {}
    for owner, each in owners:
        for name, value in getattr(each, "__dict__", {}).items():
            if isinstance(value, Mapping):
                parts: Iterable[tuple[Any, Any]] = value.items()
            elif isinstance(value, list | tuple | set | frozenset | deque):
                parts = enumerate(value)
            else:
                parts = ((None, value),)
            found |= {(owner, name, place): part for place, part in parts}
    return found


def changed(before: _Attributes, after: _Attributes) -> str | None:
    """Name an attribute that is not the same as before; what is in a tensor is not looked at."""
    for key in [*after, *(before.keys() - after.keys())]:
        one, other = (part.get(key, _Attributes) for part in (before, after))
        if one is not other and not (type(one) is type(other) and isinstance(one, _PLAIN) and one == other):
            owner, name, place = key
            return f"{owner}{f'.{place}' if name in _OF_MODULES else f'.{name}'}"
    return None


# of a module's attributes, those that are seen as attributes themselves
_OF_MODULES = ("_parameters", "_buffers", "_modules")


def _loud(hooks: Mapping[int, Any] | None) -> bool:
    return any(not isinstance(hook, Quiet) for hook in (hooks or {}).values())


def kind_of(batch: Batch) -> Key:
    """Return what two batches have in common that one graph can run."""
    segments = batch.segments
    shapes = tuple((tuple(part.shape), part.dtype) for part in tensors_of(batch))
    return (batch.places, len(segments.lengths), segments.room, segments.builders, shapes, segments.fixed)


def tensors_of(batch: Batch) -> list[Tensor]:
    """List all tensors of a batch, those of its index tables as well, in an order that its kind decides."""
    return [batch.input_ids, batch.labels, batch.position_ids, *batch.segments.tensors]


def static_copy(batch: Batch) -> Batch:
    """Copy a batch into tensors of its own; what the host knows of this batch alone is unknown in the copy.

    Raises:
        TypeError: A table consists of more than tensors, numbers and tuples of these.
    """
    unknown: Any = Unknown()
    return replace(
        batch,
        input_ids=batch.input_ids.clone(),
        labels=batch.labels.clone(),
        position_ids=batch.position_ids.clone(),
        segments=batch.segments.static(batch.input_ids.shape[1]),
        num_labels=unknown,
        num_tokens=unknown,
        document_ids=(),
    )


class HeldGradients:
    """Gradients that lie in one tensor and stay there.

    Args:
        parameters: On one device. Gradients are float32, also of parameters of 16 bits that say so (``grad_dtype``).

    Attributes:
        whole: ``[N]``, all of them.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        # 16 numbers keep every gradient at a multiple of 64 bytes
        sizes = [-(-parameter.numel() // 16) * 16 for parameter in self._parameters]
        first = self._parameters[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.whole = torch.zeros(sum(sizes), dtype=dtype, device=first.device)
        self._parts = [
            part[: parameter.numel()].view(parameter.shape)
            for part, parameter in zip(self.whole.split(sizes), self._parameters, strict=True)
        ]
        self.clear()

    def clear(self) -> None:
        """Set all gradients to zero, and to be where they were."""
        self.whole.zero_()
        for parameter, part in zip(self._parameters, self._parts, strict=True):
            if parameter.grad is not part:
                parameter.grad = part


def why_not_captured(
    module: nn.Module, *, device: torch.device, fused: bool, apart: bool, live: bool
) -> str | None:
    """Say what keeps a stage's passes from being captured; None if nothing is known to.

    Args:
        module: The student, with its objective.
        device: Where it runs.
        fused: Whether student and teacher run fused.
        apart: Whether processes share nothing inside of passes.
        live: Whether the teacher is a model that is run, or there is none.
    """
    if device.type != "cuda":
        return f"graphs are CUDA's, and the stage runs on {device.type}"
    if not apart:
        return "processes share weights or gradients in the middle of a pass"
    if not live:
        return "the teacher is not a model that is run"
    if not fused:
        return "the layers of student or teacher do not run fused, and others ask the GPU for masks"
    drops = [name for name, part in module.named_modules() if isinstance(part, nn.Dropout) and part.p > 0]
    if drops:
        return f"{drops[0]} drops activations at random"
    return None
