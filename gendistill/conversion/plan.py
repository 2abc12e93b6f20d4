"""Plan a conversion: where every tensor of the student comes from. Imports no torch.

The policies are explained in docs/conversion.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from gendistill.anatomy.family import Geometry, attention_shapes, block_shapes, outer_shapes
from gendistill.anatomy.geometry import read_geometry
from gendistill.anatomy.groups import layer_part
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.placement import Placement
from gendistill.anatomy.settings import to_plain
from gendistill.anatomy.spec import Init, ParameterSpec
from gendistill.checkpoints.tensors import DTYPE_BYTES, NewTensor, TensorInfo
from gendistill.config.mixers import MixersConfig
from gendistill.errors import CheckpointError, RecipeError
from gendistill.types import short_count

_FLOATS = ("F32", "F16", "BF16")
# facts about the teacher's own file and defaults of transformers, neither of which belong into a student
_NOT_INHERITED = (
    *("model_type", "architectures", "layer_types", "auto_map", "quantization_config", "_name_or_path"),
    *("transformers_version", "base_model_type", "mixers", "mixer_configs", "sliding_window"),
    *("use_sliding_window", "max_window_layers", "id2label", "label2id", "problem_type", "return_dict"),
    *("output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder", "impl"),
)


class Origin(StrEnum):
    """How a tensor of the student comes about."""

    COPIED = "copied"
    TRANSFORMED = "transformed"
    INITIALISED = "initialised"


@dataclass(frozen=True, slots=True)
class TensorStep:
    """The making of one tensor of the student.

    Attributes:
        name: In the student.
        dtype: Safetensors name: the source's, or ``F32`` for gates.
        sources: Teacher tensors read: one when copied, weight and norm scale when folded.
        expression: How a transformed tensor is computed, for people.
        init: Scheme of an initialised tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    origin: Origin
    sources: tuple[str, ...] = ()
    expression: str = ""
    init: Init | None = None

    @property
    def num_parameters(self) -> int:
        """How many numbers it holds."""
        return self.as_new_tensor().num_bytes // DTYPE_BYTES[self.dtype]

    def as_new_tensor(self) -> NewTensor:
        """Describe it for the shard writer."""
        return NewTensor(self.name, self.shape, self.dtype)

    def describe(self) -> str:
        """Return ``copied``, the expression, or the scheme."""
        if self.init is not None:
            return self.init.describe()
        return self.expression or "copied"


