"""Launch every kernel on a few tiny inputs, for ``compute-sanitizer``: ``make racecheck``.

``python tests/ops/racecheck.py [NAME ...]`` runs the named cases, all by default, and fails if a result is not finite.
Run it once without the sanitizer, so that everything is compiled.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gendistill.ops import Segments
from gendistill_kernels.conv.causal import conv_backward, conv_forward
from gendistill_kernels.conv.layout import Tiles
from gendistill_kernels.delta import chunk, layout, rows
from gendistill_kernels.delta.decode import decode_step
from gendistill_kernels.delta.layout import Chunks, InferenceChunks
from gendistill_kernels.delta.rule import Convolution, Finish, Heads, Rule
from gendistill_kernels.divergence.dense import compare
from gendistill_kernels.divergence.layout import CE, JSD, KL, REVERSE_KL, Mix, gradient_in
from gendistill_kernels.divergence.tail import log_sum, spread
from gendistill_kernels.norm.gated import gated_norm_backward, gated_norm_forward
from gendistill_kernels.paged import decode as paged_decode
from gendistill_kernels.paged.prefill import prefill
from gendistill_kernels.paged.store import turn_and_store
from gendistill_kernels.runtime.lookup import Config, forced

LENGTHS = [1, 0, 66, 13]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _load_cases() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_cases", Path(__file__).with_name("gpu_cases.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = _load_cases()


def chunks(
    rule: Rule,
    dtype: torch.dtype,
    *,
    lengths: list[int] | None = None,
    wild: bool = False,
    has_state: bool = True,
    **sizes: Any,
) -> list[Tensor]:
    """Run the chunked kernels forwards and backwards, and forwards without saving.

    ``wild``: one chunk's decay is out of range, that of a block of 16 of the other's tokens, too.
    """
    number, tokens = (1, 80) if lengths is None else (len(lengths), sum(lengths))
    x = cases.draw(rule, B=1, T=tokens, dtype=dtype, **{"H": 1, **sizes})
    if wild:
        x.decay[:, :64, :, 3] = -4.0
        x.decay[:, 64:, :, 5] = -20.0
    state = cases.normal(number, x.decay.shape[2], x.k.shape[3], x.v.shape[3]) if has_state else None
    table = None if lengths is None else Chunks.of(lengths, cases.DEVICE)
    out, last, _ = chunk.chunk_forward(x, rule, state=state, chunks=table)
    return [out, last, *cases.run(x, rule, state, cases.upstream(x, number), table).values()]


def spans(rule: Rule, dtype: torch.dtype, **sizes: int) -> list[Tensor]:
    """Cut sequences into spans of one chunk: one of two, and one of three between others of one or none.

    And these again without gradients, with spans and chunks that are dead.
    """
    before, layout.SPAN = layout.SPAN, 1
    try:
        cut = [3, 0, 130, 64]
        found = [*chunks(rule, dtype, **sizes), *chunks(rule, dtype, lengths=cut, has_state=False, **sizes)]
        x = cases.draw(rule, B=1, T=sum(cut), dtype=dtype, **{"H": 1, **sizes})
        state = cases.normal(len(cut) + 1, x.decay.shape[2], x.k.shape[3], x.v.shape[3])
        table = Segments([*cut, 0], device=cases.DEVICE, room=8).table(InferenceChunks.of)
        return [*found, *chunk.chunk_forward(x, rule, state=state, chunks=table)[:2]]
    finally:
        layout.SPAN = before


def convolution(dtype: torch.dtype, *, packed: bool) -> list[Tensor]:
    """Run the convolution forwards and backwards."""
    torch.manual_seed(0)
    number = len(LENGTHS) if packed else 1
    x, grad = (cases.normal(1, 80, 192, dtype=dtype) for _ in range(2))
    weight, bias = cases.normal(192, 4, dtype=dtype), cases.normal(192, dtype=dtype)
    state, end = (cases.normal(number, 192, 3, dtype=dtype) for _ in range(2))
    tiles = Tiles.of(LENGTHS, cases.DEVICE) if packed else None
    settings = {"activation": "silu", "state": state, "tiles": tiles}
    return [
        *conv_forward(x, weight, bias, **settings),
        *conv_backward(grad, end, x, weight, bias, **settings),
    ]


def norm(dtype: torch.dtype, channels: int) -> list[Tensor]:
    """Run the gated norm forwards and backwards."""
    torch.manual_seed(0)
    out, weight = cases.normal(1, 70, 3, channels, dtype=dtype), cases.normal(channels, dtype=dtype)
    gate, grad = (cases.normal(1, 70, 3 * channels, dtype=dtype) for _ in range(2))
    return [gated_norm_forward(out, weight, gate), *gated_norm_backward(grad, out, weight, gate)]


def decode(dtype: torch.dtype, channels: int, tokens: int, heads: Heads) -> list[Tensor]:
    """Take a decode step with everything in it."""
    torch.manual_seed(0)
    N, H, K, C = 2, heads.q, channels, sum(heads) * channels
    state, past = cases.normal(N, H, K, K), cases.normal(N, C, 3, dtype=dtype)
    out = decode_step(
        cases.normal(N, tokens, C, dtype=dtype),
        cases.normal(N, tokens, H, K, dtype=dtype),
        cases.normal(N, tokens, H, dtype=dtype),
        state,
        rule=Rule("bounded"),
        heads=heads,
        A_log=cases.normal(H),
        dt_bias=cases.normal(H * K),
        convolution=Convolution(cases.normal(C, 4, dtype=dtype), past, cases.normal(C, dtype=dtype), "silu"),
        finish=Finish(
            cases.normal(K, dtype=dtype), 1e-6, cases.normal(N, tokens, H * K, dtype=dtype), "silu"
        ),
    )
    return [out, state, past]


def divergence(dtype: torch.dtype) -> list[Tensor]:
    """Compare rows of three slices, whose programs wait for each other twice, and do what a known tail needs."""
    torch.manual_seed(0)
    student, teacher = (3 * cases.normal(5, 9000) for _ in range(2))
    targets = torch.randint(0, 9000, (5,), device=cases.DEVICE)
    mix = Mix((KL, REVERSE_KL, JSD, CE), (1.0,) * 4, (1.0, 2.0, 1.0, 1.0), (0.0, 0.0, 0.5, 0.0))
    total = log_sum(student)
    shares = spread(student, total, total, dtype=dtype)
    values = compare(student, teacher, targets, mix, grad_dtype=dtype)
    return [total, shares, values, gradient_in(student, dtype)]


def paged(dtype: torch.dtype, heads: tuple[int, int], channels: int, window: int | None) -> list[Tensor]:
    """Store and prefill tokens in pages, and decode, shared out and not; every cell that is read has been written."""
    torch.manual_seed(0)
    (H, KV), D, lengths, device = heads, channels, [300, 0, 66], cases.DEVICE
    tokens, width = sum(lengths), -(-max(lengths) // 64)
    table = (1 + torch.randperm(3 * width, device=device)).view(3, width)
    places = [torch.arange(length, device=device) for length in lengths]
    cells = [row[place // 64] * 64 + place % 64 for row, place in zip(table, places, strict=True)]
    memory = [torch.empty(3 * width + 1, 64, KV, D, dtype=dtype, device=device) for _ in range(2)]
    qkv, angles = (
        cases.normal(tokens, (H + 2 * KV) * D, dtype=dtype),
        cases.normal(tokens, D // 2).repeat(1, 2),
    )
    gains, turns = (cases.normal(D), cases.normal(D)), (angles.cos(), angles.sin())
    q = turn_and_store(qkv, *gains, *turns, *memory, torch.cat(cells), num_heads=H, eps=1e-6)
    sizes = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.tensor([0, 300, 300, 366], dtype=torch.int32, device=device)
    found = [q, prefill(q, *memory, table.int(), sizes, starts, window=window)]
    for programs in (1, 100):
        with forced("paged_decode", Config(64, 4, stages=3, programs=programs)):
            found.append(paged_decode.decode(q[:3], *memory, table.int(), sizes, window=window))
    return found


def make_cases() -> dict[str, Callable[[], Sequence[Tensor]]]:
    """List what to run, by name."""
    found: dict[str, Callable[[], Sequence[Tensor]]] = {}
    for word, dtype in DTYPES.items():
        for K in (64, 128):
            for gate in ("bounded", "softplus"):
                found[f"chunks-{K}-{gate}-{word}"] = lambda K=K, gate=gate, dtype=dtype: chunks(
                    Rule(gate), dtype, K=K
                )
            found[f"spans-{K}-{word}"] = lambda K=K, dtype=dtype: spans(Rule("bounded"), dtype, K=K)
            found[f"packed-{K}-{word}"] = lambda K=K, dtype=dtype: chunks(
                Rule("none", sigmoid=False), dtype, lengths=LENGTHS, K=K
            )
            found[f"out-of-range-{K}-{word}"] = lambda K=K, dtype=dtype: chunks(
                Rule("none", sigmoid=False), dtype, wild=True, K=K
            )
            # heads that share nothing, and heads with the same keys and values
            found[f"decode-{K}-{word}"] = lambda K=K, dtype=dtype: [
                *decode(dtype, K, tokens=1, heads=Heads(2, 2, 2)),
                *decode(dtype, K, tokens=3, heads=Heads(12, 1, 1) if K == 64 else Heads(3, 1, 1)),
            ]
            found[f"norm-{K}-{word}"] = lambda K=K, dtype=dtype: norm(dtype, K)
        found[f"paged-{word}"] = lambda dtype=dtype: [
            *paged(dtype, (4, 2), 128, None),
            *paged(dtype, (7, 1), 64, 100),
        ]
        found[f"divergence-{word}"] = lambda dtype=dtype: divergence(dtype)
        found[f"convolution-{word}"] = lambda dtype=dtype: [
            *convolution(dtype, packed=False),
            *convolution(dtype, packed=True),
        ]
    for name, decay_per, erase, write in (
        ("gdn", "scalar", "scalar", "scalar"),
        ("gdn2", "channel", "channel", "channel"),
        ("linear-attention", "scalar", "none", "scalar"),
    ):
        found[f"{name}-64-bf16"] = lambda decay_per=decay_per, erase=erase, write=write: chunks(
            Rule("softplus", erase=erase, write=write), torch.bfloat16, K=64, decay_per=decay_per
        )
    found["chunks-256-bounded-bf16"] = lambda: chunks(Rule("bounded"), torch.bfloat16, K=256, V=64)
    found["shared-heads-64-bf16"] = lambda: chunks(
        Rule("softplus"), torch.bfloat16, H=4, K=64, heads=(4, 2, 1)
    )
    # as many chains as have the scans take other rows of the table
    found["many-heads-128-bf16"] = lambda: chunks(Rule("bounded"), torch.bfloat16, H=rows.MANY, K=128)
    return found


def main(names: Sequence[str]) -> int:
    """Run the named cases, or all; returns the exit code."""
    known = make_cases()
    if unknown := [name for name in names if name not in known]:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}", file=sys.stderr)
        return 2
    bad = []
    for name in names or known:
        start = time.monotonic()
        results = known[name]()
        if not all(bool(torch.isfinite(part).all()) for part in results):
            bad.append(name)
        print(f"{name}: {len(results)} results, {time.monotonic() - start:.1f} s", flush=True)
    if bad:
        print(f"not finite: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
