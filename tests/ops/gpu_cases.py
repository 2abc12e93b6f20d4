"""Inputs of the kernels, their float64 answers, and poisoned and guarded memory, for the tests and ``racecheck.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gendistill.ops import bounded_log_decay, l2norm, softplus_log_decay
from gendistill.ops.reference.delta_rule import recurrent_delta_rule
from gendistill_kernels.delta import chunk, plan
from gendistill_kernels.delta.chunk import chunk_backward, chunk_forward
from gendistill_kernels.delta.layout import Chunks
from gendistill_kernels.delta.rule import Inputs, Rule, Saved
from gendistill_kernels.runtime import memory

DEVICE = "cuda"
BF16, FP16 = torch.bfloat16, torch.float16
TENSORS = Inputs._fields
# bytes on both sides of a guarded tensor, as many as a tile of 64 by 256 float32; keeps addresses aligned
GUARD = 1 << 16


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draw a tensor, the same values for every dtype."""
    return torch.randn(*shape, device=DEVICE).to(dtype)


def draw(
    rule: Rule,
    B: int = 2,
    T: int = 100,
    H: int = 2,
    K: int = 64,
    V: int | None = None,
    *,
    heads: tuple[int, int, int] | None = None,
    decay_per: str = "channel",
    dtype: torch.dtype = BF16,
    seed: int = 0,
) -> Inputs:
    """Draw the inputs of a chunked call; ``heads`` are those of q, k and v, H by default; decay per channel or head."""
    torch.manual_seed(seed)
    V = V or K
    numbers = heads or (H, H, H)
    q, k, v = (normal(B, T, number, c, dtype=dtype) for number, c in zip(numbers, (K, K, V), strict=True))
    if not rule.norm:
        q, k = q / K**0.5, k / K**0.5
    wide = (K,) if decay_per == "channel" else ()
    decay, beta = normal(B, T, H, *wide, dtype=dtype), normal(B, T, H, dtype=dtype)
    x = Inputs(q, k, v, decay, beta)
    if rule.gate == "none":
        x = x._replace(decay=-0.3 * decay.abs())
    else:
        rates = torch.rand(H, device=DEVICE) * (2.7 if rule.gate == "softplus" else 1.0)
        x = x._replace(A_log=rates, dt_bias=normal(H * (K if wide else 1)) - 4)
    strengths = {
        "beta": beta if "scalar" in (rule.erase, rule.write) else None,
        "erase": normal(B, T, H, K, dtype=dtype) if rule.erase == "channel" else None,
        "write": normal(B, T, H, V, dtype=dtype) if rule.write == "channel" else None,
    }
    if not rule.sigmoid:
        strengths = {name: part if part is None else part.sigmoid() for name, part in strengths.items()}
    return x._replace(**strengths)


