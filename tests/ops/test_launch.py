"""The launcher, with a driver that only writes down what it is told to launch, beside Triton's plain path."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted functions have no launcher", allow_module_level=True)

import triton
import triton.compiler
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.compiler import CompiledKernel, LazyDict
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from gendistill_kernels.conv import causal
from gendistill_kernels.delta import chunk, decode
from gendistill_kernels.norm import gated
from gendistill_kernels.runtime import launch
from gendistill_kernels.runtime.launch import Blocks, Fixed, Launcher
from gendistill_kernels.runtime.memory import Part

if launch._VERSION not in launch._HEADS:
    pytest.skip("the launcher leaves this version of Triton alone", allow_module_level=True)


@triton.jit
def kernel(x, y, rows, columns, scale, N: tl.constexpr, KIND: tl.constexpr):
    pass


@triton.jit
def block_kernel(x, y, rows, N: tl.constexpr):
    pass


class Elsewhere(torch.Tensor):
    """Say that it is on the second GPU."""

    def get_device(self):
        return 1


def test_work_starts_on_the_gpu_where_its_first_argument_is(monkeypatch):
    entered = []

    @contextlib.contextmanager
    def device(number):
        entered.append(number)
        yield

    @launch.on_its_device
    def work(x, y=0):
        return y

    monkeypatch.setattr(torch.cuda, "device", device)
    here, there = torch.zeros(1), torch.zeros(1).as_subclass(Elsewhere)
    # a CPU build of torch has no current device to ask for
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("asked"))
    assert work(here, 5) == 5
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert work(there, y=6) == 6
    assert entered == []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # a tensor, the first of several, by position or by name
    assert [work(there, 1), work([there, here], 2), work((there,), y=3), work(y=4, x=there)] == [1, 2, 3, 4]
    assert entered == [1, 1, 1, 1]


@pytest.mark.parametrize(
    "function",
    [
        chunk.chunk_forward,
        chunk.chunk_backward_scan,
        chunk.chunk_backward_local,
        decode.decode_step,
        causal.conv_forward,
        causal.conv_backward,
        gated.gated_norm_forward,
        gated.gated_norm_backward,
    ],
)
def test_all_that_launches_starts_there(monkeypatch, function):
    def device(number):
        raise InterruptedError(number)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(InterruptedError):
        function(torch.zeros(1).as_subclass(Elsewhere))


class Driver:
    """Stand in for a GPU's driver."""

    def __init__(self):
        self.device, self.stream, self.encoded = 0, 7, 0
        encode = {"fill_tma_descriptor": self.encode, "fill_tma_descriptor_tiled": self.encode}
        self.utils = SimpleNamespace(**encode)

    def encode(self, *about):
        self.encoded += 1
        return about

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream + device


class Recorder:
    """Stand in for compiler and C launcher: whatever Triton compiles anew is a kernel with a number of its own."""

    def __init__(self):
        self.launches, self.plain, self.functions = [], 0, []

    def compile(self, source, target, options, **_):
        compiled = CompiledKernel.__new__(CompiledKernel)
        run = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
        blocks = [part for part in source.signature.values() if part.startswith("tensordesc")]
        meta = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [64, 64], "fp4_padded": False}
        metas = [meta | {"swizzle": number} for number, _ in enumerate(blocks)]
        run.launch = nvidia.wrap_handle_tensordesc(self.launch, source.signature, metas)
        run.num_ctas, run.launch_cooperative_grid, run.launch_pdl = 1, False, False
        run.global_scratch_size = run.profile_scratch_size = 0
        run.global_scratch_align = run.profile_scratch_align = 1
        run.arg_annotations, run.kernel_signature = ["annotations"], b"signature"
        self.functions.append(source.fn)
        compiled._run, compiled.module, compiled.function, compiled.src = (
            run,
            object(),
            len(self.functions),
            source,
        )
        compiled.name, compiled.packed_metadata = source.fn.__name__, (4, 1, 1024)
        compiled.metadata = SimpleNamespace(tensordesc_meta=metas)
        return compiled

    def launch(self, *given):
        # Triton 3.7 hands over the arguments as one
        head, values = (
            (given[:-1], given[-1]) if isinstance(given[-1], list | tuple) else (given[:13], given[13:])
        )
        # hooks without functions, and their metadata, are as good as none
        head = [part for part in head if not isinstance(part, knobs.HookChain | LazyDict | None)]
        constants = sum(parameter.is_constexpr for parameter in self.functions[head[4] - 1].params)
        places = [part.data_ptr() if isinstance(part, torch.Tensor) else part for part in values[:-constants]]
        self.launches.append((head, places, len(values)))


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(triton.compiler, "compile", recorder.compile)
    monkeypatch.setattr(launch, "_is_on_gpu", lambda part: True)
    monkeypatch.setattr(launch, "_c_launcher", lambda run: recorder.launch)
    monkeypatch.setattr(driver, "_active", Driver())
    run = JITFunction.run

    def counted(*arguments, **keywords):
        recorder.plain += 1
        return run(*arguments, **keywords)

    monkeypatch.setattr(JITFunction, "run", counted)
    for function in (kernel, block_kernel):
        function.device_caches.clear()
    return recorder


