"""The table of launch configurations: what it says, whom it refuses, and that every entry of it fits."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from gendistill.bench.launches import PLACES, TABLES, table_of, watch
from gendistill_kernels.delta.chunk import chunk_forward
from gendistill_kernels.delta.rows import TABLE
from gendistill_kernels.delta.rule import Inputs, Rule
from gendistill_kernels.runtime import hardware
from gendistill_kernels.runtime.hardware import SHARED_BYTES
from gendistill_kernels.runtime.lookup import Config, Row, forced

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAPABILITIES = {"sm_90": 90, "sm_80": 80, "any": 86}
SIZES = (16, 32, 64, 128, 256)
ENTRIES = [
    pytest.param(where, row, id=f"{where}-{row.kernel}-{number}")
    for table in TABLES
    for where, rows in table.rows.items()
    for number, row in enumerate(rows)
]
# What compiles within seconds. The rows of prepare, keys and values on sm_90 are held against its limit in
# test_machine_code.py, those of other architectures by the slow test; all that the running architecture has are
# launched by test_gpu_configs.py.
QUICK = {
    "sm_90": (
        "scan", "summary", "carry", "reverse_scan", "reverse_summary", "norm_forward", "decode", "decode_convolution",
        "divergence", "divergence_mixture", "tail_sum", "tail_gradient", "paged_store", "paged_prefill",
        "paged_decode", "paged_join", "thin_product",
    ),
    "sm_80": ("reverse_scan",),
    "any": ("reverse_scan",),
}  # fmt: skip


@pytest.mark.parametrize(("where", "row"), ENTRIES)
def test_every_entry_is_well_formed_and_reached(where, row):
    assert row.kernel in table_of(row.kernel).kernels
    assert row.kernel in PLACES
    assert row.config.block & (row.config.block - 1) == 0
    assert row.config.warps in (1, 2, 4, 8)
    # of registers 64 Ki on a processor
    assert row.config.warps * 32 * (row.config.registers or 255) <= 65536
    if row.kernel in TABLE.kernels:
        key = min(row.keys, 256), min(row.values, 256), row.size, bool(row.many), bool(row.save)
    else:
        key = (row.size,)
    assert table_of(row.kernel).find(where, row.kernel, *key) == row
    assert row.narrowed(row.config, *key).covers(*key)


@pytest.mark.parametrize("where", TABLE.rows)
def test_kernels_that_share_workspaces_agree(where):
    for keys, values, size in itertools.product(SIZES, SIZES, (2, 4)):
        sizes = keys, values, size, False, True

        def found(kernel, sizes=sizes):
            return TABLE.find(where, kernel, *sizes).config

        try:
            found("prepare"), found("prepare_levels")
            block = found("keys").block
        except ValueError:
            continue
        # what is saved for the backward pass gets one
        assert found("keys_levels").block == block
        for kernel in (
            "scan",
            "values",
            "reverse_scan",
            *(("reverse_summary", "carry") if keys <= 128 else ()),
        ):
            found(kernel)


def draw(K, V, dtype):
    parts = [torch.zeros(1, 64, 1, channels, dtype=dtype) for channels in (K, K, V, K)]
    return Inputs(*parts, torch.zeros(1, 64, 1, dtype=dtype))


@pytest.mark.parametrize(
    ("K", "V", "dtype", "save", "message"),
    [
        (512, 64, torch.bfloat16, False, r"512 key .*up to 256 key"),
        (64, 512, torch.bfloat16, False, r"512 value .*up to 256 value"),
        (
            256,
            256,
            torch.float32,
            True,
            r"scan .*256 value channels of 4 bytes with a backward.*sm_90.*128 value",
        ),
    ],
)
def test_what_fits_nowhere_is_refused_before_anything_is_launched(K, V, dtype, save, message):
    with watch("prepare", run=False) as launches, pytest.raises(ValueError, match=message):
        chunk_forward(draw(K, V, dtype), Rule("none"), save=save)
    assert not launches


def test_float32_keys_of_256_channels_are_accepted():
    with watch("scan", run=False) as launches:
        chunk_forward(draw(256, 128, torch.float32), Rule("none"), save=True)
        chunk_forward(draw(256, 256, torch.float32), Rule("none"))
    assert len(launches) == 2


def test_a_forced_configuration_is_taken_and_forgotten():
    device, mine = torch.device("cpu"), Config(32, 2)
    usual = TABLE.lookup(device, "scan", 128, 128)
    with forced("scan", mine):
        assert TABLE.lookup(device, "scan", 128, 128) == mine
        assert TABLE.lookup(device, "scan", 64, 16, 4) == mine
        with forced("keys", mine):
            assert TABLE.lookup(device, "keys", 128, 128) == TABLE.lookup(device, "scan", 128, 128) == mine
        assert TABLE.lookup(device, "keys", 128, 128) != mine
    assert TABLE.lookup(device, "scan", 128, 128) == usual


def test_another_architecture_reads_its_own_rows(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, device.index))
    found = [hardware.architecture(torch.device("cuda", minor)) for minor in (0, 6, 7, 9)]
    hardware.architecture.cache_clear()
    assert found == ["sm_80", "any", "sm_80", "any"]


def fits(machine_code, cases, config_cases, where, row: Row):
    """Compile the launches of an entry for its architecture, and hold them against its limits."""
    for save in config_cases.saves(row):
        # recorded on a CPU, which allows what sm_90 does
        with forced(row.kernel, row.config), watch(row.kernel, run=False) as found:
            config_cases.make(cases, row, save=save)[0]()
        launch = found[-1]
        settings = dict(launch.settings)
        options = {name: settings.pop(name) for name in machine_code.OPTIONS if name in settings}
        assert options["num_warps"] <= row.config.warps
        function, capability = launch.launcher.function, CAPABILITIES[where]
        kernel = machine_code.build(function, launch.arguments, settings, options, capability)
        used = machine_code.usage(kernel)
        assert used.shared <= SHARED_BYTES[where]
        assert used.registers * 32 * options["num_warps"] <= 65536
        print(f"\n{where} {row.kernel} {row.config}: {used}")
        if where == "sm_90" and row.config.stages == 1:
            # what a pipelined loop reads lies at a place that turns with the loop; see test_machine_code.py
            products = machine_code.products(machine_code.code(kernel))
            lost = [product for product in products if None in product[1:]]
            assert len(lost) <= (4 if row.kernel == "keys_levels" else 0)
            assert all(product.right is not None for product in lost)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("where", "row"), [param for param in ENTRIES if param.values[1].kernel in QUICK[param.values[0]]]
)
def test_entries_fit_their_architecture(machine_code, cases, config_cases, monkeypatch, where, row):
    if where == "sm_90" and row.size == 4 and row.kernel == "scan":
        pytest.skip("seven seconds each: see the slow test")
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    fits(machine_code, cases, config_cases, where, row)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(("where", "row"), ENTRIES)
def test_all_entries_fit_their_architecture(machine_code, cases, config_cases, monkeypatch, where, row):
    monkeypatch.setattr(cases, "DEVICE", "cpu")
    fits(machine_code, cases, config_cases, where, row)
