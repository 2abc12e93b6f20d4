"""What models cost: bytes of caches and of what the loss works on, operations of a step, peaks of devices.

Each mixer tells its own. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gendistill.anatomy.adapters import is_adapter, plain_name
from gendistill.anatomy.family import Geometry, attention_shapes, block_shapes, geometry_of
from gendistill.anatomy.full import FULL
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.spec import attention_flops, causal_pairs
from gendistill.anatomy.student import mixer_settings

# One chunk's float32 logits in the divergences, by kind of device. Small enough on a CPU to stay in a last-level cache
# of 32 MiB: the element-wise part is 2.4 times faster at 24 MiB than at 96 MiB (V = 49,152, two cores), and the matmuls
# are no slower. On a GPU eager torch stays under 2 GiB with 16k tokens of V = 151,936, D = 1,024 even when the head
# trains (1.9 GiB; 1.3 GiB when it does not); 1 GiB chunks would be 9% faster with a frozen head and take 6 GiB (one
# H200). Our kernels need two buffers of a chunk and no more: 1024 rows at that vocabulary, 1.9 GB with the head's
# gradient.
LOSS_CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 192 * 2**20, "triton": 640 * 2**20}


def cache_bytes(config: Mapping[str, Any], *, tokens: int, bytes_per_value: int = 2) -> int:
    """Compute the bytes that one sequence occupies in the cache.

    Args:
        config: A family's config, or a student's with ``mixers`` and ``mixer_configs``.
        tokens: Length of the sequence.
        bytes_per_value: Of keys, values and whatever else has the dtype of the activations.
    Source: per attention layer ``2 * kv_heads * head_dim`` values a token (at most a window of them, of which the
        newest need not be kept); per layer of a module of ours what its spec lists as its state.
    """
    geometry = geometry_of(config)
    kinds = config.get("mixers") or [FULL.kind] * geometry.num_layers
    layer_types = config.get("layer_types") or [FULL.layer_type] * geometry.num_layers
    window = config.get("sliding_window")
    total = 0
    for kind, layer_type in zip(kinds, layer_types, strict=True):
        spec = MIXERS[kind]
        if spec.replaces_attention:
            state = spec.state(geometry, mixer_settings(config, kind))
            total += sum(one.num_bytes(bytes_per_value) for one in state.values())
        else:
            kept = min(tokens, window - 1) if layer_type == "sliding_attention" and window else tokens
            total += bytes_per_value * 2 * geometry.num_kv_heads * geometry.head_dim * kept
    return total


# Operations a second of dense bfloat16 products with float32 sums, as the makers state them without sparsity; the
# first of these that a device's own name contains, word by word, counts.
PEAK_BF16_FLOPS = {
    "GB200": 2500e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Return what a device can do at most in bfloat16, in operations a second; None if that is not known.

    Args:
        device_name: As CUDA says it: ``NVIDIA H100 80GB HBM3``. A part of a device (MIG) is not known.
    """
    words = f" {device_name.replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if f" {name} " in words), None)


@dataclass(frozen=True, slots=True)
class Flops:
    """The operations of a step by what does them; a product with its addition counts as two.

    Attributes:
        teacher: Its forward pass up to the last hidden states.
        student: Its forward and backward passes, the head left out.
        loss: The logits of both, and the gradients of the student's.
    """

    teacher: int
    student: int
    loss: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.teacher + self.student + self.loss


