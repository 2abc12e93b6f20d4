"""Published Kimi Delta Attention weights as our layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gendistill.mixers.kda import KDA

# transformers keeps the decay gate in a module of its own; flash-linear-attention holds each low-rank pair as a list
_RENAMED = {
    "forget_gate.A_log": "A_log",
    "forget_gate.dt_bias": "dt_bias",
    "forget_gate.f_a_proj.weight": "f_a_proj.weight",
    "forget_gate.f_b_proj.weight": "f_b_proj.weight",
    "f_proj.0.weight": "f_a_proj.weight",
    "f_proj.1.weight": "f_b_proj.weight",
    "g_proj.0.weight": "g_a_proj.weight",
    "g_proj.1.weight": "g_b_proj.weight",
    "g_proj.1.bias": "g_b_proj.bias",
}
_STACKED = "conv1d.weight"
_PROJECTIONS = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
_CONVOLUTIONS = ("q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight")
_CONVOLUTION_BIASES = ("q_conv1d.bias", "k_conv1d.bias", "v_conv1d.bias")
_OUTPUT_GATE_BIAS = "g_b_proj.bias"
_REQUIRED = (
    *_PROJECTIONS,
    *_CONVOLUTIONS,
    "f_a_proj.weight",
    "f_b_proj.weight",
    "A_log",
    "dt_bias",
    "b_proj.weight",
    "g_a_proj.weight",
    "g_b_proj.weight",
    "o_norm.weight",
    "o_proj.weight",
)
_FLOAT32 = ("A_log", "dt_bias")


def load_published_kda(
    weights: Mapping[str, Tensor],
    *,
    norm_eps: float = 1e-5,
    gate_lower_bound: float | None = None,
    impl: str = "auto",
) -> KDA:
    """Build a :class:`KDA` from the tensors of one published layer.

    Understood are the names of transformers' ``kimi_linear`` layer (``conv1d`` over q, k and v, ``forget_gate.*``), of
    Kimi Linear checkpoint files (``q_conv1d``, ``f_a_proj``, ...) and of flash-linear-attention's
    ``KimiDeltaAttention`` (``f_proj.0``, ``g_proj.1``, ...). The layer has a SiLU convolution, an RMSNorm of every head
    and a sigmoid output gate. All sizes come from the shapes. What is not in the tensors has to be said here; a layer
    that doubles its write strength (``allow_neg_eigval``) cannot be told from one that does not, and is not supported.

    Args:
        weights: Tensors of one layer, named without the prefix of the model. They are copied; all take the dtype of
            ``q_proj.weight`` but ``A_log`` and ``dt_bias``, which are float32 at least.
        norm_eps: Epsilon of the RMSNorm: ``rms_norm_eps`` or ``norm_eps`` of the published configuration.
        gate_lower_bound: Of a bounded gate, < 0 (``linear_lower_bound``); None for the softplus gate.
        impl: As in :class:`KDA`.
    Raises:
        ValueError: A tensor is missing, unknown, there under two names, or not of the shape that the others ask for, as
            with more value heads than query heads, or values and keys of different width.
    Source: outputs are tested against transformers' ``kimi_linear`` and ``glm5_next`` layers. Names in checkpoint files
        are those that transformers' weight conversion reads. Names and shapes of flash-linear-attention were read in
        its source (``fla/layers/kda.py`` at 0812a88); its layer needs a GPU and was not run: the test compares with the
        formulas of that file in float64.
    """
    tensors = _with_our_names(weights)
    _check_names(tensors)
    K = _head_dim(tensors)
    with torch.device("meta"):
        layer = KDA(
            hidden_size=tensors["q_proj.weight"].shape[-1],
            num_heads=tensors["A_log"].numel(),
            num_kv_heads=max(1, tensors["k_proj.weight"].shape[0] // K),
            head_dim=K,
            conv_size=tensors["q_conv1d.weight"].shape[-1],
            conv_activation="silu",
            conv_bias=_CONVOLUTION_BIASES[0] in tensors,
            gate="softplus" if gate_lower_bound is None else "bounded",
            gate_lower_bound=-5.0 if gate_lower_bound is None else gate_lower_bound,
            gate_rank=tensors["f_a_proj.weight"].shape[0],
            output_gate="sigmoid",
            output_gate_rank=tensors["g_a_proj.weight"].shape[0],
            output_norm=True,
            norm_eps=norm_eps,
            impl=impl,
        )
    dtype = tensors["q_proj.weight"].dtype
    gates = torch.promote_types(dtype, torch.float32)
    if _OUTPUT_GATE_BIAS not in tensors:
        tensors[_OUTPUT_GATE_BIAS] = tensors["g_b_proj.weight"].new_zeros(layer.num_heads * K)
    for name, parameter in layer.named_parameters():
        found = tensors[name]
        if found.shape != parameter.shape:
            raise ValueError(
                f"{_names(name)} has shape {tuple(found.shape)}; {layer.num_heads} heads of {K} channels "
                f"and {layer.num_kv_heads} key/value heads need {tuple(parameter.shape)}"
            )
        tensors[name] = found.detach().to(gates if name in _FLOAT32 else dtype, copy=True).contiguous()
    layer.load_state_dict(tensors, assign=True)
    return layer


def _with_our_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for theirs, tensor in weights.items():
        ours = _RENAMED.get(theirs, theirs)
        if ours in tensors:
            raise ValueError(f"{_names(ours)} is there twice")
        tensors[ours] = tensor.flatten() if ours in _FLOAT32 else tensor
    if _STACKED in tensors and all(name in tensors for name in _PROJECTIONS):
        sizes = [tensors[name].shape[0] for name in _PROJECTIONS]
        stacked = tensors.pop(_STACKED)
        if stacked.shape[0] != sum(sizes):
            raise ValueError(f"{_STACKED} has {stacked.shape[0]} channels, q, k and v have {sum(sizes)}")
        if twice := [name for name in _CONVOLUTIONS if name in tensors]:
            raise ValueError(f"{', '.join(twice)} is there twice, also as {_STACKED}")
        tensors.update(zip(_CONVOLUTIONS, stacked.split(sizes), strict=True))
    return tensors


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    biased = any(name in tensors for name in _CONVOLUTION_BIASES)
    required = [*_REQUIRED, *(_CONVOLUTION_BIASES if biased else ())]
    if missing := [_names(name) for name in required if name not in tensors]:
        raise ValueError(f"a Kimi Delta Attention layer needs {', '.join(missing)}")
    if unknown := [name for name in tensors if name not in (*required, _OUTPUT_GATE_BIAS)]:
        raise ValueError(f"not known in a Kimi Delta Attention layer: {', '.join(unknown)}")


def _head_dim(tensors: Mapping[str, Tensor]) -> int:
    heads, K, V = (tensors[name].numel() for name in ("A_log", "dt_bias", "o_norm.weight"))
    if heads * V != K:
        raise ValueError(
            f"o_norm.weight has {V} channels, dt_bias {K} for the {heads} heads of A_log; "
            "KDA has values as wide as keys"
        )
    return V


def _names(ours: str) -> str:
    """Return a tensor's name, with those it has elsewhere."""
    others = [theirs for theirs, renamed in _RENAMED.items() if renamed == ours]
    if ours in _CONVOLUTIONS:
        others.append(_STACKED)
    return f"{ours} (or {', '.join(others)})" if others else ours
