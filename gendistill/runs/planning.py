"""Plan a run without running it: teacher, student, stages, memory. What ``--dry-run`` prints.

Imports torch only when a plan is made, to ask what the linear layers can run on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gendistill.anatomy.family import Geometry, attention_shapes, block_shapes, outer_shapes
from gendistill.anatomy.geometry import check_vocabulary, read_geometry
from gendistill.anatomy.groups import ParamGroup
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.tensors import TensorInfo, read_tensor_index
from gendistill.config.engine import EngineConfig
from gendistill.config.mixers import MixersConfig
from gendistill.config.schema import Recipe, StageConfig, teacher_dtype
from gendistill.conversion.plan import ConversionPlan, plan_conversion
from gendistill.errors import RecipeError
from gendistill.runs.advice import advise, cached_folder, check_batches, has_chat_template
from gendistill.runs.fitting import Way, ways_to_fit
from gendistill.runs.learning import Learning, check_packages, find_learning
from gendistill.runs.memory import Device, MemoryEstimate, find_device, predict_memory, stays_gathered
from gendistill.runs.timing import TimeEstimate, predict_time
from gendistill.types import short_count

if TYPE_CHECKING:
    import torch

    from gendistill.conversion.impl import ImplChoice
    from gendistill.teachers.base import TeacherFacts

_BYTES = {"float32": 4, "bfloat16": 2}
_DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a pretrained model without loading it.

    Attributes:
        spec: As written in the recipe.
        config: With defaults filled in.
        tensors: Name to shape and dtype.
        chat_template: Whether its tokenizer has one.
    """

    spec: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    chat_template: bool = False

    @property
    def num_parameters(self) -> int:
        """Parameters; a head tied to the embeddings counts once."""
        tied = bool(self.config.get("tie_word_embeddings"))
        return sum(
            info.num_elements
            for name, info in self.tensors.items()
            if not (tied and name == "lm_head.weight")
        )

    def as_teacher(self, dtype: str) -> TeacherFacts:
        """Say what an objective asks of a teacher before there is one."""
        from gendistill.teachers.base import TeacherFacts

        return TeacherFacts(
            vocab_size=self.config["vocab_size"],
            hidden_size=self.config["hidden_size"],
            num_layers=self.config["num_hidden_layers"],
            num_bytes=self.num_parameters * _BYTES[dtype],
        )

    def describe(self, dtype: str) -> str:
        """Return layers, heads, vocabulary, parameters and dtype on one line."""
        heads = self.config["num_attention_heads"]
        kv_heads = self.config.get("num_key_value_heads") or heads
        head_dim = self.config.get("head_dim") or self.config["hidden_size"] // heads
        return (
            f"{self.spec}   {self.config['num_hidden_layers']} layers, {heads}/{kv_heads} heads x {head_dim}, "
            f"vocab {self.config['vocab_size']:,}, {short_count(self.num_parameters)} parameters, {dtype}"
        )


