"""Groups of packed layers that share memory with a larger one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gendistill.engine.decoder import fuse, refreshed, release
from gendistill.engine.linear import PackedDiagonal, PackedLinear, can_lie_diagonally, pack_groups
from gendistill.engine.taps import PackedTaps
from gendistill.mixers import kda
from gendistill.mixers.base import MixerState, SequenceInfo
from gendistill.mixers.kda import KDA
from gendistill.ops.select import Impl
from gendistill.ops.types import Segments
from gendistill.testing import tiny_student


def pack(groups, **settings):
    """Pack groups, with the weights as they are."""
    made = pack_groups(groups, torch.float32, **settings)
    for packed in made.values():
        for source, target in zip(packed.sources, packed.targets, strict=True):
            target.copy_(source.detach())
    return made


def layers(*widths, bias=()):
    return tuple(nn.Linear(16, width, bias=number in bias) for number, width in enumerate(widths))


@pytest.mark.parametrize("learns", [True, False])
def test_parts_lie_in_the_whole_and_say_what_they_would_alone(learns):
    group = layers(24, 8, 5, 3, bias=(0, 1))
    groups = [group, group[:2], group[2:]]
    alone = {each: pack([each])[each] for each in groups}
    packed = pack(groups, learns=learns)
    whole = packed[group]
    x = torch.randn(7, 16)
    for each in groups:
        assert packed[each].matrix.untyped_storage().data_ptr() == whole.matrix.untyped_storage().data_ptr()
        expected = alone[each].split(alone[each](x))
        for found, right, layer in zip(packed[each].split(packed[each](x)), expected, each, strict=True):
            assert torch.equal(found, right)
            assert torch.allclose(found, layer(x), atol=1e-6)
    assert packed[group[:2]].bias is not None
    assert packed[group[2:]].bias is None
    # rows of zeros at the end make a product fast, alone as in the whole
    assert len(packed[group[2:]].matrix) == 8


def test_gradients_reach_the_layers_through_a_part():
    group = layers(8, 8, 6)
    packed = pack([group, group[:2], group[2:]])
    x = torch.randn(5, 16)
    for each in (group[:2], group[2:]):
        sum(part.square().sum() for part in packed[each].split(packed[each](x))).backward()
    found = [layer.weight.grad.clone() for layer in group]
    for layer in group:
        layer.weight.grad = None
        layer(x).square().sum().backward()
    for layer, grad in zip(group, found, strict=True):
        assert torch.allclose(layer.weight.grad, grad, atol=1e-5)


def test_groups_that_cannot_share_are_packed_alone():
    group = layers(20, 8, 5)
    packed = pack([group, group[:2], group[2:]])
    # the third begins at row 28, and products with rows that begin there are slow
    assert group not in packed
    assert set(packed) == {group[:2], group[2:]}


def test_a_decode_step_reads_its_input_once():
    model = tiny_student("qwen3", "pure").eval()
    mixer = model.model.layers[0].self_attn
    config = model.config
    state = None
    with torch.no_grad():
        _, state = KDA.forward(mixer, torch.randn(2, 6, config.hidden_size))
        x = torch.randn(2, 1, config.hidden_size)
        right, after = mixer._decode(x, state, Impl.REFERENCE)
        fuse(model, torch.float32)
        fused = refreshed(model)
        groups = next(
            value.args[2] for module, name, value in fused.patched if module is mixer and name == "forward"
        )
        mixer.packed = groups
        assert mixer._all in groups
        calls = []
        diagonal = mixer.side_by_side()
        raised = groups[diagonal]
        groups[diagonal] = lambda x: calls.append(diagonal) or raised(x)
        for group, packed in [each for each in groups.items() if isinstance(each[1], PackedLinear)]:
            groups[group] = lambda *a, packed=packed, group=group: calls.append(group) or packed(*a)
            groups[group].split = packed.split
        found, then = mixer._decode(x, state, Impl.REFERENCE)
        del mixer.packed
        release(model)
    assert torch.allclose(found, right, atol=1e-5)
    assert isinstance(then, MixerState)
    assert torch.allclose(then.recurrent, after.recurrent, atol=1e-5)
    assert calls == [mixer._all, diagonal, (mixer.o_proj,)]


@pytest.mark.parametrize("biased", [(), (1,), (0, 1, 2)])
def test_layers_that_read_side_by_side_are_one_product(biased):
    widths, inputs = (6, 9, 4), (3, 5, 2)
    group = [
        nn.Linear(one, other, bias=number in biased)
        for number, (one, other) in enumerate(zip(inputs, widths, strict=True))
    ]
    assert can_lie_diagonally(group)
    assert not can_lie_diagonally(group[:1])
    assert not can_lie_diagonally(())
    packed = PackedDiagonal(group, torch.float32)
    for source, target in zip(packed.sources, packed.targets, strict=True):
        target.copy_(source.detach())
    assert (packed.bias is None) == (not biased)
    # as part of a wider output
    x = torch.randn(2, 4, 12)[..., : sum(inputs)]
    for found, part, layer in zip(packed(x), x.split(inputs, dim=-1), group, strict=True):
        assert torch.allclose(found, layer(part), atol=1e-6)


def test_a_diagonal_follows_its_parameters():
    model = tiny_student("qwen3", "pure").eval()
    mixer = model.model.layers[0].self_attn
    fuse(model, torch.float32)
    fused = refreshed(model)
    (packed,) = [
        each
        for each in fused.packed
        if isinstance(each, PackedDiagonal) and each.sources[0] is mixer.f_b_proj.weight
    ]
    x = torch.randn(3, packed.matrix.shape[1])
    before = packed(x)
    with torch.no_grad():
        mixer.f_b_proj.weight.mul_(2.0)
    fused.refresh()
    after = packed(x)
    assert torch.allclose(after[0], 2 * before[0], atol=1e-6)
    assert torch.equal(after[1], before[1])
    release(model)


def test_taps_are_read_as_one_without_gradients_and_follow_their_parameters(monkeypatch):
    model = tiny_student("qwen3", "pure").eval()
    mixer = model.model.layers[0].self_attn
    read, conv = [], kda.causal_conv
    monkeypatch.setattr(
        kda, "causal_conv", lambda x, weight, *a, **k: read.append(weight) or conv(x, weight, *a, **k)
    )
    inputs = {
        "input_ids": torch.arange(12)[None],
        "position_ids": torch.arange(12)[None],
        "sequences": SequenceInfo(Segments([12])),
        "use_cache": False,
    }
    plain = model.model(**inputs).last_hidden_state
    fuse(model, torch.float32)
    (taps,) = [
        each
        for each in refreshed(model).packed
        if isinstance(each, PackedTaps) and each.sources[0] is mixer.q_conv1d.weight
    ]
    with torch.no_grad():
        read.clear()
        assert torch.allclose(model.model(**inputs).last_hidden_state, plain, atol=1e-5)
        assert read[0].data_ptr() == taps.weight.data_ptr()
        mixer.q_conv1d.weight.mul_(2.0)
        model.model(**inputs)
        assert torch.equal(taps.weight[: len(mixer.q_conv1d.weight)], mixer.q_conv1d.weight[:, 0])
    read.clear()
    model.model(**inputs).last_hidden_state.sum().backward()
    assert read[0].data_ptr() != taps.weight.data_ptr()
    assert mixer.q_conv1d.weight.grad.any()
    release(model)
