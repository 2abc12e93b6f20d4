"""Parts of parameters on every process, and whole copies of them for the length of a step.

What is split is what costs memory in float32: masters, moments, the gradients that an optimizer reads. The copies are
ordinary parameters in the dtype of arithmetic. They stand in the place of the parts while the model runs, over all
micro-batches of a step, so that nothing happens in a layer's forward and backward pass that does not on one process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

# of a whole copy or its gradient: what travels in one collective, and is there twice meanwhile
_BUCKET_BYTES = 2**27

# older and newer names of the same
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Quiet:
    """A hook that has nothing to do in passes that are captured: graphs need not call it."""

    def __init__(self, act: Callable[..., None]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> None:
        self._act(*args)


class WholeCopies:
    """Parameters of a module, split in place among processes, and their copies.

    A parameter ``[rows, ...]`` is split by rows, as ``torch.chunk`` does. Gradients of copies are float32, whatever
    their dtype, and are summed over micro-batches without rounding.

    Args:
        module: On the CPU, the same on every process; its parameters become parts on the device of ``mesh``.
        kept: Parameters that are not split; they move to the device.
        dtype_of: Dtype of a parameter's copy.
        mesh: One-dimensional, of all processes.
        device: Of this process.

    Attributes:
        in_use: Whether the copies stand in the module at the moment.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        kept: set[nn.Parameter],
        dtype_of: Callable[[nn.Parameter], torch.dtype],
        mesh: DeviceMesh,
        device: torch.device,
    ) -> None:
        self.in_use = False
        rank, world = dist.get_rank(), dist.get_world_size()
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((owner, name))
        split: list[_Split] = []
        for parameter in list(module.parameters()):
            if parameter in kept:
                parameter.data = parameter.data.to(device)
            else:
                split.append(
                    _Split(
                        parameter,
                        places[parameter],
                        dtype_of(parameter),
                        mesh,
                        device,
                        rank=rank,
                        world=world,
                    )
                )
        self._split = split
        self._buckets = [_Bucket(group, device, world=world) for group in _grouped(split)]
        self._pending: list[tuple[_Bucket, Tensor, Any]] | None = None
        # what does not learn is copied once
        self._old = list(self._buckets)
        for owner in module.modules():
            for name, buffer in owner._buffers.items():
                owner._buffers[name] = None if buffer is None else buffer.to(device)
        # those of the last layers, whose gradients are there first, are shared first
        self._order = [bucket for bucket in reversed(self._buckets) if bucket.learns]
        self._sharing: list[tuple[_Bucket, Tensor, Any]] | None = None
        self._begun = 0
        self._handles: list[Any] = [
            each.copy.register_post_accumulate_grad_hook(
                Quiet(lambda _, bucket=bucket: self._arrived(bucket))
            )
            for bucket in self._order
            for each in bucket.split
        ]

    @property
    def learning(self) -> list[nn.Parameter]:
        """The copies that get gradients."""
        return [each.copy for each in self._split if each.learns]

    def watch(self, modules: Iterable[nn.Module]) -> None:
        """Have the copies stand in their places whenever one of these modules is called."""
        self._handles += [
            each.register_forward_pre_hook(Quiet(lambda *_: self.use()), prepend=True) for each in modules
        ]

    @torch.no_grad()
    def start(self) -> None:
        """Begin to gather all copies that are not in use; other work of the device goes on meanwhile. Collective."""
        if self.in_use or self._pending is not None:
            return
        self._pending = [(bucket, *bucket.gather()) for bucket in self._old]

    @torch.no_grad()
    def use(self) -> None:
        """Put the copies in the places of the parts, with the numbers that these have now. Collective."""
        if self.in_use:
            return
        # what was started is all there twice; else, two buckets at a time
        arriving = deque(self._pending or ())
        waiting = deque(self._old if self._pending is None else ())
        self._pending = None
        while arriving or waiting:
            while waiting and len(arriving) < 2:
                bucket = waiting.popleft()
                arriving.append((bucket, *bucket.gather()))
            bucket, gathered, work = arriving.popleft()
            work.wait()
            bucket.spread(gathered)
            # before the next one takes memory
            del gathered, work
        self._old = []
        for each in self._split:
            each.show(each.copy)
        self.in_use = True

    def put_away(self) -> None:
        """Put the parts in their places again; the next use gathers copies anew of what learns."""
        # after an error, what was on its way is not waited for
        self._pending = self._sharing = None
        if not self.in_use:
            return
        for each in self._split:
            each.show(each.part)
        self._old = [bucket for bucket in self._buckets if bucket.learns]
        self.in_use = False

    def expect_gradients(self) -> None:
        """Begin to share gradients as they come in the backward pass that follows, the last one of a step."""
        self._sharing, self._begun = [], 0
        for bucket in self._order:
            bucket.missing = len(bucket.split)

    def _arrived(self, bucket: _Bucket) -> None:
        """Note that a parameter of this bucket has its gradient."""
        if self._sharing is not None:
            bucket.missing -= 1
            self._begin(complete=True)

    @torch.no_grad()
    def _begin(self, *, complete: bool) -> None:
        """Begin to share what is next, one after the other: in the same order on every process."""
        assert self._sharing is not None
        while self._begun < len(self._order):
            bucket = self._order[self._begun]
            if complete and bucket.missing:
                return
            self._begun += 1
            self._sharing.append((bucket, *bucket.reduce()))
            # what is sent is in memory until it has arrived: two at a time
            if len(self._sharing) > 1:
                _finish(*self._sharing.pop(0))

    @torch.no_grad()
    def share_gradients(self) -> None:
        """Give every part its share of the mean over processes of the copies' gradients, which end. Collective.

        Comes after ``expect_gradients`` and the backward pass. A parameter without a gradient, which then has none on
        any process, keeps none.

        Raises:
            RuntimeError: A parameter got a gradient after its gradients were shared.
        """
        self._begin(complete=False)
        assert self._sharing is not None
        for each in self._sharing:
            _finish(*each)
        self._sharing = None
        if any(each.copy.grad is not None for each in self._split):
            raise RuntimeError("a parameter got its gradient in two parts in one backward pass")

    def release(self) -> None:
        """Leave the parts in the module, and let go of it."""
        self.put_away()
        for handle in self._handles:
            handle.remove()
        self._handles, self._split, self._buckets, self._order, self._old = [], [], [], [], []


