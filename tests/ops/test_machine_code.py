"""The kernels' machine code for a Hopper GPU, compiled here: every product must know where its operands are."""

from __future__ import annotations

import collections
import itertools
import os
import re

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from gendistill.ops import Segments
from gendistill_kernels.block import attention, norm
from gendistill_kernels.block.layout import Tiles
from gendistill_kernels.delta import chunk, decode
from gendistill_kernels.delta.layout import Chunks, InferenceChunks
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Inputs, Rule
from gendistill_kernels.paged import decode as paged_decode
from gendistill_kernels.paged import prefill, store
from gendistill_kernels.runtime.hardware import SHARED_BYTES
from gendistill_kernels.thin import product as thin

LAUNCHERS = ("_prepare", "_prepare_levels", "_keys", "_keys_levels", "_values")
# what a pipelined loop reads lies at a place that turns with the loop
TURNING = 4
CASES = {
    "16 heads of 128": (Rule("bounded"), {}),
    "softplus": (Rule("softplus"), {"H": 32}),
    "given gates": (Rule("none", sigmoid=False), {}),
    "3 of 9 heads of 64": (Rule("bounded"), {"H": 9, "kv": 3, "K": 64, "V": 64}),
    "2 of 14 heads of 64, softplus": (Rule("softplus"), {"H": 14, "kv": 2, "K": 64, "V": 64}),
    "96 channels": (Rule("bounded"), {"H": 4, "K": 96, "V": 96}),
    "256 channels": (Rule("bounded"), {"H": 8, "K": 256, "V": 256}),
    "float16": (Rule("bounded"), {"dtype": torch.float16}),
    "packed": (Rule("bounded"), {"B": 1, "lengths": [5, 0, 123]}),
}
# the other cases of the family; those that have a name at more geometries
FAMILY = [*itertools.product(("channel", "scalar"), ("none", "scalar", "channel"), ("scalar", "channel"))]
FAMILY.remove(("channel", "scalar", "scalar"))
for decay, erase, write in FAMILY:
    rule = Rule("softplus", erase=erase, write=write)
    CASES[f"{decay}, {erase}, {write}"] = rule, {"decay": decay}
NAMED = {"GDN": FAMILY[7], "GDN-2": FAMILY[4], "gated linear attention": FAMILY[0]}
for name, (decay, erase, write) in NAMED.items():
    rule = Rule("softplus", erase=erase, write=write)
    CASES[f"{name}, 2 of 14 heads of 64"] = rule, {"decay": decay, "H": 14, "kv": 2, "K": 64, "V": 64}
    rule = Rule("none", norm=False, sigmoid=False, erase=erase, write=write)
    CASES[f"{name}, given gates, float16"] = rule, {"decay": decay, "dtype": torch.float16}


class Recorder:
    """Stand in for a launcher; keeps what would be launched."""

    def __init__(self, function, calls):
        self.function, self.calls = function, calls

    def __getitem__(self, fixed):
        return lambda *arguments: self.calls.append((self.function, arguments, {**fixed.constants}))


def launches(
    monkeypatch,
    rule,
    *,
    B=2,
    H=16,
    kv=None,
    K=128,
    V=128,
    dtype=torch.bfloat16,
    lengths=None,
    decay="channel",
):
    """Return the launches of a forward and a backward pass."""
    calls = []
    for name in (
        "_prepare",
        "_prepare_levels",
        "_scan",
        "_carry",
        "_sum_heads",
        "_sum_chunks",
        "_reverse_scan",
        "_values",
        "_keys",
        "_keys_levels",
    ):
        monkeypatch.setattr(chunk, name, Recorder(getattr(chunk, name).function, calls))
    T = 128

    def make(heads, channels):
        return torch.zeros(B, T, heads, channels, dtype=dtype)

    per_head = torch.zeros(B, T, H, dtype=dtype)
    x = Inputs(
        make(H, K),
        make(kv or H, K),
        make(kv or H, V),
        make(H, K) if decay == "channel" else per_head,
        per_head if "scalar" in (rule.erase, rule.write) else None,
        erase=make(H, K) if rule.erase == "channel" else None,
        write=make(H, V) if rule.write == "channel" else None,
    )
    if rule.gate != "none":
        x = x._replace(A_log=torch.zeros(H), dt_bias=torch.zeros(H * K if decay == "channel" else H))
    chunks = None if lengths is None else Chunks.of(lengths, "cpu")
    out, _, saved = chunk.chunk_forward(x, rule, chunks=chunks, save=True)
    chunk.chunk_backward(torch.zeros_like(out), None, x, rule, out, saved, chunks=chunks)
    wanted = {getattr(chunk, name).function for name in LAUNCHERS}
    return [call for call in calls if call[0] in wanted]