@dataclass(frozen=True, slots=True)
class StageForecast:
    """What one stage would do.

    Attributes:
        name: Of the stage.
        objective: Kind and what matters of it.
        trained: Parameters that learn, per group; for a weight with an adapter, the adapter's.
        adapters: How many of them are in adapters.
        mask: Tokens that count.
        tokens: Planned tokens, or None when the length is given in minutes.
        steps: Planned optimizer steps, or None likewise.
        minutes: Planned time, or None.
        seq_len: Tokens per row.
        batch: ``(rows per forward, forwards per step, ranks)``.
        compute_dtype: Of matmuls and activations.
        memory: Predicted peak of one process.
        time: Predicted hours of its steps.
        checkpoint_bytes: Size of one checkpoint.
        ways_to_fit: Where the peak is beyond the device, what would fit, the cheapest first.
    """

    name: str
    objective: str
    trained: dict[ParamGroup, int]
    adapters: int
    mask: str
    tokens: int | None
    steps: int | None
    minutes: float | None
    seq_len: int
    batch: tuple[int, int, int]
    compute_dtype: str
    memory: MemoryEstimate
    time: TimeEstimate
    checkpoint_bytes: int
    ways_to_fit: tuple[Way, ...] = ()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return math.prod(self.batch) * self.seq_len


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a recipe would do."""

    recipe: Recipe
    teacher: ModelFacts
    teacher_dtype: str
    source: ModelFacts
    conversion: ConversionPlan
    impl: ImplChoice
    stages: tuple[StageForecast, ...]
    device: Device
    warnings: tuple[str, ...] = ()

    @property
    def hours(self) -> float | None:
        """Predicted hours of all stages; None if one of them cannot be predicted."""
        each = [stage.time.hours for stage in self.stages]
        return None if None in each else sum(hours for hours in each if hours is not None)

    def render(self, *, stages: bool = True) -> str:
        """Lay the plan out for people.

        Args:
            stages: Whether to show stages and memory too.
        """
        from gendistill.conversion.render import render_plan

        lines = [f"teacher   {self.teacher.describe(self.teacher_dtype)}"]
        if self.source.spec != self.teacher.spec:
            lines.append(
                f"from      {self.source.describe(str(self.source.config.get('dtype') or 'unknown dtype'))}"
            )
        placement = self.conversion.placement
        cached = sum(not MIXERS[kind].replaces_attention for kind in placement.kinds)
        share = cached / len(placement.kinds)
        lines.append(
            f"student   {placement}   keys and values in {cached} layers, {share:.0%} of the teacher's"
        )
        lines.append(f"impl      {self.impl}")
        tree = Console(file=StringIO(), width=120, highlight=False, color_system=None)
        with tree.capture() as captured:
            tree.print(render_plan(self.conversion))
        lines.append(captured.get().rstrip("\n"))
        if stages:
            lines += self._stage_lines() + self._time_lines() + self._memory_lines()
            lines += [f"warn      {warning}" for warning in self.warnings]
        lines.append(
            f"ok        nothing was run. Drop --dry-run to start; output goes to {self.recipe.run_folder}"
        )
        return "\n".join(lines)

    def _stage_lines(self) -> list[str]:
        if not self.stages:
            return ["stages    none"]
        header = (
            "stage",
            "objective",
            "trains",
            "mask",
            "length",
            "seq",
            "batch = micro x accum x ranks",
            "steps",
            "dtype",
        )
        rows = [header, *(_stage_row(stage) for stage in self.stages)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]

    def _time_lines(self) -> list[str]:
        if not self.stages:
            return []
        parts = ", ".join(f"{stage.name} {_hours(stage.time.hours)}" for stage in self.stages)
        reasons = dict.fromkeys(stage.time.reason for stage in self.stages if stage.time.reason)
        timed = all(stage.minutes is not None for stage in self.stages)
        basis = "; ".join(reasons) or (
            "as the recipe says" if timed else "steps alone, by the utilisation measured on one H200"
        )
        if not reasons and not timed and self.stages[0].batch[2] > 1:
            basis += ", without what processes send one another"
        return [f"time      {parts}; {_hours(self.hours)} in all ({basis})"]

    def _memory_lines(self) -> list[str]:
        if not self.stages:
            return []
        worst = max(self.stages, key=lambda stage: stage.memory.total)
        memory = worst.memory
        parts = (
            f"teacher {_gb(memory.teacher)}, student {_gb(memory.student)}, gradients and moments "
            f"{_gb(memory.optimizer)}, activations {_gb(memory.activations)}, chunked loss {_gb(memory.loss)}, "
            f"runtime {_gb(memory.runtime)}"
        )
        peak = f"predicted peak {_gb(memory.total)} of {_gb(self.device.total_bytes)} GB in {worst.name}"
        lines = [f"memory    {peak} on {self.device.name} ({parts})"]
        for stage in self.stages:
            if stage.memory.total > self.device.total_bytes:
                lines += _fit_lines(stage)
        largest = max(self.stages, key=lambda stage: stage.checkpoint_bytes)
        lines.append(
            f"disk      a checkpoint of {largest.name} takes {_size(largest.checkpoint_bytes)}, a saved student "
            f"{_size(4 * self.conversion.num_parameters)}"
        )
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data, without the tensor list."""
        return {
            "recipe": self.recipe.name,
            "teacher": {"model": self.teacher.spec, "parameters": self.teacher.num_parameters},
            "student": {
                "placement": list(self.conversion.placement.kinds),
                "parameters": self.conversion.num_parameters,
            },
            "impl": self.impl.to_json(),
            "stages": [{**asdict(stage), "memory": stage.memory.to_json()} for stage in self.stages],
            "hours": self.hours,
            "device": asdict(self.device),
            "warnings": list(self.warnings),
        }