def call(target, *, grid=(3,), **changes):
    settings = {"rows": 5, "columns": 7, "scale": 0.5, "N": 4, "KIND": "a", "num_warps": 4, **changes}
    arguments = [settings.pop(name) for name in ("x", "y", "rows", "columns", "scale")]
    target[grid](*arguments, **settings)


STORE = torch.zeros(64)
X, Y = STORE[:16], STORE[32:48]
CASES = {
    "plain": {},
    "another dtype": {"x": STORE.bfloat16()},
    "not aligned": {"x": STORE[1:]},
    "both not aligned": {"x": STORE[1:], "y": STORE[2:]},
    "aligned elsewhere": {"x": STORE[4:]},
    "a parameter": {"x": torch.nn.Parameter(STORE)},
    "None": {"y": None},
    "both None": {"x": None, "y": None},
    "one": {"rows": 1},
    "one, the other": {"columns": 1},
    "divisible": {"rows": 32},
    "zero": {"rows": 0},
    "negative": {"rows": -3},
    "17, which is one and 16": {"rows": 17},
    "the largest of 32 bits": {"rows": 2**31 - 1},
    "the smallest of 32 bits": {"rows": -(2**31)},
    "64 bits": {"rows": 2**31 + 1},
    "64 bits, divisible": {"rows": 2**31},
    "unsigned": {"rows": 2**63 + 1},
    "true": {"rows": True},
    "false": {"rows": False},
    "a float": {"rows": 1.0},
    "an int for a float": {"scale": 2},
    "another float": {"scale": 0.25},
    "a constant": {"N": 8},
    "another constant": {"KIND": "b"},
    "an option": {"num_warps": 8},
    "one more option": {"num_stages": 32},
    "its value for another one": {"maxnreg": 32},
    "three axes": {"grid": (2, 3, 4)},
    "nothing to do": {"grid": (0, 1)},
}


def test_every_launch_is_the_one_that_triton_makes(recorder):
    launcher = Launcher(kernel)
    rounds = []
    for target in (launcher, launcher, kernel):
        start, before = len(recorder.launches), recorder.plain
        for changes in CASES.values():
            call(target, **{"x": X, "y": Y, **changes})
        rounds.append((recorder.launches[start:], recorder.plain - before))
    (first, _), (second, plain), (expected, _) = rounds
    assert plain == 0, "launches of known combinations took the plain path"
    assert len(expected) == len(CASES)
    # and Triton compiled enough that mixing two up would be seen
    assert len({head[4] for head, *_ in expected}) == 20
    for name, *found, wanted in zip(CASES, first, second, expected, strict=True):
        assert found == [wanted, wanted], name


FIXED = ("plain", "a parameter", "None", "one", "64 bits", "a constant", "an option", "three axes")


@pytest.mark.parametrize("name", FIXED)
def test_a_fixed_launch_is_the_one_that_triton_makes(recorder, name):
    settings = {"rows": 5, "columns": 7, "scale": 0.5, "N": 4, "KIND": "a", "num_warps": 4, **CASES[name]}
    x, y, grid = settings.pop("x", X), settings.pop("y", Y), settings.pop("grid", (3,))
    numbers = [settings.pop(key) for key in ("rows", "columns", "scale")]
    fixed, launcher = Fixed(grid, **settings), Launcher(kernel)
    pairs = [(x, y), (x, y), (STORE[8:], y), (STORE[1:], y), (x, y)]

    def launch_all(launch):
        start, before = len(recorder.launches), recorder.plain
        for pair in pairs:
            launch(*(type(x)(pair[0]) if type(x) is torch.nn.Parameter else pair[0], pair[1]), *numbers)
        return recorder.launches[start:], recorder.plain - before

    found, plain = launch_all(lambda *arguments: launcher[fixed](*arguments))
    expected, _ = launch_all(lambda *arguments: kernel[grid](*arguments, **settings))
    # what is not aligned is another kernel
    assert len({head[4] for head, *_ in expected}) == 2
    assert plain == 2
    assert found == expected
    # nothing but addresses is read any more
    launcher._known.clear()
    assert launch_all(lambda *arguments: launcher[fixed](*arguments)) == (expected, 1)


