"""What the catalogue knows about a kind of mixer, without its module. Standard library only: it travels in exports."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from gendistill.anatomy.family import Geometry

# bytes of the dtypes that a state may have; None is the dtype of the activations
_BYTES = {"float32": 4, "int64": 8}


@dataclass(frozen=True, slots=True)
class Init:
    """A way to fill a new tensor, with its numbers. ``describe`` is what plans and logs print."""

    scheme: str
    values: tuple[float, ...] = ()

    def describe(self) -> str:
        """Return ``normal(0.02)``, ``zeros`` and the like."""
        return (
            f"{self.scheme}({', '.join(f'{value:g}' for value in self.values)})"
            if self.values
            else self.scheme
        )


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter of a mixer.

    Attributes:
        shape: Sizes, as in the module.
        init: How it starts when nothing is transferred.
        from_attention: Name of the attention tensor with the same meaning (same local name and shape), or None.
        scaled_by: Name of the attention tensor, ``[head_dim]``, that its rows are multiplied with head by head when it
            is transferred, or None.
        float32: Whether it stays float32 in every checkpoint and on every device (gates).
        decays: Whether weight decay applies to it when it is a matrix.
    """

    shape: tuple[int, ...]
    init: Init
    from_attention: str | None = None
    scaled_by: str | None = None
    float32: bool = False
    decays: bool = True


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One tensor of what a mixer remembers of a sequence.

    Attributes:
        shape: Sizes per sequence.
        dtype: ``float32`` or ``int64``; None for that of the activations.
    """

    shape: tuple[int, ...]
    dtype: str | None = None

    def num_bytes(self, width: int) -> int:
        """Bytes per sequence, with activations of ``width`` bytes."""
        return math.prod(self.shape) * (width if self.dtype is None else _BYTES[self.dtype])


@dataclass(frozen=True, slots=True)
class Kept:
    """What one layer keeps per token for its backward pass.

    Attributes:
        numbers: In the dtype of the activations.
        float32: In float32.
    """

    numbers: int
    float32: int = 0

    def num_bytes(self, width: int) -> int:
        """Bytes per token, with activations of ``width`` bytes."""
        return width * self.numbers + 4 * self.float32


class MixerSpec:
    """A kind of mixer: everything about it but its arithmetic.

    A new kind is a subclass of this, a module (``gendistill.mixers.base.Mixer``) and one entry of
    ``gendistill.anatomy.mixers.MIXERS``; ``docs/architecture.md`` lists who reads what.

    Attributes:
        kind: Its name in recipes and configurations.
        letter: One capital letter for placement strips, unlike that of any other kind.
        colour: Fill and ink of its square in plots.
        about: What mixes the tokens, after "mix tokens by".
        advice: Settings to try when an untrained student predicts badly, or nothing.
        settings: Frozen dataclass of its settings, declared with :func:`~gendistill.anatomy.settings.setting`; None if
            there are none.
        module: ``package.module:Class`` of its module; None where the family's own attention module stays.
        op: Family of ops whose implementation ``impl`` chooses; None if there is but one.
        recurrent: Whether it folds all tokens into a state of fixed size.
        layer_type: Transformers' word for such a layer. Modules of ours have ``linear_attention``: transformers keeps
            tensors of fixed size for them and makes no mask.
        in_every_key: Whether its settings are part of every recipe's step keys, placed or not: those of the kinds that
            the first recipes had, so that finished work keeps its keys.
    """

    kind: str
    letter: str
    colour: tuple[str, str]
    about: str
    advice: str = ""
    settings: type | None = None
    module: str | None = None
    op: str | None = None
    recurrent: bool = False
    layer_type: str = "linear_attention"
    in_every_key: bool = False

    @property
    def replaces_attention(self) -> bool:
        """Whether a layer of this kind has a module of ours in the place of its family's attention."""
        return self.module is not None

    def parameters(self, geometry: Geometry, settings: Any) -> dict[str, ParameterSpec]:
        """List the parameters of the module, by name relative to it."""
        raise NotImplementedError(f"{type(self).__name__} does not list its parameters")

    def state(self, geometry: Geometry, settings: Any) -> dict[str, StateSpec]:
        """List what the module remembers of a sequence, by the fields of its state."""
        raise NotImplementedError(f"{type(self).__name__} does not list its state")

    def kept(self, geometry: Geometry, settings: Any, impl: str | None) -> Kept:
        """Count what a layer keeps per token for its backward pass.

        Args:
            geometry: Of the model.
            settings: Of the mixer.
            impl: ``reference`` or ``triton``; None if it has but one implementation.
        """
        raise NotImplementedError(f"{type(self).__name__} does not count what it keeps")

    def mixing_flops(self, geometry: Geometry, settings: Any, length: int) -> int:
        """Count the operations that mix one document's tokens in a forward pass, those of its matrices left out.

        Zero unless a spec says otherwise: utilisation then counts the matrices alone.

        Args:
            geometry: Of the model.
            settings: Of the mixer.
            length: Tokens of the document.
        """
        return 0

    def not_used(self, name: str, settings: Any) -> str:
        """Say why a tensor of the attention that it replaces, named relative to it, has no place in the module."""
        return f"{self.kind} has no such tensor"


def attention_kept(geometry: Geometry) -> Kept:
    """Count what softmax attention keeps per token: its input, q, k, v, the rotated q and k, and its output.

    That is ``2h + 3q + 3kv`` with ``q = heads * head_dim`` and ``kv = kv_heads * head_dim``.
    """
    q, kv = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
    return Kept(2 * geometry.hidden_size + 3 * q + 3 * kv)


def attention_flops(geometry: Geometry, pairs: int) -> int:
    """Count the two products of softmax attention, with keys and with values, over pairs of a query and a key."""
    return 4 * geometry.num_heads * geometry.head_dim * pairs


def causal_pairs(length: int, window: int | None = None) -> int:
    """Count the pairs of a query and a key that it sees, in a document of ``length`` tokens.

    Args:
        window: Tokens that a query sees, itself included; None: all before it.
    """
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) // 2 + (length - seen) * seen
