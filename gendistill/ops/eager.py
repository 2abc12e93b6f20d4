"""Call registered ops past torch's dispatch, which takes longer than a launch, where only autograd has to see them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

# a subclass of Tensor may stand for something that has no memory
_PLAIN = {Tensor, Parameter, type(None), list, str, float, int, bool, torch.dtype}


def is_eager(arguments: tuple[Any, ...]) -> bool:
    """Say whether nobody but autograd has to see an op: no compiler, tracer, transform, mode or tensor subclass."""
    if (
        torch.compiler.is_compiling()
        or is_in_torch_dispatch_mode()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    kinds = set(map(type, arguments))
    if list in kinds:
        for part in arguments:
            if type(part) is list:
                kinds.update(map(type, part))
    return kinds <= _PLAIN


def _needs_grad(arguments: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for part in arguments:
            if isinstance(part, Tensor) and part.requires_grad:
                return True
            if type(part) is list and _needs_grad(tuple(part)):
                return True
    return False


def quick(op: Any, launch: Any) -> Any:
    """Return what calls an op without derivative; eagerly, what it does itself, since its dispatch takes long."""

    def call(*arguments: Any) -> Any:
        if is_eager(arguments) and not _needs_grad(arguments):
            return launch(*arguments)
        return op(*arguments)

    return call


def differentiable(op: Any, launch: Any, keep: Any, differentiate: Any) -> Any:
    """Register an op's derivative, and return what calls the op; eagerly, what it does itself, as :func:`quick`."""
    op.register_autograd(differentiate, setup_context=keep)

    def forward(ctx: Any, *arguments: Any) -> Any:
        # an output without a gradient says None, and costs no tensor of zeros
        ctx.set_materialize_grads(False)
        output = launch(*arguments)
        keep(ctx, arguments, output)
        return output

    methods = {"forward": forward, "backward": once_differentiable(differentiate)}
    function = type(op._name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in methods.items()})

    def call(*arguments: Any) -> Any:
        if not is_eager(arguments):
            return op(*arguments)
        return function.apply(*arguments) if _needs_grad(arguments) else launch(*arguments)

    return call
