"""What the files of a run hold, as far as it is read again: each file described once. Imports no torch.

Keys that nobody reads may be there and may hold anything.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, get_type_hints

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from gendistill.anatomy.mixers import MIXERS
from gendistill.errors import GendistillError
from gendistill.paths import check_shape, parse_json, read_file
from gendistill_evals.protocols import PROTOCOLS, ProtocolFamily


def _mixer_kind(word: str) -> str:
    """Accept the name of a mixer."""
    if word not in MIXERS:
        raise ValueError(f"{word!r} is not a mixer; allowed: {', '.join(MIXERS)}")
    return word


# counts far above those of any run, and all that float32 holds: small enough to compute with
Count = Annotated[int, Field(ge=0, le=10**15)]
Positive = Annotated[int, Field(ge=1, le=10**15)]
Number = Annotated[float, Field(ge=-1e39, le=1e39)]


class LoggedScores(TypedDict):
    """Held-out scores inside a row of metrics."""

    kl: Number


class LoggedGeneration(TypedDict):
    """A score by generation inside a row of metrics."""

    value: Number


class HeldoutScores(LoggedScores):
    """Student beside teacher on held-out text, in nats per token."""

    student_ce: Number
    teacher_ce: Number
    top1_agreement: Number
    ln_vocab: Number
    num_tokens: Positive


class PositionRecord(LoggedScores):
    """Held-out scores over a range of positions, counted in tokens read before the prediction."""

    first: Positive
    last: Positive
    num_tokens: Positive


class MetricRow(TypedDict):
    """A line of ``metrics.jsonl``."""

    step: Count
    loss: NotRequired[Number | None]
    heldout: NotRequired[LoggedScores | None]
    speed: NotRequired[dict[str, Number]]
    shares: NotRequired[dict[str, Number]]
    layers: NotRequired[dict[str, Number]]
    score: NotRequired[LoggedGeneration]


class AnswerRow(TypedDict):
    """A line of a stage's ``answers.jsonl``."""

    step: Count
    question: str
    student: str
    teacher: str


class SourceRecord(TypedDict):
    """Rows that a stage read from one source, and those that it left out by reason."""

    rows: Count
    left_out: dict[str, Count]


class DataRecord(TypedDict):
    """What a stage read."""

    sources: dict[str, SourceRecord]
    notes: list[str]


class StageRecord(TypedDict):
    """A stage's ``result.json``."""

    objective: str
    steps: Count
    tokens: Count
    seconds: Number
    loss_first: Number
    loss_last: Number
    heldout: NotRequired[HeldoutScores | None]
    heldout_by_position: NotRequired[list[PositionRecord] | None]
    skipped: NotRequired[Count]
    rewinds: NotRequired[list[dict[str, Count]]]
    data: NotRequired[DataRecord | None]


class ProbedLayer(TypedDict):
    """A converted layer in ``probe.json``."""

    layer: Count
    cosine: NotRequired[Number | None]


class ProbeRecord(HeldoutScores):
    """The conversion's ``probe.json``."""

    layers: NotRequired[list[ProbedLayer] | None]
    by_position: NotRequired[list[PositionRecord] | None]


class PlannedTensor(TypedDict):
    """A tensor of the student in ``convert/plan.json``."""

    origin: str
    sources: NotRequired[list[str]]


class DroppedTensor(TypedDict):
    """A tensor of the teacher that ``convert/plan.json`` leaves out."""

    name: str


class PlanRecord(TypedDict):
    """The conversion's ``plan.json``."""

    tensors: list[PlannedTensor]
    dropped: list[DroppedTensor]


class TeacherRecord(TypedDict):
    """The teacher in the manifest."""

    spec: str
    num_layers: Count
    num_parameters: Count
    num_tensors: NotRequired[Positive]


class StudentRecord(TypedDict):
    """The student in the manifest."""

    placement: NotRequired[
        Annotated[list[Annotated[str, AfterValidator(_mixer_kind)]], Field(max_length=1024)] | None
    ]
    num_parameters: NotRequired[Count | None]


class CacheRow(TypedDict):
    """Bytes that one sequence keeps at one length, in the manifest."""

    tokens: Positive
    teacher: Positive
    student: Positive


class ManifestRecord(TypedDict, total=False):
    """The run's ``manifest.json``."""

    name: str | None
    date: str | None
    command: str | None
    commit: str | None
    device: str | None
    dtype: str | None
    impl: str | None
    versions: dict[str, str] | None
    teacher: TeacherRecord | None
    student: StudentRecord | None
    cache_bytes: Annotated[list[CacheRow], Field(max_length=100)] | None
    warnings: list[str] | None
    seconds: Number
    peak_memory_bytes: Count


class EvalSection(TypedDict, total=False):
    """The section ``eval`` of a recipe."""

    bootstrap: Annotated[int, Field(ge=1, le=10**7)]


class RecipeRecord(TypedDict, total=False):
    """The run's ``recipe.yaml``."""

    stages: dict[str, Any] | None
    eval: EvalSection | None


class Score(TypedDict):
    """A model's score on one task under one protocol."""

    value: Number
    n: Positive


class GenerationScore(Score):
    """A score by generation."""

    extraction_failures: Count
    truncated: Count
    eos_rate: Number
    mean_new_tokens: Number


