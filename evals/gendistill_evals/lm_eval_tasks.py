"""lm-eval's tasks as ours: its documents, prompts and answers, its filters as judge. Imports no torch.

lm-eval itself makes every prompt and judges every generated answer, so that item by item both say the same. It is
imported when a task of its is loaded.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import logging
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from gendistill_evals.errors import EvalError
from gendistill_evals.items import AnswerForm, Item, Kind, Message
from gendistill_evals.judges import JUDGES, Judge, Judgement
from gendistill_evals.lm_eval_file import FUNCTION, functions_of, is_lm_eval_file, read_lm_eval_file
from gendistill_evals.reading import shorten
from gendistill_evals.task import Metric, Task, sha256_of
from gendistill_evals.task_file import LONGEST_NAME
from gendistill_evals.verbatim import Verbatim

PREFIX = "lm_eval:"
# What lm-eval draws examples with, unless its command line says otherwise.
_SEED = 1234
# Its longest answer where a task does not say.
_NEW_TOKENS = 256
# Longest generated answer to a question that lm-eval only ranks answers to: a letter, or an option's words.
_LETTER_TOKENS, _TEXT_TOKENS = 16, 64
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_METRICS = {"acc": "accuracy", "acc_norm": "accuracy_per_char"}
_EXACT = "exact_match"
# Keys that say where a file stands among others, and what has no effect on a score.
_STRUCTURE = {"tag", "group", "task_list", "metadata", "task_alias"}
_ALONE = "gendistill lm-eval runs it as lm-eval does"


def is_lm_eval_task(name: str | Path) -> bool:
    """Tell whether a task is lm-eval's: ``lm_eval:<name>``, or one of its task files.

    Args:
        name: As in ``--tasks``; behind "@" it may name one of the task's filters.
    """
    if isinstance(name, str) and name.startswith(PREFIX):
        return True
    try:
        return is_lm_eval_file(Path(_split(str(name))[0]).expanduser())
    except (OSError, RuntimeError, ValueError, EvalError):
        # What cannot be read is told by whoever loads it.
        return False


def load_if_lm_eval(name_or_path: str | Path, trust_code: bool) -> list[Task] | None:
    """Load tasks of lm-eval, as ``gendistill_evals.task.LOADERS`` has it; None for all others."""
    if not is_lm_eval_task(name_or_path):
        return None
    return list(load_lm_eval_tasks(name_or_path, trust_code=trust_code))


def load_lm_eval_tasks(name: str | Path, *, trust_code: bool = False) -> tuple[Task, ...]:
    """Load tasks of lm-eval.

    Args:
        name: ``lm_eval:<task, group or tag>``, or the path of a task file. ``@<filter>`` behind it chooses one of
            several filters; otherwise the first decides.
        trust_code: Whether Python functions that a task file names may run.
    Returns: The task, or all tasks of a group.
    Raises:
        EvalError: A task that does not exist, cannot be loaded, or asks for something that our protocols do not do;
            says which key.
    """
    with _quiet():
        named, chosen = _split(str(name))
        if named.startswith(PREFIX):
            loaded = _by_name(named.removeprefix(PREFIX), trust_code=trust_code)
        else:
            loaded = [_from_file(Path(named).expanduser(), trust_code=trust_code)]
        return tuple(_task(each, where, chosen, trusted) for each, where, trusted in loaded)


def _split(name: str) -> tuple[str, str | None]:
    """Split a filter off a name; a file whose name has an "@" is itself."""
    before, at, after = name.rpartition("@")
    if not at or "/" in after or Path(name).is_file():
        return name, None
    return before, after


# ----- from lm-eval -----


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's log and the bars of data sets out of the output."""
    import datasets

    log = logging.getLogger("lm_eval")
    before, bars = log.level, datasets.are_progress_bars_disabled()
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        log.setLevel(before)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _templates(*, trusted: bool) -> Iterator[None]:
    """Render the templates of a file that nobody vouches for where they cannot reach into Python."""
    if trusted:
        yield
        return
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    theirs = utils.env
    utils.env = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    utils.env.filters.update(theirs.filters)
    try:
        yield
    finally:
        utils.env = theirs


