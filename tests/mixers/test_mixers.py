"""The mixers as plain layers: parameter table, packing, padding, states, and equality with other implementations."""

import math
import os

import pytest
import torch
from transformers import AutoConfig

from gendistill.anatomy.family import layer_geometry
from gendistill.anatomy.kda import KDA as SPEC
from gendistill.anatomy.kda import KDASettings
from gendistill.mixers import KDA, FullAttention, SequenceInfo, SlidingWindowAttention
from gendistill.testing import tiny_teacher

GEOMETRIES = [(16, 8, 128), (14, 2, 64), (9, 3, 64), (32, 8, 128), (4, 4, 16)]


def perturbed(module):
    """Move zero and identity starts away from where they do nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return module


def make_kda(**settings):
    torch.manual_seed(0)
    settings = {"half_life": (1.0, 64.0), "qkv_bias": True, **settings}
    return perturbed(KDA(24, 4, 2, 8, **settings)).double()


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), GEOMETRIES)
def test_parameters_are_those_of_the_table(heads, kv_heads, head_dim):
    shape = {"hidden_size": 48, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    for biases, settings in (
        ({}, {}),
        ({}, {"conv_size": 0, "output_gate": "none"}),
        ({"qkv_bias": True}, {"output_norm": True}),
    ):
        with torch.device("meta"):
            layer = KDA(**shape, **biases, **settings)
        table = SPEC.parameters(layer_geometry(**shape, **biases), KDASettings(**settings))
        assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
            name: spec.shape for name, spec in table.items()
        }


def test_published_parameter_count_of_the_0_6b_student():
    """arXiv 2603.26556 reports 613M for 21 KDA layers: 827,280 more per layer than Qwen3's attention."""
    table = SPEC.parameters(layer_geometry(1024, 16, 8, 128), KDASettings(output_norm=True))
    count = sum(math.prod(spec.shape) for spec in table.values())
    assert count == 6_291_712 + 827_280


def test_half_lives_span_the_asked_range():
    layer = KDA(24, 4, 2, 8, half_life=(4.0, 512.0))
    torch.nn.init.zeros_(layer.f_b_proj.weight)
    half_life = math.log(2) / -layer.log_decay(torch.randn(1, 1, 24)).detach().flatten()
    quantiles = half_life.sort().values
    assert quantiles[0] == pytest.approx(4, rel=1e-3)
    assert quantiles[-1] == pytest.approx(512, rel=1e-3)
    assert quantiles[16] == pytest.approx(math.sqrt(4 * 512), rel=0.1)


@pytest.mark.parametrize("preset", ["mamba", "slow", "g6"])
def test_softplus_presets_start_finite(preset):
    layer = KDA(24, 4, 2, 8, gate="softplus", decay_init=preset)
    decay = layer.log_decay(torch.randn(1, 3, 24))
    assert torch.isfinite(decay).all()
    assert (decay <= 0).all()


@pytest.mark.parametrize("settings", [{}, {"rope": True}, {"conv_size": 0}, {"output_norm": True, "gate": "softplus"}],
                         ids=str)  # fmt: skip
