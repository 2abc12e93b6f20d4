"""The generative twin of a multiple-choice task: same questions, same right answers, written instead of ranked.

Imports no torch. lm-eval is imported to check a twin against its original, not to write it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from gendistill_evals.errors import EvalError
from gendistill_evals.lm_eval_file import FUNCTION, Function, functions_of, is_lm_eval_file, read_lm_eval_file
from gendistill_evals.reading import shorten
from gendistill_evals.task import load_task
from gendistill_evals.task_file import read_task_yaml

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_TOKENS = {"letters": 32, "text": 64}
# Keys of an lm-eval task that its twin takes over as they are.
_KEPT = (
    "custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
    "test_split", "fewshot_split", "process_docs", "description", "target_delimiter", "fewshot_delimiter",
    "fewshot_config", "num_fewshot", "should_decontaminate", "doc_to_decontamination_query", "metadata",
)  # fmt: skip
# Keys whose place the twin's own take, and those that only name a task.
_REPLACED = {
    "task", "task_alias", "tag", "group", "output_type", "doc_to_text", "doc_to_target", "doc_to_choice", "metric_list",
    "generation_kwargs", "filter_list", "repeats",
}  # fmt: skip
_WRITTEN_DIFFERENTLY = {"doc_to_text", "doc_to_target", "doc_to_choice", "gen_prefix"}
_EXPRESSION = re.compile(r"\s*\{\{-?(?P<expression>(?:(?!\{\{|\}\}|\{%).)+?)-?\}\}\s*", re.DOTALL)
# A last line such as "Answer:", without anything that is filled in.
_CUE = re.compile(r"\n[^\n{}]*:[ \t]*\n?\Z")
_HINT = "write the twin by hand, or take a task whose keys are templates"


class Answers(StrEnum):
    """What answers a twin: the letter of an option, or its words."""

    LETTERS = "letters"
    TEXT = "text"


@dataclass(frozen=True, slots=True)
class Twin:
    """A task file.

    Attributes:
        content: What it holds, as text.
        name: Of the task.
        folder: The only folder that it works in; None if it works in every one.
        check: Compares it with its original once it is written, and returns in how many questions they are alike.
    """

    content: str
    name: str
    folder: Path | None
    check: Callable[[Path], int]


def make_twin(path: Path, answers: Answers | None, *, into: Path, trust_code: bool = False) -> Twin:
    """Make the twin of a task file, lm-eval's or ours.

    Args:
        path: The original.
        answers: What answers the twin; None for letters.
        into: Folder that the twin will stand in.
        trust_code: Whether Python functions that the file names may run, when both are compared.
    Raises:
        EvalError: The file cannot be read, is not of multiple choice, or writes its options in a way that no template
            can take over; says which key.
    """
    answers = answers or Answers.LETTERS
    if is_lm_eval_file(path):
        return _twin_of_theirs(path, answers, trust_code=trust_code)
    return _twin_of_ours(path, answers, into)


# ----- lm-eval's -----


def _twin_of_theirs(path: Path, answers: Answers, *, trust_code: bool) -> Twin:
    content = read_lm_eval_file(path)
    where = str(path)
    _check(content, where)
    options = _options(content.get("doc_to_choice"), where)
    gold = _gold(content.get("doc_to_target"), where)
    shown_already = answers is Answers.LETTERS and _are_letters(content.get("doc_to_choice"))
    text = _template(content["doc_to_text"], "doc_to_text", where)
    if not shown_already:
        text = _with_options(text, options, answers)
    letters = json.dumps(_LETTERS)
    right = "options[place]" if answers is Answers.TEXT else f"{letters}[place]"
    name = f"{content['task']}_{answers}"
    twin: dict[str, Any] = {
        "task": name,
        **{key: content[key] for key in _KEPT if key in content},
        "output_type": "generate_until",
        "doc_to_text": text,
        "doc_to_target": f"{{% set options = {options} %}}{gold}{{{{ {right} }}}}",
        "generation_kwargs": {
            # Not the delimiter alone: what a base model goes on with is another question.
            "until": list(dict.fromkeys([content.get("fewshot_delimiter") or "\n\n", "\n\n", "\nQuestion:"])),
            "max_gen_toks": _TOKENS[answers],
            "do_sample": False,
        },
        "filter_list": [{"name": str(answers), "filter": [*_filters(answers), {"function": "take_first"}]}],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                **({"ignore_case": True, "ignore_punctuation": True} if answers is Answers.TEXT else {}),
            }
        ],
    }
    # What stands beside the file is found from there alone.
    beside = path.parent.resolve() if functions_of(twin) else None
    head = f"# The generative twin of {path.name}: gendistill twins {path.name} --{answers}\n"

    def check(written: Path) -> int:
        return _compare(path, written, answers, trust_code=trust_code)

    return Twin(head + _dump(twin), name, beside, check)


def _check(content: dict[str, Any], where: str) -> None:
    if isinstance(content.get("task"), list) or "task" not in content:
        members = content.get("task")
        shown = ", ".join(map(str, members)) if isinstance(members, list) else "none"
        raise EvalError(
            f"the file is a group and not a task; its tasks are {shown}",
            where=where,
            hint="make the twins of its tasks one by one",
        )
    if content.get("output_type") != "multiple_choice":
        raise EvalError(
            f"output_type is {content.get('output_type', 'generate_until')}, and twins are made of multiple_choice",
            where=where,
            hint="a task that generates is its own twin",
        )
    for key in content:
        if key not in _KEPT and key not in _REPLACED:
            raise EvalError(
                f"{key}: a twin cannot take it over",
                where=where,
                hint="remove the key, or write the twin by hand",
            )
    if content.get("repeats", 1) != 1:
        raise EvalError("repeats: greedy answers are all the same", where=where, hint="remove the key")
    overridden = sorted(_WRITTEN_DIFFERENTLY & set(content.get("fewshot_config") or {}))
    if overridden:
        raise EvalError(
            f"fewshot_config.{overridden[0]}: examples are written in another way than questions",
            where=where,
            hint="remove the key, or write the twin by hand",
        )
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        if isinstance(content.get(key), Function):
            raise EvalError(
                f"{key}: {FUNCTION} {content[key]} is Python, which a template cannot take over",
                where=where,
                hint=_HINT,
            )
    if not isinstance(content.get("doc_to_text"), str):
        raise EvalError(
            f"doc_to_text must be a column or a template, got {shorten(content.get('doc_to_text'))}",
            where=where,
            hint=_HINT,
        )


def _is_column(text: str) -> bool:
    """Whether a value can be a column's name: lm-eval takes it as one if there is such a column."""
    return text.isidentifier()


