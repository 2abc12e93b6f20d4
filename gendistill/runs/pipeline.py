"""Run a recipe: convert, the stages in order, evaluation, report. Finished steps are skipped, partial ones resume."""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.text import Text

from gendistill.anatomy.cost import cache_bytes
from gendistill.anatomy.geometry import read_geometry
from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.resolve import (
    Checkpoint,
    is_hub_id,
    load_causal_lm,
    load_tokenizer,
    read_tensor_index,
    resolve_checkpoint,
)
from gendistill.config.schema import Recipe
from gendistill.conversion.execute import apply_plan
from gendistill.conversion.impl import choose_impl
from gendistill.conversion.plan import plan_conversion
from gendistill.conversion.probe import check_probe, probe_student, render_probe
from gendistill.data.stream import build_stream, heldout_batches
from gendistill.errors import OutputError, RecipeError
from gendistill.losses.logits import choose_loss_impl
from gendistill.models.card import CardScore, add_scores
from gendistill.models.io import export_code, load_student, save_student
from gendistill.paths import RunDir, real_path, write_json
from gendistill.provenance import installed_versions, source_commit, today
from gendistill.report import clear_report, write_report
from gendistill.report.run_files import read_run
from gendistill.report.write import gap_report
from gendistill.runs.advice import advise, check_batches
from gendistill.runs.examiner import TaskExaminer, check_examiner, model_limits
from gendistill.runs.inputs import recipe_steps
from gendistill.runs.learning import check_packages, find_learning
from gendistill.runs.memory import CACHE_LENGTHS
from gendistill.runs.planning import ModelFacts
from gendistill.runs.scoring import resolve_dtype, score
from gendistill.runs.steps import BEFORE, CONVERT, ROLES, Step, differences, eval_step, stage_step
from gendistill.runs.workspace import Workspace
from gendistill.teachers.base import check_vocabulary
from gendistill.teachers.live import LiveTeacher
from gendistill.text import printable_lines
from gendistill.training.console import TrainingConsole
from gendistill.training.job import StageJob
from gendistill.training.parallel import Parallel, Situation, connect
from gendistill.training.stage import train_stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from gendistill.models import HybridForCausalLM


def run(recipe: Recipe, *, command: str) -> RunDir:
    """Run every step of a recipe.

    Args:
        recipe: What to do.
        command: The command line, recorded in the manifest.
    Returns: The run folder.
    """
    started = time.monotonic()
    with _opened(recipe, command) as context:
        _check_stages(context, tuple(recipe.stages))
        _convert(context)
        _distill(context, tuple(recipe.stages))
        context.parallel.on_main(lambda: _finish(context, started))
    return context.workspace.run


def _finish(context: _Context, started: float) -> None:
    """Score, show and report what has been made, on the main process."""
    _evaluate(context)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    context.workspace.entries.update(seconds=round(time.monotonic() - started, 1), peak_memory_bytes=peak)
    context.workspace.complete(forget=clear_report)
    write_report(context.workspace.run.root)
    _describe_scores(context)


def _describe_scores(context: _Context) -> None:
    """Write what the student scored into the card of the run's copy, on the main process."""
    report = gap_report(read_run(context.workspace.run.root))
    scores = [
        CardScore(
            task=task.task,
            protocol=protocol,
            metric=task.metric,
            value=score.value,
            low=score.low,
            high=score.high,
            n=score.n,
            teacher=teacher.value if (teacher := task.teacher.get(protocol)) else None,
        )
        for task in report.tasks
        for protocol in report.protocols
        if (score := task.student.get(protocol))
    ]
    context.workspace.describe_student(lambda folder: add_scores(folder, scores))


def convert(recipe: Recipe, *, command: str) -> RunDir:
    """Build the untrained student and probe it."""
    with _opened(recipe, command) as context:
        _convert(context)
        context.complete()
    return context.workspace.run