def test_a_fixed_launch_goes_to_the_current_device_and_stream(recorder):
    launcher, fixed, seen = Launcher(kernel), Fixed((3,), N=4, KIND="a", num_warps=4), []
    for device, stream in ((0, 7), (1, 7), (0, 9), (1, 7)):
        driver.active.device, driver.active.stream = device, stream
        launcher[fixed](X, Y, 5, 7, 0.5)
        head = recorder.launches[-1][0]
        seen.append((head[3], head[4]))
    assert seen == [(7, 1), (8, 2), (9, 1), (8, 2)]
    assert recorder.plain == 2


def test_blocks_and_pointers_may_be_parts_of_memory(recorder):
    launcher, fixed = Launcher(block_kernel), Fixed((1,), N=1)
    plain_launcher, plain_fixed = Launcher(kernel), Fixed((3,), N=4, KIND="a", num_warps=4)
    memory, other = torch.zeros(3 * 16384, dtype=torch.uint8), torch.zeros(64, 64, dtype=torch.float16)
    parts = [
        Part(memory, memory.data_ptr(), 16384 * number, (2, 64, 64), torch.float16) for number in range(3)
    ]

    def launch_all(launch):
        start = len(recorder.launches)
        for number in (0, 1, 2, 1):
            launch(parts[number])
        return recorder.launches[start:]

    def plain(part):
        block_kernel[(1,)](_described(part.tensor, (64, 64)), _described(other, (64, 64)), 3, N=1)
        kernel[(3,)](part.tensor, None, 5, 7, 0.5, N=4, KIND="a", num_warps=4)

    def repeated(part):
        launcher[fixed](Blocks(part, (64, 64)), Blocks(other, (64, 64)), 3)
        plain_launcher[plain_fixed](part, None, 5, 7, 0.5)

    def known(part):
        launcher[(1,)](Blocks(part, (64, 64)), Blocks(other, (64, 64)), 3, N=1)
        plain_launcher[(3,)](part, None, 5, 7, 0.5, N=4, KIND="a", num_warps=4)

    expected = launch_all(plain)
    assert launch_all(repeated) == launch_all(known) == launch_all(repeated) == expected
    encoded, before = driver.active.encoded, recorder.plain
    assert launch_all(repeated) == launch_all(known) == expected
    assert (driver.active.encoded, recorder.plain) == (encoded, before)


def test_devices_and_streams_are_told_apart(recorder):
    launcher = Launcher(kernel)
    seen = []
    for device, stream in ((0, 7), (1, 7), (0, 9), (1, 7)):
        driver.active.device, driver.active.stream = device, stream
        call(launcher, x=X, y=Y)
        head = recorder.launches[-1][0]
        seen.append((head[3], head[4]))
    assert seen == [(7, 1), (8, 2), (9, 1), (8, 2)]
    assert recorder.plain == 2


def test_blocks_are_encoded_once_for_every_place(recorder):
    launcher = Launcher(block_kernel)
    first = torch.zeros(2, 64, 64, dtype=torch.float16)
    cases = [
        (first, (64, 64)),
        (torch.zeros_like(first), (64, 64)),
        (first.bfloat16(), (64, 64)),
        # these begin at one address
        (first[:1], (64, 64)),
        (first[:1], (64, 32)),
        (first[:1, :32].view(64, 32), (64, 32)),
    ]

    def launch_all(target, make):
        start = len(recorder.launches)
        for one, other in itertools.product(cases, cases):
            target[(1,)](make(*one), make(*other), 3, N=1)
        return recorder.launches[start:]

    expected = launch_all(block_kernel, _described)
    launch_all(launcher, Blocks)
    launch_all(launcher, Blocks)
    before, plain = driver.active.encoded, recorder.plain
    assert launch_all(launcher, Blocks) == expected
    assert (driver.active.encoded, recorder.plain) == (before, plain)