@cache
def _manager() -> Any:
    """Index the tasks that lm-eval ships, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _by_name(name: str, *, trust_code: bool) -> list[tuple[Any, str, bool]]:
    manager = _manager()
    if name not in manager.task_index:
        near = difflib.get_close_matches(name[:LONGEST_NAME], manager.all_tasks, n=1)
        raise EvalError(
            f'lm-eval has no task "{name[:LONGEST_NAME]}"',
            hint=f'did you mean "{PREFIX}{near[0]}"?' if near else "gendistill lm-eval ls tasks",
            exit_code=2,
        )
    where = f"{PREFIX}{name}"
    # The functions of these tasks are lm-eval's own, as is all that runs them.
    return [(task, where, True) for task in _loaded(manager, name, where)["tasks"].values()]


def _from_file(path: Path, *, trust_code: bool) -> tuple[Any, str, bool]:
    from lm_eval.tasks import TaskManager

    where = str(path)
    content = read_lm_eval_file(path)
    if isinstance(content.get("task"), list) or ("group" in content and "dataset_path" not in content):
        members = [each if isinstance(each, str) else shorten(each) for each in content.get("task") or ()]
        raise EvalError(
            f"the file is a group of tasks: {', '.join(members) or 'none'}",
            where=where,
            hint="name the files of its tasks, separated by commas",
        )
    if "task" not in content:
        raise EvalError('a task file of lm-eval needs "task", its name', where=where, hint="write task: NAME")
    found = functions_of(content)
    if found and not trust_code:
        raise EvalError(
            f"the task runs Python: {', '.join(f'{key}: {FUNCTION} {name}' for key, name in found)}",
            where=where,
            hint="read that code, and if it may run, add --trust-task-code",
        )
    _check_keys(content, where)
    with _templates(trusted=trust_code):
        found = list(_loaded(TaskManager(include_defaults=False), str(path), where)["tasks"].values())
    if len(found) != 1:
        raise EvalError(
            f"lm-eval finds {len(found)} tasks in the file",
            where=where,
            hint='remove "group" and "task_list"',
        )
    return found[0], where, trust_code


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    from lm_eval.config.task import TaskConfig

    known = {field.name for field in fields(TaskConfig)} | _STRUCTURE
    for key in content:
        if key == "class":
            raise EvalError(
                "class: tasks written in Python have no documents that we can read", where=where, hint=_ALONE
            )
        if key not in known:
            near = difflib.get_close_matches(key[:LONGEST_NAME], known, n=1)
            raise EvalError(
                f'lm-eval has no key "{key[:LONGEST_NAME]}"',
                where=where,
                hint=f'did you mean "{near[0]}"?'
                if near
                else "remove it; lm-eval's task guide lists the keys",
            )
    for metric in content.get("metric_list") or ():
        _check_metric(metric, where)


def _check_metric(metric: Any, where: str) -> None:
    """Refuse metrics that lm-eval would load as code from the hub or from a folder."""
    from lm_eval.api import metrics  # noqa: F401  registers them
    from lm_eval.api.registry import metric_registry

    name = metric.get("metric") if isinstance(metric, Mapping) else None
    if callable(name):
        return
    if not isinstance(name, str) or name not in metric_registry or metric.get("hf_evaluate"):
        raise EvalError(
            f"metric_list names {shorten(name)}, which is not a metric of lm-eval's own",
            where=where,
            hint=f"use exact_match, acc or acc_norm; or {_ALONE}",
        )


def _loaded(manager: Any, name: str, where: str) -> dict[str, Any]:
    try:
        return manager.load([name])
    except EvalError:
        raise
    # Whatever data sets, templates and functions raise: there is no common class.
    except Exception as error:
        text = str(error).strip() or "it says nothing more"
        raise EvalError(
            f"lm-eval cannot load the task: {type(error).__name__}: {text[:400]}",
            where=where,
            hint="gendistill lm-eval validate --tasks NAME checks a task; without a network its data must be here",
        ) from error


# ----- to ours -----


def _task(task: Any, where: str, chosen: str | None, trusted: bool) -> Task:
    name = task.task_name
    at = where if name in where else f"{where}, {name}"
    refuse = _Refusal(at)
    _check_features(task, refuse)
    with _templates(trusted=trusted):
        try:
            docs = list(task.eval_docs)
            contexts = list(_contexts(task, docs))
            make = _choice if task.OUTPUT_TYPE == "multiple_choice" else _written
            return make(task, docs, contexts, refuse, chosen, trusted)
        except EvalError:
            raise
        # Whatever templates and functions raise, and lm-eval where a key holds what it does not expect.
        except Exception as error:
            text = str(error).strip() or "it says nothing more"
            raise EvalError(
                f"lm-eval cannot write the questions and answers: {type(error).__name__}: {text[:400]}",
                where=at,
                hint="gendistill lm-eval validate --tasks NAME checks a task",
            ) from error


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What our protocols do not do, said of a task."""

    where: str

    def __call__(self, what: str, hint: str = _ALONE) -> EvalError:
        return EvalError(what, where=self.where, hint=hint)


