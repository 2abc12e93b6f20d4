"""What is looked at while stages train, and what a stage does when it goes wrong or has learnt enough."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from typing import Annotated, Literal

from pydantic import Field

from gendistill.config.base import Affects, Section
from gendistill.errors import RecipeError

_MANY_STEPS = 10**9
_MANY_ITEMS = 10**6

# accelerate's name of a tracker -> the package that has it; gendistill has an extra of the tracker's name
TRACKERS = {"tensorboard": "tensorboard", "trackio": "trackio", "wandb": "wandb"}
Tracker = Literal["tensorboard", "trackio", "wandb"]


class WatchConfig(Section):
    """What is looked at while stages train. Nothing of it changes what is trained."""

    speed: Annotated[bool, Affects.NOTHING] = Field(
        default=True,
        description="in every log line: model FLOPs, MFU, and what share of a step each part takes",
    )
    groups: Annotated[bool, Affects.NOTHING] = Field(
        default=True, description="in every log line: gradient norm and change of weights by group"
    )
    layers_every_steps: Annotated[int | None, Affects.NOTHING] = Field(
        default=None,
        ge=1,
        le=_MANY_STEPS,
        description="compare every new mixer with its attention, and list gate half-lives, on a held-out batch",
    )
    answers_every_steps: Annotated[int | None, Affects.NOTHING] = Field(
        default=None,
        ge=1,
        le=_MANY_STEPS,
        description="answer open questions beside the teacher: answers.jsonl",
    )
    questions: Annotated[str, Affects.NOTHING] = Field(
        default="demo", description="built-in name or .jsonl of open questions"
    )
    answer_tokens: Annotated[int, Affects.NOTHING] = Field(
        default=48, ge=1, le=4096, description="new tokens per open answer"
    )
    score_every_steps: Annotated[int | None, Affects.NOTHING] = Field(
        default=None, ge=1, le=_MANY_STEPS, description="score the student by generation on a task"
    )
    task: Annotated[str, Affects.NOTHING] = Field(
        default="everyday", description="built-in task name or task.yaml path"
    )
    task_limit: Annotated[int | None, Affects.NOTHING] = Field(
        default=64, ge=1, le=_MANY_ITEMS, description="items of the task, from the first; null: all"
    )


class NonFiniteConfig(Section):
    """What follows steps whose loss or gradient is not finite. Such a step never changes a weight or a moment.

    A lone one is skipped. Several in a row take the stage back to its newest intact checkpoint; the rows of the steps
    in between are not read again, and among such steps no checkpoint is saved. ``{in_a_row: 1, rewinds: 0}`` ends the
    stage at the first one.
    """

    in_a_row: int = Field(
        default=3, ge=1, le=1000, description="steps that make a stage go back; fewer are skipped"
    )
    rewinds: int = Field(
        default=2, ge=0, le=1000, description="times that a stage goes back before it ends with an error"
    )


class StopEarlyConfig(Section):
    """The end of a stage once a generation score has stopped rising; it keeps the weights of its last step.

    The score is the share of items right by generation. The first one counts as the best so far.
    """

    task: Annotated[str, Affects.CONTENT] = Field(
        default="everyday", description="built-in task name or task.yaml path; not one of eval.tasks"
    )
    limit: int | None = Field(
        default=64, ge=1, le=_MANY_ITEMS, description="items of the task, from the first; null: all"
    )
    every_steps: int = Field(ge=1, le=_MANY_STEPS, description="steps between two scores")
    patience: int = Field(
        default=3, ge=1, le=_MANY_STEPS, description="scores in a row without a gain that end the stage"
    )
    gain: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="by how much a score must exceed the best so far, as a share of items",
    )
    min_steps: int = Field(default=0, ge=0, le=_MANY_STEPS, description="steps that are taken in any case")


def check_trackers(trackers: Sequence[str]) -> None:
    """Check that what a recipe writes to is installed.

    Raises:
        RecipeError: It is not; names the extra that installs it.
    """
    for name in trackers:
        try:
            metadata.distribution(TRACKERS[name])
        except metadata.PackageNotFoundError:
            raise RecipeError(
                f"the recipe writes to {name}, and the package {TRACKERS[name]} is not installed here",
                where="trackers",
                hint=f"pip install {TRACKERS[name]} (or gendistill with its extra of that name), or leave it out: "
                "metrics.jsonl has the same numbers",
            ) from None
