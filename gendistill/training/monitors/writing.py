"""What a student writes while it learns: answers to open questions beside the teacher's, and scores by generation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from gendistill.errors import TrainingError
from gendistill.paths import write_text
from gendistill.text import printable
from gendistill.training.heldout import evaluating
from gendistill.training.job import Examiner, StageJob
from gendistill.training.monitors.base import StageInProgress, Stop, When

T = TypeVar("T")
_SHOWN_ANSWERS = 2
_SHOWN_LETTERS = 60


class Answers:
    """Greedy answers to open questions: a line each in ``answers.jsonl``, beside the teacher's; a few are shown."""

    when: When = "log"

    def __init__(self, job: StageJob, examiner: Examiner, every: int) -> None:
        self.path, self.name, self.examiner, self.every = (
            job.folder / "answers.jsonl",
            job.name,
            examiner,
            every,
        )

    def __call__(self, run: StageInProgress) -> None:
        """Ask on every process, which may each hold a part of the student; write on the main one."""
        step = run.progress.step
        rows = [{"step": step, **row} for row in undisturbed(run, self.examiner.answers)]
        run.parallel.on_main(lambda: self._write(step, rows))
        for row in rows[:_SHOWN_ANSWERS]:
            run.console.say(
                f"{self.name}  {step:,}  {_short(row['question'])}  student: {_short(row['student'])}  teacher: "
                f"{_short(row['teacher'])}"
            )

    def _write(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write the answers behind those of earlier steps; later ones are of steps that are taken again."""
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        write_text(self.path, "".join(line + "\n" for line in (*_earlier(self.path, step), *lines)))


class Score:
    """The share of a task's items that the student gets right by generation; it may end the stage.

    ``best`` is the highest score so far, and ``since`` how many scores ago it was.
    """

    when: When = "log"

    def __init__(
        self,
        job: StageJob,
        examiner: Examiner,
        *,
        task: str,
        limit: int | None,
        every: int,
    ) -> None:
        self.examiner, self.task, self.limit, self.every = examiner, task, limit, every
        self.rules = job.config.stop_early

    def __call__(self, run: StageInProgress) -> dict[str, float] | Stop:
        """Score the student, and stop if the score has not risen for long enough."""
        here = undisturbed(run, lambda student: self.examiner.score(student, self.task, self.limit))
        found = run.parallel.on_main(lambda: dict(here))
        best, since = run.progress.memory.get("score", (found["value"], -1))
        gain = self.rules.gain if self.rules else 0.0
        if found["value"] > best and found["value"] >= best + gain:
            best, since = found["value"], 0
        else:
            since += 1
        run.progress.memory["score"] = best, since
        found |= {"best": best, "since": since}
        rules = self.rules
        if rules is None or since < rules.patience or run.progress.step < rules.min_steps:
            return found
        return Stop(
            f"{since} scores of {self.task} in a row did not rise above {best:.1%} by {rules.gain:.1%} of the items",
            found,
        )


def watch_answers(job: StageJob) -> Answers | None:
    """Ask open questions where the recipe asks for it."""
    every = job.watch.answers_every_steps
    return None if every is None else Answers(job, _examiner(job, "watch.answers_every_steps"), every)


def watch_score(job: StageJob) -> Score | None:
    """Score by generation as ``stop_early`` says, or else as ``watch`` does."""
    rules, watch = job.config.stop_early, job.watch
    if rules is not None:
        examiner = _examiner(job, f"stages.{job.name}.stop_early")
        return Score(job, examiner, task=rules.task, limit=rules.limit, every=rules.every_steps)
    if watch.score_every_steps is None:
        return None
    examiner = _examiner(job, "watch.score_every_steps")
    return Score(job, examiner, task=watch.task, limit=watch.task_limit, every=watch.score_every_steps)


def undisturbed(run: StageInProgress, work: Callable[[Any], T]) -> T:
    """Let a student write in the arithmetic of its stage, and leave no trace of it.

    Random numbers, the mode of every module and the state of autocast are as before; gradients are not touched. The
    student is reached by way of the module that is trained, so that sharded parameters are gathered.
    """
    device, dtype = run.parallel.device, run.lock.dtype
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        evaluating(run.module),
        torch.no_grad(),
        torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32),
    ):
        found = run.runner.plain_module(None, None, lambda student, _signals, _batch: work(student))
        run.parallel.settle(run.runner.plain_module)
        return found


def _examiner(job: StageJob, setting: str) -> Examiner:
    if job.examiner is None:
        raise TrainingError(
            f"{setting} asks the student to write, but nobody was given who could ask it",
            where=f"stages.{job.name}",
            hint="give StageJob an examiner, such as gendistill.runs.examiner.TaskExaminer",
        )
    return job.examiner


def _earlier(path: Path, step: int) -> list[str]:
    """Return the lines of a file of answers that are of earlier steps; what cannot be read is left out."""
    kept = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    # answers may hold the other line separators of Unicode
    for line in text.split("\n"):
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    return kept


def _short(text: str) -> str:
    words = printable(" ".join(text.split()))
    return f'"{words if len(words) <= _SHOWN_LETTERS else words[: _SHOWN_LETTERS - 1] + "…"}"'