def _check_features(task: Any, refuse: _Refusal) -> None:
    config = getattr(task, "config", None)
    if config is None or not hasattr(task, "doc_to_prefix") or not hasattr(task, "features"):
        raise refuse("class: tasks written in Python have no documents that we can read")
    if config.output_type not in ("multiple_choice", "generate_until"):
        raise refuse(
            f"output_type: {config.output_type} neither ranks options nor judges an answer, so that neither "
            "protocol can score it"
        )
    if config.unsafe_code:
        raise refuse(
            "unsafe_code: answers are programs to run", "gendistill_evals runs HumanEval in a sandbox"
        )
    for key in ("doc_to_image", "doc_to_audio", "use_prompt", "gen_prefix"):
        if getattr(config, key):
            raise refuse(f"{key}: our protocols have nothing like it")
    if config.repeats != 1:
        raise refuse(f"repeats: {config.repeats} answers to a question, and greedy answers are all the same")
    if config.process_results is not None and config.output_type == "multiple_choice":
        raise refuse("process_results: options are ranked by our protocols, and not by a function")
    if task.multiple_input:
        raise refuse("doc_to_text is the number of a choice: contexts that differ by option are not ranked")


def _contexts(task: Any, docs: Sequence[Any]) -> Iterator[tuple[str, list[Message]]]:
    """Write every document's prompt as a text and as turns, with the examples that lm-eval draws for it."""
    shots = task.config.num_fewshot or 0
    task.set_fewshot_seed(_SEED)
    texts = [task.fewshot_context(doc, num_fewshot=shots) for doc in docs]
    # The same draws once more.
    task.set_fewshot_seed(_SEED)

    def as_turns(turns: list[dict[str, str]], *, add_generation_prompt: bool) -> list[dict[str, str]]:
        return turns

    for doc, text in zip(docs, texts, strict=True):
        turns = task.fewshot_context(
            doc,
            num_fewshot=shots,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            chat_template=as_turns,
        )
        yield text, [Message(role=turn["role"], content=turn["content"]) for turn in turns]


def _choice(
    task: Any,
    docs: Sequence[Any],
    contexts: Sequence[tuple[str, list[Message]]],
    refuse: _Refusal,
    chosen: str | None,
    trusted: bool,
) -> Task:
    config = task.config
    if chosen is not None or config.filter_list:
        raise refuse("filter_list: log-likelihoods have nothing to filter", "leave filters out of the task")
    listed = [each["metric"] for each in config.metric_list or ({"metric": "acc"}, {"metric": "acc_norm"})]
    ranked = [name for name in listed if name in _METRICS]
    if not ranked:
        raise refuse(
            f"metric_list has {', '.join(map(str, listed))}, and our protocols rank by acc or acc_norm"
        )
    items, letters = [], True
    for number, (doc, (text, turns)) in enumerate(zip(docs, contexts, strict=True)):
        options, gold = _options(task, doc, _Refusal(f"{refuse.where}, document {number}"))
        letters = letters and list(options) == list(string.ascii_uppercase[: len(options)])
        items.append(
            Item(str(number), Verbatim(turns, text, config.target_delimiter), options[gold], options, options)
        )
    if letters:
        # What they stand for is in the prompt alone.
        items = [Item(item.id, item.prompt, item.gold, item.options, ()) for item in items]
    return _finished(
        task,
        docs,
        items,
        kind=Kind.MULTIPLE_CHOICE,
        judge="letter" if letters else "option",
        metric=Metric(_METRICS[ranked[0]]),
        answer=AnswerForm.LETTER if letters else AnswerForm.TEXT,
        max_new_tokens=_LETTER_TOKENS if letters else _TEXT_TOKENS,
        stop=(config.fewshot_delimiter,) if config.fewshot_delimiter else (),
        left_out=[name for name in listed if name not in _METRICS],
    )


