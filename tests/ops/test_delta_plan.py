"""Plans of the chunked kernels: what calls share, what tells them apart, and what is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the Triton kernels need triton")

from gendistill_kernels.delta import chunk
from gendistill_kernels.delta.plan import plan_launches, token_stride
from gendistill_kernels.delta.rule import Inputs, Rule
from gendistill_kernels.runtime import memory
from gendistill_kernels.runtime.launch import Fixed
from gendistill_kernels.runtime.lookup import Config, forced
from gendistill_kernels.runtime.memory import Results, Workspace

F32, BF16 = torch.float32, torch.bfloat16
BOUNDED = Rule("bounded")


def make(*, B=8, T=4096, H=16, K=128, V=128, rule=BOUNDED, packed=None, span=128, changes=None, **kinds):
    shapes = {
        "q": (B, T, H, K),
        "k": (B, T, H, K),
        "v": (B, T, H, V),
        "decay": (B, T, H, K),
        "beta": (B, T, H),
    }
    shapes |= {"A_log": (H,), "dt_bias": (H * K,), "erase": None, "write": None} | (changes or {})
    usual = {name: None if shape is None else (BF16, 0) for name, shape in shapes.items()}
    strides = tuple(
        (T * shape[2] * shape[3], shape[2] * shape[3], shape[3], 1)
        for shape in (shapes["q"], shapes["k"], shapes["v"])
    )
    about = tuple(
        None if shape is None else (*(usual | kinds)[name], shape) for name, shape in shapes.items()
    )
    return plan_launches(about, strides, torch.device("cpu"), rule, packed, span, BF16, True)


def test_equal_calls_share_a_plan():
    assert make() is make()
    assert make().forward(save=True, state=None) is make().forward(save=True, state=None)
    others = [make(T=4095), make(rule=Rule("softplus")), make(q=(torch.float16, 0)), make(span=8)]
    assert len({make(), *others}) == 5
    one = make()
    states = [one.forward(save=False, state=state) for state in (None, (F32, 0), (BF16, 0))]
    assert len(set(map(id, states))) == 3
    assert [each.scan.constants["HAS_STATE"] for each in states] == [False, True, True]


def test_tensors_on_several_devices_are_refused():
    with pytest.raises(ValueError, match="v is on cuda:1 and q on cuda:0; put all tensors on one device"):
        make(v=(BF16, 1))
    with pytest.raises(ValueError, match="dt_bias is on the CPU and q on cuda:0"):
        make(dt_bias=(F32, -1))
    with pytest.raises(ValueError, match="cu_seqlens is on the CPU"):
        make(B=1, packed=(64, 3, 0, -1))
    with pytest.raises(ValueError, match="state is on cuda:2"):
        make().forward(save=False, state=(F32, 2))
    with pytest.raises(ValueError, match="grad_state is on the CPU"):
        make().reverse_scan((BF16, 0), (F32, -1), want_state=False)
    with pytest.raises(ValueError, match="grad_out is on cuda:1"):
        make().local((BF16, 1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"dt_bias": (16,)},
            r"dt_bias must have 2048 elements, one for each head and key channel, got shape \[16\]",
        ),
        ({"A_log": (1,)}, r"A_log must have 16 elements, one for each head, got shape \[1\]"),
        ({"A_log": None}, "A_log must have 16 elements, one for each head, got None"),
    ],
)
def test_parameters_of_another_shape_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make(changes=changes)
    assert make(changes={"A_log": (1, 1, 16, 1), "dt_bias": (16, 128)})
    assert make(rule=Rule("none"), changes={"A_log": None, "dt_bias": None})


def test_numbers_are_of_one_class():
    """A launch that was compiled for an integer takes no other."""
    for number in (-5, -5.0):
        found = make(rule=Rule("bounded", number, scale=1))
        assert (type(found.lower_bound), type(found.scale)) == (float, float)


def test_packed_sequences_are_walked_by_more_programs():
    whole, packed = (
        make(**sizes).forward(save=False, state=None).scan
        for sizes in ({}, {"B": 1, "T": 8 * 4096, "packed": (512, 8, 0, 0), "span": 1000})
    )
    assert (whole.grid, whole.constants["BV"]) == ((1 * 128,), 128)
    assert (packed.grid, packed.constants["BV"]) == ((2 * 128,), 64)


def test_any_number_of_rows_fits_on_a_grid():
    """The second and the third axis of a grid hold no more than 65,535 programs."""
    plan = make(B=4096, T=1, span=1)
    back = plan.reverse_scan(None, None, want_state=True)
    long = make(B=4096, T=65, span=1)
    launches = [
        *plan.forward(save=True, state=None), *plan.local(None), *back,
        *long.forward(save=True, state=None), *long.reverse_scan(None, None, want_state=True),
    ]  # fmt: skip
    launches = [launch for launch in launches if isinstance(launch, Fixed)]
    assert len(launches) >= 12
    assert all(number <= 65535 for launch in launches for number in launch.grid[1:])


def test_long_sequences_are_cut():
    launches = make(B=1, T=32768).forward(save=True, state=None)
    assert launches.summary is not None
    # the end of a segment and its matrix; below two halves of the values
    assert launches.summary.grid == (2 * 64,)
    assert launches.scan.grid == (2 * 64,)
    assert launches.scan.constants["HAS_STATE"]
    assert launches.late.parts(launches.late.allocate())[5].shape == (4, 16, 128, 128)
    assert [part.shape for part in launches.span_states.parts(launches.span_states.allocate())] == [
        (4, 16, 128, 128)
    ] * 2
    assert make(B=1, T=8192).forward(save=True, state=None).summary is None


@pytest.mark.parametrize(
    ("tokens", "spans", "saving"), [(2304, 0, 0), (2305, 4, 0), (8193, 4, 2), (65_536, 8, 8)]
)
def test_rows_without_gradients_are_cut_into_more_spans(tokens, spans, saving):
    part = torch.empty(2, tokens, 1, 16, device="meta")
    x = Inputs(part, part, part, part, part[..., 0])
    for save, number in ((False, spans), (True, saving)):
        plan = chunk._plan(x, Rule("none"), None, save=save)[1]
        assert plan.spans == 2 * number
        launches = plan.forward(save=save, state=None)
        assert (launches.summary is not None) == (number > 0)
        if launches.carry is not None:
            # what a sequence begins with is its own state, unless it has to be found by the backward pass
            assert launches.carry.constants["BEGINS"] == save


def test_a_forced_configuration_makes_new_plans():
    usual = make().forward(save=False, state=None).scan
    with forced("scan", Config(32, 2, stages=2)):
        other = make().forward(save=False, state=None).scan
    assert (other.constants["BV"], other.constants["num_warps"]) == (32, 2)
    assert make().forward(save=False, state=None).scan.constants == usual.constants


SPACES = [(3, 2, 5), (2, 1, 5), (0, 4), (1,), (7, 1, 1)]


def test_results_are_new_and_contiguous():
    work = Results([None, *((shape, BF16) for shape in SPACES)], torch.device("cpu"))
    (nothing, *first), (_, *second) = work.allocate(), work.allocate()
    assert nothing is None
    for shape, one, other in zip(SPACES, first, second, strict=True):
        assert (one.shape, one.dtype) == (shape, BF16)
        assert one.is_contiguous()
        assert one.untyped_storage().nbytes() == 2 * one.numel()
        assert one.numel() == 0 or one.data_ptr() != other.data_ptr()


@pytest.mark.parametrize("gap", [0, 4096])
def test_parts_of_a_workspace_are_aligned_and_apart(monkeypatch, gap):
    monkeypatch.setattr(memory, "_GAP", gap)
    kinds = [BF16, torch.float32, BF16, torch.int32, torch.float32]
    spaces = {
        "nothing": None,
        **{str(shape): (shape, kind) for shape, kind in zip(SPACES, kinds, strict=True)},
    }
    work = Workspace(spaces, torch.device("cpu"))
    whole = work.allocate().zero_()
    assert whole.data_ptr() != work.allocate().data_ptr()
    nothing, *parts = work.parts(whole)
    assert nothing is None
    # each is written whole, and only that changes
    for number, (part, shape, kind) in enumerate(zip(parts, SPACES, kinds, strict=True), 1):
        assert (part.shape, part.dtype, part.get_device()) == (shape, kind, -1)
        assert (part.data_ptr() - whole.data_ptr()) % 512 == 0
        tensor = part.tensor
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, kind, True)
        assert tensor.numel() == 0 or tensor.data_ptr() == part.data_ptr()
        tensor.view(torch.uint8).fill_(number)
    sizes = [tensor.numel() * kind.itemsize for tensor, kind in ((part.tensor, part.dtype) for part in parts)]
    assert whole.bincount(minlength=6).tolist() == [whole.numel() - sum(sizes), *sizes]
    places = sorted((part.data_ptr(), size) for part, size in zip(parts, sizes, strict=True))
    edges = [
        whole.data_ptr(),
        *(edge for at, size in places for edge in (at, at + size)),
        whole.data_ptr() + whole.numel(),
    ]
    assert all(after - before >= gap for before, after in zip(edges[::2], edges[1::2], strict=True))


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        ((2, 5, 3, 4), (60, 12, 4, 1), 12),
        ((2, 5, 3, 4), (180, 36, 4, 1), 36),
        ((1, 5, 3, 4), (7, 36, 4, 1), 36),
        ((2, 5, 3, 4), (200, 36, 4, 1), None),
        ((2, 5, 3, 4), (60, 4, 20, 1), None),
        ((2, 5, 3, 4), (0, 0, 4, 1), None),
        ((2, 1, 3, 4), (36, 12, 4, 1), 36),
        ((1, 1, 3, 4), (1, 1, 4, 1), 12),
        # a tensor without elements stays as it is when it is made contiguous
        ((2, 5, 3, 0), (60, 12, 4, 1), 0),
    ],
)
def test_strides_that_kernels_can_step_through(shape, stride, expected):
    assert token_stride(shape, stride) == expected
