"""The largest call that a row of the kernels' table covers: its inputs, the call, and the right answer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gendistill.bench.launches import PLACES
from gendistill.ops import Divergence, Segments, Term, causal_conv, gated_rms_norm, sliding_window_attention
from gendistill.ops.paged import PAGE, Pages
from gendistill.ops.reference import block as reference
from gendistill.ops.reference.divergence import compare as reference_compare
from gendistill.ops.reference.paged import paged_attend
from gendistill.ops.types import THIN_ROWS
from gendistill_kernels.block.attention import attend_backward, attend_forward
from gendistill_kernels.block.glu import swiglu_backward, swiglu_forward
from gendistill_kernels.block.layout import Tiles
from gendistill_kernels.block.norm import rms_norm_backward, rms_norm_forward
from gendistill_kernels.block.rope import rotate_backward, rotate_forward
from gendistill_kernels.conv.causal import conv_backward, conv_forward
from gendistill_kernels.delta import chunk, layout
from gendistill_kernels.delta.chunk import chunk_forward
from gendistill_kernels.delta.decode import decode_step
from gendistill_kernels.delta.rows import TABLE, Row
from gendistill_kernels.delta.rule import Convolution, Heads, Rule
from gendistill_kernels.divergence.dense import compare
from gendistill_kernels.divergence.layout import KINDS, Mix, gradient_in
from gendistill_kernels.divergence.tail import log_sum, spread
from gendistill_kernels.norm.gated import gated_norm_backward, gated_norm_forward
from gendistill_kernels.paged.decode import decode
from gendistill_kernels.paged.prefill import prefill
from gendistill_kernels.paged.store import turn_and_store
from gendistill_kernels.runtime.lookup import ByBytes
from gendistill_kernels.thin.product import gated_of_sum, product

FORWARD = ("prepare", "prepare_levels", "scan", "summary", "carry")
RULE = Rule("softplus")
Call = Callable[[], dict[str, Tensor]]


def saves(row: Row | ByBytes) -> list[bool]:
    """Say of which forward passes a row is part."""
    if row.kernel not in FORWARD:
        return [True]
    return [False, True] if row.save is None else [row.save]


def make(cases: Any, row: Row | ByBytes, *, save: bool) -> tuple[Call, Call]:
    """Return what calls the kernel at the largest sizes of a row, and what computes that in float64.

    Args:
        cases: The module ``gpu_cases``.
        row: To be forced by the caller.
        save: Differentiate, too.
    """
    dtype = torch.float32 if row.size == 4 else torch.bfloat16
    if row.kernel not in TABLE.kernels:
        makers = {
            "conv": _convolution,
            "norm": _norm,
            "block": _block,
            "divergence": functools.partial(_divergence, mixture=row.kernel == "divergence_mixture"),
            "tail": _tail,
            "paged": functools.partial(_paged, row.kernel),
            "thin": _thin,
        }
        return makers[row.kernel.split("_")[0]](cases, dtype)
    K, V = min(row.keys, 256), min(row.values, 256)
    if PLACES[row.kernel].module is chunk:
        if save and dtype == torch.float32:
            # what has a gradient
            V = min(V, 128)
        return _chunks(
            cases,
            K,
            V,
            dtype,
            save=save,
            cut=row.kernel in ("summary", "carry", "reverse_summary"),
            heads=(2, 1, 1) if row.kernel == "sum_heads" else None,
        )
    # one launch that convolves as well, or two
    shared = 1 if row.kernel == "decode" else 4
    return _decode(cases, dtype, min(row.keys, 128), shared=shared)


def _chunks(
    cases: Any,
    K: int,
    V: int,
    dtype: torch.dtype,
    *,
    save: bool,
    cut: bool,
    heads: tuple[int, int, int] | None,
) -> tuple[Call, Call]:
    x = cases.draw(RULE, B=1, T=200, K=K, V=V, dtype=dtype, heads=heads)
    # four channels of the first chunk forget fast, so that it goes level by level
    x.decay[:, :64, :, :4] += 6
    state, grads = cases.normal(1, 2, K, V), cases.upstream(x)

    def call() -> dict[str, Tensor]:
        with mock.patch.object(layout, "SPAN", 1 if cut else layout.SPAN):
            if save:
                return cases.run(x, RULE, state, grads)
            return dict(zip(("out", "last"), chunk_forward(x, RULE, state=state), strict=False))

    def answer() -> dict[str, Tensor]:
        found = cases.differentiate(x, RULE, state, grads)
        return found if save else {name: found[name] for name in ("out", "last")}

    return call, answer


def _differentiated(op: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Run an op in float64; returns its results and the gradients of its inputs."""
    wide = [part.double().requires_grad_() for part in inputs]
    results = op(*wide)
    results = [results] if isinstance(results, Tensor) else list(results)
    found = torch.autograd.grad(results, wide, [grad.double() for grad in grads])
    return [*(part.detach() for part in results), *found]