def _template(text: str, key: str, where: str) -> str:
    """Return a value as a template; a column's name becomes one."""
    if _is_column(text):
        return f"{{{{{text}}}}}"
    if not text.strip():
        raise EvalError(f"{key} is empty", where=where, hint=_HINT)
    return text


def _options(value: Any, where: str) -> str:
    """Return the expression of a template that gives a question's options."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list) and value and all(isinstance(option, str) for option in value):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        if _is_column(value):
            return value
        if found := _EXPRESSION.fullmatch(value):
            return f"({found['expression'].strip()})"
    raise EvalError(
        f"doc_to_choice must be a column, a list of texts or one {{{{ expression }}}}, got {shorten(value)}",
        where=where,
        hint=_HINT,
    )


def _gold(value: Any, where: str) -> str:
    """Return the part of a template that sets ``place``, the number of the right option, from ``options``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{{% set place = {value} %}}"
    if not isinstance(value, str):
        raise EvalError(
            f"doc_to_target must be a number, a column or a template, got {shorten(value)}",
            where=where,
            hint=_HINT,
        )
    if _is_column(value):
        # A number, or the text of the option.
        return f"{{% set place = options.index({value}) if {value} is string else {value} %}}"
    # lm-eval takes rendered digits as a number.
    return (
        f"{{% set found %}}{value}{{% endset %}}"
        "{% set place = found|int if found.isdigit() else options.index(found) %}"
    )


def _are_letters(value: Any) -> bool:
    """Whether options are letters that a prompt explains already."""
    texts = list(value.values()) if isinstance(value, dict) else value
    return isinstance(texts, list) and texts == list(_LETTERS[: len(texts)])