@pytest.mark.parametrize("name", CASES)
def test_every_product_reads_its_own_operands(machine_code, monkeypatch, name):
    rule, sizes = CASES[name]
    found = launches(monkeypatch, rule, **sizes)
    # one decay per head has no chunks out of range
    assert len(found) == len(LAUNCHERS) - (2 if sizes.get("decay") == "scalar" else 0)
    for function, arguments, settings in found:
        options = {key: settings.pop(key) for key in machine_code.OPTIONS if key in settings}
        sass, shared = machine_code.listing(function, arguments, settings, options)
        # Triton makes a bfloat16 constant too small for float16 a zero
        assert not re.search(r"H(MUL|FMA)2\S* [^;]*\bRZ\.H0_H0", sass), function.__name__
        assert shared <= SHARED_BYTES["sm_90"]
        products = machine_code.products(sass)
        assert products
        # a block starts with 1 KiB of the system's
        inside = {None, -1, *range(1024, 1024 + shared)}
        assert all(product.left in inside and product.right in inside for product in products), (
            function.__name__
        )
        lost = [product for product in products if None in product[1:]]
        assert len(lost) <= (TURNING if settings.get("BY_LEVEL") else 0), (function.__name__, lost)
        assert all(product.right is not None for product in lost)


def test_a_register_that_nothing_wrote_is_seen(machine_code):
    sass = """
        /*0000*/                   S2UR UR5, SR_CgaCtaId ;
        /*0010*/                   UMOV UR4, 0x400 ;
        /*0020*/                   ULEA UR4, UR5, UR4, 0x18 ;
        /*0030*/                   USHF.R.U32.HI UR4, URZ, 0x4, UR4 ;
        /*0040*/                   USGXT.U32 UR8, UR4, 0xe ;
        /*0050*/                   UMOV UR9, 0x40000040 ;
        /*0060*/                   UIADD3 UR10, UP1, UR8, 0x40, URZ ;
        /*0070*/                   UIADD3.X UR11, URZ, -0x7fffffe0, URZ, UP1, !UPT ;
        /*0080*/                   HGMMA.64x32x16.F32 R24, gdesc[UR8].tnspB, RZ, !UPT ;
        /*0090*/                   UIADD3 UR10, UP1, UR20, 0x40, URZ ;
        /*00a0*/                   HGMMA.64x32x16.F32 R24, gdesc[UR8].tnspB, R24 ;
"""
    assert [product[1:] for product in machine_code.products(sass)] == [(0x400, 0x800), (0x400, None)]


def test_a_state_of_16_bits_is_carried(machine_code, monkeypatch):
    """Over the spans of a long sequence; the interpreter does not mind what the compiler refuses."""
    K = 64
    monkeypatch.setattr("gendistill_kernels.delta.layout.SPAN", 1)
    tall = torch.zeros(1, 128, 1, K, dtype=torch.bfloat16)
    x = Inputs(tall, tall, tall, tall, tall[..., 0])
    state = torch.zeros(1, 1, K, K, dtype=torch.bfloat16)
    for save in (False, True):
        for function, arguments, settings in span_launches(monkeypatch, x, state=state, save=save):
            options = {key: settings.pop(key) for key in machine_code.OPTIONS if key in settings}
            machine_code.build(function, arguments, settings, options)


def span_launches(monkeypatch, x, **keywords):
    """Return the launches of a forward pass over spans: what these do, what is carried, what comes out."""
    calls = []
    with monkeypatch.context() as patch:
        for name in ("_prepare", "_prepare_levels"):
            patch.setattr(chunk, name, Recorder(None, []))
        for name in ("_scan", "_carry"):
            patch.setattr(chunk, name, Recorder(getattr(chunk, name).function, calls))
        chunk.chunk_forward(x, Rule("none"), **keywords)
    assert [function.__name__ for function, *_ in calls] == ["scan_kernel", "carry_kernel", "scan_kernel"]
    return calls


