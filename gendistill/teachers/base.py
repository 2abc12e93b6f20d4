"""What a teacher is to training: a few facts, and signals about a batch as far as somebody needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gendistill.anatomy import geometry
from gendistill.data.batch import Batch


@dataclass(frozen=True, slots=True)
class TeacherFacts:
    """What is known about a teacher without asking it anything.

    Attributes:
        vocab_size: Entries of its next-token distributions.
        hidden_size: Width of its hidden states.
        num_layers: Decoder layers.
        num_bytes: Memory that it takes on the device.
        config: Its configuration as plain data, from which its costs follow; None if it is not known.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_bytes: int
    config: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Needs:
    """What somebody must see of the teacher; without any of it, no teacher is run.

    Attributes:
        hidden: Last hidden states, and the output embedding that turns them into logits.
        mixer_io: Layers of whose attention input and output are needed.
        block_io: Layers of which input and output of the whole block are needed.
    """

    hidden: bool = False
    mixer_io: tuple[int, ...] = ()
    block_io: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.hidden or self.mixer_io or self.block_io)


@dataclass(frozen=True, slots=True)
class ModuleIO:
    """What went into a module of the teacher and what came out.

    Attributes:
        hidden_states: ``[B, T, D]`` input.
        position_embeddings: Cosines and sines that the module got, ``[B, T, head_dim]`` each.
        output: ``[B, T, D]``.
    """

    hidden_states: Tensor
    position_embeddings: tuple[Tensor, Tensor]
    output: Tensor


@dataclass(frozen=True, slots=True)
class TeacherSignals:
    """What a teacher said about one batch, in its own dtype and without gradients; only what was needed is there.

    Attributes:
        hidden: ``[B, T, E]`` last hidden states.
        head: ``[V, E]`` output embedding.
        mixers: Layer index to input and output of its attention.
        blocks: Layer index to input and output of the block.
    """

    hidden: Tensor | None = None
    head: Tensor | None = None
    mixers: Mapping[int, ModuleIO] = field(default_factory=dict)
    blocks: Mapping[int, ModuleIO] = field(default_factory=dict)


class Teacher(Protocol):
    """Something that can say what a pretrained model makes of a batch: the model itself, or what it said before."""

    @property
    def facts(self) -> TeacherFacts:
        """Sizes, for checks and plans."""
        ...

    @property
    def model(self) -> Any:
        """The causal language model that is run; None where nothing is."""
        ...

    def to(self, device: torch.device, *, place: Callable[[nn.Module], object] | None = None) -> Any:
        """Have the signals on this device from now on.

        Args:
            device: Where.
            place: Brings a model there, perhaps in parts; a teacher that runs one lets it do so.
        """
        ...

    def signals(
        self, batch: Batch, needs: Needs, *, take: Callable[[int, ModuleIO], None] | None = None
    ) -> TeacherSignals:
        """Say what is needed about a batch.

        Args:
            batch: On the teacher's device.
            needs: What to return; nothing needed means nothing is run.
            take: Receives every layer's input and output in the order of layers, as soon as both are known, in place
                of the result's ``mixers`` and ``blocks``: then they need not all be in memory at once.
        """
        ...


class HasVocabulary(Protocol):
    """A teacher's facts, or the configuration of a model."""

    @property
    def vocab_size(self) -> int:
        """Entries of next-token distributions."""
        ...


def check_vocabulary(teacher: HasVocabulary, student: HasVocabulary) -> None:
    """Reject a teacher whose distributions cannot be compared with the student's entry by entry.

    Raises:
        RecipeError: The vocabularies differ in size.
    """
    geometry.check_vocabulary(teacher.vocab_size, student.vocab_size)