def _with_options(text: str, options: str, answers: Answers) -> str:
    """List the options in a prompt: before its last line if that only asks for the answer, else behind it."""
    mark = f"{{{{ {json.dumps(_LETTERS)}[loop.index0] }}}}. " if answers is Answers.LETTERS else "- "
    listing = f"{{% for option in {options} %}}\n{mark}{{{{ option }}}}{{% endfor %}}"
    cue = _CUE.search(text)
    if cue is None:
        return f"{text}{listing}\nAnswer:"
    return f"{text[: cue.start()]}{listing}{text[cue.start() :]}"


def _filters(answers: Answers) -> list[dict[str, Any]]:
    if answers is Answers.TEXT:
        # The first line that says something, without a mark before it.
        return [{"function": "regex", "regex_pattern": r"^\s*(?:- )?([^\n]*[^\s])"}]
    # A letter that the answer begins with, or one that is stated as the answer.
    pattern = r"^\W*([A-Z])(?![\w'\u2019])(?! [a-z])|(?i:answer|option|choice)(?i: is)?\W{1,4}([A-Z])(?![\w'\u2019])"
    return [{"function": "regex", "regex_pattern": pattern}]


class _Dumper(yaml.SafeDumper):
    """YAML with functions by name, and texts of several lines in quotes on one."""


_Dumper.add_representer(Function, lambda dumper, name: dumper.represent_scalar(FUNCTION, str(name)))


def _dump(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000)


def _compare(original: Path, written: Path, answers: Answers, *, trust_code: bool) -> int:
    """Load both with lm-eval and compare the right answer of every document."""
    from gendistill_evals.lm_eval_tasks import load_lm_eval_tasks

    (one,) = load_lm_eval_tasks(original, trust_code=trust_code)
    (other,) = load_lm_eval_tasks(written, trust_code=trust_code)
    if len(one.items) != len(other.items):
        raise EvalError(
            f"the twin has {len(other.items)} questions, and the original {len(one.items)}",
            where=str(written),
        )
    for item, its in zip(one.items, other.items, strict=True):
        options = item.options or ()
        right = item.gold if answers is Answers.TEXT else _LETTERS[options.index(item.gold)]
        if its.gold != right:
            raise EvalError(
                f"of document {item.id} the right answer is {shorten(right)}, and the twin's is {shorten(its.gold)}",
                where=str(written),
                hint="--letters, if the words of an option read as something else than text",
            )
    return len(one.items)


# ----- ours -----


def _twin_of_ours(path: Path, answers: Answers, into: Path) -> Twin:
    task = load_task(path)
    content = {str(key): value for key, value in read_task_yaml(path).items()}
    where = str(path)
    if content.get("kind") != "multiple_choice":
        raise EvalError(
            f"kind is {content.get('kind')}, and twins are made of multiple_choice",
            where=where,
            hint="a task that generates is its own twin",
        )
    answer = "letter" if answers is Answers.LETTERS else "text"
    if not all(item.texts for item in task.items) and answer == "text":
        raise EvalError(
            "its options are letters that the prompt alone explains", where=where, hint="--letters"
        )
    twin = {**content, "name": f"{task.name}-{answers}", "answer": answer}
    if twin.get("judge") in ("option", "letter"):
        # The form of the answer decides.
        del twin["judge"]
    for key in ("items", "examples"):
        if key in twin:
            twin[key] = _path_from(into, path.parent / str(twin[key]))
    explained = not all(item.texts for item in task.items)
    if not explained and not _shows_options(twin["prompt"]):
        twin["prompt"] = _with_listing(twin["prompt"])
    head = f"# The generative twin of {path.name}: gendistill twins {path.name} --{answers}\n"

    def check(written: Path) -> int:
        other = load_task(written)
        for item, its in zip(task.items, other.items, strict=True):
            options, texts = item.options or (), its.options or ()
            if options.index(item.gold) != texts.index(its.gold):
                raise EvalError(f"the right answer of item {item.id} is another one", where=str(written))
        return len(task.items)

    return Twin(head + _dump(twin), twin["name"], None, check)


def _path_from(folder: Path, target: Path) -> str:
    return Path(os.path.relpath(target.resolve(), folder.resolve())).as_posix()


def _shows_options(prompt: Any) -> bool:
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return "{options}" in asked


def _with_listing(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return f"{prompt.rstrip()}\n{{options}}"
    last = prompt[-1]
    return [*prompt[:-1], {**last, "content": _with_listing(last["content"])}]