@pytest.mark.parametrize(("H", "kv", "K"), [(16, 8, 128), (14, 2, 64)])
def test_spans_of_a_prompt_fit_a_processor(machine_code, monkeypatch, H, kv, K):
    """As the engine reads one: packed, with room, from a state or none; values may be part of wider tokens."""
    lengths = [4096, 0, 0, 0]
    table = Segments(lengths, room=68).table(InferenceChunks.of)
    q, k = (torch.zeros(1, 4096, heads, K, dtype=torch.bfloat16) for heads in (H, kv))
    x = Inputs(q, k, k, q, q[..., 0].contiguous())
    for state in (torch.zeros(4, H, K, K), None):
        for function, arguments, settings in span_launches(monkeypatch, x, state=state, chunks=table):
            options = {key: settings.pop(key) for key in machine_code.OPTIONS if key in settings}
            used = machine_code.usage(machine_code.build(function, arguments, settings, options))
            assert used.shared <= SHARED_BYTES["sm_90"]
            # nothing but a few numbers of a thread that do not fit into its registers
            assert used.stack <= 16, function.__name__


def decode_steps(machine_code, monkeypatch, N, H, KV, K, lives=None):
    """Record the launches of a step with everything in it, as a GPU that lets kernels overlap would get them."""
    calls = {}
    for name in ("_convolution", "_decode"):
        monkeypatch.setattr(
            decode, name, Recorder(getattr(decode, name).function, calls.setdefault(name, []))
        )
    C, bf16 = (H + 2 * KV) * K, torch.bfloat16
    qkv, decay, beta, gate = (
        torch.zeros(N, 1, *sizes, dtype=bf16) for sizes in ((C,), (H, K), (H,), (H * K,))
    )
    history = Convolution(torch.zeros(C, 4, dtype=bf16), torch.zeros(N, C, 3, dtype=bf16), None, "silu")
    gates = {"A_log": torch.zeros(H), "dt_bias": torch.zeros(H * K)}
    decode.decode_step(
        qkv, decay, beta, torch.zeros(N, H, K, K), rule=Rule("bounded"), heads=Heads(H, KV, KV), convolution=history,
        finish=Finish(torch.zeros(K, dtype=bf16), 1e-6, gate), lives=lives, **gates,
    )  # fmt: skip
    found = {}
    for name, launches in calls.items():
        for function, arguments, settings in launches:
            assert not settings["OVERLAP"], "there is no GPU here"
            settings["OVERLAP"] = settings["launch_pdl"] = True
            options = {
                key: settings.pop(key) for key in machine_code.OPTIONS if settings.get(key) is not None
            }
            settings.pop("maxnreg", None)
            found[name] = machine_code.build(function, arguments, settings, options)
    return found


def memory_and_waits(sass):
    """List what touches global memory, and waiting for the kernel before and letting the next one start."""
    names = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9.]+)", sass, re.MULTILINE)
    kinds = ("LDG", "STG", "LD", "ST", "ATOMG", "RED", "ACQBULK", "PREEXIT")
    return [name for name in names if name.split(".")[0] in kinds]


@pytest.mark.parametrize("lives", [None, torch.ones(1, dtype=torch.bool)])
@pytest.mark.parametrize("KV", [4, 2])
def test_an_overlapping_step_waits_before_it_touches_memory(machine_code, monkeypatch, KV, lives):
    """But for which rows live, and states, which the second of two launches reads from the second cache alone."""
    kernels = decode_steps(machine_code, monkeypatch, 1, 4, KV, 64, lives)
    assert [*kernels] == (["_decode"] if KV == 4 else ["_convolution", "_decode"])
    for name, kernel in kernels.items():
        found = memory_and_waits(machine_code.code(kernel))
        wait = found.index("ACQBULK")
        assert "PREEXIT" in found[wait:]
        if name == "_decode" and KV == 2:
            first = [] if lives is None else ["LDG.E.U8.STRONG.GPU"]
            assert found[:wait] == first + ["LDG.E.128.STRONG.GPU"] * 16
        else:
            assert wait == 0
        if name == "_decode" and lives is not None:
            # nothing is loaded before it; a row without a sequence stores zeros, and where it has not waited it waits
            assert next(part for part in found if part.startswith("LDG")).startswith("LDG.E.U8")
            waits = [found[at + 1 : at + 3] for at, part in enumerate(found) if part == "ACQBULK"]
            assert len(waits) == (2 if KV == 2 else 1)
            assert (["PREEXIT", "STG.E.U16"] in waits) == (KV == 2)


