"""A decoder whose layers run fused: packed projections, one kernel between two matrix products, and no masks.

:func:`fuse` changes how a model's own modules run, not what they are: parameters, names and hooks of layers and mixers
stay, and so do calls that are not about packed documents, such as generation. :func:`release` ends it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.modeling_outputs import BaseModelOutputWithPast

from gendistill.anatomy.family import FAMILIES, Geometry, family_of, geometry_of
from gendistill.engine.adapted import why_not_packed
from gendistill.engine.linear import PackedDiagonal, PackedLinear, can_lie_diagonally, pack, pack_groups
from gendistill.engine.mlp import normed_mlp
from gendistill.engine.taps import PackedTaps, can_pack
from gendistill.mixers.base import Mixer, SequenceInfo, States
from gendistill.ops.block import attend, rms_norm
from gendistill.ops.select import Impl, resolve

_MARK = "_fused_decoder"
# dtypes of arithmetic on a GPU
_HALF = (torch.bfloat16, torch.float16)
_Packed = PackedLinear | PackedDiagonal | PackedTaps
# what a decoder that runs fused reads, and what it may be told besides
_READ = ("input_ids", "position_ids", "sequences")
_INPUTS = {*_READ, "cu_seq_lens_q", "cu_seq_lens_k"}


class Memory(States, Protocol):
    """What layers remember of sequences that a forward pass goes on with."""

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *,
        heads: tuple[int, int],
        eps: float,
        window: int | None,
        impl: Impl,
    ) -> Tensor:
        """Attend to what was seen and what is new, which is kept; as :func:`gendistill.ops.block.attend`."""
        ...


@dataclass(slots=True)
class Layout:
    """What all layers of one forward pass share.

    Attributes:
        sequences: The documents; they fill the grid. None where every row of it is one.
        cos, sin: ``[B * T, head_dim]`` float32.
        position_embeddings: The same, ``[B, T, head_dim]``.
        position_ids: ``[B, T]``.
        dtype: Of arithmetic.
        memory: Of the sequences, where they go on from an earlier pass.
    """

    sequences: SequenceInfo | None
    cos: Tensor
    sin: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    position_ids: Tensor | None
    dtype: torch.dtype
    memory: Memory | None = None


# what is made in inference mode cannot be written to outside of it, nor can gradients reach it
@torch.inference_mode(False)
def fuse(model: Any, dtype: torch.dtype, *, learns: bool = True) -> None:
    """Let a causal language model run fused until :func:`release`; :func:`why_not` must have nothing against it.

    Args:
        model: A family's own or a student: with ``model`` and ``config``; where it will run.
        dtype: Of arithmetic. Parameters keep theirs; copies in this dtype are refreshed when parameters change or get
            other memory. Writing to their ``.data`` is not noticed, nor is another parameter in the place of one.
        learns: Whether an optimizer changes parameters that require a gradient; those of a teacher, and copies that
            are written again every step, need no further copies in their own dtype.
    """
    release(model)
    object.__setattr__(model.model, _MARK, FusedDecoder(model, dtype, learns=learns))


@torch.inference_mode(False)
def release(model: Any) -> None:
    """Let a model run as its classes say; nothing happens to one that does."""
    fused = vars(model.model).get(_MARK)
    if fused is not None:
        object.__delattr__(model.model, _MARK)
        fused.release()


def refreshed(model: Any) -> FusedDecoder | None:
    """Cast the weights of a model that runs fused, if any has changed, and return what it runs as; None for another.

    A forward pass does this itself; CUDA graphs, which repeat one, take the copies of this very object as they are.
    """
    fused = vars(model.model).get(_MARK)
    if fused is not None:
        fused.refresh()
    return fused


@contextmanager
def unfused(model: Any) -> Iterator[None]:
    """Have a model run as its classes say for a while, so that every module says what it computes."""
    fused = vars(model.model).get(_MARK)
    if fused is None:
        yield
        return
    object.__delattr__(model.model, _MARK)
    fused.leave()
    try:
        yield
    finally:
        fused.enter()
        object.__setattr__(model.model, _MARK, fused)


def is_fused(model: Any) -> bool:
    """Say whether a model runs fused."""
    return _MARK in vars(model.model)


def why_not(model: Any, *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what keeps a causal language model from running fused; None if nothing does.

    Args:
        model: With ``model`` and ``config``.
        device: Where it will run.
        dtype: Of its arithmetic.
    """
    for name, layer in model.model.named_modules():
        if name.endswith("_proj") and (reason := why_not_packed(layer)):
            return reason
    if any(parameter.is_inference() for parameter in model.parameters()):
        return "its parameters were made in inference mode, and nobody can tell whether they have changed"
    if not is_fused(model) and (found := _passed_over(model.model)):
        return found
    return why_no_such(model.config.to_dict(), device=device, dtype=dtype)