def _finish(bucket: _Bucket, _held: Tensor, work: Any) -> None:
    work.wait()
    bucket.hand_out()


class _Split:
    """One parameter, its part and its copy."""

    def __init__(
        self,
        parameter: nn.Parameter,
        places: list[tuple[nn.Module, str]],
        dtype: torch.dtype,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        rank: int,
        world: int,
    ) -> None:
        self.places, self.mesh, self.learns = places, mesh, parameter.requires_grad
        whole = parameter.data
        self.shape, self.dtype = whole.shape, dtype
        # rows of every process but the last ones
        self.rows = -(-len(whole) // world)
        self.ends = [min(number * self.rows, len(whole)) for number in range(world + 1)]
        own = whole[self.ends[rank] : self.ends[rank + 1]]
        # a part of its own memory, not of that which all others share
        self.local = torch.empty(own.shape, dtype=whole.dtype, device=device).copy_(own)
        self.part = nn.Parameter(self.distributed(self.local), requires_grad=self.learns)
        # the first copy is filled as every other: from the parts
        self.copy = nn.Parameter(
            torch.empty(self.shape, dtype=dtype, device=device), requires_grad=self.learns
        )
        if self.learns and dtype.itemsize < 4:
            self.copy.grad_dtype = torch.float32
        self.show(self.part)

    def distributed(self, local: Tensor) -> DTensor:
        """Return a part as one of a whole."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=self.shape, stride=stride
        )

    @property
    def slot(self) -> int:
        """Numbers that every process sends."""
        return self.rows * self.shape[1:].numel()

    def show(self, parameter: nn.Parameter) -> None:
        """Have the module's modules see this one."""
        for owner, name in self.places:
            owner._parameters[name] = parameter

    @property
    def sizes(self) -> list[int]:
        """Numbers that each process has."""
        width = self.shape[1:].numel()
        return [width * (end - start) for start, end in zip(self.ends, self.ends[1:], strict=False)]


class _Bucket:
    """Parameters that travel together: of one dtype, all of which learn or none."""

    def __init__(self, split: Sequence[_Split], device: torch.device, *, world: int) -> None:
        self.split, self.device, self.world, self.rank = split, device, world, dist.get_rank()
        self.dtype, self.learns = split[0].dtype, split[0].learns
        self.slots = sum(each.slot for each in split)
        sizes = [each.sizes for each in split]
        self.sizes = sizes
        # of every process's slots: what is full and what stays empty of each parameter's
        self.cuts = [
            [
                cut
                for each, own in zip(split, sizes, strict=True)
                for cut in (own[number], each.slot - own[number])
            ]
            for number in range(world)
        ]
        self.grads: list[DTensor] = []
        self.received: Tensor | None = None
        # gradients that are still to come in a backward pass
        self.missing = 0

    def gather(self) -> tuple[Tensor, Any]:
        """Begin to send the parts to all; returns where they arrive, and what to wait for."""
        sent = torch.empty(self.slots, dtype=self.dtype, device=self.device)
        _copy(self._own(sent), [each.local for each in self.split])
        gathered = torch.empty(self.world * self.slots, dtype=self.dtype, device=self.device)
        work = _all_gather(gathered, sent, async_op=True)
        return gathered.view(self.world, self.slots), work

    def spread(self, gathered: Tensor) -> None:
        """Fill the copies from what has arrived; whoever has made something of them sees that they have changed."""
        _copy(self._of_wholes([each.copy for each in self.split]), self._of_slots(gathered))

    def reduce(self) -> tuple[Tensor, Any]:
        """Begin to add up the copies' gradients, which end; returns what is sent, and what to wait for."""
        # what stays empty is not looked at
        sent = torch.empty(self.world, self.slots, device=self.device)
        if not self.grads:
            self.received = torch.empty(self.slots, device=self.device)
            self.grads = [
                each.distributed(own) for each, own in zip(self.split, self._own(self.received), strict=True)
            ]
        assert self.received is not None
        for each, grad in zip(self.split, self.grads, strict=True):
            if each.copy.grad is not None:
                each.part.grad = grad
        _copy(self._of_slots(sent), self._of_wholes([each.copy.grad for each in self.split]))
        for each in self.split:
            each.copy.grad = None
        return sent, _reduce_scatter(self.received, sent.view(-1), async_op=True)

    def hand_out(self) -> None:
        """Make a mean of the sum that has arrived, which the parts' gradients see."""
        assert self.received is not None
        self.received /= self.world

    def _own(self, flat: Tensor) -> list[Tensor]:
        """Cut the slots of one process into the shapes of the parts of this one."""
        pieces = flat.split(self.cuts[self.rank])[::2]
        return [piece.view(each.local.shape) for each, piece in zip(self.split, pieces, strict=True)]

    def _of_slots(self, flat: Tensor) -> list[Tensor | None]:
        """Cut the slots of all, ``[world, slots]``, into flat pieces: process by process, parameter by parameter."""
        rows = zip(flat.unbind(), self.cuts, strict=True)
        return [piece for row, cuts in rows for piece in row.split(cuts)[::2]]

    def _of_wholes(self, wholes: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Cut whole tensors into the same pieces; None for one that is missing."""
        cut = [
            [None] * self.world if whole is None else whole.reshape(-1).split(sizes)
            for whole, sizes in zip(wholes, self.sizes, strict=True)
        ]
        return [pieces[number] for number in range(self.world) for pieces in cut]


def _grouped(split: Sequence[_Split]) -> Iterator[list[_Split]]:
    """Sort parameters into buckets, in their order."""
    kinds: dict[tuple[torch.dtype, bool], list[_Split]] = {}
    for each in split:
        kinds.setdefault((each.dtype, each.learns), []).append(each)
    for (dtype, learns), members in kinds.items():
        size, group = 0, []
        for each in members:
            # gradients are float32
            num_bytes = each.shape.numel() * (4 if learns else dtype.itemsize)
            if group and size + num_bytes > _BUCKET_BYTES:
                yield group
                size, group = 0, []
            group.append(each)
            size += num_bytes
        yield group


def _copy(targets: Sequence[Tensor | None], sources: Sequence[Tensor | None]) -> None:
    pairs = [
        (target, source)
        for target, source in zip(targets, sources, strict=True)
        if target is not None and source is not None and target.numel()
    ]
    if pairs:
        torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))  # pyright: ignore
