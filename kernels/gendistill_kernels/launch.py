"""Launch Triton kernels with little work on the host.

``kernel[grid](...)`` classifies every argument anew, formats the options, compares global variables and encodes every
tensor descriptor: 20 to 50 microseconds a launch. A ``Launcher`` lets Triton do that once for every combination of what
it compiles for, keeps the compiled kernel, and hands later calls of the same combination to its C launcher.

It reaches into Triton below its public functions, in the versions of ``_HEADS`` only. Elsewhere, and for whatever
it does not know, every call is the plain ``kernel[grid](...)``, which differs in nothing but time.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

_VERSION = ".".join(triton.__version__.split(".")[:2])
# what the C launcher gets between the stream and the arguments: no scratch memory, no hooks
_HEADS: dict[str, Callable[[Any, Any], tuple[Any, ...]]] = {
    "3.6": lambda kernel, run: (
        kernel.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
        kernel.packed_metadata, None, None, None,
    ),
    "3.7": lambda kernel, run: (
        kernel.function, run.launch_cooperative_grid, run.launch_pdl,
        kernel.packed_metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature,
    ),
}  # fmt: skip
# places of which a kernel keeps the encoded descriptor; workspaces of a step come back to the same places in the next
_PLACES = 4096


class Blocks(TensorDescriptor):
    """Describe a contiguous tensor as one matrix, all axes but the last its rows, that is read in blocks.

    Made without the checks of a ``TensorDescriptor``, which every launch would pay for.

    Args:
        base: Starts at a multiple of 16 bytes, and so does every row.
        block_shape: Rows and columns; powers of two, no fewer than 16 bytes of columns.
    """

    def __init__(self, base: Tensor, block_shape: tuple[int, int]) -> None:
        width = base.shape[-1]
        rows = base.numel() // width
        self.base = base
        self.shape = [rows, width]
        self.strides = [width, 1]
        self.block_shape = [*block_shape]
        # what a kernel is compiled for, and what is encoded
        self.kind = (base.dtype, base.get_device(), block_shape)
        self.place = (base.data_ptr(), rows, width)


# for an argument of each type: what distinguishes compiled kernels, and what its C launcher gets
_POINTER = ("{0}.dtype, {0}.get_device(), {0}_at & 15 == 0", "{0}_at")
_RULES: dict[type, tuple[str, str]] = {
    Tensor: _POINTER,
    torch.nn.Parameter: _POINTER,
    bool: ("", "{0}"),
    int: ("{0} == 1, {0} & 15 == 0, -0x80000000 <= {0} < 0x80000000, {0} < 0x8000000000000000", "{0}"),
    float: ("", "{0}"),
    type(None): ("", "{0}"),
    Blocks: ("{0}.kind", "{0}"),
}


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(
        f"launches of kernels take longer than they need on the host: {reason}", RuntimeWarning, stacklevel=4
    )


def _is_hooked(hook: Any) -> bool:
    return hook is not None and (type(hook) is not knobs.HookChain or bool(hook.calls))


def _is_watched(function: Any) -> bool:
    runtime = knobs.runtime
    return bool(
        _is_hooked(runtime.launch_enter_hook)
        or _is_hooked(runtime.launch_exit_hook)
        or runtime.add_stages_inspection_hook
        or function.pre_run_hooks
        or runtime.debug
        or knobs.compilation.instrumentation_mode
    )


def _reader(classes: tuple[type, ...]) -> Callable[..., tuple[tuple[Any, ...], list[Any]]] | None:
    """Make a function of arguments of these classes, which returns what a kernel is compiled for, and plain values.

    None if there is no rule for one of them.
    """
    if not all(kind in _RULES for kind in classes):
        return None
    names = [f"x{index}" for index in range(len(classes))]
    pointers, keys, values = [], [], []
    for name, kind in zip(names, classes, strict=True):
        key, value = _RULES[kind]
        if _RULES[kind] is _POINTER:
            pointers.append(f"    {name}_at = {name}.data_ptr()\n")
        if key:
            keys.append(key.format(name))
        values.append(value.format(name))
    body = f"    return ({''.join(key + ', ' for key in keys)}), [{', '.join(values)}]\n"
    scope: dict[str, Any] = {}
    exec(f"def read({', '.join(names)}):\n{''.join(pointers)}{body}", scope)
    return scope["read"]


class Launcher:
    """Stand in for a jitted function: ``launcher[grid](arguments, CONSTANT=..., num_warps=...)``.

    What varies at run time comes first and by position, constants and options by keyword; else the call is a plain one.
    So it is while somebody watches launches through Triton's hooks. Unlike a plain call, one of a known combination
    does not compare the global variables that the kernel was compiled with.

    Args:
        function: What ``triton.jit`` returned, interpreted or not.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        # by classes of arguments: how to read them, and what was compiled for what was read
        self._known: dict[tuple[type, ...], tuple[Any, dict[tuple[Any, ...], _Compiled | None]]] = {}

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        if type(self.function) is not JITFunction:
            return self.function[grid]
        if _VERSION not in _HEADS:
            _warn(f"triton {triton.__version__} is not one of {', '.join(_HEADS)}")
            return self.function[grid]
        return functools.partial(self._launch, grid)

    def _launch(self, grid: Any, /, *arguments: Any, **constants: Any) -> None:
        classes = tuple(map(type, arguments))
        found = self._known.get(classes)
        if found is None:
            found = self._known[classes] = _reader(classes), {}
        read, known = found
        if read is None or type(grid) is not tuple or _is_watched(self.function):
            self.function[grid](*arguments, **constants)
            return
        active: Any = driver.active
        device = active.get_current_device()
        kind, values = read(*arguments)
        # constants are told apart by ``==``, as in Triton's own table
        key = (device, kind, *constants, *constants.values())
        compiled = known.get(key)
        if compiled is not None:
            compiled.launch(grid, active.get_current_stream(device), values)
            return
        kernel = self.function[grid](*arguments, **constants)
        if key not in known and isinstance(kernel, CompiledKernel):
            known[key] = _compiled(kernel, self.function, arguments)