def plan_run(recipe: Recipe, *, num_processes: int = 1, device: Device | None = None) -> RunPlan:
    """Plan a recipe from configs alone.

    Of a hub model only config.json is fetched. A package or GGUF file is resolved as for the run itself, which
    fills the cache folder the first time.

    Args:
        recipe: The recipe.
        num_processes: Ranks that share a step.
        device: Where it would run; found if None.
    Raises:
        CheckpointError: A model that cannot be found, read or converted.
        RecipeError: A placement, batch, vocabulary, ``student.impl`` or ``engine.loss`` that does not fit.
    """
    device = device or find_device()
    teacher = read_model(recipe.teacher.model, revision=recipe.teacher.revision, where="teacher.model")
    source = teacher
    if recipe.student.source is not None:
        source = read_model(recipe.student.source, revision="main", where="student.from")
    check_batches(recipe, num_processes)
    geometry = read_geometry(source.config)
    check_vocabulary(teacher.config.get("vocab_size"), source.config["vocab_size"])
    placement = Placement.parse(recipe.student.placement, num_layers=geometry.num_layers)
    conversion = plan_conversion(source.config, source.tensors, placement, recipe.student.mixers)
    impl, loss = _choose_impl(recipe, placement, device), _choose_loss(recipe, device)
    dtype = teacher_dtype(recipe.teacher.dtype, device.kind)
    run = _Run(
        stages=recipe.stages,
        conversion=conversion,
        geometry=geometry,
        mixers=recipe.student.mixers,
        impl=impl.impl,
        loss=loss,
        engine=recipe.engine,
        teacher=teacher,
        dtype=dtype,
        num_processes=num_processes,
        sharded=recipe.engine.parallel == "fsdp2",
        device=device,
    )
    stages = tuple(run.forecast(name, stage) for name, stage in recipe.stages.items())
    warnings = advise(recipe, teacher.config, chat_template=teacher.chat_template)
    return RunPlan(recipe, teacher, dtype, source, conversion, impl, stages, device, tuple(warnings))


def _choose_impl(recipe: Recipe, placement: Placement, device: Device) -> ImplChoice:
    from gendistill.conversion.impl import choose_impl

    return choose_impl(recipe.student.impl, placement, device=_torch_device(device), device_name=device.name)


def _choose_loss(recipe: Recipe, device: Device) -> str:
    from gendistill.losses.logits import choose_loss_impl

    return choose_loss_impl(recipe.engine.loss, _torch_device(device)).value


def read_model(spec: str, *, revision: str, where: str) -> ModelFacts:
    """Read a model's config and its tensors' shapes; of a hub model only config.json is fetched."""
    from gendistill.checkpoints.config_file import read_config
    from gendistill.checkpoints.hub import download_config
    from gendistill.checkpoints.resolve import is_hub_id, local_path, resolve_checkpoint

    if (
        spec.startswith(("pypi:", "builtin:"))
        or local_path(spec, where=where) is not None
        or not is_hub_id(spec)
    ):
        checkpoint = resolve_checkpoint(spec, revision=revision, where=where)
        return ModelFacts(
            spec,
            checkpoint.config,
            read_tensor_index(checkpoint.folder, where=where),
            has_chat_template(checkpoint.folder),
        )
    config = read_config(download_config(spec, revision=revision, where=where), where)
    # of the tokenizer only what was downloaded before is known
    folder = cached_folder(spec, revision)
    has_template = folder is not None and has_chat_template(folder)
    return ModelFacts(spec, config, expected_tensors(config, where=where), has_template)


