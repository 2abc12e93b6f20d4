"""The student as a loss sees it: its body, its head, and the mixer of one of its blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from gendistill.data.batch import Batch, model_inputs

T = TypeVar("T")


class StudentLike(Protocol):
    """A causal language model laid out as in transformers.

    Attributes:
        model: Decoder with ``layers``; returns ``last_hidden_state``.
        lm_head: Linear layer onto the vocabulary.
        config: Its configuration.
    """

    @property
    def model(self) -> Any: ...

    @property
    def lm_head(self) -> nn.Linear: ...

    @property
    def config(self) -> Any: ...


def output_head(student: StudentLike) -> Tensor:
    """Return the output embedding ``[V, D]``, for losses that make logits themselves, a chunk at a time."""
    return student.lm_head.weight


def last_hidden(student: StudentLike, batch: Batch) -> Tensor:
    """Run the decoder and return its last hidden states ``[B, T, D]``."""
    return student.model(**model_inputs(batch)).last_hidden_state


def run_mixer(block: nn.Module, **inputs: Any) -> Tensor:
    """Run the mixer of a decoder block alone, by way of the block.

    Gradient checkpointing of the block does not apply.

    Args:
        block: Decoder layer whose ``self_attn`` is the mixer.
        inputs: Keywords of the mixer.
    Returns: ``[B, T, D]``.
    """
    mixer: Any = block.self_attn
    return in_block(block, lambda **keywords: mixer(**keywords)[0], **inputs)


def in_block(block: nn.Module, work: Callable[..., T], **inputs: Any) -> T:
    """Do something in the place of a decoder block's forward pass.

    What is attached to the block, such as the gathering of sharded parameters, happens before and after, as if the
    whole block ran.
    """
    replaced = vars(block).get("forward")
    block.forward = work  # pyright: ignore
    try:
        # past the family's own __call__, which would run the whole block once more in the backward pass
        return nn.Module.__call__(block, **inputs)
    finally:
        if replaced is None:
            del block.forward
        else:
            block.forward = replaced