class _Compiled:
    """Hold a compiled kernel's C launcher, all that it gets from call to call, and encoded descriptors."""

    def __init__(
        self, start: Callable[..., None], head: tuple[Any, ...], tail: int, blocks: list[tuple[int, Any]]
    ) -> None:
        self.start = start
        self.head = head
        self.tail = [None] * tail
        # from the last to the first, since each becomes several values
        self.blocks = [(index, meta, {}) for index, meta in reversed(blocks)]

    def launch(self, grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        """Launch; ``values`` are as a reader returns them."""
        for index, meta, places in self.blocks:
            block = values[index]
            encoded = places.get(block.place)
            if encoded is None:
                if len(places) >= _PLACES:
                    places.clear()
                encoded = places[block.place] = nvidia.make_tensordesc_arg(block, meta)
            values[index : index + 1] = encoded
        # the places of constants, which a kernel has no parameters for
        values += self.tail
        x, y, z = (*grid, 1, 1)[:3]
        if _VERSION == "3.6":
            self.start(x, y, z, stream, *self.head, *values)
        else:
            self.start(x, y, z, stream, *self.head, values)


def _compiled(kernel: CompiledKernel, function: JITFunction, arguments: Sequence[Any]) -> _Compiled | None:
    """Look for what later launches need; None if they must be plain ones."""
    run: Any = kernel.run
    count = len(arguments)
    start = _c_launcher(run)
    if start is None or len(kernel.packed_metadata) != 3:
        return _warn(f"{type(run).__name__} is not as Triton {_VERSION} is known to have it")
    at_run_time = [parameter.name for parameter in function.params if not parameter.is_constexpr]
    in_order = [parameter.name for parameter in function.params[:count]] == at_run_time
    # plain launches refuse a pointer to the host's memory; those that follow get bare addresses
    on_gpu = all(_is_on_gpu(part) for part in arguments if isinstance(part, Tensor | Blocks))
    needs_scratch = run.global_scratch_size > 0 or run.profile_scratch_size > 0
    if not in_order or not on_gpu or needs_scratch:
        return None
    blocks = [index for index, part in enumerate(arguments) if isinstance(part, Blocks)]
    metas = kernel.metadata.tensordesc_meta if blocks else []  # pyright: ignore
    if len(metas or ()) != len(blocks) or None in metas:
        # descriptors that are not encoded but taken apart
        return None
    head = _HEADS[_VERSION](kernel, run)
    return _Compiled(start, head, len(function.params) - count, list(zip(blocks, metas, strict=True)))


def _c_launcher(run: Any) -> Callable[..., None] | None:
    """Find what a compiled kernel is launched with; None if it is not where it was in the versions known."""
    if type(run) is not nvidia.CudaLauncher:
        return None
    start = run.launch
    if isinstance(start, types.FunctionType):
        # what encodes descriptors, around the launcher itself
        start = inspect.getclosurevars(start).nonlocals.get("launcher")
    return start if isinstance(start, types.BuiltinFunctionType) else None


def _is_on_gpu(part: Tensor | Blocks) -> bool:
    return (part.base if isinstance(part, Blocks) else part).is_cuda