def step_flops(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any] | None,
    *,
    documents: Mapping[int, int],
    num_labels: int,
    trained: Collection[str],
    reaches: Callable[[str], bool] = lambda name: True,
    apart: bool = False,
    compares_logits: bool = True,
) -> Flops:
    """Count the operations that the mathematics of a step needs: what an implementation does twice counts once.

    A matrix of ``m x n`` costs ``2mn`` a token forward, as much again for its own gradient if it learns, and as much
    again for that of its input if anything before it learns. Mixing costs what the mixer's spec says, and twice that
    backward. Norms, activations, convolutions and gates are left out: they are bound by memory. So are products with
    adapters, which are thin; that gradients pass through what they adapt counts.

    Args:
        student: Its configuration.
        teacher: Its configuration; None if it is not asked.
        documents: How many documents there are of each length in tokens, padding left out.
        num_labels: Positions that the loss counts.
        trained: Names of the student's parameters that learn, adapters among them.
        reaches: Whether the objective runs what a parameter belongs to.
        apart: Whether every layer is run alone, on inputs without gradients.
        compares_logits: Whether the loss makes the teacher's logits, too.
    """
    geometry = geometry_of(student)
    adapted = {plain_name(name) for name in trained if is_adapter(name)}
    forward = backward = 0
    # whether the input of what comes next needs a gradient
    before = "model.embed_tokens.weight" in trained
    for layer, parts in enumerate(_layers(student, geometry, documents)):
        before = before and not apart
        place = f"model.layers.{layer}"
        for part in parts:
            if not reaches(f"{place}.{part.names[0]}"):
                continue
            whole = {name for name in part.names if f"{place}.{name}" in trained}
            learning = whole | {name for name in part.names if f"{place}.{name}" in adapted}
            for name, cost, is_inner in part.matrices:
                forward += cost
                # what an inner matrix reads comes from the others
                backward += cost * (name in whole) + cost * (before or (is_inner and bool(learning - {name})))
            forward += part.mixing
            mixed = any(not name.endswith(_LAST) for name in learning)
            backward += 2 * part.mixing * (before or mixed)
            before = before or bool(learning)
    loss = 0
    if reaches("lm_head.weight"):
        logits = 2 * geometry.vocab_size * geometry.hidden_size * num_labels
        head = "model.embed_tokens.weight" if geometry.tied_head else "lm_head.weight"
        before = before or "model.norm.weight" in trained
        loss = logits * (1 + before + (head in trained))
        if teacher is not None and compares_logits:
            loss += 2 * geometry.vocab_size * geometry_of(teacher).hidden_size * num_labels
    return Flops(
        teacher=0 if teacher is None else forward_flops(teacher, documents),
        student=forward + backward,
        loss=loss,
    )


def forward_flops(config: Mapping[str, Any], documents: Mapping[int, int]) -> int:
    """Count a model's forward pass up to its last hidden states; arguments as above."""
    return sum(
        part.mixing + sum(cost for _, cost, _ in part.matrices)
        for parts in _layers(config, geometry_of(config), documents)
        for part in parts
    )


# what a mixer's output goes through: no gradient of its passes through the mixing
_LAST = ("o_proj.weight", "o_proj.bias")


@dataclass(frozen=True, slots=True)
class _Part:
    """A norm, a mixer or an MLP in the order of computation.

    Attributes:
        names: Its parameters, relative to the layer.
        matrices: Name, operations of a forward pass, and whether it reads something else than the part's input.
        mixing: Operations of a forward pass beside the matrices.
    """

    names: tuple[str, ...]
    matrices: tuple[tuple[str, int, bool], ...] = ()
    mixing: int = 0


def _layers(
    config: Mapping[str, Any], geometry: Geometry, documents: Mapping[int, int]
) -> list[tuple[_Part, ...]]:
    """List the parts of every layer in the order of computation; layers of one kind share theirs."""
    kinds = config.get("mixers") or [FULL.kind] * geometry.num_layers
    alike = [*zip(kinds, geometry.sliding, strict=True)]
    parts = {
        (kind, sliding): tuple(_parts(config, geometry, kind, sliding, documents))
        for kind, sliding in dict.fromkeys(alike)
    }
    return [parts[one] for one in alike]


def _parts(
    config: Mapping[str, Any], geometry: Geometry, kind: str, sliding: bool, documents: Mapping[int, int]
) -> Iterator[_Part]:
    """List the parts of a layer in the order of computation."""
    tokens = sum(length * count for length, count in documents.items())
    spec = MIXERS[kind]
    settings = mixer_settings(config, kind)
    if spec.replaces_attention:
        shapes = {name: table.shape for name, table in spec.parameters(geometry, settings).items()}
    else:
        shapes = attention_shapes(geometry)
    if not spec.replaces_attention and geometry.window and sliding:
        mixing = sum(
            attention_flops(geometry, causal_pairs(length, geometry.window)) * count
            for length, count in documents.items()
        )
    else:
        mixing = sum(
            spec.mixing_flops(geometry, settings, length) * count for length, count in documents.items()
        )
    hidden = geometry.hidden_size
    around = block_shapes(geometry)
    mlp = {name: shape for name, shape in around.items() if name.startswith("mlp.")}
    yield _Part(("input_layernorm.weight",))
    yield _Part(
        tuple(f"self_attn.{name}" for name in shapes),
        tuple(
            (f"self_attn.{name}", 2 * shape[0] * shape[1] * tokens, name in _LAST or shape[1] != hidden)
            for name, shape in shapes.items()
            if len(shape) == 2
        ),
        mixing,
    )
    yield _Part(("post_attention_layernorm.weight",))
    yield _Part(
        tuple(mlp),
        tuple(
            (name, 2 * shape[0] * shape[1] * tokens, name == "mlp.down_proj.weight")
            for name, shape in mlp.items()
            if len(shape) == 2
        ),
    )