def exact(x: Inputs, rule: Rule, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Apply the definition token by token; float64 inputs give float64 results."""
    q, k = (l2norm(part) if rule.norm else part for part in (x.q, x.k))
    beta, erase, write = (
        part if part is None or not rule.sigmoid else part.sigmoid() for part in (x.beta, x.erase, x.write)
    )
    # a decay per head is one of a single channel
    decay = x.decay if x.decay.ndim == 4 else x.decay[..., None]
    if rule.gate == "bounded":
        decay = bounded_log_decay(decay, x.A_log, x.dt_bias, lower_bound=rule.lower_bound)
    if rule.gate == "softplus":
        decay = softplus_log_decay(decay, x.A_log, x.dt_bias)
    settings = {
        "log_decay": decay if x.decay.ndim == 4 else decay[..., 0],
        "erase": {"none": None, "scalar": beta, "channel": erase}[rule.erase],
        "write": beta if rule.write == "scalar" else write,
    }
    return recurrent_delta_rule(q, k, x.v, **settings, state=state, scale=rule.scale)


def exact_packed(x: Inputs, rule: Rule, state: Tensor | None, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Apply the definition to packed sequences, one by one; those of no token keep their state."""
    outs, lasts, first = [], [], 0
    for number, length in enumerate(lengths):
        own = None if state is None else state[number : number + 1]
        # the gate's parameters have no tokens
        here = {
            name: part[:, first : first + length] for name, part in x._asdict().items() if _has_tokens(part)
        }
        first += length
        if length:
            out, own = exact(x._replace(**here), rule, own)
            outs.append(out)
        elif own is None:
            own = x.v.new_zeros(1, x.decay.shape[2], x.k.shape[3], x.v.shape[3])
        lasts.append(own)
    return torch.cat(outs, 1), torch.cat(lasts)


def _has_tokens(part: Tensor | None) -> bool:
    return part is not None and part.ndim > 2


def run(
    x: Inputs,
    rule: Rule,
    state: Tensor | None,
    grads: tuple[Tensor, Tensor],
    chunks: Chunks | None = None,
) -> dict[str, Tensor]:
    """Run the kernels forwards and backwards; every result by name."""
    out, last, saved = chunk_forward(x, rule, state=state, chunks=chunks, save=True)
    want = state is not None
    found = chunk_backward(grads[0], grads[1], x, rule, out, saved, chunks=chunks, want_state=want)
    named = {"out": out, "last": last, **{f"d {name}": part for name, part in found._asdict().items()}}
    return {name: part for name, part in named.items() if part is not None}


def saved_tensors(x: Inputs, rule: Rule, saved: Saved, chunks: Chunks | None = None) -> dict[str, Tensor]:
    """Name what a forward pass saved; only what there is."""
    at = chunk._plan(x, rule, chunks)[1]
    found = {}
    for work, whole in zip(at.saved, saved, strict=True):
        parts = zip(work.names, work.parts(whole), strict=True)
        found |= {name: part.tensor for name, part in parts if part is not None}
    return found


def differentiate(
    x: Inputs,
    rule: Rule,
    state: Tensor | None,
    grads: tuple[Tensor, Tensor],
    lengths: list[int] | None = None,
) -> dict[str, Tensor]:
    """Compute in float64 what :func:`run` returns; ``lengths`` are those of packed sequences."""
    leaves = {**x._asdict(), "state": state}
    wide = {
        name: part.double().requires_grad_(part.is_floating_point())
        for name, part in leaves.items()
        if part is not None
    }
    start = wide.get("state")
    inputs = Inputs(**{name: wide.get(name) for name in TENSORS})
    if lengths is None:
        out, last = exact(inputs, rule, start)
    else:
        out, last = exact_packed(inputs, rule, start, lengths)
    found = torch.autograd.grad((out, last), list(wide.values()), [part.double() for part in grads])
    named = {f"d {name}": part for name, part in zip(wide, found, strict=True)}
    return {"out": out.detach(), "last": last.detach(), **named}


def upstream(x: Inputs, number: int | None = None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Draw gradients of the output and of the final state."""
    torch.manual_seed(seed)
    B, T, H = x.decay.shape[:3]
    K, V = x.k.shape[3], x.v.shape[3]
    return normal(B, T, H, V, dtype=x.v.dtype), normal(number or B, H, K, V)


def rms(part: Tensor) -> float:
    """Root of the mean square, in float64."""
    return part.double().square().mean().sqrt().item()


def error(found: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    """Divide the rms of the difference by the rms of the right answer, or by ``floor`` if that is larger."""
    return rms(found.double() - expected) / max(rms(expected), floor)


@contextmanager
def every_new_tensor(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Pass whatever is allocated uninitialised through ``change``."""

    def through(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *arguments, **keywords: change(make(*arguments, **keywords))

    with (
        mock.patch.object(torch, "empty", through(torch.empty)),
        mock.patch.object(torch, "empty_like", through(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", through(Tensor.new_empty)),
    ):
        yield


def poison(made: Tensor) -> Tensor:
    """Fill a new tensor with NaN, so that a cell that no program writes is seen."""
    if made.dtype == torch.uint8:
        # memory for tensors of any dtype: all ones is NaN in every floating one
        return made.fill_(255)
    return made.fill_(float("nan")) if made.is_floating_point() else made


def check_repeats(step: Callable[[], Any]) -> None:
    """Take a step ten times more; every result is bitwise that of the first."""
    first = [part.clone() for part in step()]
    assert all(torch.isfinite(part).all() for part in first)
    for _ in range(10):
        assert all(torch.equal(one, other) for one, other in zip(step(), first, strict=True))


class Guards:
    """Hand out tensors that lie inside larger buffers, filled so that reading or writing around them is seen.

    All bits around a tensor are ones, which is NaN in every floating type: what reads it spoils its result. What
    writes there changes it.
    """

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int, str]] = []

    def room(self, shape: tuple[int, ...], dtype: torch.dtype, device: Any, what: str = "new") -> Tensor:
        """Make an uninitialised tensor, all NaN."""
        size = torch.Size(shape).numel() * dtype.itemsize
        padded = -(-size // 16) * 16
        raw = torch.full((GUARD + padded + GUARD,), 255, dtype=torch.uint8, device=device)
        self.buffers.append((raw, size, what))
        return raw[GUARD : GUARD + size].view(dtype).view(shape)

    def copy(self, part: Tensor, what: str = "input") -> Tensor:
        """Copy a tensor into guarded memory."""
        return self.room(tuple(part.shape), part.dtype, part.device, what).copy_(part)

    def damage(self) -> list[str]:
        """Name the tensors around which something was written."""
        if self.buffers and self.buffers[0][0].is_cuda:
            torch.cuda.synchronize()
        bad = []
        for raw, size, what in self.buffers:
            before, after = raw[:GUARD], raw[GUARD + size :]
            if not (bool((before == 255).all()) and bool((after == 255).all())):
                bad.append(f"{what} tensor of {size} bytes")
        return bad

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leave as much between tensors that share a piece of memory, in what is planned within."""
        with mock.patch.object(memory, "_GAP", GUARD):
            plan.plan_launches.cache_clear()
            try:
                yield
            finally:
                plan.plan_launches.cache_clear()

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Guard whatever is allocated, too; what shares a piece of memory must have been planned ``apart``."""
        allocate = memory.Workspace.allocate

        def guard(made: Tensor) -> Tensor:
            if made.device.type != torch.device(DEVICE).type or not made.is_contiguous():
                return made
            return self.room(tuple(made.shape), made.dtype, made.device)

        def guard_parts(work: memory.Workspace) -> Tensor:
            made = allocate(work)
            for part in work.parts(made):
                if part is not None:
                    size = part.tensor.nbytes
                    aligned = -(-size // memory._ALIGNMENT) * memory._ALIGNMENT
                    whole = made[part.offset - GUARD : part.offset + aligned + GUARD]
                    self.buffers.append((whole, size, f"{part.dtype} {part.shape}"))
            return made

        with every_new_tensor(guard), mock.patch.object(memory.Workspace, "allocate", guard_parts):
            yield