class TaskRecord(TypedDict):
    """A task in ``results.json``, without its scores and the reasons for those that it lacks."""

    task: str
    kind: str
    metric: str
    items_sha256: str
    prompt_sha256: str
    n: Positive
    limit: NotRequired[Positive | None]


class Judged(TypedDict):
    """Whether an item was answered correctly."""

    correct: bool


class JudgedAnswer(Judged):
    """A generated answer, and what was found in it."""

    text: str
    extracted: str | None


class TurnRecord(TypedDict):
    """A message of a prompt."""

    role: str
    content: str


class SampleRow(TypedDict):
    """A line of ``samples.jsonl``, without the entries of the protocols."""

    task: str
    id: str | int
    group: NotRequired[str]
    prompt: str | list[TurnRecord]
    gold: JsonValue
    options: NotRequired[list[str] | None]


_SCORES = {ProtocolFamily.LIKELIHOOD: Score, ProtocolFamily.GENERATION: GenerationScore}
_JUDGED = {ProtocolFamily.LIKELIHOOD: Judged, ProtocolFamily.GENERATION: JudgedAnswer}


def results_record() -> Any:
    """Return the shape of a model's ``results.json``: each task has an entry and a reason per protocol."""
    return _results_record(_families())


def sample_row() -> Any:
    """Return the shape of a line of ``samples.jsonl``: the item, and an entry per protocol."""
    return _sample_row(_families())


def _families() -> tuple[tuple[str, ProtocolFamily], ...]:
    return tuple((name, protocol.family) for name, protocol in PROTOCOLS.items())


# One shape per set of protocols, because what checks a shape is built once for each.
@functools.cache
def _results_record(families: tuple[tuple[str, ProtocolFamily], ...]) -> Any:
    entries: dict[str, Any] = {}
    for name, family in families:
        entries[name] = NotRequired[_SCORES[family] | None]
        entries[f"{name}_reason"] = NotRequired[str | None]
    task = _typed_dict("ScoredTask", {**_annotations(TaskRecord), **entries})
    settings = NotRequired[dict[str, JsonValue] | None]
    return _typed_dict("ResultsRecord", {"model": str, "settings": settings, "tasks": list[task]})


@functools.cache
def _sample_row(families: tuple[tuple[str, ProtocolFamily], ...]) -> Any:
    entries = {name: NotRequired[_JUDGED[family] | None] for name, family in families}
    return _typed_dict("ScoredSample", {**_annotations(SampleRow), **entries})


def _typed_dict(name: str, fields: dict[str, Any]) -> Any:
    # Type checkers only know fields that are written out.
    make: Any = TypedDict
    return make(name, fields)


def _annotations(record: Any) -> dict[str, Any]:
    return get_type_hints(record, include_extras=True)


class TranscriptRow(TypedDict):
    """A line of ``transcripts.jsonl``."""

    id: str | int
    question: str
    answer: str
    num_tokens: Count
    truncated: bool
    repeated_4gram_share: Number
    teacher_nll: Number | None


@dataclass(frozen=True, slots=True)
class Metrics:
    """A metrics file.

    Attributes:
        rows: The lines that hold a ``MetricRow``, in order.
        broken: The others.
    """

    rows: list[dict[str, Any]]
    broken: list[bytes]


def read_bytes(path: Path, *, error: type[GendistillError], hint: str) -> bytes:
    """Read a file.

    Raises:
        error: It cannot be read.
    """
    try:
        return read_file(path)
    except OSError as problem:
        raise error(f"cannot read the file: {problem.strerror}", where=str(path), hint=hint) from problem


def read_rows(path: Path, shape: Any, *, error: type[GendistillError], hint: str) -> list[dict[str, Any]]:
    """Read a file of JSON lines, all of one shape.

    Args:
        path: The file.
        shape: Of every line, as for ``read_json``.
        error: What to raise.
        hint: What to do about a broken file.
    Raises:
        error: It cannot be read, or a line is not JSON or of another shape.
    """
    lines = read_bytes(path, error=error, hint=hint).split(b"\n")
    rows = {
        f"line {number}": parse_json(line, where=f"{path}:{number}", hint=hint, error=error)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    }
    check_shape(rows, dict[str, shape], where=str(path), hint=hint, error=error)
    return list(rows.values())


def read_metrics_file(path: Path, *, error: type[GendistillError]) -> Metrics:
    """Read ``metrics.jsonl``; a last line without its end is still being written, or was when its writer was killed.

    Raises:
        error: The file cannot be read.
    """
    hint = "make the file readable, or delete it: it tells how training went, and nothing depends on it"
    *lines, _ = read_bytes(path, error=error, hint=hint).split(b"\n")
    rows: dict[int, Any] = {}
    broken: set[int] = set()
    for number, line in enumerate(lines):
        try:
            if line.strip():
                rows[number] = parse_json(line, where=str(path), hint=hint, error=error)
        except error:
            broken.add(number)
    try:
        TypeAdapter(dict[int, MetricRow]).validate_python(rows, strict=True)
    except ValidationError as problem:
        wrong = problem.errors(include_url=False, include_context=False, include_input=False)
        broken.update(int(each["loc"][0]) for each in wrong)
    return Metrics(
        rows=[row for number, row in rows.items() if number not in broken],
        broken=[lines[number] for number in sorted(broken)],
    )
