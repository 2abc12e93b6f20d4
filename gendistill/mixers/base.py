"""What a mixer is, what it needs to know about its input, and what it remembers between calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from gendistill.anatomy.family import Geometry, layer_geometry
from gendistill.anatomy.settings import read_settings, rules
from gendistill.anatomy.spec import MixerSpec, ParameterSpec
from gendistill.mixers.init import initial_value
from gendistill.ops.select import Impl
from gendistill.ops.types import Segments


class MixerState(NamedTuple):
    """What a recurrent mixer remembers of ``N`` sequences.

    A mixer with another memory has a named tuple of its own: tensors whose first size is ``N``, or None, under the
    names that its spec lists as its state, and ``owned`` at the end, followed by ``lives`` if it can skip rows.

    Attributes:
        conv: ``[N, C, W - 1]`` last inputs of the short convolution, or None for a mixer without one.
        recurrent: ``[N, H, K, V]`` float32 memory.
        owned: Whether a mixer may write to these tensors instead of making new ones, as a cache allows. Only where no
            gradient is recorded.
        lives: ``[N]`` bool, rows that have a sequence, where a caller decodes rows that have none beside others; None:
            all. Where a mixer has an op for a few tokens at once, that leaves states of other rows as they are and
            skips their work. Elsewhere a mixer takes these rows as if they had sequences. It is told, never returned.
    """

    conv: Tensor | None
    recurrent: Tensor
    owned: bool = False
    lives: Tensor | None = None


# fields of a state that tell a mixer how to treat the others, and that nobody remembers
ASIDE = ("owned", "lives")


class States(Protocol):
    """Where the mixers of a model keep what they remember, in place of a cache of transformers."""

    def read(self, layer: int) -> Any:
        """Return what a layer's mixer remembers, as its ``state_type``."""
        ...

    def write(self, layer: int, state: Any) -> None:
        """Keep it."""
        ...