def _described(part, block_shape):
    width = part.shape[-1]
    return TensorDescriptor(part, [part.numel() // width, width], [width, 1], [*block_shape])


def test_encoded_blocks_do_not_pile_up(recorder, monkeypatch):
    monkeypatch.setattr(launch, "_KEPT", 3)
    launcher = Launcher(block_kernel)
    store = torch.zeros(20, 64, 64, dtype=torch.float16)
    for part in store:
        launcher[(1,)](Blocks(part, (64, 64)), Blocks(store[0], (64, 64)), 3, N=1)
    ((_, known),) = launcher._known.values()
    (compiled,) = known.values()
    assert max(len(places) for *_, places in compiled.blocks) <= 3


def test_a_tensor_of_the_host_never_becomes_a_bare_address(recorder, monkeypatch):
    monkeypatch.setattr(launch, "_is_on_gpu", lambda part: part is not X)
    launcher = Launcher(kernel)
    for _ in range(3):
        call(launcher, x=X, y=Y)
    assert recorder.plain == 3


def test_the_switch_leaves_every_launch_to_triton(recorder, monkeypatch):
    """And so changes nothing about any of them, ours or its own."""
    pairs = [(X, Y), (STORE[8:], Y), (STORE[1:], Y), (X, Y)]
    rounds = []
    for is_plain in (False, True):
        monkeypatch.setattr(launch, "_PLAIN", is_plain)
        launcher, fixed = Launcher(kernel), Fixed((3,), N=4, KIND="a", num_warps=4)
        start, before = len(recorder.launches), recorder.plain
        for changes in CASES.values():
            call(launcher, **{"x": X, "y": Y, **changes})
        for pair in pairs:
            launcher[fixed](*pair, 5, 7, 0.5)
        rounds.append((recorder.launches[start:], recorder.plain - before))
    (ours, some), (theirs, every) = rounds
    assert ours == theirs
    assert every == len(theirs) == len(CASES) + len(pairs)
    assert some < every


def test_the_switch_is_read_from_the_environment():
    code = "from gendistill_kernels.runtime import launch; print(launch.why_plain())"
    for value, expected in (("1", "GENDISTILL_PLAIN_LAUNCH=1 is set"), ("0", "None")):
        environment = {**os.environ, launch.SWITCH: value}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_every_launch(recorder, hook, is_fixed):
    launcher, seen, fixed = Launcher(kernel), [], Fixed((3,), N=4, KIND="a", num_warps=4)

    def launch():
        if is_fixed:
            launcher[fixed](X, Y, 5, 7, 0.5)
        else:
            call(launcher, x=X, y=Y)

    launch()
    chain = getattr(knobs.runtime, hook)
    chain.add(seen.append)
    try:
        launch()
    finally:
        chain.remove(seen.append)
    assert recorder.plain == 2
    launch()
    assert recorder.plain == 2


def test_other_ways_to_call_are_plain_ones(recorder):
    launcher = Launcher(kernel)
    for _ in range(2):
        launcher[(3,)](X, Y, 5, 7, scale=0.5, N=4, KIND="a")
        launcher[(3,)](X, Y, 5, 7, 0.5, 4, KIND="a")
        launcher[lambda _: (3,)](X, Y, 5, 7, 0.5, N=4, KIND="a")
        launcher[(3,)](triton.reinterpret(X, tl.int32), Y, 5, 7, 0.5, N=4, KIND="a")
    assert recorder.plain == 8
    # the same kernel with the same arguments, but for the one reinterpreted
    assert recorder.launches[0] == recorder.launches[1] == recorder.launches[2]


def test_another_version_of_triton_is_left_alone(recorder, monkeypatch):
    monkeypatch.setattr(launch, "_VERSION", "9.9")
    launch._warn.cache_clear()
    launcher = Launcher(kernel)
    with pytest.warns(RuntimeWarning, match=f"triton {triton.__version__} is not one of"):
        call(launcher, x=X, y=Y)
    call(launcher, x=X, y=Y)
    launcher[Fixed((3,), N=4, KIND="a", num_warps=4)](X, Y, 5, 7, 0.5)
    assert recorder.plain == 3
    assert recorder.launches[0] == recorder.launches[2]


def test_the_c_launcher_is_found_only_where_it_is_known_to_be():
    run = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    run.launch = print
    assert launch._c_launcher(run) is print
    run.launch = nvidia.wrap_handle_tensordesc(print, {0: "tensordesc<fp16[64, 64]>"}, [{}])
    assert launch._c_launcher(run) is print
    run.launch = lambda *_: print()
    assert launch._c_launcher(run) is None
    assert launch._c_launcher(SimpleNamespace(launch=print)) is None