@torch.no_grad()
def test_packed_and_padded_rows_equal_single_sequences(settings):
    layer, lengths, width = make_kda(**settings), [5, 0, 9, 1], 9
    x = torch.randn(4, width, 24, dtype=torch.float64)
    angle = torch.arange(width)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]).repeat(2)
    cos, sin = angle.cos()[None].double(), angle.sin()[None].double()
    for side in ("left", "right"):
        mask = torch.zeros(4, width)
        for row, length in enumerate(lengths):
            cells = slice(width - length, width) if side == "left" else slice(0, length)
            mask[row, cells] = 1
        out, state = layer(x, sequences=SequenceInfo.from_mask(mask), position_embeddings=(cos, sin))
        for row, length in enumerate(lengths):
            cells = mask[row].bool()
            alone, alone_state = layer(
                x[row : row + 1, cells], position_embeddings=(cos[:, cells], sin[:, cells])
            )
            torch.testing.assert_close(out[row, cells], alone[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(state.recurrent[row], alone_state.recurrent[0], rtol=0, atol=1e-10)
            assert (out[row, ~cells] == 0).all()
            if length and state.conv is not None:
                torch.testing.assert_close(state.conv[row], alone_state.conv[0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_positions_and_cu_seqlens_describe_the_same_documents():
    layer, x = make_kda(), torch.randn(2, 8, 24, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    by_position = layer(x, sequences=SequenceInfo.from_position_ids(positions))[0]
    by_ends = layer(x, sequences=SequenceInfo.from_cu_seqlens(torch.tensor([0, 3, 8, 16])))[0]
    assert torch.equal(by_position, by_ends)
    assert SequenceInfo.from_position_ids(positions[1:]) is None
    torch.testing.assert_close(by_ends[0, 3:], layer(x[:1, 3:])[0][0], rtol=0, atol=1e-10)


@torch.no_grad()
def test_state_carries_any_split():
    layer, x = make_kda(), torch.randn(2, 20, 24, dtype=torch.float64)
    whole = layer(x)[0]
    for split in (1, 2, 7, 19):
        state, parts = None, []
        for piece in x.split(split, dim=1):
            out, state = layer(piece, state=state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def test_no_gradient_flows_back_in_time():
    layer = make_kda()
    x = torch.randn(1, 20, 24, dtype=torch.float64, requires_grad=True)
    layer(x)[0][0, :11].sum().backward()
    assert (x.grad[0, 11:] == 0).all()
    assert (x.grad[0, :11].abs().sum(-1) > 0).all()


@torch.no_grad()
def test_kda_layer_matches_kimi_linear_with_the_same_weights():
    """Same weights, another code base: no grouped heads, SiLU convolution, softplus gate, normed sigmoid output."""
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = AutoConfig.for_model(
        "kimi_linear", hidden_size=24, linear_num_heads=4, linear_head_dim=8, linear_conv_kernel_dim=4,
        num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=1e-6, num_attention_heads=4,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = KimiLinearDeltaAttention(config, 0).eval()
    with torch.no_grad():  # some of their parameters are left to the model's own initialisation
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = KDA(
        24, 4, 4, 8, conv_activation="silu", conv_bias=False, gate="softplus", decay_init="mamba",
        output_gate="sigmoid", output_norm=True,
    )  # fmt: skip
    weights = dict(theirs.state_dict())
    conv = weights.pop("conv1d.weight").split(32)
    renamed = {
        "forget_gate.f_a_proj.weight": "f_a_proj.weight",
        "forget_gate.f_b_proj.weight": "f_b_proj.weight",
        "forget_gate.A_log": "A_log",
        "forget_gate.dt_bias": "dt_bias",
    }
    weights = {renamed.get(name, name): tensor for name, tensor in weights.items()}
    weights |= {f"{letter}_conv1d.weight": part for letter, part in zip("qkv", conv, strict=True)}
    weights["A_log"] = weights["A_log"].flatten()
    weights["g_b_proj.bias"] = torch.zeros(32)
    ours.load_state_dict(weights)
    x = torch.randn(2, 21, 24)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_attention_layer_takes_pretrained_weights(family):
    teacher = tiny_teacher(family)
    module, x = teacher.model.layers[0].self_attn, torch.randn(2, 11, 32)
    cos, sin = teacher.model.rotary_emb(x, torch.arange(11)[None])
    settings = {"qkv_bias": family == "qwen2", "qk_norm": family == "qwen3"}
    full = FullAttention(32, 4, 2, 8, **settings)
    full.load_state_dict(module.state_dict())
    expected = module(x, position_embeddings=(cos, sin), attention_mask=None)[0]
    torch.testing.assert_close(full(x, position_embeddings=(cos, sin)), expected, rtol=0, atol=1e-5)
    wide = SlidingWindowAttention(32, 4, 2, 8, window=11, **settings)
    wide.load_state_dict(module.state_dict())
    torch.testing.assert_close(wide(x, position_embeddings=(cos, sin)), expected, rtol=0, atol=1e-5)
    wide.window = 3
    narrow = wide(x, position_embeddings=(cos, sin))
    tail = full(x[:, 4:7], position_embeddings=(cos[:, 4:7], sin[:, 4:7]))
    torch.testing.assert_close(narrow[:, 6], tail[:, -1], rtol=0, atol=1e-5)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="interpreted, Triton runs on the CPU")
def test_triton_on_a_cpu_is_refused_when_it_would_run():
    layer = KDA(24, 4, impl="triton")
    with pytest.raises(ValueError, match='impl "triton" is not available for delta_rule on cpu'):
        layer(torch.randn(1, 3, 24))
    assert KDA(24, 4).impl == "reference"


def test_bad_settings_are_named():
    for settings, message in (
        ({"gate": "tanh"}, "bounded or softplus"),
        ({"output_gate": "relu"}, "silu, sigmoid or none"),
        ({"impl": "cuda"}, "auto, reference or triton"),
        ({"num_kv_heads": 3}, "not a multiple"),
        ({"decay_init": "g6"}, "log_uniform"),
        ({"init": "vo"}, "how a conversion starts"),
        ({"taps": 3}, "among conv_activation"),
    ):
        with pytest.raises(ValueError, match=message):
            KDA(24, 4, **{"num_kv_heads": 2, **settings})
    with pytest.raises(ValueError, match="at least 1"):
        SlidingWindowAttention(24, 4, window=0)
    with pytest.raises(ValueError, match="position_embeddings"):
        KDA(24, 4, 2, 8, rope=True)(torch.randn(1, 3, 24))