def _options(task: Any, doc: Any, refuse: _Refusal) -> tuple[tuple[str, ...], int]:
    """Return the options of a document and the place of the right one."""
    options, gold = task.doc_to_choice(doc), task.doc_to_target(doc)
    if not isinstance(options, list) or not all(isinstance(option, str) and option for option in options):
        raise refuse(
            f"doc_to_choice must give a list of texts, got {shorten(options)}", "correct the task or its data"
        )
    if len(options) < 2:
        raise refuse(
            f"doc_to_choice gives {len(options)} options; ranking needs two", "correct the task or its data"
        )
    if len(set(options)) < len(options):
        raise refuse(f"two options are the same: {shorten(options)}", f"leave the document out; or {_ALONE}")
    if isinstance(gold, list):
        raise refuse("doc_to_target gives several right answers, and ours is one")
    if isinstance(gold, str) and gold in options:
        gold = options.index(gold)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
        raise refuse(
            f"doc_to_target gives {shorten(gold)}, which is none of the {len(options)} options",
            "correct the task or its data",
        )
    return tuple(options), gold


def _written(
    task: Any,
    docs: Sequence[Any],
    contexts: Sequence[tuple[str, list[Message]]],
    refuse: _Refusal,
    chosen: str | None,
    trusted: bool,
) -> Task:
    config = task.config
    listed = [each["metric"] for each in config.metric_list or ({"metric": _EXACT},)]
    metric = _EXACT if config.process_results is None else next(iter(listed), _EXACT)
    if metric not in listed:
        raise refuse(
            f"metric_list has {', '.join(map(str, listed))}, and an answer is right or wrong by {_EXACT} alone"
        )
    ensemble = _filter(task, chosen, refuse)
    until, max_new_tokens = _generation(config.generation_kwargs or {}, refuse)
    items = []
    for number, (doc, (text, turns)) in enumerate(zip(docs, contexts, strict=True)):
        gold = task.doc_to_target(doc)
        if config.doc_to_choice is not None:
            gold = task.doc_to_choice(doc)[gold]
        shown = gold[0] if isinstance(gold, list) and gold else gold
        if shown is None or shown == "":
            at = _Refusal(f"{refuse.where}, document {number}")
            raise at("doc_to_target gives no answer", "correct the task or its data")
        items.append(Item(str(number), Verbatim(turns, text), str(shown), None, None))
    settings = [
        config.filter_list,
        config.metric_list,
        metric,
        ensemble.name,
        _source(config.process_results),
    ]
    mark = sha256_of(_plain([settings, docs]))[:12]
    judge = f"{PREFIX}{task.task_name}:{ensemble.name}:{mark}"
    JUDGES[judge] = _judge(task, docs, ensemble, metric, trusted)
    return _finished(
        task,
        docs,
        items,
        kind=Kind.EXACT_MATCH,
        judge=judge,
        metric=Metric.ACCURACY,
        answer=AnswerForm.TEXT,
        max_new_tokens=max_new_tokens,
        stop=until,
        left_out=[str(name) for name in listed if name != metric],
        suffix=f"-{chosen}" if chosen else "",
    )


def _filter(task: Any, chosen: str | None, refuse: _Refusal) -> Any:
    """Return the filters that an answer goes through before it is judged: the chosen ones, else the first."""
    known = {ensemble.name: ensemble for ensemble in task._filters}
    if not known:
        raise refuse("filter_list is empty", "remove the key")
    if chosen is None:
        return next(iter(known.values()))
    if chosen not in known:
        raise refuse(
            f'the task has no filter "{chosen}"; it has {", ".join(known)}', "name one of them behind the @"
        )
    return known[chosen]


