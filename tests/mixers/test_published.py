"""Published KDA weights: equality with the layers they come from, in every naming, and what is refused."""

import importlib

import pytest
import torch
from torch import Tensor

from gendistill.mixers import SequenceInfo
from gendistill.mixers.published import load_published_kda

HIDDEN, HEADS, K = 24, 4, 8
LOWER_BOUND = -5.0
KINDS = {"kimi_linear": ("KimiLinearConfig", "KimiLinearDeltaAttention"),
         "glm5_next": ("Glm5NextTextConfig", "Glm5NextTextLinearAttention")}  # fmt: skip


def their_layer(kind="kimi_linear"):
    reason = f"this transformers has no {kind}"
    config_class, layer_class = KINDS[kind]
    module = pytest.importorskip(f"transformers.models.{kind}.modeling_{kind}", reason=reason)
    configuration = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
    bounded = {"linear_lower_bound": LOWER_BOUND} if kind == "glm5_next" else {}
    config = getattr(configuration, config_class)(
        hidden_size=HIDDEN, linear_num_heads=HEADS, linear_head_dim=K, linear_conv_kernel_dim=4,
        num_hidden_layers=1, layer_types=["linear_attention"], rms_norm_eps=1e-3, **bounded,
    )  # fmt: skip
    layer = getattr(module, layer_class)(config, 0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # some of their parameters are left to the model's own initialisation
        for name, parameter in layer.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return layer


def random_weights(dtype=torch.float64, *, conv_bias=False, rank=6):
    """Draw the tensors of one layer under flash-linear-attention's names, with every bias it may have."""
    size = HEADS * K
    shapes = {
        **{f"{letter}_proj.weight": (size, HIDDEN) for letter in "qkv"},
        **{f"{letter}_conv1d.weight": (size, 1, 4) for letter in "qkv"},
        **({f"{letter}_conv1d.bias": (size,) for letter in "qkv"} if conv_bias else {}),
        "f_proj.0.weight": (rank, HIDDEN), "f_proj.1.weight": (size, rank),
        "A_log": (HEADS,), "dt_bias": (size,), "b_proj.weight": (HEADS, HIDDEN),
        "g_proj.0.weight": (rank, HIDDEN), "g_proj.1.weight": (size, rank), "g_proj.1.bias": (size,),
        "o_norm.weight": (K,), "o_proj.weight": (HIDDEN, size),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype) * 0.4 for name, shape in shapes.items()
    }


def checkpoint_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name a transformers layer's tensors as the published files do."""
    named = {name.removeprefix("forget_gate."): tensor for name, tensor in weights.items()}
    parts = named.pop("conv1d.weight").chunk(3)
    return named | {f"{letter}_conv1d.weight": part for letter, part in zip("qkv", parts, strict=True)}


def written_out(w: dict[str, Tensor], x: Tensor, *, eps: float) -> Tensor:
    """Compute one sequence ``[T, hidden]`` from the formulas, one token and one head at a time."""
    qkv = []
    for letter in "qkv":
        flat, taps = x @ w[f"{letter}_proj.weight"].T, w[f"{letter}_conv1d.weight"][:, 0]
        bias = w.get(f"{letter}_conv1d.bias", torch.zeros(()))
        rows = []
        for t in range(len(x)):
            window = [flat[t - back] * taps[:, -1 - back] for back in range(taps.shape[1]) if t >= back]
            total = sum(window) + bias
            rows.append(total / (1 + torch.exp(-total)))
        qkv.append(torch.stack(rows).reshape(len(x), HEADS, K))
    q, k, v = qkv
    raw = (x @ w["f_proj.0.weight"].T @ w["f_proj.1.weight"].T + w["dt_bias"]).reshape(len(x), HEADS, K)
    g = -w["A_log"].exp()[:, None] * torch.log1p(raw.exp())
    beta = 1 / (1 + torch.exp(-(x @ w["b_proj.weight"].T)))
    gate = x @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    gate = (1 / (1 + torch.exp(-gate))).reshape(len(x), HEADS, K)
    out = torch.zeros(len(x), HEADS, K, dtype=x.dtype)
    for head in range(HEADS):
        state = torch.zeros(K, K, dtype=x.dtype)
        for t in range(len(x)):
            query = q[t, head] / (q[t, head].square().sum() + 1e-6).sqrt() * K**-0.5
            key = k[t, head] / (k[t, head].square().sum() + 1e-6).sqrt()
            state = g[t, head].exp()[:, None] * state
            state = state + beta[t, head] * torch.outer(key, v[t, head] - state.T @ key)
            read = state.T @ query
            norm = (read.square().mean() + eps).sqrt()
            out[t, head] = read / norm * w["o_norm.weight"] * gate[t, head]
    return out.flatten(1) @ w["o_proj.weight"].T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 7, 64, 65, 130])
