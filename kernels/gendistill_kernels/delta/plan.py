"""Plan the launches of the chunked delta rule: all that follows from the sizes of a call, worked out once.

Between calls of the same sizes nothing changes but where tensors are, and what the host does for a short call takes
longer than the GPU. ``plan_launches`` keeps grids, constants, sizes of workspaces and checks; ``chunk`` allocates and
launches.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton.language as tl

from gendistill_kernels.delta.layout import CHUNK, Sizes, gradient_spaces, num_spans, work_spaces
from gendistill_kernels.delta.rows import TABLE, is_many
from gendistill_kernels.delta.rule import Rule, check_gate, check_rule
from gendistill_kernels.runtime.launch import Fixed, Kind, check_devices
from gendistill_kernels.runtime.lookup import Config, cached
from gendistill_kernels.runtime.memory import Results, Shape, Space, Workspace

_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LEVELS = 6
# A chunk whose decay, as a power of two, stays above this in every channel takes one product for all its pairs of
# tokens: its factors stay in the range of the operands, and what they are multiplied with keeps its bits. Other chunks
# go level by level down to blocks of 2^WHOLE tokens, which then take one product if they are in range.
_RANGE, _RANGE_FLOAT16 = -200.0, -12.0
WHOLE = 4
# columns that a program of the sum over chunks takes: 128 bytes
_SUMMED_COLUMNS = 32
_INPUTS = ("q", "k", "v", "decay", "beta", "A_log", "dt_bias", "erase", "write")


class Forward(NamedTuple):
    """The launches of a forward pass, in their order.

    Attributes:
        results: Output, and final state.
        early, late: Of ``work_spaces``.
        span_states: States after and before spans; None if no sequence is cut.
        operands: Dtype of the 0/1 matrices.
        prepare, prepare_levels, summary, carry, scan: Launches; None where there is none.
        width, width_levels: Channels of the blocks that the first two store.
    """

    results: Results
    early: Workspace
    late: Workspace
    span_states: Workspace | None
    operands: torch.dtype
    prepare: Fixed
    width: int
    prepare_levels: Fixed | None
    width_levels: int
    summary: Fixed | None
    carry: Fixed | None
    scan: Fixed


class ReverseScan(NamedTuple):
    """The launches of the first half of a backward pass.

    Attributes:
        span_states: As of ``Forward``, of gradients.
        results: The gradient of the initial state, or None.
        summary, carry, scan: Launches, in their order; None where there is none.
    """

    span_states: Workspace | None
    results: Results
    summary: Fixed | None
    carry: Fixed | None
    scan: Fixed


class Local(NamedTuple):
    """The launches of the second half of a backward pass.

    Attributes:
        results: Gradients of q, k and v per head of the state; of decay, write, beta and erase, or what they are summed
            from.
        work: Gradients of the gate's bias and rate in every chunk, and what the first kernel hands to the second:
            gradients of scores and of what erases, their units, rows.
        values, keys, keys_levels: Launches; None where there is none.
        sum_q, sum_k, sum_v: Launches that add up heads; None where no heads share.
        sum_gate: The launch that adds up the gradients of the gate's parameters; None without a gate.
    """

    results: Results
    work: Workspace
    values: Fixed
    keys: Fixed
    keys_levels: Fixed | None
    sum_q: Fixed | None
    sum_k: Fixed | None
    sum_v: Fixed | None
    sum_gate: Fixed | None


class LaunchPlan:
    """What calls of the same sizes share; made by ``plan_launches``.

    Args:
        about: Dtypes, numbers of the device and shapes of ``Inputs``, in their order; None where there is no tensor.
        strides: Of q, k and v.
        device: Of q.
        rule: What the inputs mean.
        packed: Numbers of chunks, of sequences, of spans, and of the device if sequences are packed, else None.
        span: Chunks of a span of rows that are not packed.
        wide_any: Operands that have the range of float32.
        keep_float16: Whether float16 inputs make do with their own range instead.

    Attributes:
        n: Sizes.
        token_strides: From token to token of q, k and v; None for what has to be copied first.
        scalar: Whether there is one decay per head.
        span: As given.
        spans: How many; zero if no sequence is cut.
        scale: Factor on q.
        lower_bound: Of the bounded gate.

    Raises:
        ValueError: Tensors are on several devices, or do not fit the rule; the kernels would read what is not there.
    """

    def __init__(
        self,
        about: tuple[tuple[torch.dtype, int, Shape] | None, ...],
        strides: tuple[Shape, ...],
        device: torch.device,
        rule: Rule,
        packed: tuple[int, int, int, int] | None,
        span: int,
        wide_any: torch.dtype,
        keep_float16: bool,
    ) -> None:
        # of one pass over the tensors, since a short call waits for it
        kinds: list[Kind | None] = [part and part[:2] for part in about]
        shapes = tuple([part and part[2] for part in about])
        q, k, v, decay, beta, rate, bias, erase, write = shapes
        assert q is not None
        assert k is not None
        assert v is not None
        assert decay is not None
        check_rule(rule, decay, q[3], v[3], beta=beta, erase=erase, write=write)
        if rule.gate != "none":
            check_gate(decay, rate, bias)
        self.n = n = Sizes.of(q, k, v, decay, packed and packed[:2])
        self.token_strides = [
            token_stride(shape, stride) for shape, stride in zip((q, k, v), strides, strict=True)
        ]
        self.rule, self.device, self.packed = rule, device, packed is not None
        self.shapes, self.dtypes = shapes, [kind and kind[0] for kind in kinds]
        self._first = kinds[0]
        check_devices(_INPUTS, kinds, first=self._first)
        self._check_devices(cu_seqlens=packed and (torch.int32, packed[3]))
        self.scalar = len(decay) == 3
        self.span = span
        self.spans = num_spans(n, span, packed and packed[2])
        # always of one class: a launch is compiled for it
        self.scale = float(n.K**-0.5 if rule.scale is None else rule.scale)
        self.lower_bound = float(rule.lower_bound)
        self.dtype: torch.dtype = self.dtypes[0]  # pyright: ignore[reportAttributeAccessIssue]
        # what holds factors as far out as the limit of a chunk's decay
        self.wide_any = wide_any
        self.wide = self.dtype if self.dtype == torch.float16 and keep_float16 else wide_any
        self.range = _RANGE_FLOAT16 if self.dtype == torch.float16 else _RANGE
        # what strengthens a write is what erases
        self.erase = "tied" if rule.erase == rule.write == "scalar" else rule.erase
        self._made: dict[Any, Any] = {}

    def forward(self, *, save: bool, state: Kind | None) -> Forward:
        """Plan a forward pass, which may save for the backward pass, or start from a state."""
        key = ("forward", save, state)
        if key not in self._made:
            self._check_devices(state=state)
            self._made[key] = self._forward(save, state is not None)
        return self._made[key]

    def reverse_scan(
        self, grad_out: Kind | None, grad_state: Kind | None, *, want_state: bool
    ) -> ReverseScan:
        """Plan the first half of a backward pass: from these gradients, and for the initial state's."""
        key = ("reverse", grad_out, grad_state, want_state)
        if key not in self._made:
            self._check_devices(grad_out=grad_out, grad_state=grad_state)
            self._made[key] = self._reverse_scan(grad_state is not None, want_state)
        return self._made[key]

    def local(self, grad_out: Kind | None) -> Local:
        """Plan the second half of a backward pass."""
        key = ("local", grad_out)
        if key not in self._made:
            self._check_devices(grad_out=grad_out)
            self._made[key] = self._local()
        return self._made[key]

    def _check_devices(self, **kinds: Kind | None) -> None:
        check_devices([*kinds], [*kinds.values()], first=self._first)

    def _config(self, kernel: str, *, save: bool = False) -> Config:
        n = self.n
        many = is_many(n.sequences * n.H, n.wide, packed=self.packed)
        return TABLE.lookup(self.device, kernel, n.BK, n.wide, self.dtype.itemsize, many, save)

    @functools.cached_property
    def _always_in_range(self) -> bool:
        """Whether a gate keeps every chunk in range, whatever the inputs, or there is no range to keep."""
        rule = self.rule
        return self.scalar or (
            rule.gate == "bounded" and CHUNK * rule.lower_bound * math.log2(math.e) > self.range
        )

    @functools.cached_property
    def saved(self) -> tuple[Workspace, Workspace]:
        """What the forward pass saves: ``work_spaces``."""
        return self._work(True)

    @functools.cached_property
    def gradients(self) -> Workspace:
        """What the first half of the backward pass hands to the second: ``gradient_spaces``."""
        return Workspace(gradient_spaces(self.n, self.dtype), self.device)

    def _work(self, save: bool) -> tuple[Workspace, Workspace]:
        early, late = work_spaces(
            self.n, self.rule, self.dtype, beta=self.dtypes[4] is not None, scalar=self.scalar,
            spans=self.spans, save=save,
        )  # fmt: skip
        return Workspace(early, self.device), Workspace(late, self.device)

    def _span_states(self) -> Workspace | None:
        n = self.n
        states = (self.spans, n.H, n.K, n.V), torch.float32
        return Workspace({"given": states, "carried": states}, self.device) if self.spans else None

    def _of_scan(self, config: Config, columns: int, **constants: Any) -> Fixed:
        """Plan a scan, forward or backward, over the values of every state and this many columns more, in blocks."""
        n, BV = self.n, min(self.n.wide, config.block)
        chains = (self.spans or n.sequences) * n.H
        blocks = -(-n.V // BV) + -(-columns // BV)
        # on one axis: the others hold no more than 65,535
        return Fixed(
            (blocks * chains,),
            **{"H": n.H, "K": n.K, "V": n.V, "BK": n.BK, "BV": BV, "C": CHUNK},
            BLOCKS=blocks, PACKED=self.packed or self.spans > 0, CUT=self.spans > 0, STAGES=config.stages,
            ERASE=self.erase,
            **constants,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def _carry(self, has_state: bool, *, back: bool, begins: bool) -> Fixed:
        n, config = self.n, self._config("carry")
        BV = min(n.wide, config.block)
        blocks = -(-n.V // BV)
        return Fixed(
            (blocks * n.sequences * n.H,),
            H=n.H, K=n.K, V=n.V, BK=n.BK, BV=BV, BLOCKS=blocks, HAS_STATE=has_state, BACK=back,
            BEGINS=begins,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def _forward(self, save: bool, has_state: bool) -> Forward:
        n, rule = self.n, self.rule
        prepare, scan = self._config("prepare"), self._config("scan", save=save)
        if save:
            # of what the backward pass will launch, this takes the fewest sizes
            self._config("keys")
        # float32 inputs are for comparisons: what they cost does not matter, what they lose does
        exact = self.dtype == torch.float32
        precision = "tf32x3" if exact else "tf32"
        settings = {
            "H": n.H, "HQ": n.HQ, "HK": n.HK, "SQ": self.token_strides[0], "SK": self.token_strides[1], "K": n.K,
            "BK": n.BK, "C": CHUNK, "GATE": rule.gate, "NORM": rule.norm, "SIGMOID": rule.sigmoid,
            "PACKED": self.packed, "DOT": tl.float32 if exact else tl.float16, "LEVELS": LEVELS, "SAVE": save,
            "PRECISION": precision, "RANGE": self.range, "WIDE": _TRITON[torch.float32 if exact else self.wide],
            "ERASE": self.erase,
        }  # fmt: skip
        width = width_levels = min(n.BK, prepare.block)
        again = None
        if not self._always_in_range:
            config = self._config("prepare_levels")
            width_levels = min(n.BK, config.block)
            again = Fixed(
                (n.chunks, n.H), **settings, W=width_levels, WHOLE=WHOLE,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        of_values = {
            "HV": n.HV, "SV": self.token_strides[2], "SAVE": save, "PRECISION": precision, "SIGMOID": rule.sigmoid
        }  # fmt: skip
        summary = carry = None
        if self.spans:
            config = self._config("summary", save=save)
            summary = self._of_scan(config, n.K, **of_values, HAS_STATE=has_state, SUMMARY=True)
            carry = self._carry(has_state, back=False, begins=save)
        early, late = self.saved if save else self._work(False)
        return Forward(
            results=Results(
                [
                    ((n.B, n.T, n.H, n.V), self.dtypes[2] or self.dtype),
                    ((n.sequences, n.H, n.K, n.V), torch.float32),
                ],
                self.device,
            ),
            early=early,
            late=late,
            span_states=self._span_states(),
            operands=torch.float32 if exact else torch.float16,
            prepare=Fixed(
                (n.chunks, n.H), **settings, W=width, SCALAR=self.scalar,
                num_warps=prepare.warps, num_stages=prepare.stages,
            ),
            width=width,
            prepare_levels=again,
            width_levels=width_levels,
            summary=summary,
            carry=carry,
            scan=self._of_scan(scan, 0, **of_values, HAS_STATE=has_state or self.spans > 0, SUMMARY=False),
        )  # fmt: skip

    def _reverse_scan(self, has_grad: bool, want_state: bool) -> ReverseScan:
        summary = carry = None
        if self.spans:
            config = self._config("reverse_summary")
            summary = self._of_scan(config, 0, HAS_GRAD=False, WANT_GRAD=True, SUMMARY=True)
            carry = self._carry(has_grad, back=True, begins=True)
        has_grad = has_grad or self.spans > 0
        n, scan = self.n, self._config("reverse_scan", save=True)
        return ReverseScan(
            span_states=self._span_states(),
            results=Results(
                [((n.sequences, n.H, n.K, n.V), torch.float32) if want_state else None], self.device
            ),
            summary=summary,
            carry=carry,
            scan=self._of_scan(scan, 0, HAS_GRAD=has_grad, WANT_GRAD=want_state, SUMMARY=False),
        )

    def _local(self) -> Local:
        n, rule, float32 = self.n, self.rule, torch.float32
        values, keys = self._config("values"), self._config("keys")
        W = min(n.BK, keys.block)
        parts = n.BK // W
        grid = (parts * n.chunks, n.H)
        like: list[Space] = [
            None if shape is None or dtype is None else (shape, dtype)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]
        q, k, v, decay, beta, _, _, erase, write = like

        def per_head(heads: int, channels: int, dtype: torch.dtype | None) -> Space:
            return (n.B, n.T, n.H, channels), float32 if heads != n.H or dtype is None else dtype

        def summed(space: Space, heads: int) -> Fixed | None:
            if heads == n.H or space is None:
                return None
            config = self._config("sum_heads")
            number = math.prod(space[0])
            return Fixed(
                (-(-number // config.block),), GROUP=n.H // heads, WIDTH=space[0][3], BLOCK=config.block,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip

        # what is summed over key channels comes in parts
        if self.scalar:
            decay = ((n.B, n.T, n.H, parts), float32)
        if self.erase == "scalar":
            erase = ((n.B, n.T, n.H, parts), float32)
        has_gate = rule.gate != "none"
        columns = n.H if self.scalar else n.H * n.K
        sums, config = None, self._config("sum_chunks")
        if has_gate:
            blocks = -(-columns // _SUMMED_COLUMNS) + -(-n.H // _SUMMED_COLUMNS)
            sums = Fixed(
                (blocks,), BIASES=columns, BIAS_PARTS=parts if self.scalar else 1, RATES=n.H, RATE_PARTS=parts,
                COLUMNS=_SUMMED_COLUMNS, ROWS=config.block // _SUMMED_COLUMNS,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        settings = {
            # 64 values are padded to 128: with fewer, ptxas 12.8 loses operands (tests/ops/test_machine_code.py)
            "H": n.H, "HQ": n.HQ, "HK": n.HK, "SQ": self.token_strides[0], "SK": self.token_strides[1], "K": n.K,
            "V": n.V, "BK": n.BK, "BV": max(n.wide, 128), "C": CHUNK,
            "GATE": rule.gate, "NORM": rule.norm, "PACKED": self.packed, "DOT": tl.float16, "LEVELS": LEVELS,
            "WHOLE": WHOLE, "W": W, "SIGMOID": rule.sigmoid, "ERASE": self.erase, "SCALAR": self.scalar,
            "RANGE": self.range, "BY_LEVEL": False,
        }  # fmt: skip
        again = None
        if not self._always_in_range:
            config = self._config("keys_levels")
            again = Fixed(
                grid, **settings | {"BV": n.wide, "BY_LEVEL": True},
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip
        results = [
            per_head(n.HQ, n.K, self.dtypes[0]),
            per_head(n.HK, n.K, self.dtypes[1]),
            per_head(n.HV, n.V, self.dtypes[2]),
            decay,
            write,
            beta,
            erase,
        ]
        square = (n.chunks, n.H, CHUNK, CHUNK)
        spaces: dict[str, Space] = {
            "d_bias": ((n.chunks, n.H, parts if self.scalar else n.K), float32) if has_gate else None,
            "d_rate": ((n.chunks, n.H, parts), float32) if has_gate else None,
            "d_scores": (square, self.wide),
            "d_lower": (square, self.wide),
            "units": ((n.chunks, n.H), float32),
            "rows": ((n.chunks, n.H, 3, CHUNK), float32),
        }
        return Local(
            results=Results(results, self.device),
            work=Workspace(spaces, self.device),
            values=Fixed(
                (n.chunks, n.H),
                H=n.H, HV=n.HV, SV=self.token_strides[2], V=n.V, BV=n.wide, C=CHUNK, NORM=rule.norm,
                SIGMOID=rule.sigmoid, PACKED=self.packed, ERASE=self.erase,
                num_warps=values.warps, num_stages=values.stages,
            ),
            keys=Fixed(grid, **settings, num_warps=keys.warps, num_stages=keys.stages),
            keys_levels=again,
            sum_q=summed(q, n.HQ),
            sum_k=summed(k, n.HK),
            sum_v=summed(v, n.HV),
            sum_gate=sums,
        )  # fmt: skip


plan_launches = cached(512)(LaunchPlan)


def token_stride(shape: Shape, stride: Shape) -> int | None:
    """Return how many elements lie between tokens, if tokens of all rows do so and heads are next to each other."""
    B, T, heads, channels = shape
    if 0 in shape:
        return heads * channels
    by_row, by_token, by_head, by_channel = stride
    found = by_token if T > 1 else by_row if B > 1 else heads * channels
    even = B == 1 or T == 1 or by_row == T * by_token
    dense = (channels == 1 or by_channel == 1) and (heads == 1 or by_head == channels)
    return found if even and dense and found >= heads * channels else None