def _named(parts: Any) -> dict[str, Tensor]:
    return {str(number): part for number, part in enumerate(parts)}


def _convolution(cases: Any, dtype: torch.dtype) -> tuple[Call, Call]:
    torch.manual_seed(0)
    x, grad = (cases.normal(2, 200, 520, dtype=dtype) for _ in range(2))
    weight, bias = cases.normal(520, 4), cases.normal(520)
    state, end = (cases.normal(2, 520, 3, dtype=dtype) for _ in range(2))

    def call() -> dict[str, Tensor]:
        settings = {"activation": "silu", "state": state}
        forward = conv_forward(x, weight, bias, **settings)
        return _named([*forward, *conv_backward(grad, end, x, weight, bias, **settings)])

    def op(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        return causal_conv(x, weight, bias, activation="silu", state=state)

    return call, lambda: _named(_differentiated(op, [x, weight, bias, state], [grad, end]))


def _norm(cases: Any, dtype: torch.dtype) -> tuple[Call, Call]:
    torch.manual_seed(0)
    out, weight = cases.normal(2, 200, 3, 128, dtype=dtype), cases.normal(128)
    gate, grad = (cases.normal(2, 200, 384, dtype=dtype) for _ in range(2))

    def call() -> dict[str, Tensor]:
        return _named([gated_norm_forward(out, weight, gate), *gated_norm_backward(grad, out, weight, gate)])

    return call, lambda: _named(_differentiated(gated_rms_norm, [out, weight, gate], [grad]))


def _block(cases: Any, dtype: torch.dtype) -> tuple[Call, Call]:
    torch.manual_seed(0)
    x, added, *more = (cases.normal(200, 1024, dtype=dtype) for _ in range(4))
    weight, both = cases.normal(1024), cases.normal(200, 3000, dtype=dtype)
    grad, qkv = cases.normal(200, 1500, dtype=dtype), cases.normal(200, 8 * 128, dtype=dtype)
    weights, grads = [cases.normal(128) for _ in range(2)], cases.normal(200, 8, 128, dtype=dtype)
    angles = cases.normal(200, 64).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    parts = grads[:, :4].contiguous(), grads[:, 4:6].contiguous(), grads[:, 6:].contiguous()

    lengths = [150, 50]
    tiles, segments = Tiles.of(lengths, x.device), Segments(lengths, device=x.device)

    def call() -> dict[str, Tensor]:
        total, y, rstd = rms_norm_forward(x, added, weight, eps=1e-6, dtype=dtype)
        norms = rms_norm_backward(*more, total, weight, rstd, added=dtype, want_weight=True)
        found = [
            total,
            y,
            *norms,
            swiglu_forward(both),
            swiglu_backward(grad.clone(), both, want_hidden=False)[0],
        ]
        q, k = rotate_forward(qkv, *weights, cos, sin, num_heads=4, num_kv_heads=2, eps=1e-6)
        turned = rotate_backward(*parts, qkv, *weights, cos, sin, eps=1e-6, want_weights=True)
        attended, lse = attend_forward(*parts, tiles, window=None)
        attended = attended, *attend_backward(parts[0], *parts, attended, lse, tiles, window=None)
        return _named([*found, q, k, *turned, *attended])

    def answer() -> dict[str, Tensor]:
        def norm(x: Tensor, added: Tensor, weight: Tensor) -> Any:
            return reference.rms_norm(x, weight, added, eps=1e-6, dtype=torch.float64)

        total, y, d_x, d_added, d_weight = _differentiated(norm, [x, added, weight], [more[1], more[0]])
        h, d_both = _differentiated(reference.swiglu, [both], [grad])

        def turn(qkv: Tensor, q_weight: Tensor, k_weight: Tensor) -> Any:
            q, k, v = qkv.unflatten(-1, (8, 128)).split([4, 2, 2], dim=1)
            both = ((q, q_weight), (k, k_weight))
            return [*(reference.turn(part, w, cos.double(), sin.double(), eps=1e-6) for part, w in both), v]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sliding_window_attention(q[None], k[None], v[None], segments=segments)[0]

        q, k, _, *turned = _differentiated(turn, [qkv, *weights], list(parts))
        attended = _differentiated(attend, list(parts), [parts[0]])
        return _named([total, y, d_x, d_added, d_weight, h, d_both, q, k, *turned, *attended])

    return call, answer


def _paged(kernel: str, cases: Any, dtype: torch.dtype) -> tuple[Call, Call]:
    """Store 256 channels, prefill two sequences, or decode from them; what is asked for alone is launched."""
    torch.manual_seed(0)
    H, KV, D, lengths, new = 4, 2, 256, [700, 90], [130, 90]
    single = kernel in ("paged_decode", "paged_join")
    new = [1, 1] if single else new
    width, device = -(-max(lengths) // PAGE), cases.DEVICE
    table = (1 + torch.randperm(2 * width)).view(2, width)
    memory = [cases.normal(2 * width + 1, PAGE, KV, D, dtype=dtype) for _ in range(2)]
    position = [torch.arange(length - number, length) for length, number in zip(lengths, new, strict=True)]
    cells = [row[place // PAGE] * PAGE + place % PAGE for row, place in zip(table, position, strict=True)]
    pages = Pages(
        table.int().to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.tensor([0, new[0], sum(new)], dtype=torch.int32, device=device),
        torch.cat(cells).to(device),
        single,
    )
    qkv = cases.normal(sum(new), (H + 2 * KV) * D, dtype=dtype)
    angles = cases.normal(sum(new), D // 2).repeat(1, 2)
    cos, sin, gains = angles.cos(), angles.sin(), [cases.normal(D) for _ in range(2)]
    # without norm and turn
    q, k, v = (part.contiguous() for part in qkv.unflatten(1, (-1, D)).split([H, KV, KV], dim=1))

    def call() -> dict[str, Tensor]:
        sides = [part.clone() for part in memory]
        if kernel == "paged_store":
            found = turn_and_store(qkv, *gains, cos, sin, *sides, pages.cells, num_heads=H, eps=1e-6)
            return _named([found, *sides])
        for side, part in zip(sides, (k, v), strict=True):
            side.view(-1, KV, D)[pages.cells] = part
        if single:
            return _named([decode(q, *sides, pages.table, pages.lengths, window=None)])
        return _named([prefill(q, *sides, pages.table, pages.lengths, pages.starts, window=None)])

    def answer() -> dict[str, Tensor]:
        sides = [part.double() for part in memory]
        heads = {"heads": (H, KV), "eps": 1e-6, "window": None, "pages": pages}
        if kernel != "paged_store":
            plain = torch.ones_like(cos.double()), torch.zeros_like(sin.double())
            return _named(
                [paged_attend(qkv.double(), None, None, *plain, *sides, **heads).unflatten(1, (H, D))]
            )
        wide = [part.double() for part in (qkv, *gains, cos, sin)]
        paged_attend(*wide, *sides, **heads)
        turned = reference.turn(wide[0].unflatten(1, (-1, D))[:, :H], *wide[1:2], *wide[3:], eps=1e-6)
        return _named([turned, *sides])

    return call, answer


def _thin(cases: Any, dtype: torch.dtype) -> tuple[Call, Call]:
    """Run both halves of an MLP whose sizes fill neither tiles nor programs."""
    torch.manual_seed(0)
    rows, K, inner = THIN_ROWS, 1160, 1000
    stream, mixed, gain = cases.normal(rows, K), cases.normal(rows, K, dtype=dtype), cases.normal(K)
    gate_up, down = cases.normal(2 * inner, K, dtype=dtype) / K**0.5, cases.normal(K, inner, dtype=dtype)
    x = cases.normal(rows, inner, dtype=dtype)

    def call() -> dict[str, Tensor]:
        out = product(x, down, added=stream, out=torch.empty_like(stream))
        # the launch that needs more comes last
        return _named([out, *gated_of_sum(stream, mixed, gain, gate_up, eps=1e-6)])

    def answer() -> dict[str, Tensor]:
        wide = stream.double() + mixed.double()
        total, normed = reference.rms_norm(wide, gain.double(), None, eps=1e-6, dtype=torch.float64)
        hidden = reference.swiglu(normed @ gate_up.double().T)
        return _named([stream.double() + x.double() @ down.double().T, total, hidden])

    return call, answer


def _divergence(cases: Any, dtype: torch.dtype, *, mixture: bool) -> tuple[Call, Call]:
    """Compare rows of several slices, of which the last is not full, at two temperatures.

    Args:
        mixture: By every divergence, or by all but that from the models' mixture.
    """
    torch.manual_seed(0)
    kinds = [kind for kind in Divergence if mixture or kind is not Divergence.JSD]
    terms = [Term(kind, 0.5 + kind_number, 1.0, 0.3) for kind_number, kind in enumerate(kinds)]
    terms.append(Term(Divergence.FORWARD_KL, 1.0, 2.0))
    mix = Mix(
        tuple(KINDS[term.kind.value] for term in terms),
        tuple(term.weight for term in terms),
        tuple(term.temperature for term in terms),
        tuple(term.beta for term in terms),
    )
    student, teacher = (3 * cases.normal(20, 20_004, dtype=dtype) for _ in range(2))
    targets = torch.randint(0, 20_004, (20,), device=cases.DEVICE)

    def call() -> dict[str, Tensor]:
        logits = student.clone()
        values = compare(logits, teacher, targets, mix, grad_dtype=dtype)
        return {"values": values, "d logits": gradient_in(logits, dtype)}

    def answer() -> dict[str, Tensor]:
        wide = student.double(), teacher.double()
        return dict(zip(("values", "d logits"), reference_compare(*wide, targets, terms, True), strict=True))

    return call, answer


def _tail(cases: Any, dtype: torch.dtype) -> tuple[Call, Call]:
    torch.manual_seed(0)
    logits, factors = 3 * cases.normal(20, 20_004, dtype=dtype), cases.normal(20)

    def call() -> dict[str, Tensor]:
        total = log_sum(logits)
        return {"total": total, "shares": spread(logits, total, factors, dtype=dtype)}

    def answer() -> dict[str, Tensor]:
        wide = logits.double()
        return {"total": wide.logsumexp(1), "shares": wide.softmax(1) * factors.double()[:, None]}

    return call, answer


def _decode(cases: Any, dtype: torch.dtype, K: int, *, shared: int) -> tuple[Call, Call]:
    heads = Heads(4, 4 // shared, 4 // shared)
    x = cases.draw(RULE, B=3, T=2, H=4, K=K, dtype=dtype, heads=heads)
    state, channels = cases.normal(3, 4, K, K), sum(heads) * K
    # it changes nothing, but a step of heads that share a key and a value launches a kernel for it
    weight = torch.tensor([0.0, 1.0], dtype=dtype, device=cases.DEVICE).expand(channels, 2).contiguous()

    def call() -> dict[str, Tensor]:
        memory = state.clone()
        packed = torch.cat([part.flatten(2) for part in x[:3]], 2)
        gates = {"A_log": x.A_log, "dt_bias": x.dt_bias}
        past = torch.zeros(3, channels, 1, dtype=dtype, device=cases.DEVICE)
        out = decode_step(
            packed, x.decay, x.beta, memory, rule=RULE, heads=heads,
            convolution=Convolution(weight, past), **gates,
        )  # fmt: skip
        return {"out": out, "last": memory}

    def answer() -> dict[str, Tensor]:
        wide = x._replace(**{name: part.double() for name, part in x._asdict().items() if part is not None})
        return dict(zip(("out", "last"), cases.exact(wide, RULE, state.double()), strict=True))

    return call, answer
