"""A teacher that is run: a Hugging Face model in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gendistill.data.batch import Batch, model_inputs
from gendistill.teachers.base import ModuleIO, Needs, TeacherFacts, TeacherSignals

Take = Callable[[int, ModuleIO], None]


class LiveTeacher:
    """A causal language model that answers for itself, in its own dtype and without dropout.

    Args:
        model: With ``model``, ``lm_head`` and ``config`` as transformers has them; of any of our families.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    @property
    def facts(self) -> TeacherFacts:
        """Sizes, as its configuration has them."""
        config = self.model.config
        return TeacherFacts(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_bytes=sum(value.numel() * value.element_size() for value in self.model.parameters()),
            config=config.to_dict(),
        )

    def to(self, device: torch.device, *, place: Callable[[nn.Module], object] | None = None) -> LiveTeacher:
        """Move the model, or have it placed."""
        if place is None:
            self.model.to(device)
        else:
            place(self.model)
        return self

    @torch.no_grad()
    def signals(self, batch: Batch, needs: Needs, *, take: Take | None = None) -> TeacherSignals:
        """Run the model up to its last hidden states, and keep what is needed.

        Args:
            batch: On the model's device.
            needs: What to return; nothing needed means that the model is not run.
            take: Receives every layer's input and output instead of the result.
        """
        if not needs:
            return TeacherSignals()
        mixers: dict[int, ModuleIO] = {}
        blocks: dict[int, ModuleIO] = {}
        layers = self.model.model.layers
        with (
            _evaluating(self.model),
            _watched(
                {layer: layers[layer].self_attn for layer in needs.mixer_io}, take or mixers.__setitem__
            ),
            _watched({layer: layers[layer] for layer in needs.block_io}, take or blocks.__setitem__),
        ):
            hidden = self.model.model(**model_inputs(batch)).last_hidden_state
        if not needs.hidden:
            return TeacherSignals(mixers=mixers, blocks=blocks)
        return TeacherSignals(hidden, self.model.lm_head.weight, mixers, blocks)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


@contextmanager
def _watched(modules: dict[int, nn.Module], take: Take) -> Iterator[None]:
    """Hand over what goes into the modules and comes out."""

    def hook(layer: int) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            io = ModuleIO(
                hidden_states=kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
                position_embeddings=kwargs["position_embeddings"],
                output=output[0] if isinstance(output, tuple) else output,
            )
            take(layer, io)

        return record

    handles = [
        module.register_forward_hook(hook(layer), with_kwargs=True) for layer, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