@torch.no_grad()
def test_layer_equals_that_of_transformers(kind, length):
    theirs = their_layer(kind)
    bound = LOWER_BOUND if kind == "glm5_next" else None
    ours = load_published_kda(theirs.state_dict(), norm_eps=1e-3, gate_lower_bound=bound)
    x = torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(length))
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_padded_rows_equal_those_of_transformers():
    theirs, lengths, width = their_layer(), [100, 67, 3], 100
    ours = load_published_kda(theirs.state_dict(), norm_eps=1e-3)
    x = torch.randn(3, width, HIDDEN, generator=torch.Generator().manual_seed(2))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    out = ours(x, sequences=SequenceInfo.from_mask(mask))[0]
    torch.testing.assert_close(out, theirs(x, attention_mask=mask), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_long_first_part_and_single_tokens_equal_the_whole_of_transformers():
    theirs = their_layer()
    ours = load_published_kda(theirs.state_dict(), norm_eps=1e-3)
    x = torch.randn(2, 80, HIDDEN, generator=torch.Generator().manual_seed(3))
    out, state = ours(x[:, :70])
    parts = [out]
    for t in range(70, 80):
        out, state = ours(x[:, t : t + 1], state=state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), theirs(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_names_in_checkpoint_files_give_the_same_layer():
    weights = their_layer().state_dict()
    one, two = load_published_kda(weights), load_published_kda(checkpoint_names(weights))
    assert one.state_dict().keys() == two.state_dict().keys()
    assert all(torch.equal(tensor, two.state_dict()[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("conv_bias", [False, True], ids=["no bias", "bias"])
@torch.no_grad()
def test_layer_of_flash_linear_attention_equals_its_formulas_in_float64(conv_bias):
    weights = random_weights(conv_bias=conv_bias)
    x = torch.randn(2, 70, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = torch.stack([written_out(weights, row, eps=1e-5) for row in x])
    torch.testing.assert_close(load_published_kda(weights)(x)[0], expected, rtol=0, atol=1e-10)


def test_tensors_are_copied_and_gates_are_float32():
    weights = random_weights(torch.bfloat16)
    weights["A_log"] = weights["A_log"].float()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    layer = load_published_kda(weights)
    dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"A_log", "dt_bias"}
    out, _ = layer(torch.randn(1, 5, HIDDEN, dtype=torch.bfloat16))
    out.float().sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            assert parameter.grad is not None
            parameter.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.items())


def test_missing_unknown_and_misshapen_tensors_are_named():
    full = random_weights(conv_bias=True)

    def refused(message, changes, without=()):
        weights = {name: tensor for name, tensor in (full | changes).items() if name not in without}
        with pytest.raises(ValueError, match=message):
            load_published_kda(weights)

    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.float64)

    refused(r"needs f_b_proj.weight \(or .*f_proj.1.weight\)", {}, ["f_proj.1.weight"])
    refused(r"needs k_conv1d.bias", {}, ["k_conv1d.bias"])
    refused(r"needs q_conv1d.weight \(or conv1d.weight\)", {}, ["q_conv1d.weight"])
    refused(r"not known.*: q_proj.bias", {"q_proj.bias": zeros(32)})
    refused(r"f_a_proj.weight.* is there twice", {"f_a_proj.weight": full["f_proj.0.weight"]})
    refused(r"q_conv1d.weight.* is there twice, also as conv1d.weight", {"conv1d.weight": zeros(96, 1, 4)})
    refused(r"conv1d.weight has 95 channels, q, k and v have 96", {"conv1d.weight": zeros(95, 1, 4)})
    # more value heads than query heads, and wider values, which flash-linear-attention knows
    refused(r"v_proj.weight has shape \(64, 24\).*need \(32, 24\)", {"v_proj.weight": zeros(64, 24)})
    refused(r"o_norm.weight has 16 channels.*values as wide as keys", {"o_norm.weight": zeros(16)})
    refused(r"o_proj.weight has shape \(24, 31\)", {"o_proj.weight": zeros(24, 31)})
