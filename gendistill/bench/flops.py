"""What a training step has to multiply, whoever does it: the numerator of MFU. Imports no torch.

A matrix of ``n`` numbers costs ``2n`` operations a token forward, ``2n`` for the gradient of its input, and ``2n`` for
its own if it is trained. Causal attention over a document of ``l`` tokens has ``l (l + 1) / 2`` pairs of ``4 head_dim``
operations a head; the delta rule, taken token by token, has ``7 K V`` a head and token: decay, what the state says to
the key, the write, what it says to the query. Their gradients cost twice as much. Norms, convolutions, gates and the
softmax of the loss do not count, and nothing counts twice that is computed again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gendistill.anatomy.family import Geometry, attention_shapes, block_shapes
from gendistill.anatomy.groups import ParamGroup
from gendistill.anatomy.mixers import MIXERS

# dense bfloat16 without sparsity, by what the device calls itself: NVIDIA's data sheets
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12}


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What models are and what a stage does with them.

    Attributes:
        geometry: Of teacher and student.
        mixers: Shapes of a converted layer's parameters, by kind.
        kinds: Mixer of every layer of the student.
        train: Groups that learn.
        aligns: Whether converted blocks are trained one by one on the teacher's inputs; else end to end, to logits.
    """

    geometry: Geometry
    mixers: Mapping[str, Mapping[str, tuple[int, ...]]]
    kinds: Sequence[str]
    train: Sequence[ParamGroup]
    aligns: bool

    def flops(self, lengths: Sequence[int]) -> dict[str, float]:
        """Count the operations of ``teacher`` and ``student`` on documents of these lengths."""
        tokens = float(sum(lengths))
        pairs = sum(length * (length + 1) / 2 for length in lengths)
        attention = self._attention * tokens + self._scores * pairs
        converted = [layer for layer, kind in enumerate(self.kinds) if MIXERS[kind].replaces_attention]
        depth = 1 + max(converted, default=-1) if self.aligns else len(self.kinds)
        head = 0.0 if self.aligns else 2.0 * self.geometry.vocab_size * self.geometry.hidden_size * tokens
        teacher = depth * (attention + self._mlp * tokens) + head
        student = head * (2 + (ParamGroup.HEAD in self.train))
        for layer, kind in enumerate(self.kinds):
            if layer in converted:
                student += self._converted(kind) * tokens
            elif not self.aligns:
                trained = ParamGroup.ATTENTION in self.train
                student += (2 + trained) * self._attention * tokens + 3 * self._scores * pairs
            if layer in converted or not self.aligns:
                student += (2 + (ParamGroup.MLP in self.train)) * self._mlp * tokens
        return {"teacher": teacher, "student": student}

    @property
    def _attention(self) -> float:
        return 2.0 * _matrices(attention_shapes(self.geometry))

    @property
    def _mlp(self) -> float:
        return 2.0 * _matrices(block_shapes(self.geometry))

    @property
    def _scores(self) -> float:
        return 4.0 * self.geometry.num_heads * self.geometry.head_dim

    def _converted(self, kind: str) -> float:
        table = self.mixers[kind]
        weights = 2.0 * _matrices(table)
        # what a block is given needs no gradient where blocks are trained one by one
        inputs = {
            name: shape
            for name, shape in table.items()
            if shape[-1] == self.geometry.hidden_size and not name.startswith("o_proj.")
        }
        gradient = weights - 2.0 * _matrices(inputs) * self.aligns
        rule = 7.0 * self.geometry.num_heads * self.geometry.head_dim**2 * MIXERS[kind].recurrent
        return weights * (1 + (ParamGroup.MIXER in self.train)) + gradient + 3 * rule


def peak_flops(device_name: str) -> float | None:
    """Look up what a device can do a second in bfloat16; None where we do not know it."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def _matrices(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Count the numbers of the matrices that multiply every token."""
    return sum(shape[0] * shape[1] for shape in shapes.values() if len(shape) == 2)
