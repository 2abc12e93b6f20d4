"""Launch Triton kernels with little work on the host.

``kernel[grid](...)`` classifies every argument anew, formats the options, compares global variables and encodes every
tensor descriptor: 20 to 50 microseconds a launch. A ``Launcher`` lets Triton do that once for every combination of what
it compiles for, keeps the compiled kernel, and hands later calls of the same combination to its C launcher. Of a
``Fixed`` launch even the combination is known: only addresses are left to read.

It reaches into Triton below its public functions, in the versions of ``_HEADS`` only. Elsewhere, for whatever it does
not know, and with ``GENDISTILL_PLAIN_LAUNCH=1`` in the environment when Python starts, every call is the plain
``kernel[grid](...)``, which differs in nothing but time.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import os
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gendistill_kernels.runtime.memory import Part

_P = ParamSpec("_P")
_R = TypeVar("_R")
_VERSION = ".".join(triton.__version__.split(".")[:2])
# the switch that leaves every launch to Triton
SWITCH = "GENDISTILL_PLAIN_LAUNCH"
_PLAIN = os.environ.get(SWITCH) == "1"
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
# addresses of which a kernel keeps the encoded descriptor; workspaces of a step come back to them in the next
_KEPT = 4096


class Blocks(TensorDescriptor):
    """A contiguous tensor, described as a matrix that is read in blocks.

    All axes but the last are the matrix's rows. Made without the checks of a ``TensorDescriptor``, which every launch
    would pay for; what only a first launch asks for is computed then.

    Args:
        whole: Starts at a multiple of 16 bytes, and so does every row.
        block_shape: Rows and columns; powers of two, no fewer than 16 bytes of columns.
    """

    def __init__(self, whole: Tensor | Part, block_shape: tuple[int, int]) -> None:
        self.whole = whole
        self.block_shape = [*block_shape]
        # of the matrix
        self.address = whole.data_ptr()

    @property
    def base(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The tensor described."""
        return self.whole.tensor if isinstance(self.whole, Part) else self.whole

    @property
    def shape(self) -> list[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rows and columns of the matrix."""
        *rows, width = self.whole.shape
        return [math.prod(rows), width]

    @property
    def strides(self) -> list[int]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the matrix, in elements."""
        return [self.whole.shape[-1], 1]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a kernel is compiled for, but for the address."""
        return self.whole.dtype, self.whole.get_device(), *self.block_shape


class Fixed:
    """What does not change from one launch to the next: ``launcher[Fixed(grid, ...)](arguments)``.

    Whoever makes one promises to hand it to one launcher only, with arguments that differ only in the addresses of
    tensors and blocks: not in classes, dtypes, devices, shapes of blocks, nor numbers.

    Args:
        grid: Up to three numbers of programs.
        constants: Constants of the kernel, and options.
    """

    def __init__(self, grid: tuple[int, ...], **constants: Any) -> None:
        self.grid = grid
        self.constants = constants
        # what its launcher gave for it
        self.call: Callable[..., Any] | None = None
        # on which device it was launched, and what launches it there again
        self.ready: tuple[int, Callable[..., bool]] | None = None


def on_its_device(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Run a function on the GPU of its first argument, a tensor or several; kernels start on the current one."""
    name = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def call(*arguments: _P.args, **settings: _P.kwargs) -> _R:
        first: Any = arguments[0] if arguments else settings[name]
        while not isinstance(first, Tensor):
            first = first[0]
        number = first.get_device()
        if number < 0 or number == torch.cuda.current_device():
            return function(*arguments, **settings)
        with torch.cuda.device(number):
            return function(*arguments, **settings)

    return call


# dtype of a tensor, and number of its device
Kind = tuple[torch.dtype, int]


def kinds_of(parts: Sequence[Tensor | None]) -> tuple[Kind | None, ...]:
    """Return what launches of ``Fixed`` must share besides shapes."""
    return tuple([None if part is None else (part.dtype, part.get_device()) for part in parts])


def check_devices(names: Sequence[str], kinds: Sequence[Kind | None], *, first: Kind | None) -> None:
    """Refuse tensors that are not where q is; a repeated launch would take their addresses for the GPU's.

    Args:
        names, kinds: Of the tensors.
        first: Of q.
    Raises:
        ValueError: Says which, where it is, and where q is.
    """
    for name, kind in zip(names, kinds, strict=True):
        if kind is not None and first is not None and kind[1] != first[1]:
            found, expected = (
                "the CPU" if number < 0 else f"cuda:{number}" for number in (kind[1], first[1])
            )
            raise ValueError(f"{name} is on {found} and q on {expected}; put all tensors on one device")


# for an argument of each type: what distinguishes compiled kernels, and what its C launcher gets
_POINTER = ("{0}.dtype, {0}.get_device(), {0}_at & 15 == 0", "{0}_at")
_RULES: dict[type, tuple[str, str]] = {
    Tensor: _POINTER,
    torch.nn.Parameter: _POINTER,
    Part: _POINTER,
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


def why_plain() -> str | None:
    """Say why launches are left to Triton; None if they are ours."""
    if _PLAIN:
        return f"{SWITCH}=1 is set"
    if _VERSION not in _HEADS:
        return f"triton {triton.__version__} is not one of {', '.join(_HEADS)}"
    return None


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
    return _function(f"def read({', '.join(names)}):\n{''.join(pointers)}{body}", "read")


@functools.cache
def _repeater(classes: tuple[type, ...], version: str) -> Callable[..., Callable[..., bool]]:
    """Make a function that makes launches of arguments of these classes, as ``_Compiled.repeat`` returns them."""
    names = [f"x{index}" for index in range(len(classes))]
    pointers = [name for name, kind in zip(names, classes, strict=True) if _RULES[kind] is _POINTER]
    blocks = [name for name, kind in zip(names, classes, strict=True) if kind is Blocks]
    lines = [f"{name} = {name}.data_ptr()" for name in pointers]
    if pointers:
        lines.append(f"if ({' | '.join(pointers)}) & 15: return False")
    for name in blocks:
        lines += [
            f"key = {name}.address, shape_{name}",
            f"{name} = encoded_{name}.get(key) or encode(encoded_{name}, key, {name}, meta_{name})",
        ]
    values = ", ".join([*(f"*{name}" if name in blocks else name for name in names), "*tail"])
    values = values if version == "3.6" else f"[{values}]"
    lines += [f"start(*grid, stream, *head, {values})", "return True"]
    known = "".join(f", encoded_{name}, shape_{name}, meta_{name}" for name in blocks)
    body = "".join(f"        {line}\n" for line in lines)
    return _function(
        f"def make(start, grid, head, tail, encode{known}):\n"
        f"    def repeat(stream, {', '.join(names)}):\n{body}"
        "    return repeat\n",
        "make",
    )


def _function(source: str, name: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {}
    exec(source, scope)
    return scope[name]


class Launcher:
    """A stand-in for a jitted function: ``launcher[grid](arguments, CONSTANT=..., num_warps=...)``.

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
        is_fixed = type(grid) is Fixed
        if is_fixed and grid.call is not None:
            return grid.call
        if type(self.function) is JITFunction and why_plain() is None:
            call = functools.partial(self._repeat if is_fixed else self._launch, grid)
            if is_fixed:
                grid.call = call
            return call
        if type(self.function) is JITFunction and not _PLAIN:
            _warn(why_plain() or "")
        if is_fixed:
            return functools.partial(self._plainly, grid.grid, **grid.constants)
        return functools.partial(self._plainly, grid)

    def _plainly(self, grid: Any, /, *arguments: Any, **constants: Any) -> Any:
        """Launch as anybody does."""
        plain = [part.tensor if type(part) is Part else part for part in arguments]
        return self.function[grid](*plain, **constants)

    def _repeat(self, fixed: Fixed, /, *arguments: Any) -> None:
        active: Any = driver.active
        device = active.get_current_device()
        # read once: another thread may be on another device
        ready = fixed.ready
        if (
            ready is not None
            and ready[0] == device
            and not _is_watched(self.function)
            and ready[1](active.get_current_stream(device), *arguments)
        ):
            return
        compiled = self._launch(fixed.grid, *arguments, **fixed.constants)
        if compiled is not None and all(_is_aligned(part) for part in arguments):
            fixed.ready = device, compiled.repeat(fixed.grid, arguments)

    def _launch(self, grid: Any, /, *arguments: Any, **constants: Any) -> _Compiled | None:
        """Launch; returns what to launch such again with, if there is anything."""
        classes = tuple(map(type, arguments))
        found = self._known.get(classes)
        if found is None:
            found = self._known[classes] = _reader(classes), {}
        read, known = found
        if read is None or type(grid) is not tuple or _is_watched(self.function):
            self._plainly(grid, *arguments, **constants)
            return None
        active: Any = driver.active
        device = active.get_current_device()
        kind, values = read(*arguments)
        # constants are told apart by ``==``, as in Triton's own table
        key = (device, kind, *constants, *constants.values())
        compiled = known.get(key)
        if compiled is not None:
            compiled.launch(grid, active.get_current_stream(device), values)
            return compiled
        kernel = self._plainly(grid, *arguments, **constants)
        if key not in known and isinstance(kernel, CompiledKernel):
            known[key] = _compiled(kernel, self.function, arguments)
        return known.get(key)


class _Compiled:
    """A compiled kernel's C launcher, all that it gets from call to call, and encoded descriptors.

    Args:
        start, head: The C launcher, and what it gets first.
        tail: How many constants follow the arguments.
        blocks: Which arguments are encoded, and what the compiler says of each.
    """

    def __init__(
        self,
        start: Callable[..., None],
        head: tuple[Any, ...],
        tail: int,
        blocks: Sequence[tuple[int, Any]],
    ) -> None:
        self.start = start
        self.head = head
        # the slots of constants, which a kernel has no parameters for
        self.tail = [None] * tail
        # from the last to the first, since each becomes several values
        self.blocks = [(index, meta, {}) for index, meta in reversed(blocks)]

    def repeat(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> Callable[..., bool]:
        """Make what launches this on a stream, with arguments that differ from these in nothing but addresses.

        It launches nothing and returns False if a tensor does not start at a multiple of 16 bytes.
        """
        blocks = sorted((index, encoded, meta) for index, meta, encoded in self.blocks)
        make = _repeater(tuple(map(type, arguments)), _VERSION)
        about = [(encoded, tuple(arguments[index].shape), meta) for index, encoded, meta in blocks]
        return make(self.start, (*grid, 1, 1)[:3], self.head, self.tail, _encode, *itertools.chain(*about))

    def launch(self, grid: tuple[int, ...], stream: int, values: list[Any]) -> None:
        """Launch; ``values`` are as a reader returns them."""
        for index, meta, encoded in self.blocks:
            block = values[index]
            key = block.address, tuple(block.shape)
            values[index : index + 1] = encoded.get(key) or _encode(encoded, key, block, meta)
        values += self.tail
        x, y, z = (*grid, 1, 1)[:3]
        if _VERSION == "3.6":
            self.start(x, y, z, stream, *self.head, *values)
        else:
            self.start(x, y, z, stream, *self.head, values)


def _encode(encoded: dict[Any, Any], key: Any, block: Blocks, meta: Any) -> Sequence[Any]:
    """Encode a block's descriptor, and keep it."""
    if len(encoded) >= _KEPT:
        encoded.clear()
    encoded[key] = found = nvidia.make_tensordesc_arg(block, meta)
    return found


def _is_aligned(part: Any) -> bool:
    return not isinstance(part, Tensor | Part) or part.data_ptr() & 15 == 0


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
    on_gpu = all(_is_on_gpu(part) for part in arguments if isinstance(part, Tensor | Part | Blocks))
    needs_scratch = run.global_scratch_size > 0 or run.profile_scratch_size > 0
    if not in_order or not on_gpu or needs_scratch:
        return None
    blocks = [index for index, part in enumerate(arguments) if isinstance(part, Blocks)]
    metas = kernel.metadata.tensordesc_meta if blocks else []  # pyright: ignore
    if len(metas or ()) != len(blocks) or None in metas:
        # descriptors that are not encoded but taken apart
        return None
    head = _HEADS[_VERSION](kernel, run)
    blocks = list(zip(blocks, metas, strict=True))
    return _Compiled(start, head, len(function.params) - count, blocks)


def _c_launcher(run: Any) -> Callable[..., None] | None:
    """Find what a compiled kernel is launched with; None if it is not where it was in the versions known."""
    if type(run) is not nvidia.CudaLauncher:
        return None
    start = run.launch
    if isinstance(start, types.FunctionType):
        # what encodes descriptors, around the launcher itself
        start = inspect.getclosurevars(start).nonlocals.get("launcher")
    return start if isinstance(start, types.BuiltinFunctionType) else None


def _is_on_gpu(part: Tensor | Part | Blocks) -> bool:
    part = part.whole if isinstance(part, Blocks) else part
    return (part.whole if isinstance(part, Part) else part).is_cuda