@pytest.mark.parametrize(("H", "KV", "K"), [(14, 2, 64), (9, 3, 64), (16, 8, 128), (16, 16, 128)])
@pytest.mark.parametrize("N", [1, 512])
@pytest.mark.parametrize("told", [False, True])
def test_a_step_asks_for_all_it_reads_before_it_waits(machine_code, monkeypatch, N, H, KV, K, told):
    lives = torch.ones(N, dtype=torch.bool) if told else None
    for name, kernel in decode_steps(machine_code, monkeypatch, N, H, KV, K, lives).items():
        code, skips = machine_code.code(kernel), told and name == "_decode"
        assert machine_code.late_loads(code, skips=skips) == 0, name
        # nothing of a state that matters is spilled
        assert machine_code.usage(kernel).stack <= 32


@pytest.mark.parametrize(("H", "KV", "D"), [(16, 8, 128), (14, 2, 64), (8, 4, 256)])
@pytest.mark.parametrize("window", [None, 300])
def test_attention_fits_into_shared_memory(machine_code, monkeypatch, H, KV, D, window):
    calls = []
    for name in ("_forward", "_queries", "_keys"):
        kernel = getattr(attention, name).function
        # a grid, and a launch with constants by name
        stand_in = collections.defaultdict(
            lambda kernel=kernel: lambda *arguments, **settings: calls.append((kernel, arguments, settings))
        )
        monkeypatch.setattr(attention, name, stand_in)
    q, k = (torch.zeros(512, heads, D, dtype=torch.bfloat16) for heads in (H, KV))
    tiles = Tiles.of([500, 12], "cpu")
    out, lse = attention.attend_forward(q, k, k, tiles, window=window)
    attention.attend_backward(torch.zeros_like(q), q, k, k, out, lse, tiles, window=window)
    assert len(calls) == 3
    for kernel, arguments, settings in calls:
        options = {key: settings.pop(key) for key in machine_code.OPTIONS if key in settings}
        taken = machine_code.usage(machine_code.build(kernel, arguments, settings, options))
        assert taken.shared <= SHARED_BYTES["sm_90"]
        # gradients of a tile of keys do not all stay in registers
        assert taken.stack < 512


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("H", "KV", "D"), [(16, 8, 128), (14, 2, 64), (8, 4, 256)])
@pytest.mark.parametrize("window", [None, 300])
def test_paged_attention_fits_into_shared_memory(machine_code, monkeypatch, H, KV, D, window, dtype):
    calls = []
    for module, name in (
        (store, "_store"),
        (prefill, "_prefill"),
        (paged_decode, "_decode"),
        (paged_decode, "_join"),
    ):
        kernel = getattr(module, name).function
        stand_in = collections.defaultdict(
            lambda kernel=kernel: lambda *arguments, **settings: calls.append((kernel, arguments, settings))
        )
        monkeypatch.setattr(module, name, stand_in)
    rows, angles, weight = 4, torch.zeros(4, D), torch.zeros(D, dtype=dtype)
    qkv, q = torch.zeros(rows, (H + 2 * KV) * D, dtype=dtype), torch.zeros(rows, H, D, dtype=dtype)
    memory = [torch.zeros(2, 64, KV, D, dtype=dtype) for _ in range(2)]
    table, lengths = torch.zeros(rows, 64, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    starts, cells = torch.zeros(rows + 1, dtype=torch.int32), torch.zeros(rows, dtype=torch.int64)
    store.turn_and_store(qkv, weight, weight, angles, angles, *memory, cells, num_heads=H, eps=1e-6)
    prefill.prefill(q, *memory, table, lengths, starts, window=window)
    paged_decode.decode(q, *memory, table, lengths, window=window)
    assert len(calls) == 4
    for kernel, arguments, settings in calls:
        options = {key: settings.pop(key) for key in machine_code.OPTIONS if key in settings}
        taken = machine_code.usage(machine_code.build(kernel, arguments, settings, options))
        assert taken.shared <= SHARED_BYTES["sm_90"]
        # a sum of values stays in registers
        assert taken.stack < 128
        if kernel is paged_decode.decode_kernel and dtype == torch.bfloat16 and D <= 128:
            # what is under way hides memory's latency: several programs of a processor, two tiles each
            assert taken.shared >= 2 * 2 * 64 * D * 2
            assert 3 * (taken.shared + 1024) <= SHARED_BYTES["sm_90"]
            assert 3 * taken.registers * 128 <= 65536


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
def test_products_of_few_rows_read_weights_ahead_and_as_wide_as_they_can(
    machine_code, monkeypatch, rows, stream
):
    calls, bf16 = [], torch.bfloat16
    monkeypatch.setattr(thin, "can_overlap", lambda device: True)
    kernel = thin._product.function
    stand_in = collections.defaultdict(
        lambda: lambda *arguments, **settings: calls.append((arguments, settings))
    )
    monkeypatch.setattr(thin, "_product", stand_in)
    x, wide = torch.zeros(rows, 1024, dtype=stream), torch.zeros(rows, 3072, dtype=bf16)
    gate_up, down, gain = (
        torch.zeros(*sizes, dtype=dtype)
        for sizes, dtype in (((6144, 1024), bf16), ((1024, 3072), bf16), ((1024,), stream))
    )
    thin.gated_of_sum(x, x.bfloat16(), gain, gate_up, eps=1e-6)
    thin.product(wide, down, added=x, out=x)
    for number, (arguments, settings) in enumerate(calls):
        options = {key: settings.pop(key) for key in machine_code.OPTIONS if key in settings}
        built = machine_code.build(kernel, arguments, settings, options)
        taken = machine_code.usage(built)
        assert taken.stack < 64
        assert taken.shared <= SHARED_BYTES["sm_90"] // 2
        names = re.findall(r"\b(LDG\.\S+|PREEXIT|ACQBULK|STG\.\S+|BAR\.SYNC\S*)", machine_code.code(built))
        ahead = names[: names.index("ACQBULK")]
        # nothing is written, nor a tile of x read, before the kernel before has ended
        assert not [name for name in ahead if name.startswith("STG")]
        loads = [name for name in ahead if name.startswith("LDG.E.EF")]
        # of a program, 8 gates and 8 values, or 8 rows: four tiles of the former, all that are asked for of the latter
        assert len(loads) == (16, 24)[number]
        assert all(name == "LDG.E.EF.128" for name in loads)
        # threads meet once, to hand over what they store
        assert sum(name.startswith("BAR") for name in names) <= 1


@pytest.mark.parametrize("rows", [4, 5])
def test_the_norm_of_few_rows_starts_early_and_waits_before_it_touches_memory(
    machine_code, monkeypatch, rows
):
    calls = []
    monkeypatch.setattr(norm, "can_overlap", lambda device: True)
    kernel = norm._forward.function
    stand_in = collections.defaultdict(
        lambda: lambda *arguments, **settings: calls.append((arguments, settings))
    )
    monkeypatch.setattr(norm, "_forward", stand_in)
    x = torch.zeros(rows, 1024, dtype=torch.bfloat16)
    norm.rms_norm_forward(x, x, torch.zeros(1024), eps=1e-6, dtype=torch.bfloat16)
    ((arguments, settings),) = calls
    options = {key: settings.pop(key) for key in machine_code.OPTIONS if key in settings}
    found = memory_and_waits(machine_code.code(machine_code.build(kernel, arguments, settings, options)))
    early = found[:2] == ["PREEXIT", "ACQBULK"]
    assert early == settings["OVERLAP"] == options["launch_pdl"] == (rows == 4)
    assert {"LDG", "STG"} == {name.split(".")[0] for name in found[2 if early else 0 :]}