def expected_tensors(config: dict[str, Any], *, where: str) -> dict[str, TensorInfo]:
    """List the tensors that a config promises."""
    geometry = read_geometry(config, where=where)
    shapes = dict(outer_shapes(geometry))
    for layer in range(geometry.num_layers):
        prefix = f"model.layers.{layer}."
        shapes.update(
            {f"{prefix}self_attn.{name}": shape for name, shape in attention_shapes(geometry).items()}
        )
        shapes.update({prefix + name: shape for name, shape in block_shapes(geometry).items()})
    dtype = _DTYPE_NAMES.get(str(config.get("dtype")).removeprefix("torch."), "F32")
    return {name: TensorInfo(shape, dtype, Path("config.json")) for name, shape in shapes.items()}


@dataclass(frozen=True, slots=True)
class _Run:
    """What all stages of a run share."""

    stages: Mapping[str, StageConfig]
    conversion: ConversionPlan
    geometry: Geometry
    mixers: MixersConfig
    impl: str | None
    loss: str
    engine: EngineConfig
    teacher: ModelFacts
    dtype: str
    num_processes: int
    sharded: bool
    device: Device

    def learning(self, name: str, stage: StageConfig) -> Learning:
        return find_learning(
            name,
            stage,
            self.conversion,
            self.teacher.as_teacher(self.dtype),
            tied_head=self.geometry.tied_head,
        )

    def is_fused(self, stage: StageConfig) -> bool:
        """Whether the student's layers will run fused."""
        import torch

        from gendistill.engine.decoder import why_no_such

        where = _torch_device(self.device)
        blocks = self.engine.blocks
        if blocks == "family" or (blocks == "auto" and where.type != "cuda"):
            return False
        if stage.lora is not None and (stage.lora.dropout or self._is_split(stage)):
            return False
        dtype = getattr(torch, _compute_dtype(stage, self.geometry.hidden_size, self.device))
        return why_no_such(self.conversion.student_config, device=where, dtype=dtype) is None

    def _is_split(self, stage: StageConfig) -> bool:
        """Whether each of the student's layers will have its parameters whole only while it runs."""
        if not self.sharded or self.num_processes == 1:
            return False
        return not stays_gathered(
            self.engine,
            stage,
            geometry=self.geometry,
            num_student=self.conversion.num_parameters,
            device=self.device,
        )

    def memory(self, stage: StageConfig, learning: Learning) -> MemoryEstimate:
        return predict_memory(
            stage,
            geometry=self.geometry,
            placement=self.conversion.placement,
            mixers=self.mixers,
            impl=self.impl,
            # a stage of cross-entropy alone has it on the device too, for its held-out scores
            num_teacher=self.teacher.num_parameters,
            num_student=self.conversion.num_parameters,
            learning=learning,
            teacher_bytes=_BYTES[self.dtype],
            device=self.device,
            loss=self.loss,
            fused=self.is_fused(stage),
            num_shards=self.num_processes if self.sharded else 1,
            engine=self.engine,
            buckets=self.num_processes > 1
            and not self.sharded
            and not self.engine.may_capture(self.device.kind),
        )

    def forecast(self, name: str, stage: StageConfig) -> StageForecast:
        rows = stage.micro_batch_size * self.num_processes
        learning = self.learning(name, stage)
        check_packages(name, stage)
        memory = self.memory(stage, learning)
        dtype = _compute_dtype(stage, self.geometry.hidden_size, self.device)
        per_step = stage.batch_size * stage.seq_len
        steps = stage.steps if stage.tokens is None else math.ceil(stage.tokens / per_step)
        ways = ()
        if memory.total > self.device.total_bytes:
            found = ways_to_fit(
                name,
                stage,
                self.num_processes,
                self._peak,
                self.device.total_bytes,
                num_layers=self.geometry.num_layers,
            )
            ways = tuple(way for each in found if (way := self._for_all_stages(name, each)) is not None)
        return StageForecast(
            name=name,
            objective=_describe_objective(stage),
            trained=learning.counts(),
            adapters=learning.num_adapters,
            mask=stage.mask,
            tokens=None if steps is None else steps * per_step,
            steps=steps,
            minutes=stage.minutes,
            seq_len=stage.seq_len,
            batch=(stage.micro_batch_size, stage.batch_size // rows, self.num_processes),
            compute_dtype=dtype,
            memory=memory,
            time=predict_time(
                stage,
                steps=steps,
                student=self.conversion.student_config,
                teacher=self.teacher.config,
                learning=learning,
                device=self.device,
                compute_dtype=dtype,
                kernels=self.impl in (None, "triton") and self.loss == "triton" and self.is_fused(stage),
                num_processes=self.num_processes,
            ),
            checkpoint_bytes=learning.checkpoint,
            ways_to_fit=ways,
        )

    def _for_all_stages(self, name: str, way: Way) -> Way | None:
        """Let the other stages' batches be shared by a way's processes, too; None if one cannot be."""
        if way.num_processes is None:
            return way
        smaller = []
        for other, stage in self.stages.items():
            share, rest = divmod(stage.batch_size, way.num_processes)
            if rest:
                return None
            if other != name and share % stage.micro_batch_size:
                fits = max(rows for rows in range(1, stage.micro_batch_size) if share % rows == 0)
                smaller.append(f"stages.{other}.micro_batch_size={fits}")
        return replace(way, overrides=(*way.overrides, *smaller))

    def _peak(self, name: str, stage: StageConfig, processes: int | None, captured: bool) -> int | None:
        """Predict the peak of a changed stage, sharded over some processes or as planned; None: it is refused."""
        changed = self
        if not captured:
            changed = replace(self, engine=self.engine.model_copy(update={"capture": "never"}))
        if processes is not None:
            # memory is what is missing
            engine = self.engine.model_copy(update={"reshard": "always"})
            changed = replace(self, num_processes=processes, sharded=True, engine=engine)
        try:
            return changed.memory(stage, changed.learning(name, stage)).total
        except RecipeError:
            return None


def _compute_dtype(stage: StageConfig, hidden_size: int, device: Device) -> str:
    import torch

    from gendistill.training.optim import choose_compute_dtype, fixed_dtype

    where = _torch_device(device)
    chosen = fixed_dtype(stage)
    if chosen is None and where.type == "cuda" and not torch.cuda.device_count():
        chosen = torch.bfloat16  # a plan for another machine, whose GPU cannot be asked
    return str(chosen or choose_compute_dtype(where, hidden_size)).removeprefix("torch.")


def _torch_device(device: Device) -> torch.device:
    """Return where torch would run; a driver may name a GPU that torch cannot use."""
    import torch

    return torch.device(device.kind if torch.cuda.is_available() else "cpu")


def _describe_objective(stage: StageConfig) -> str:
    objective = stage.objective
    words = [objective.kind]
    for name in ("direction", "norm"):
        value = getattr(objective, name, None)
        words += [value] if value else []
    temperature = getattr(objective, "temperature", 1.0)
    return " ".join([*words, *([f"T={temperature:g}"] if temperature != 1.0 else [])])


def _stage_row(stage: StageForecast) -> tuple[str, ...]:
    micro, accumulation, ranks = stage.batch
    trained = (
        ", ".join(f"{group} {short_count(count)}" for group, count in stage.trained.items()) or "nothing"
    )
    if stage.adapters:
        trained += f" ({short_count(stage.adapters)} in adapters)"
    length = f"{stage.minutes:g} min" if stage.tokens is None else f"{short_count(stage.tokens)} tokens"
    return (
        stage.name,
        stage.objective,
        trained,
        stage.mask,
        length,
        f"{stage.seq_len:,}",
        f"{micro * accumulation * ranks} x {stage.seq_len:,} = {stage.tokens_per_step:,} = "
        f"{micro} x {accumulation} x {ranks}",
        "timed" if stage.steps is None else f"{stage.steps:,}",
        stage.compute_dtype,
    )


def _fit_lines(stage: StageForecast) -> list[str]:
    """Say what would fit where a stage does not."""
    if not stage.ways_to_fit:
        return [
            f"warn      {stage.name} will not fit, and no setting mends it: take a larger device, a smaller teacher, "
            f"or a shorter stages.{stage.name}.seq_len"
        ]
    width = max(len(way.command) for way in stage.ways_to_fit)
    return [
        f"warn      {stage.name} will not fit; what would, the cheapest first:",
        *(
            f"          {way.command:{width}}  {_gb(way.peak)} GB   {way.cost}".rstrip()
            for way in stage.ways_to_fit
        ),
    ]


def _hours(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.3g} h"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:.1f} MB"


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f}"
