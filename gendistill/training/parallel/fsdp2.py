"""Several processes that hold a part of student and teacher each, in one of two ways.

Of a decoder block, the matrices are split. They are gathered in the dtype of the arithmetic: the numbers that autocast
would have made of them, half as many bytes. Everything else of a block (gates, norms, biases, taps of convolutions) is
small, stays whole on every process and float32, and its gradients are averaged at the end of a step. Embedding, final
norm and head are split too, gathered in float32 when the step begins and kept until its end, because losses read the
head outside of any layer.

``always``: torch's ``fully_shard`` gathers a block when it runs, and lets go of it afterwards; gradients are shared in
every micro-batch. Least memory; the host works for every layer of every pass. Accelerate shards one model only, and on
CPU none at all while it says that it does; so it only starts the processes.

``step``: whole copies stand in the student from the beginning of a step to its end (``copies``), gradients add up in
whole ones and are shared once, in the last backward pass; a teacher is whole for good. In between the host has nothing
to do that it would not have on one process.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gendistill.anatomy.adapters import plain_name
from gendistill.anatomy.student import mixer_names
from gendistill.config.engine import EngineConfig
from gendistill.errors import TrainingError
from gendistill.training.parallel.copies import WholeCopies
from gendistill.training.parallel.group import Group
from gendistill.training.parallel.peers import Situation

_REFUSED = "set engine.parallel=ddp, which keeps models whole"


class FullySharded(Group):
    """Several processes that share parameters, gradients and moments.

    Args:
        accelerator: Of more than one process.
        engine: How long to wait for others, in which dtype matrices are gathered, and when they are let go.
    """

    def __init__(self, accelerator: Accelerator, engine: EngineConfig) -> None:
        super().__init__(accelerator, patience_s=engine.patience_s)
        # a launcher's default under which transformers loads weights on the first process only
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        self.engine = engine
        self._mesh = init_device_mesh(self.device.type, (self.world,))
        self._whole: list[nn.Parameter] = []
        self._undo: list[_Unwrapped] = []
        self._copies: WholeCopies | None = None
        self._teacher_is_split = False

    @contextlib.contextmanager
    def together(self, situation: Callable[[], Situation]) -> Iterator[None]:
        """Notice inside that another process is gone, and name what cannot be split.

        Raises:
            TrainingError: An objective, a mixer or a monitor reads a split parameter outside of its layer.
        """
        with super().together(situation):
            try:
                yield
            except RuntimeError as error:
                if "mixed torch.Tensor and DTensor" not in str(error):
                    raise
                raise TrainingError(
                    "something reads a parameter outside of the layer that it belongs to, where fsdp2 has it in parts: "
                    "an objective or a mixer that is not one of gendistill's, which should run the layer instead "
                    "(losses.student.run_mixer)",
                    where=situation().where,
                    hint=_REFUSED,
                ) from error

    averages = False

    @property
    def captures(self) -> bool:
        """Whether both models stay whole inside of a step."""
        return self._copies is not None and not self._teacher_is_split

    def holders(self, trained: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return the copies that learn, and what is not split."""
        assert self._copies is not None
        return [*self._copies.learning, *(each for each in self._whole if each.requires_grad)]

    def ready(self) -> None:
        """Have the copies stand in their places."""
        assert self._copies is not None
        self._copies.use()

    def average(self, gradients: Tensor) -> None:
        """Share the gradients of the copies, and average those of what is not split."""
        assert self._copies is not None
        self._copies.expect_gradients()
        self._share()

    def _share(self) -> None:
        if self._copies is not None:
            self._copies.share_gradients()
            self._copies.put_away()
        self._average([parameter.grad for parameter in self._whole if parameter.grad is not None])

    @property
    def description(self) -> str:
        """What is shared."""
        return f"{self.world} processes, each with a part of student and teacher (fsdp2)"

    @property
    def loads_on(self) -> torch.device:
        """Models are loaded beside the device, which need not hold them whole."""
        return torch.device("cpu")

    def shard(self, module: nn.Module, *, compute_dtype: torch.dtype) -> nn.Module:
        """Split every block, and what lies around them, in place.

        Raises:
            TrainingError: The blocks share a parameter.
        """
        student: Any = module.student
        blocks = list(student.model.layers)
        _check_apart(blocks)
        float32 = mixer_names(student.config.to_dict(), lambda spec: spec.float32)
        whole = {
            parameter
            for name, parameter in student.model.named_parameters()
            if name.startswith("layers.") and (parameter.dim() != 2 or plain_name(name) in float32)
        }
        # in the order of the module, which is the same on every process
        self._whole = [parameter for parameter in module.parameters() if parameter in whole]
        dtype = torch.float32 if self.engine.gather == "float32" else compute_dtype
        inside = {parameter for block in blocks for parameter in block.parameters()}
        if self._keeps(
            parameter.numel() * (dtype if parameter in inside else torch.float32).itemsize
            for parameter in module.parameters()
            if parameter not in whole
        ):
            self._copies = WholeCopies(
                module,
                kept=whole,
                dtype_of=lambda parameter: dtype if parameter in inside else torch.float32,
                mesh=self._mesh,
                device=self.device,
            )
            # a block may run alone
            self._copies.watch([module, *blocks])
        else:
            self._split_blocks(module, blocks, whole, dtype)
        _check_sharded(module, whole)
        return module

    def _split_blocks(
        self, module: nn.Module, blocks: Sequence[nn.Module], whole: set[nn.Parameter], dtype: torch.dtype
    ) -> None:
        """Split every block, and what lies around them, so that each is gathered when it runs."""
        # classes and hooks as they are now
        self._undo = [_Unwrapped(each) for each in module.modules()]
        for number, block in enumerate(blocks):
            fully_shard(
                block,
                mesh=self._mesh,
                # the last one is needed at once in the backward pass
                reshard_after_forward=number < len(blocks) - 1,
                mp_policy=MixedPrecisionPolicy(
                    param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
                ),
                ignored_params=whole,
            )
        fully_shard(module, mesh=self._mesh, reshard_after_forward=False, ignored_params=whole)
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        for unwrapped in self._undo:
            unwrapped.note_added()

    def _keeps(self, num_bytes: Iterable[int]) -> bool:
        """Whether a model stays gathered whose parameters then take these bytes; all processes decide alike."""
        memory = -self.largest(-float(_device_bytes(self.device)))
        return self.engine.keeps_whole(sum(num_bytes), memory)

    def unshard(self, module: nn.Module) -> None:
        """Make an ordinary module of it again, whole on the first process and in main memory; empty on the others."""
        self._drop_copies()
        self.settle(module)
        places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for owner in module.modules():
            for name, parameter in owner.named_parameters(recurse=False):
                places.setdefault(parameter, []).append((owner, name))
        for parameter, owners in places.items():
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.data
            value = value.detach().to("cpu" if self.is_main else "meta")
            plain = nn.Parameter(value, requires_grad=parameter.requires_grad)
            for owner, name in owners:
                owner._parameters[name] = plain
        for unwrapped in self._undo:
            unwrapped.restore()
        self._undo, self._whole = [], []
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                owner._buffers[name] = buffer.to(self.loads_on)

    def close(self) -> None:
        """Let go of copies, too."""
        self._drop_copies()
        super().close()

    def _drop_copies(self) -> None:
        if self._copies is not None:
            self._copies.release()
            self._copies = None

    def place_teacher(self, model: nn.Module) -> None:
        """Split the matrices of a frozen model in place, but for its head, which every loss on logits reads.

        A model that stays gathered is not split at all.
        """
        causal: Any = model
        decoder, head = causal.model, causal.lm_head
        self._teacher_is_split = isinstance(decoder, FSDPModule)
        if self._teacher_is_split:
            return
        model.requires_grad_(False)
        if self._keeps(parameter.numel() * parameter.element_size() for parameter in model.parameters()):
            model.to(self.device)
            return
        self._teacher_is_split = True
        whole = {parameter for parameter in decoder.layers.parameters() if parameter.dim() != 2}
        whole.update(head.parameters())
        settings: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": True,
            "ignored_params": whole,
        }
        _check_apart(decoder.layers)
        for block in decoder.layers:
            fully_shard(block, **settings)
        fully_shard(decoder, **settings)
        for parameter in whole:
            parameter.data = parameter.data.to(self.device)
        _check_sharded(decoder, whole)

    @contextlib.contextmanager
    def whole(self, module: nn.Module) -> Iterator[bool]:
        """Have the whole copies stand in the module, if there are any."""
        if self._copies is None:
            yield False
            return
        self._copies.use()
        try:
            yield True
        finally:
            self._copies.put_away()

    def settle(self, module: nn.Module) -> None:
        """Let go of what a pass without gradients has gathered and left."""
        if self._copies is not None:
            self._copies.put_away()
        for each in module.modules():
            if isinstance(each, FSDPModule):
                each.reshard()

    @contextlib.contextmanager
    def accumulating(self, module: nn.Module, *, last: bool) -> Iterator[None]:
        """Share gradients of copies in the last micro-batch, else in each: there, whole ones are what is saved."""
        if self._copies is not None:
            # arrives while the teacher runs
            self._copies.start()
            if last:
                self._copies.expect_gradients()
        try:
            yield
            if last:
                self._share()
        except BaseException:
            self.settle(module)
            raise

    def _average(self, grads: list[Tensor]) -> None:
        """Average whole gradients over processes, in place."""
        if not grads:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.world
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            grads, [part.view_as(grad) for grad, part in zip(grads, parts, strict=True)]
        )

    @torch.no_grad()
    def norm(self, gradients: Iterable[Tensor]) -> Tensor:
        """Return the norm of all gradients together, whole ones and parts; the same on every process."""
        own, whole = [], []
        for gradient in gradients:
            if isinstance(gradient, DTensor):
                own.append(gradient.to_local())
            else:
                whole.append(gradient)
        # a process may have no part of a small tensor
        squares = _sum_of_squares([part for part in own if part.numel()], self.device)
        dist.all_reduce(squares)
        return (squares + _sum_of_squares(whole, self.device)).sqrt()

    @torch.no_grad()
    def clip(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale all gradients; the norm before is that of all parts together, and the same everywhere."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = self.norm(gradients)
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        own = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
        torch._foreach_mul_(own, factor)  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def gather(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors whole, one after the other; on the first process in main memory."""
        for name, value in tensors.items():
            whole = value.full_tensor().detach() if isinstance(value, DTensor) else value
            yield name, whole.cpu() if self.is_main else whole

    def scatter(
        self, like: Mapping[str, Tensor], read: Callable[[str], Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Send every process its part of the tensors, one after the other."""
        # copies would not be those of the new parts
        if self._copies is not None:
            self._copies.put_away()
        for name, tensor in like.items():
            whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            if self.is_main:
                whole.copy_(read(name))
            if isinstance(tensor, DTensor):
                yield name, distribute_tensor(whole, tensor.device_mesh, tensor.placements)
            else:
                dist.broadcast(whole, src=0)
                yield name, whole


def _device_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class _Unwrapped:
    """A module's class and hooks, to go back to."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.type = type(module)
        self.names = set(vars(module))
        self.added: set[str] = set()
        self.hooks = {name: value.copy() for name, value in vars(module).items() if "_hooks" in name}

    def note_added(self) -> None:
        """See what sharding has just added."""
        self.added = set(vars(self.module)) - self.names

    def restore(self) -> None:
        """Take it away."""
        self.module.__class__ = self.type
        for name in self.added:
            del vars(self.module)[name]
        vars(self.module).update(self.hooks)


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).square().sum()


def _check_apart(blocks: Iterable[nn.Module]) -> None:
    """Refuse blocks that share a parameter: it would be gathered for one of them only."""
    owner: dict[Tensor, int] = {}
    for number, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            if owner.setdefault(parameter, number) != number:
                raise TrainingError(
                    f"layers {owner[parameter]} and {number} share the parameter {name}; fsdp2 splits layer by layer",
                    where="engine.parallel",
                    hint=_REFUSED,
                )


def _check_sharded(module: nn.Module, whole: set[nn.Parameter]) -> None:
    """Make sure that what was to be split is split: libraries have been seen to leave models as they were."""
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, DTensor) or cast(nn.Parameter, parameter) in whole, name