def _generation(settings: Mapping[str, Any], refuse: _Refusal) -> tuple[tuple[str, ...], int]:
    """Read generation_kwargs, of which greedy decoding leaves stop texts and the length."""
    given = dict(settings)
    until = given.pop("until", [])
    lengths = [given.pop(name) for name in _LENGTHS if given.get(name) is not None]
    samples, heat = given.pop("do_sample", None), given.get("temperature")
    # lm-eval draws answers at a temperature alone, too.
    if (samples or (samples is None and heat)) and heat not in (0, 0.0, "0", "0.0"):
        key = "do_sample" if samples else "temperature"
        raise refuse(f"generation_kwargs.{key}: answers are drawn, and ours are greedy")
    for name in ("temperature", "top_p", "top_k", "do_sample"):
        # Without sampling they have no effect.
        given.pop(name, None)
    if given:
        raise refuse(f"generation_kwargs.{next(iter(given))}: our decoding has nothing like it")
    texts = until if isinstance(until, list) else [] if until is None else [until]
    if not all(isinstance(text, str) for text in texts):
        raise refuse(f"generation_kwargs.until must be texts, got {shorten(until)}", "correct the task")
    length = lengths[0] if lengths else _NEW_TOKENS
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise refuse(
            f"the longest answer must be a whole number of tokens above 0, got {shorten(length)}",
            "correct generation_kwargs",
        )
    return tuple(dict.fromkeys(text for text in texts if text)), length


def _judge(task: Any, docs: Sequence[Any], ensemble: Any, metric: str, trusted: bool) -> Judge:
    """Judge as lm-eval does: its filters on the answer, its metric on what they find."""

    def judge(item: Item, text: str) -> Judgement:
        doc: Any = docs[int(item.id)]
        answers: Any = [[text]]
        with _quiet(), _templates(trusted=trusted):
            for make in ensemble.filters:
                answers = list(make().apply(answers, [doc]))
            (found,) = answers
            value = task.process_results(doc, [found]).get(metric)
        if value not in (0, 1):
            raise EvalError(
                f"{metric} is {shorten(value)}, and an answer is right or wrong",
                where=f"{task.task_name}, item {item.id}",
            )
        shown = found if isinstance(found, str) else json.dumps(_plain(found), ensure_ascii=False)
        nothing = not shown or shown in _fallbacks(task)
        return Judgement(None if nothing else shown, correct=bool(value))

    return judge


def _fallbacks(task: Any) -> set[str]:
    """Return what filters give where they find nothing."""
    steps = [step for each in task.config.filter_list or () for step in each["filter"]]
    return {str(step.get("fallback", "[invalid]")) for step in steps if "regex" in str(step["function"])}


def _finished(
    task: Any,
    docs: Sequence[Any],
    items: Sequence[Item],
    *,
    left_out: Sequence[str],
    suffix: str = "",
    **shape: Any,
) -> Task:
    import lm_eval

    prompts = [
        [item.prompt, item.prompt.text, item.prompt.lead]
        for item in items
        if isinstance(item.prompt, Verbatim)
    ]
    answers = [[item.gold, item.options] for item in items]
    described = f"lm-eval's {task.task_name}"
    if left_out:
        described += (
            f"; of its metrics, {', '.join(left_out)} {'is' if len(left_out) == 1 else 'are'} not computed"
        )
    return Task(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", f"{task.task_name}{suffix}").strip("-._")[:LONGEST_NAME]
        or "task",
        description=described,
        items=tuple(items),
        items_sha256=sha256_of(_plain(docs)),
        prompt_sha256=sha256_of(
            _plain([lm_eval.__version__, prompts, answers, list(map(str, shape.values()))])
        ),
        **shape,
    )


def _plain(value: Any) -> Any:
    """Make JSON of documents, whatever their data set holds; functions are their source."""
    return json.loads(json.dumps(value, default=_source, ensure_ascii=False))


def _source(value: Any) -> str:
    if not callable(value):
        return str(value)
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return hashlib.sha256(repr(value).encode()).hexdigest()