@dataclass(frozen=True, slots=True)
class DroppedTensor:
    """A teacher tensor that the student does not have, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class ConversionPlan:
    """What becomes of every tensor.

    Attributes:
        steps: One per tensor of the student, in the order of the model.
        student_config: Content of the student's config.json.
        placement: Mixer of each layer.
        dropped: Teacher tensors that nothing is made from.
    """

    steps: tuple[TensorStep, ...]
    student_config: dict[str, Any]
    placement: Placement
    dropped: tuple[DroppedTensor, ...]

    @property
    def num_parameters(self) -> int:
        """Parameters of the student; a tied head counts once."""
        return sum(step.num_parameters for step in self.steps)

    @property
    def num_bytes(self) -> int:
        """Size of the student's weights on disk."""
        return sum(step.as_new_tensor().num_bytes for step in self.steps)

    def parameters_by_origin(self) -> dict[Origin, int]:
        """Count parameters that are copied, transformed and initialised."""
        return {
            origin: sum(step.num_parameters for step in self.steps if step.origin is origin)
            for origin in Origin
        }

    def __repr__(self) -> str:
        size = f"{short_count(self.num_parameters)} parameters"
        return f"<ConversionPlan {self.placement}, {size}; print shows the origins>"

    def __str__(self) -> str:
        lines = [f"{self.placement}; {short_count(self.num_parameters)} parameters"]
        for origin, count in self.parameters_by_origin().items():
            steps = [step for step in self.steps if step.origin is origin]
            if steps:
                lines.append(f"{origin:<12} {len(steps):>4} tensors  {short_count(count):>6} parameters")
        lines += [f"dropped      {item.name}: {item.reason}" for item in self.dropped]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data for plan.json."""
        steps = []
        for step in self.steps:
            entry = {
                "name": step.name,
                "shape": list(step.shape),
                "dtype": step.dtype,
                "origin": step.origin.value,
            }
            if step.sources:
                entry["sources"] = list(step.sources)
            if step.origin is not Origin.COPIED:
                entry["how"] = step.describe()
            steps.append(entry)
        return {
            "placement": list(self.placement.kinds),
            "parameters": {"total": self.num_parameters, **self.parameters_by_origin()},
            "bytes": self.num_bytes,
            "student_config": self.student_config,
            "tensors": steps,
            "dropped": [asdict(item) for item in self.dropped],
        }


def plan_conversion(
    config: dict[str, Any], tensors: Mapping[str, TensorInfo], placement: Placement, mixers: MixersConfig
) -> ConversionPlan:
    """Decide what becomes of every tensor of a teacher.

    Args:
        config: The teacher's config with defaults filled in, as ``Checkpoint.config``.
        tensors: The teacher's tensors.
        placement: Mixer of each layer.
        mixers: Settings of the mixers.
    Raises:
        CheckpointError: Unsupported family, or tensors that do not fit the config.
        RecipeError: Placement of the wrong length, or settings that contradict each other.
    """
    geometry = read_geometry(config)
    if len(placement.kinds) != geometry.num_layers:
        raise RecipeError(
            f"the placement has {len(placement.kinds)} layers, the checkpoint has {geometry.num_layers}",
            where="student.placement",
            hint="give one mixer per layer, or a pattern that is tiled",
        )
    student_config = _student_config(config, geometry, placement, mixers)
    _check_teacher(geometry, tensors)
    steps = tuple(_steps(geometry, tensors, placement, mixers))
    dropped = _dropped(geometry, tensors, steps, placement, mixers)
    plan = ConversionPlan(steps, student_config, placement, dropped)
    check_census(plan, tensors)
    return plan


def check_census(plan: ConversionPlan, tensors: Mapping[str, TensorInfo]) -> None:
    """Make sure that nothing is lost or invented.

    Raises:
        CheckpointError: A teacher tensor is neither used nor dropped, a student tensor has no origin or two, or
            a copy changes shape.
    """
    used = {source for step in plan.steps for source in step.sources}
    dropped = {item.name for item in plan.dropped}
    names = [step.name for step in plan.steps]
    problems = [f"{name} is neither used nor dropped" for name in tensors if name not in used | dropped]
    problems += [f"{name} is used and dropped" for name in sorted(used & dropped)]
    problems += [f"{name} is not in the checkpoint" for name in sorted((used | dropped) - set(tensors))]
    problems += [
        f"{name} is made twice" for name in sorted({name for name in names if names.count(name) > 1})
    ]
    for step in plan.steps:
        if (step.origin is Origin.INITIALISED) != (step.init is not None) or (
            (step.origin is Origin.INITIALISED) == bool(step.sources)
        ):
            problems.append(f"{step.name} has no single origin")
        elif step.sources and step.sources[0] in tensors and tensors[step.sources[0]].shape != step.shape:
            problems.append(
                f"{step.name} has shape {step.shape}, its source has {tensors[step.sources[0]].shape}"
            )
    if problems:
        shown = "; ".join(problems[:3])
        raise CheckpointError(
            f"the census fails for {len(problems)} tensors: {shown}",
            where="conversion plan",
            hint="the checkpoint differs from its family; convert only checkpoints that transformers loads cleanly",
        )


def _check_teacher(geometry: Geometry, tensors: Mapping[str, TensorInfo]) -> None:
    expected = dict(outer_shapes(geometry))
    for layer in range(geometry.num_layers):
        expected.update(
            (f"model.layers.{layer}.{name}", shape) for name, shape in block_shapes(geometry).items()
        )
        expected.update(
            (f"model.layers.{layer}.self_attn.{name}", shape)
            for name, shape in attention_shapes(geometry).items()
        )
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape != shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, the config says {list(shape)}")
        elif name in tensors and tensors[name].dtype not in _FLOATS:
            problems.append(f"{name} is {tensors[name].dtype}; allowed: {', '.join(_FLOATS)}")
    problems += [
        f"{name} does not belong to a {geometry.family} model"
        for name in tensors
        if name not in expected and _superfluous(name, geometry) is None
    ]
    if problems:
        raise CheckpointError(
            f"the weights do not fit config.json in {len(problems)} places: {'; '.join(problems[:3])}",
            where="student.from",
            hint="check that config.json and the safetensors files come from the same checkpoint",
        )


def _superfluous(name: str, geometry: Geometry) -> str | None:
    """Give the reason why a tensor that some checkpoints carry is not needed."""
    if name == "lm_head.weight" and geometry.tied_head:
        return "tied to the embeddings"
    if re.fullmatch(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", name):
        return "recomputed from the config"
    return None


def _steps(
    geometry: Geometry, tensors: Mapping[str, TensorInfo], placement: Placement, mixers: MixersConfig
) -> Iterator[TensorStep]:
    outer = list(outer_shapes(geometry))
    yield _copy(outer[0], tensors)
    for layer, kind in enumerate(placement.kinds):
        prefix, spec = f"model.layers.{layer}.", MIXERS[kind]
        if spec.replaces_attention:
            table = spec.parameters(geometry, mixers.of(kind))
            yield from _mixer_steps(f"{prefix}self_attn.", table, tensors)
        else:
            for name in attention_shapes(geometry):
                yield _copy(f"{prefix}self_attn.{name}", tensors)
        for name in block_shapes(geometry):
            yield _copy(prefix + name, tensors)
    for name in outer[1:]:
        yield _copy(name, tensors)


def _copy(name: str, tensors: Mapping[str, TensorInfo]) -> TensorStep:
    return TensorStep(name, tensors[name].shape, tensors[name].dtype, Origin.COPIED, (name,))


def _mixer_steps(
    prefix: str, table: Mapping[str, ParameterSpec], tensors: Mapping[str, TensorInfo]
) -> Iterator[TensorStep]:
    dtype = tensors[f"{prefix}q_proj.weight"].dtype  # new tensors follow the layer they replace
    for name, spec in table.items():
        if spec.from_attention is None:
            kept = "F32" if spec.float32 else dtype
            yield TensorStep(prefix + name, spec.shape, kept, Origin.INITIALISED, init=spec.init)
            continue
        source = prefix + spec.from_attention
        kept = "F32" if spec.float32 else tensors[source].dtype
        if spec.scaled_by is not None:
            yield TensorStep(
                prefix + name,
                spec.shape,
                kept,
                Origin.TRANSFORMED,
                (source, prefix + spec.scaled_by),
                f"each head's rows of {spec.from_attention} times {spec.scaled_by}",
            )
        else:
            yield TensorStep(prefix + name, spec.shape, kept, Origin.COPIED, (source,))


def _dropped(
    geometry: Geometry,
    tensors: Mapping[str, TensorInfo],
    steps: tuple[TensorStep, ...],
    placement: Placement,
    mixers: MixersConfig,
) -> tuple[DroppedTensor, ...]:
    used = {source for step in steps for source in step.sources}
    found = []
    for name in tensors:
        if name in used:
            continue
        reason = _superfluous(name, geometry)
        layer, part = layer_part(name) or (0, "")
        if reason is None and part == "self_attn":
            kind = placement.kinds[layer]
            local = name.partition(".self_attn.")[2]
            reason = MIXERS[kind].not_used(local, mixers.of(kind))
        if reason is not None:
            found.append(DroppedTensor(name, reason))
    return tuple(found)


def _student_config(
    config: dict[str, Any], geometry: Geometry, placement: Placement, mixers: MixersConfig
) -> dict[str, Any]:
    kinds = placement.kinds
    kept = {key: value for key, value in config.items() if key not in _NOT_INHERITED}
    layer_types = []
    for kind, sliding in zip(kinds, geometry.sliding, strict=True):
        spec = MIXERS[kind]
        windowed = sliding and not spec.replaces_attention
        layer_types.append("sliding_attention" if windowed else spec.layer_type)
    settings = {kind: mixers.of(kind) for kind in MIXERS if kind in kinds}
    student = {
        **kept,
        "model_type": "gendistill",
        "architectures": ["GendistillForCausalLM"],
        "impl": "auto",
        "base_model_type": geometry.family,
        "head_dim": geometry.head_dim,
        "num_key_value_heads": geometry.num_kv_heads,
        "layer_types": layer_types,
        "mixers": list(kinds),
        "mixer_configs": {kind: to_plain(one) for kind, one in settings.items() if one is not None},
    }
    if "sliding_attention" in layer_types:
        student["sliding_window"] = _window(geometry, placement, mixers)
    return student


def _window(geometry: Geometry, placement: Placement, mixers: MixersConfig) -> int:
    """All sliding layers of a model share one window."""
    own = geometry.window
    sliding = [kind for kind in placement.kinds if MIXERS[kind].layer_type == "sliding_attention"]
    if not sliding:
        assert own is not None
        return own
    kind = sliding[0]
    chosen = mixers.of(kind).window
    if own is not None and own != chosen:
        raise RecipeError(
            f"mixers.{kind}.window is {chosen}, but the checkpoint has sliding layers of {own}; a model has one window",
            where=f"student.mixers.{kind}.window",
            hint=f'set it to {own}, or place "full", which keeps the checkpoint\'s own window',
        )
    return chosen
