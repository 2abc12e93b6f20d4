"""AdamW whose moments of large matrices are kept in 8 bits, in the blockwise format of bitsandbytes."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from gendistill.anatomy.moments import BLOCK, SLAB, in_8_bits
from gendistill.errors import RecipeError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_bitsandbytes(where: str) -> None:
    """Refuse 8-bit moments where bitsandbytes is missing.

    Raises:
        RecipeError: It is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "adamw8bit needs the package bitsandbytes, which is not installed",
            where=where,
            hint=f'pip install "gendistill[adamw8bit]", or {where}=adamw',
        )


class AdamW8bit(torch.optim.Optimizer):
    """AdamW, of whose moments those of large matrices take a byte a number and a float32 scale per 256 numbers.

    A step unpacks a slab of moments to float32, runs torch's fused AdamW on it and packs the result. As in torch's own
    fused optimizer, a step changes nothing while the attribute ``found_inf``, a float32 scalar on the device, is 1:
    nobody waits for the device to learn that.

    ``state[parameter]`` holds ``step`` and both moments: float32 as in ``torch.optim.AdamW``, or the bytes in the
    parameter's shape beside ``<moment>_scale``.

    Args:
        groups: Parameter groups, each with ``group`` (a ``ParamGroup``); float32 parameters.
        betas: Of AdamW.
        eps: Of AdamW.
    Raises:
        RecipeError: bitsandbytes is not installed.
    Source: blockwise dynamic quantisation of arXiv 2110.02861, as bitsandbytes does it.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        check_bitsandbytes("optimizer")
        groups = list(groups)
        if any(isinstance(each, DTensor) for group in groups for each in group["params"]):
            raise RecipeError(
                "adamw8bit packs the moments of whole tensors, and these are sharded",
                where="optimizer",
                hint="adamw shares its moments among the processes; or keep models whole with engine.parallel=ddp",
            )
        super().__init__(groups, {"lr": 1e-3, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self._slabs = [(group, slab) for group in self.param_groups for slab in _slabs(group)]
        for _, slab in self._slabs:
            self.state.update(slab.state)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, or none while ``found_inf`` is 1."""
        assert closure is None
        for group, slab in self._slabs:
            slab.update(group, self.found_inf)


class _Slab:
    """Parameters whose moments are updated together, in float32 or packed."""

    def __init__(self, parameters: Sequence[nn.Parameter], *, packed: bool) -> None:
        self.parameters = parameters
        device = parameters[0].device
        steps = [torch.zeros((), device=device) for _ in parameters]
        self.state: dict[Tensor, dict[str, Tensor]] = {
            parameter: {"step": step} for parameter, step in zip(parameters, steps, strict=True)
        }
        # every parameter begins with a block of its own
        blocks = [math.ceil(parameter.numel() / BLOCK) for parameter in parameters]
        starts = [sum(blocks[:number]) for number in range(len(blocks))]
        self.ranges = [
            (start * BLOCK, parameter.numel()) for start, parameter in zip(starts, parameters, strict=True)
        ]
        self.moments: list[_Packed | Tensor] = []
        for name in _MOMENTS:
            flat = (
                _Packed(sum(blocks), name, device)
                if packed
                else torch.zeros(sum(blocks) * BLOCK, device=device)
            )
            self.moments.append(flat)
            for parameter, start, count in zip(parameters, starts, blocks, strict=True):
                state = self.state[parameter]
                if isinstance(flat, _Packed):
                    state[f"{name}_scale"] = flat.scale[start : start + count]
                    state[name] = self._view(flat.codes, parameter, start * BLOCK)
                else:
                    state[name] = self._view(flat, parameter, start * BLOCK)

    @staticmethod
    def _view(flat: Tensor, parameter: Tensor, start: int) -> Tensor:
        return flat[start : start + parameter.numel()].view(parameter.shape)

    def update(self, group: dict[str, Any], found_inf: Tensor | None) -> None:
        """Run AdamW over the parameters that have gradients."""
        ready = [number for number, parameter in enumerate(self.parameters) if parameter.grad is not None]
        if not ready:
            return
        whole = [flat.unpack() if isinstance(flat, _Packed) else flat for flat in self.moments]
        beta1, beta2 = group["betas"]
        if isinstance(self.moments[0], _Packed) and beta1**2 < beta2:
            # packing takes a small second moment to zero before the first; this is the least that it can be beside it
            least = (1 - beta2) * (1 - beta1**2 / beta2) / (1 - beta1) ** 2
            torch.maximum(whole[1], whole[0].square().mul_(least), out=whole[1])
        params = [self.parameters[number] for number in ready]
        first, second = (
            [self._view(flat, self.parameters[number], self.ranges[number][0]) for number in ready]
            for flat in whole
        )
        adamw(
            params,  # pyright: ignore[reportArgumentType]
            [parameter.grad for parameter in params],  # pyright: ignore[reportArgumentType]
            first,
            second,
            [],
            [self.state[parameter]["step"] for parameter in params],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        # packed again, moments without a gradient would be rounded again
        idle = [self.state[parameter] for parameter in self.parameters if parameter.grad is None]
        kept = [{key: value.clone() for key, value in state.items()} for state in idle]
        for flat, values in zip(self.moments, whole, strict=True):
            if isinstance(flat, _Packed):
                flat.pack(values, unless=found_inf)
        for state, before in zip(idle, kept, strict=True):
            for key, value in before.items():
                state[key].copy_(value)


class _Packed:
    """One moment of a slab: a code of 8 bits per number, and a scale per block.

    Args:
        num_blocks: Blocks of 256 numbers.
        moment: ``exp_avg``, or ``exp_avg_sq``, which has no sign.
        device: Where.
    """

    def __init__(self, num_blocks: int, moment: str, device: torch.device) -> None:
        # an extra, which type checkers do not find
        self._functional: Any = importlib.import_module("bitsandbytes").functional
        table: Tensor = self._functional.create_dynamic_map(signed=moment == "exp_avg")
        self.table = table.to(device)
        self.scale = torch.zeros(num_blocks, device=device)
        zero = int(torch.argmin(self.table.abs()))
        self.codes = torch.full((num_blocks * BLOCK,), zero, dtype=torch.uint8, device=device)

    def unpack(self) -> Tensor:
        """Return the numbers, float32 ``[256 * blocks]``."""
        return self._functional.dequantize_blockwise(
            self.codes, absmax=self.scale, code=self.table, blocksize=BLOCK
        )

    def pack(self, values: Tensor, *, unless: Tensor | None) -> None:
        """Take up new numbers, or stay as it is where ``unless`` is 1."""
        codes, found = self._functional.quantize_blockwise(values, code=self.table, blocksize=BLOCK)
        scale = found.absmax
        if unless is not None:
            keep = unless.bool()
            codes, scale = torch.where(keep, self.codes, codes), torch.where(keep, self.scale, scale)
        self.codes.copy_(codes)
        self.scale.copy_(scale)


def _slabs(group: dict[str, Any]) -> list[_Slab]:
    """Split a parameter group: small parameters and embeddings together in float32, the others packed, slab by slab."""
    small = [each for each in group["params"] if not in_8_bits(group["group"], each.numel())]
    slabs = [_Slab(small, packed=False)] if small else []
    batch: list[nn.Parameter] = []
    for parameter in group["params"]:
        if not in_8_bits(group["group"], parameter.numel()):
            continue
        if batch and sum(each.numel() for each in batch) + parameter.numel() > SLAB:
            slabs.append(_Slab(batch, packed=True))
            batch = []
        batch.append(parameter)
    return [*slabs, _Slab(batch, packed=True)] if batch else slabs