def _passed_over(decoder: nn.Module) -> str | None:
    """Name what somebody has added to a decoder's modules and fused layers would not run; None if there is nothing."""
    for name, module in decoder.named_modules():
        if "forward" in vars(module):
            return (
                f"{name or 'its decoder'} has a forward pass of its own, as accelerate's device_map gives it"
            )
        # layers and mixers are called as ever
        inner = name == "norm" or (name.count(".") > 1 and not name.endswith(".self_attn"))
        hooks = (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        if inner and any(hooks):
            return f"a hook on {name} would not be called"
    return None


def why_no_such(config: Mapping[str, Any], *, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say what keeps every model of a configuration from running fused; None if nothing does.

    Args:
        config: A family's or a student's.
        device: Where it will run.
        dtype: Of its arithmetic.
    """
    if family_of(config) not in FAMILIES:
        return f"{config.get('model_type')} is not a family with fused layers ({', '.join(FAMILIES)})"
    geometry = geometry_of(config)
    # what every family has where a config is silent
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        return f'its MLP uses "{activation}"; fused layers know silu'
    if geometry.mlp_bias:
        return "its MLP has biases"
    if config.get("attention_dropout"):
        return "it drops attention weights at random (attention_dropout)"
    if device.type == "cuda":
        if resolve("auto", op="block", device=device) is not Impl.TRITON:
            return "its kernels do not run on this GPU"
        if dtype not in _HALF:
            return f"fused layers compute in bfloat16 or float16 on a GPU, not in {dtype}"
        if geometry.head_dim % 8 or geometry.head_dim > 256:
            return f"its heads have {geometry.head_dim} channels; fused attention takes multiples of 8, up to 256"
    return None


class FusedDecoder:
    """A decoder that runs fused until it is released; arguments as :func:`fuse`."""

    def __init__(self, model: Any, dtype: torch.dtype, *, learns: bool = True) -> None:
        self.decoder: Any = model.model
        self.dtype, self.learns = dtype, learns
        self.geometry = geometry_of(model.config.to_dict())
        self.impl = resolve("auto", op="block", device=self.decoder.norm.weight.device)
        self.packed: list[_Packed] = []
        self.patched: list[tuple[nn.Module, str, Any]] = []
        self.sources: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.versions: list[tuple[int, int]] = []
        # a fused optimizer changes parameters without counting their versions up
        self.handle = register_optimizer_step_post_hook(
            functools.partial(_forget_versions, weakref.ref(self))
        )
        try:
            for index, layer in enumerate(self.decoder.layers):
                self._patch_layer(index, layer)
            self._patch(self.decoder, "forward", functools.partial(_run_decoder, self))
            self.enter()
        except BaseException:
            # nobody else could: memory may have run out halfway
            self.release()
            raise
        self.sources += [source for packed in self.packed for source in packed.sources]
        self.targets += [target for packed in self.packed for target in packed.targets]

    def _patch(self, module: nn.Module, name: str, value: Any) -> None:
        self.patched.append((module, name, value))

    def enter(self) -> None:
        """Have the modules run fused."""
        for module, name, value in self.patched:
            # an instance's own attribute; the module's class stays as it is
            object.__setattr__(module, name, value)

    def leave(self) -> None:
        """Have the modules run as their classes say, and keep the packed weights."""
        for module, name, _ in self.patched:
            vars(module).pop(name, None)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a decoder that runs fused cannot be copied or pickled; call release(model) first")

    def _pack(self, *layers: nn.Linear) -> PackedLinear:
        packed = pack(layers, self.dtype, learns=self.learns)
        self.packed.append(packed)
        return packed

    def _patch_layer(self, index: int, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        if isinstance(attention, Mixer):
            packed: dict[tuple[nn.Module, ...], Any] = {
                **pack_groups(attention.projections(), self.dtype, learns=self.learns)
            }
            if can_pack(convolutions := attention.convolutions()):
                packed[convolutions] = PackedTaps(convolutions)
            if can_lie_diagonally(layers := attention.side_by_side()):
                packed[layers] = PackedDiagonal(layers, self.dtype)
            # what is part of another group has nothing of its own
            self.packed += [each for each in packed.values() if each.sources]
            self._patch(attention, "forward", functools.partial(_run_mixer, self, attention, packed))
        else:
            window = self.geometry.window if self.geometry.sliding[index] else None
            parts = _Attention(
                self._pack(attention.q_proj, attention.k_proj, attention.v_proj),
                self._pack(attention.o_proj),
                window,
            )
            self._patch(attention, "forward", functools.partial(_run_attention, self, attention, parts))
        parts = (self._pack(mlp.gate_proj, mlp.up_proj), self._pack(mlp.down_proj))
        self._patch(layer, "forward", functools.partial(_run_layer, self, layer, *parts))

    @torch.no_grad()
    def refresh(self) -> None:
        """Cast the weights if any has changed since the last time, which is once an optimizer step."""
        versions = [(source._version, source.data_ptr()) for source in self.sources]
        if versions != self.versions:
            # what is a view of its target is there already
            apart = [
                (target, source)
                for target, source, (_, place) in zip(self.targets, self.sources, versions, strict=True)
                if place != target.data_ptr()
            ]
            whole = [pair for pair in apart if pair[0].is_contiguous()]
            if whole:
                # one that is not whole would make it copy all of them one by one
                torch._foreach_copy_(*map(list, zip(*whole, strict=True)))  # pyright: ignore
            for target, source in apart:
                if not target.is_contiguous():
                    target.copy_(source)
            self.versions = versions
            # the next kernel but this one may read weights before the one before it has ended
            torch.zeros(1, device=self.decoder.norm.weight.device)

    def release(self) -> None:
        """Let the modules run as their classes say."""
        self.handle.remove()
        self.leave()
        self.patched, self.sources, self.targets = [], [], []
        # one after the other: a model need not be in memory twice
        while self.packed:
            self.packed.pop().release()


def _forget_versions(fused: Callable[[], FusedDecoder | None], *_: Any) -> None:
    decoder = fused()
    if decoder is not None:
        decoder.versions = []


@dataclass(slots=True)
class _Attention:
    """The packed projections of softmax attention, and its window."""

    qkv: PackedLinear
    out: PackedLinear
    window: int | None


@torch.no_grad()
def go_on(
    fused: FusedDecoder,
    input_ids: Tensor,
    position_ids: Tensor,
    *,
    sequences: SequenceInfo | None,
    memory: Memory,
    wanted: Tensor | None = None,
) -> Tensor:
    """Run a decoder on tokens of sequences that go on; its weights are as :meth:`FusedDecoder.refresh` left them.

    Args:
        fused: Of the model.
        input_ids: ``[B, T]``.
        position_ids: ``[B, T]``, of each in its sequence.
        sequences: Which of the tokens, end to end in a single row, belong together; None where every row is one
            sequence.
        memory: Of the sequences; what is new is kept there.
        wanted: ``[M]`` int64, tokens in row-major order whose hidden states are wanted; None for all.
    Returns: ``[M or B * T, hidden_size]`` after the last norm, in the dtype of arithmetic.
    """
    decoder = fused.decoder
    with torch.autocast(input_ids.device.type, enabled=False):
        stream = decoder.embed_tokens(input_ids)
        angles = decoder.rotary_emb(torch.empty((), dtype=torch.float32, device=stream.device), position_ids)
        layout = _lay_out(fused, stream.shape[0], sequences, angles, position_ids)
        layout.memory = memory
        for layer in decoder.layers:
            # nothing is computed again, whatever a stage that trains the model says
            stream = layer.forward(stream, layout=layout)
        rows = stream.flatten(0, 1)
        if wanted is not None:
            rows = rows[wanted]
        _, hidden = rms_norm(
            rows, decoder.norm.weight, eps=fused.geometry.norm_eps, dtype=fused.dtype, impl=fused.impl
        )
    return hidden


def _run_decoder(fused: FusedDecoder, *args: Any, **inputs: Any) -> Any:
    """Run a decoder on packed documents; anything else is left to the decoder itself."""
    decoder = fused.decoder
    others = [
        name for name in inputs.keys() - _INPUTS if inputs[name] is not None and inputs[name] is not False
    ]
    input_ids, position_ids, sequences = (inputs.get(name) for name in _READ)
    if (
        args
        or others
        or input_ids is None
        or position_ids is None
        or not _fills(sequences, input_ids.numel())
    ):
        return type(decoder).forward(decoder, *args, **inputs)
    fused.refresh()
    # the arithmetic is explicit from here on
    with torch.autocast(input_ids.device.type, enabled=False):
        stream = decoder.embed_tokens(input_ids)
        angles = decoder.rotary_emb(torch.empty((), dtype=torch.float32, device=stream.device), position_ids)
        layout = _lay_out(fused, stream.shape[0], sequences, angles, position_ids)
        for layer in decoder.layers:
            # what watches layers finds what it would find without fusion
            stream = layer(
                stream,
                position_embeddings=layout.position_embeddings,
                position_ids=position_ids,
                sequences=sequences,
                layout=layout,
            )
        norm = decoder.norm
        _, hidden = rms_norm(
            stream, norm.weight, eps=fused.geometry.norm_eps, dtype=fused.dtype, impl=fused.impl
        )
    return BaseModelOutputWithPast(last_hidden_state=hidden)


def _run_layer(
    fused: FusedDecoder,
    layer: Any,
    gate_up: PackedLinear,
    down: PackedLinear,
    hidden_states: Tensor,
    layout: Layout | None = None,
    **others: Any,
) -> Tensor:
    if layout is None:
        layout = _layout_of(fused, hidden_states, **others)
    if layout is None:
        return type(layer).forward(layer, hidden_states, **others)
    settings: Any = {"eps": fused.geometry.norm_eps, "dtype": layout.dtype, "impl": fused.impl}
    with torch.autocast(hidden_states.device.type, enabled=False):
        stream, x = rms_norm(hidden_states, layer.input_layernorm.weight, **settings)
        extra = {} if layout.memory is None else {"states": layout.memory}
        mixed = layer.self_attn(
            hidden_states=x,
            position_embeddings=layout.position_embeddings,
            attention_mask=None,
            position_ids=layout.position_ids,
            sequences=layout.sequences,
            layout=layout,
            **extra,
        )[0]
        return normed_mlp(stream, mixed, layer.post_attention_layernorm.weight, gate_up, down, **settings)


def _fills(sequences: Any, cells: int) -> TypeGuard[SequenceInfo]:
    """Say whether these are documents that fill a grid."""
    packed = isinstance(sequences, SequenceInfo) and sequences.tokens is None
    return packed and sequences.segments.num_tokens == cells


def _layout_of(
    fused: FusedDecoder,
    hidden_states: Tensor,
    sequences: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    position_ids: Tensor | None = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **_: Any,
) -> Layout | None:
    """Return the layout of a layer that is run alone, on packed documents; None for any other call."""
    batch, length = hidden_states.shape[:2]
    if position_embeddings is None or attention_mask is not None or past_key_values is not None:
        return None
    if not _fills(sequences, batch * length):
        return None
    fused.refresh()
    return _lay_out(fused, batch, sequences, position_embeddings, position_ids)


def _lay_out(
    fused: FusedDecoder,
    batch: int,
    sequences: SequenceInfo | None,
    position_embeddings: tuple[Tensor, Tensor],
    position_ids: Tensor | None,
) -> Layout:
    # kernels read a row for every token
    cos, sin = (part.expand(batch, -1, -1).flatten(0, 1).contiguous() for part in position_embeddings)
    return Layout(sequences, cos, sin, position_embeddings, position_ids, fused.dtype)


def _run_mixer(
    fused: FusedDecoder,
    mixer: Any,
    packed: Mapping[tuple[nn.Module, ...], _Packed],
    hidden_states: Tensor,
    layout: Layout | None = None,
    **inputs: Any,
) -> Any:
    if layout is None:
        layout = _layout_of(fused, hidden_states, **inputs)
    run = type(mixer).forward
    if layout is None:
        return run(mixer, hidden_states, **inputs)
    # a mixer whose linear layers are not packed casts their weights itself
    casts = not mixer.projects and fused.dtype in _HALF
    with torch.autocast(hidden_states.device.type, dtype=fused.dtype if casts else None, enabled=casts):
        mixer.packed = packed
        try:
            return run(mixer, hidden_states.to(fused.dtype), **inputs)
        finally:
            del mixer.packed


def _run_attention(
    fused: FusedDecoder,
    attention: Any,
    parts: _Attention,
    hidden_states: Tensor,
    *args: Any,
    layout: Layout | None = None,
    **others: Any,
) -> Any:
    if layout is None:
        return type(attention).forward(attention, hidden_states, *args, **others)
    geometry: Geometry = fused.geometry
    norms = (attention.q_norm.weight, attention.k_norm.weight) if geometry.qk_norm else (None, None)
    qkv = parts.qkv(hidden_states)
    # zeros below the last weight make columns that mean nothing
    qkv = qkv.flatten(0, -2)[:, : sum(parts.qkv.widths)]
    settings: Any = {
        "heads": (geometry.num_heads, geometry.num_kv_heads),
        "eps": geometry.norm_eps,
        "window": parts.window,
        "impl": fused.impl,
    }
    if layout.memory is not None:
        out = layout.memory.attend(attention.layer_idx, qkv, *norms, layout.cos, layout.sin, **settings)
    else:
        assert layout.sequences is not None
        segments = layout.sequences.segments
        out = attend(qkv, *norms, layout.cos, layout.sin, **settings, segments=segments)
    return parts.out(out).view(hidden_states.shape), None
