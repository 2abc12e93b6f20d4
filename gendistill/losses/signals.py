"""Run the teacher once per batch and keep what an objective needs of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gendistill.data.batch import Batch, model_inputs
from gendistill.losses.base import ModuleIO, Signal, TeacherSignals


@torch.no_grad()
def teacher_signals(
    teacher: Any, batch: Batch, needs: Collection[Signal], layers: Sequence[int] = ()
) -> TeacherSignals:
    """Run the teacher in its own dtype, up to its last hidden states at most.

    Args:
        teacher: A Hugging Face causal language model.
        batch: On the teacher's device.
        needs: What to keep; nothing needed means nothing is run.
        layers: Layers whose input and output to keep, for ``MIXER_IO`` and ``BLOCK_IO``.
    """
    if not needs:
        return TeacherSignals()
    blocks = {layer: teacher.model.layers[layer] for layer in layers}
    if Signal.MIXER_IO in needs:
        blocks = {layer: block.self_attn for layer, block in blocks.items()}
    with _recorded(blocks) as modules:
        hidden = teacher.model(**model_inputs(batch)).last_hidden_state
    if Signal.HIDDEN not in needs:
        return TeacherSignals(modules=modules)
    return TeacherSignals(hidden=hidden, head=teacher.lm_head.weight, modules=modules)


@contextmanager
def _recorded(blocks: dict[int, Any]) -> Iterator[dict[int, ModuleIO]]:
    modules: dict[int, ModuleIO] = {}

    def hook(layer: int) -> Any:
        def record(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            modules[layer] = ModuleIO(
                hidden_states=kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
                position_embeddings=kwargs["position_embeddings"],
                output=output[0] if isinstance(output, tuple) else output,
            )

        return record

    handles = [block.register_forward_hook(hook(layer), with_kwargs=True) for layer, block in blocks.items()]
    try:
        yield modules
    finally:
        for handle in handles:
            handle.remove()