class Mixer(nn.Module):
    """A layer that mixes tokens, in the place of a model's attention.

    A subclass names its spec, makes its modules in :meth:`build` and mixes in :meth:`forward`. What is not a token,
    which :class:`SequenceInfo` says, must change nothing. This constructor makes a layer that stands in no model;
    :meth:`of` makes a model's.

    Args:
        hidden_size: Width of the input.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; as many as queries by default.
        head_dim: Channels per head; ``hidden_size // num_heads`` by default.
        qkv_bias: Biases on the q, k and v projections.
        output_bias: Bias on the output projection.
        norm_eps: Epsilon of norms.
        initializer_range: Standard deviation of new projections.
        impl: ``auto``, ``reference`` or ``triton``; :attr:`impl` says what it means where the weights are.
        settings: Fields of the settings that the spec names.

    Attributes:
        spec: What the catalogue knows of it.
        state_type: Named tuple of what it remembers.
        projects: Whether all its linear layers are run by :meth:`project` and :meth:`project_together`.
        packed: Faster ways to run groups of its layers, while it runs fused; and the taps of its convolutions as one.
        requested_impl: As given.
        table: What its parameters are and how they start.
    """

    spec: ClassVar[MixerSpec]
    state_type: ClassVar[type[Any]] = MixerState
    projects: ClassVar[bool] = False
    packed: Mapping[tuple[nn.Module, ...], Any] = {}

    num_heads: int
    num_kv_heads: int
    head_dim: int
    requested_impl: str
    table: dict[str, ParameterSpec]

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        qkv_bias: bool = False,
        output_bias: bool = False,
        norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        impl: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        geometry = layer_geometry(
            hidden_size,
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            norm_eps=norm_eps,
            initializer_range=initializer_range,
        )
        self._set_up(geometry, self._read(settings), impl)

    @classmethod
    def of(cls, geometry: Geometry, settings: Any, *, impl: str = "auto") -> Self:
        """Make the mixer of a layer of a model.

        Args:
            geometry: Of the model.
            settings: Of the class that the spec names, or None if it names none.
            impl: ``auto``, ``reference`` or ``triton``.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(geometry, settings, impl)
        return layer

    def _read(self, given: dict[str, Any]) -> Any:
        """Make settings from keywords; how a mixer starts from attention has no meaning for one that stands alone."""
        name, settings = type(self).__name__, self.spec.settings
        if settings is None:
            if given:
                raise ValueError(f"{name} has no settings, got {', '.join(given)}")
            return None
        for field, rule in rules(settings).items():
            if rule.conversion_only and field in given:
                raise ValueError(
                    f"{name}.{field} says how a conversion starts; a layer alone takes no {field}"
                )
        return read_settings(settings, given, where=name)

    def _set_up(self, geometry: Geometry, settings: Any, impl: str) -> None:
        if geometry.num_heads % geometry.num_kv_heads:
            raise ValueError(
                f"{geometry.num_heads} query heads are not a multiple of {geometry.num_kv_heads} key/value heads"
            )
        if impl not in ("auto", "reference", "triton"):
            raise ValueError(f'impl must be auto, reference or triton, got "{impl}"')
        self.num_heads, self.num_kv_heads = geometry.num_heads, geometry.num_kv_heads
        self.head_dim = geometry.head_dim
        self.requested_impl = impl
        self.table = self.spec.parameters(geometry, settings)
        self.build(geometry, settings)
        self.reset_parameters()

    def build(self, geometry: Geometry, settings: Any) -> None:
        """Make the parameters that :attr:`table` lists, under their names; their values follow."""
        raise NotImplementedError(f"{type(self).__name__} makes no parameters")

    def project(self, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Run linear layers on one input ``[..., in_features]``; returns an output of each."""
        packed = self.packed.get(layers)
        return tuple(layer(x) for layer in layers) if packed is None else packed.split(packed(x))

    def project_together(self, x: Tensor, *layers: nn.Linear) -> Tensor:
        """Run linear layers on one input ``[..., in_features]``; returns their outputs side by side."""
        packed = self.packed.get(layers)
        if packed is None:
            return torch.cat([layer(x) for layer in layers], dim=-1)
        return packed(x)[..., : sum(packed.widths)]

    def projections(self) -> list[tuple[nn.Linear, ...]]:
        """List the groups of layers that are run together; one that is part of another follows it, and shares it."""
        return []

    def side_by_side(self) -> tuple[nn.Linear, ...]:
        """List layers that read what lies side by side in the output of other layers, each a part, in this order."""
        return ()

    def convolutions(self) -> tuple[nn.Module, ...]:
        """List the short convolutions over channels that lie side by side."""
        return ()

    @property
    def kind(self) -> str:
        """Its name in the catalogue."""
        return self.spec.kind

    @property
    def impl(self) -> Impl:
        """The implementation that runs on the weights' device; eager torch, unless a subclass has kernels."""
        return Impl.REFERENCE

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fill every parameter with its starting value from the table."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(self.initial(name, generator=generator))

    def initial(self, name: str, *, generator: torch.Generator | None = None) -> Tensor:
        """Make the starting value of a parameter."""
        spec = self.table[name]
        return initial_value(spec.init, spec.shape, generator=generator)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        sequences: SequenceInfo | None = None,
        state: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Mix a batch of sequences.

        Args:
            hidden_states: ``[B, T, hidden_size]``.
            sequences: Padding or packed documents; None when every row is one sequence without padding.
            state: What was remembered of the ``N`` sequences, or None. ``N`` is B, or the number of segments.
            position_embeddings: ``cos`` and ``sin`` ``[B or 1, T, head_dim]``.
        Returns: ``[B, T, hidden_size]``, zero at padding, and the new state.
        """
        raise NotImplementedError(f"{type(self).__name__} does not mix")

    def diagnostics(self, hidden_states: Tensor) -> dict[str, Tensor]:
        """Compute what is worth watching, per token: the probe reads ``half_life``, in tokens.

        Args:
            hidden_states: ``[B, T, hidden_size]``, the mixer's input.
        Returns: ``[B, T, ...]`` by name; empty if there is nothing.
        """
        return {}


class SequenceInfo:
    """Which cells of a ``[B, T]`` grid are tokens, and which tokens belong together.

    Args:
        segments: The sequences, in row-major order of their tokens.
        tokens: ``[num_tokens]`` int64, row-major index of every real token; None when every cell is one.
    """

    def __init__(self, segments: Segments, tokens: Tensor | None = None) -> None:
        self.segments = segments
        self.tokens = tokens

    @classmethod
    def from_mask(cls, mask: Tensor) -> SequenceInfo:
        """Drop padding: ``mask`` ``[B, T]`` is zero there. Each row stays one sequence, possibly empty."""
        kept = mask.bool()
        return cls(
            Segments(kept.sum(1).tolist(), device=mask.device), kept.flatten().nonzero(as_tuple=True)[0]
        )

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor) -> SequenceInfo:
        """Separate packed documents, given their ends ``[N + 1]`` in the row-major grid."""
        return cls(Segments.from_cu_seqlens(cu_seqlens))

    @classmethod
    def from_position_ids(cls, position_ids: Tensor) -> SequenceInfo | None:
        """Separate documents wherever ``position_ids`` ``[B, T]`` do not count on; None when they always do."""
        length = position_ids.shape[1]
        starts = cls.document_starts(position_ids)
        if int(starts.sum()) == position_ids.shape[0]:
            return None
        first = starts.flatten().nonzero(as_tuple=True)[0]
        end = first.new_tensor([position_ids.shape[0] * length])
        return cls.from_cu_seqlens(torch.cat([first, end]))

    @staticmethod
    def document_starts(position_ids: Tensor) -> Tensor:
        """Mark, in ``[B, T]``, where ``position_ids`` do not count on from the cell before."""
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
        return starts

    def gather(self, grid: Tensor) -> Tensor:
        """Take ``[B, T, ...]`` to ``[1, num_tokens, ...]``."""
        flat = grid.flatten(0, 1)
        return (flat if self.tokens is None else flat[self.tokens])[None]

    def scatter(self, packed: Tensor, batch: int, length: int) -> Tensor:
        """Take ``[1, num_tokens, ...]`` back to ``[B, T, ...]`` with zeros at padding."""
        flat = packed[0]
        if self.tokens is not None:
            flat = flat.new_zeros(batch * length, *flat.shape[1:]).index_copy(0, self.tokens, flat)
        return flat.unflatten(0, (batch, length))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x`` ``[B, T, H, D]`` by position; ``cos`` and ``sin`` ``[B, T, D]`` hold each angle twice.

    Source: arXiv 2104.09864, in the half-split layout of Llama-family checkpoints.
    """
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * cos[:, :, None].to(x.dtype) + turned * sin[:, :, None].to(x.dtype)