def distill(recipe: Recipe, *, command: str, only: tuple[str, ...] = ()) -> RunDir:
    """Convert if needed, then train all stages, or ``only`` some whose predecessors are finished."""
    with _opened(recipe, command) as context:
        _check_stages(context, only or tuple(recipe.stages))
        _convert(context)
        _distill(context, only or tuple(recipe.stages))
        context.complete()
    return context.workspace.run


def evaluate(recipe: Recipe, *, command: str) -> RunDir:
    """Score the teacher and the run's student on the recipe's tasks and questions."""
    with _opened(recipe, command) as context:
        workspace = context.workspace
        made = [CONVERT, *map(stage_step, recipe.stages)]
        missing = [name for name in made if not context.is_done(name)]
        if missing:
            raise RecipeError(
                f"{workspace.run.root} has no finished student of this recipe to score: {missing[0]} is to be done",
                where=str(workspace.run.student),
                hint=command.replace("gendistill eval", "gendistill distill", 1),
            )
        context.parallel.on_main(lambda: _evaluate(context))
        context.complete()
        context.parallel.on_main(lambda: _describe_scores(context))
    return workspace.run


@dataclass(frozen=True, slots=True)
class _Context:
    """What every step of one run needs."""

    recipe: Recipe
    workspace: Workspace
    parallel: Parallel
    teacher: Checkpoint
    source: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    placement: Placement
    console: Console

    @property
    def device(self) -> torch.device:
        return self.parallel.device

    @property
    def teacher_dtype(self) -> torch.dtype:
        return resolve_dtype(self.recipe.teacher.dtype, self.device)

    def say(self, title: str, text: str) -> None:
        _say(self.console, title, text)

    def complete(self) -> None:
        """Show what this command has made, once it has made everything."""
        self.parallel.on_main(lambda: self.workspace.complete(forget=clear_report))

    def is_done(self, name: str) -> bool:
        """Whether a step has finished, alike on every process."""
        return self.parallel.on_main(lambda: self.workspace.is_done(name))

    def load_teacher(self, device: torch.device | None = None) -> PreTrainedModel:
        return load_causal_lm(self.teacher.folder, dtype=self.teacher_dtype, device=device or self.device)

    def load_student(
        self, folder: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> HybridForCausalLM:
        return load_student(folder, dtype=dtype, device=device or self.device, impl=self.recipe.student.impl)


def _say(console: Console, title: str, text: str) -> None:
    # paths and names are text: brackets in them are not markup
    console.print(Text.assemble((f"{title:<9}", "bold"), " ", printable_lines(text)), soft_wrap=True)


@contextlib.contextmanager
def _opened(recipe: Recipe, command: str) -> Iterator[_Context]:
    """Resolve what the recipe names, list its steps, and keep other processes out of its run folder."""
    parallel = connect(recipe.engine)
    check_batches(recipe, parallel.world)
    with parallel.together(lambda: _when_lost(recipe)), _prepared(recipe, command, parallel) as context:
        yield context
        # nobody lets go of the folder, or leaves, before all are through
        parallel.barrier()


def _when_lost(recipe: Recipe) -> Situation:
    return Situation(
        where=recipe.name,
        kept=f"Finished steps in {recipe.run_folder} are intact",
        hint="run the same command again: finished steps are kept, an interrupted stage resumes",
    )


@contextlib.contextmanager
def _prepared(recipe: Recipe, command: str, parallel: Parallel) -> Iterator[_Context]:
    console = Console(quiet=not parallel.is_main, highlight=False, soft_wrap=not sys.stdout.isatty())
    # one process of a machine downloads, the others find the cache
    teacher, source = parallel.in_turns(lambda: _resolve(recipe))
    tokenizer = load_tokenizer(teacher.folder)
    _check_apart(recipe.run_folder, (teacher, source))
    placement = Placement.parse(recipe.student.placement, num_layers=source.config["num_hidden_layers"])
    device_name = _device_name(parallel.device)
    impl = choose_impl(recipe.student.impl, placement, device=parallel.device, device_name=device_name)
    choose_loss_impl(recipe.engine.loss, parallel.device)
    workspace = Workspace(recipe, say=lambda title, text: _say(console, title, text))
    with contextlib.ExitStack() as stack:
        parallel.on_main(lambda: stack.enter_context(workspace.locked()))
        steps = parallel.on_main(
            lambda: recipe_steps(
                recipe,
                teacher=teacher,
                source=source,
                placement=placement,
                shown=workspace.shown_recipe(),
                recorded=workspace.shown_inputs,
                say=workspace.warn,
            )
        )
        _compare_machines(recipe, steps, parallel, teacher=teacher, source=source, placement=placement)
        # the folder is the main process's; on another machine there may be none, or an older one
        parallel.on_main(lambda: workspace.plan(steps))
        workspace.steps = {step.name: step for step in steps}
        workspace.entries.update(
            name=recipe.name,
            date=today(),
            command=command,
            commit=source_commit(),
            versions=installed_versions(),
            device=device_name,
            dtype=str(resolve_dtype(recipe.teacher.dtype, parallel.device)).removeprefix("torch."),
        )
        context = _Context(recipe, workspace, parallel, teacher, source, tokenizer, placement, console)
        context.say("device", device_name)
        if parallel.world > 1:
            context.say("parallel", parallel.description)
        context.say("impl", str(impl))
        for warning in advise(recipe, teacher.config, chat_template=bool(tokenizer.chat_template)):
            workspace.warn(warning)
        parallel.on_main(lambda: _check_questions(context))
        parallel.on_main(workspace.sync)
        yield context


def _resolve(recipe: Recipe) -> tuple[Checkpoint, Checkpoint]:
    """Find teacher and source of the student on this machine, or fetch them."""
    teacher = resolve_checkpoint(recipe.teacher.model, revision=recipe.teacher.revision)
    if recipe.student.source is None:
        return teacher, teacher
    return teacher, resolve_checkpoint(recipe.student.source, where="student.from")


def _compare_machines(
    recipe: Recipe,
    steps: Sequence[Step],
    parallel: Parallel,
    *,
    teacher: Checkpoint,
    source: Checkpoint,
    placement: Placement,
) -> None:
    """Refuse machines of which one has another teacher or other data than the first.

    Raises:
        RecipeError: They differ.
    """

    def compare() -> None:
        if not parallel.leads_machine or parallel.is_main:
            return
        mine = recipe_steps(recipe, teacher=teacher, source=source, placement=placement)
        for theirs, own in zip(steps, mine, strict=True):
            if theirs.key != own.key:
                changed = differences(theirs.inputs, own.inputs)
                raise RecipeError(
                    f"{socket.gethostname()} reads something else than the first machine: {'; '.join(changed[:3])}",
                    where=own.name,
                    hint="copy data and teacher to the same paths on every machine, and run the same command",
                )

    if parallel.machines > 1:
        parallel.on_each(compare)


def _check_questions(context: _Context) -> None:
    """Refuse what evaluation and stages could not ask, before hours of training."""
    from gendistill_evals import code
    from gendistill_evals.evaluate import check_evaluation

    recipe, config = context.recipe, context.teacher.config
    check_examiner(recipe, context.tokenizer, config)
    asked = recipe.eval
    if asked.asks:
        with code.allowed() if asked.allow_code else contextlib.nullcontext():
            check_evaluation(
                model_limits(config),
                context.tokenizer,
                tasks=asked.load_tasks(),
                protocols=asked.protocols,
                limit=asked.limit,
                style=asked.style,
                questions=asked.questions,
                question_tokens=asked.question_tokens,
            )


def _check_apart(root: Path, checkpoints: Iterable[Checkpoint]) -> None:
    """Refuse a run folder that would change a model, and a model that the run would replace."""
    root = real_path(root)
    for checkpoint in checkpoints:
        folder = real_path(checkpoint.folder)
        if root == folder or root in folder.parents or folder in root.parents:
            raise OutputError(
                f"the run folder {root} and the model {folder} lie in one another; models are never modified",
                where=checkpoint.spec,
                hint="choose another folder with output=..., or another name with name=...",
            )


def _check_stages(context: _Context, names: Sequence[str]) -> None:
    """Refuse what a stage that is not done could not train, before anything is made."""
    context.parallel.on_main(lambda: _check_stages_here(context, names))


def _check_stages_here(context: _Context, names: Sequence[str]) -> None:
    recipe, source = context.recipe, context.source
    facts = ModelFacts(
        recipe.teacher.model, context.teacher.config, read_tensor_index(context.teacher.folder)
    )
    tensors = read_tensor_index(source.folder)
    plan = plan_conversion(source.config, tensors, context.placement, recipe.student.mixers)
    tied_head = read_geometry(source.config).tied_head
    for name in names:
        if not context.workspace.is_done(stage_step(name)):
            check_packages(name, recipe.stages[name])
            find_learning(name, recipe.stages[name], plan, facts.as_teacher("float32"), tied_head=tied_head)


def _convert(context: _Context) -> None:
    """Make the untrained student and its probe, on the main process."""
    context.parallel.on_main(lambda: _convert_here(context))


def _convert_here(context: _Context) -> None:
    workspace = context.workspace
    if workspace.is_done(CONVERT):
        context.say("convert", f"done before: {workspace.run.student_init}")
        return
    with workspace.making(CONVERT) as folder:
        if folder is not None:
            workspace.finish(CONVERT, _make_student(context, folder))


def _make_student(context: _Context, folder: Path) -> dict[str, Any]:
    """Convert into ``folder`` and probe the result; return what the manifest says about it."""
    recipe, placement, student_folder = context.recipe, context.placement, folder / "student"
    # a folder is its own name
    names = dict.fromkeys((recipe.teacher.model, str(context.teacher.folder)))
    context.say("teacher", "   ".join(names))
    context.say("student", str(placement))
    tensors = read_tensor_index(context.source.folder)
    plan = plan_conversion(context.source.config, tensors, placement, recipe.student.mixers)
    write_json(folder / "plan.json", plan.to_json())
    _check_tokenizers(context)
    apply_plan(plan, context.source, student_folder, seed=recipe.seed)
    base = recipe.student.source or recipe.teacher.model
    export_code(student_folder, base_model=base if is_hub_id(base) else None)

    model, student = context.load_teacher(), context.load_student(student_folder)
    teacher = LiveTeacher(model)
    check_vocabulary(teacher.facts, student.config)
    batches = [batch.to(context.device) for batch in heldout_batches(recipe, context.tokenizer)]
    with context.console.status("probing the untrained student on held-out text"):
        probe = probe_student(student, teacher, batches)
    warning = check_probe(probe)
    write_json(folder / "probe.json", probe)
    context.console.print(render_probe(probe))
    if warning:
        context.workspace.warn(warning)
    context.say("converted", f"{student_folder}   held-out KL {probe['kl']:.3f} nats/token")
    student_config = student.config.to_dict()
    return {
        "impl": probe["impl"],
        "teacher": {
            "spec": recipe.teacher.model,
            "fingerprint": context.teacher.fingerprint,
            "num_layers": context.source.config["num_hidden_layers"],
            "num_tensors": len(tensors),
            "num_parameters": model.num_parameters(),
        },
        "student": {
            "placement": list(placement.kinds),
            "num_parameters": student.num_parameters(),
        },
        "cache_bytes": [
            {
                "tokens": tokens,
                "teacher": cache_bytes(context.teacher.config, tokens=tokens),
                "student": cache_bytes(student_config, tokens=tokens),
            }
            for tokens in CACHE_LENGTHS
        ],
    }


def _check_tokenizers(context: _Context) -> None:
    """Teacher and student must mean the same by every id."""
    if context.source is context.teacher:
        return
    other = load_tokenizer(context.source.folder)
    if context.tokenizer.get_vocab() != other.get_vocab():
        raise RecipeError(
            f"{context.recipe.teacher.model} and {context.recipe.student.source} have different tokenizers; "
            "KL compares their distributions id by id",
            where="student.from",
            hint="choose a teacher with the student's tokenizer",
        )


def _distill(context: _Context, names: tuple[str, ...]) -> None:
    """Train the named stages that have not finished, each from the student of the one before it."""
    workspace, recipe = context.workspace, context.recipe
    previous, model = CONVERT, None
    for name in recipe.stages:
        step = stage_step(name)
        if name in names and context.is_done(step):
            context.say(name, f"done before: {workspace.run.stage(name) / 'student'}")
        elif name in names:
            if not context.is_done(previous):
                raise RecipeError(
                    f'stage "{name}" starts from the result of {previous}, which has not finished',
                    where=f"stages.{name}",
                    hint="run the stages before it first: leave out --only",
                )
            model = model or context.load_teacher(context.parallel.loads_on)
            _train(context, name, model, workspace.folder(previous) / "student")
        previous = step


def _train(context: _Context, name: str, model: PreTrainedModel, start: Path) -> None:
    """Train one stage in its folder of the store."""
    recipe, workspace, parallel = context.recipe, context.workspace, context.parallel
    step, folder = stage_step(name), workspace.folder(stage_step(name))
    with contextlib.ExitStack() as stack:
        if parallel.on_main(lambda: stack.enter_context(workspace.making(step)) is None):
            return
        stream = build_stream(
            recipe,
            name,
            context.tokenizer,
            rank=parallel.rank,
            world=parallel.world,
            device=parallel.device,
        )
        stack.callback(stream.close)
        # what another machine has sent is of no use after the stage, also one that does not begin
        stack.callback(parallel.close)
        student = context.load_student(parallel.folder(start), device=parallel.loads_on)
        job = StageJob(
            name=name,
            config=recipe.stages[name],
            folder=folder,
            seed=recipe.seed,
            heldout=[batch.to(context.device) for batch in heldout_batches(recipe, context.tokenizer)],
            heldout_every=recipe.heldout.every_steps,
            lock=workspace.steps[step].inputs,
            engine=recipe.engine,
            watch=recipe.watch,
            examiner=TaskExaminer(
                model,
                context.tokenizer,
                questions=recipe.watch.questions,
                answer_tokens=recipe.watch.answer_tokens,
                batch_size=recipe.eval.batch_size,
            ),
            trackers=recipe.trackers,
            project=recipe.name,
        )
        result = train_stage(
            job,
            student=student,
            teacher=LiveTeacher(model),
            stream=stream,
            parallel=parallel,
            console=TrainingConsole(main=parallel.is_main, console=context.console),
        )

        def keep() -> None:
            save_student(student, folder / "student", companions=workspace.folder(CONVERT) / "student")
            workspace.finish(step, {"result": asdict(result)})

        parallel.on_main(keep)


def _evaluate(context: _Context) -> None:
    """Score what has not been scored, on the main process."""
    recipe, workspace = context.recipe, context.workspace
    asked = [role for role in ROLES if eval_step(role) in workspace.steps]
    if not asked:
        context.say("eval", "nothing to score: eval.tasks, eval.suite and eval.questions are empty")
        return
    pending = [role for role in asked if not workspace.is_done(eval_step(role))]
    if not pending:
        context.say("eval", f"done before: {workspace.run.eval('student').parent}")
        return
    teacher = context.load_teacher()
    settings = {**recipe.eval.model_dump(mode="json", exclude={"bootstrap"}), "tasks": recipe.eval.load_tasks()}
    for role in pending:
        step = eval_step(role)
        with workspace.making(step) as folder:
            if folder is None:
                continue
            model, name = teacher, recipe.teacher.model
            if role == "student":
                model = context.load_student(workspace.student, context.teacher_dtype)
                # other recipes show the same scores
                name = f"student@{workspace.steps[step].inputs[BEFORE]}"
            parts = workspace.store.scores(workspace.steps[step])
            score(
                model, context.tokenizer, name=name, role=role, out=folder, parts=parts,
                settings=settings, teacher=teacher, console=context.console,
            )  # fmt: skip
            workspace.finish(step, {})


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
