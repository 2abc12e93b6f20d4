"""Read an lm-eval task file without running anything in it. Imports no torch and no lm-eval."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from gendistill_evals.errors import EvalError
from gendistill_evals.reading import read_text, shorten

FUNCTION = "!function"
_HINT = "correct the file; lm-eval's task guide says what it may hold"
_THEIRS = re.compile(
    r"^(?:dataset_path|dataset_name|output_type|doc_to_text|doc_to_target|include|custom_dataset|task|group)\s*:",
    re.MULTILINE,
)
# What a key must hold where it is given; the others may hold several things, or are read with care where they are used.
_SHAPES: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("description", "target_delimiter", "fewshot_delimiter", "output_type"), (str, "a text")),
    **dict.fromkeys(("metric_list", "filter_list"), (list, "a list")),
    **dict.fromkeys(("generation_kwargs", "fewshot_config", "dataset_kwargs"), (dict, "a mapping")),
    **dict.fromkeys(("num_fewshot", "repeats"), (int, "a whole number, 0 or more")),
}
_OURS = re.compile(r"^(?:kind|items)\s*:", re.MULTILINE)


class Function(str):
    """The name of a function in a Python file, as ``!function utils.process_docs`` writes it."""


class _Loader(yaml.SafeLoader):
    """YAML of plain values, in which functions are names."""


def _function(loader: yaml.SafeLoader, node: yaml.Node) -> Function:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(
            None, None, f"{FUNCTION} takes the name of a function", node.start_mark
        )
    return Function(loader.construct_scalar(node))


_Loader.add_constructor(FUNCTION, _function)


def is_lm_eval_file(path: Path) -> bool:
    """Tell lm-eval's task files from ours, by the keys that each must have."""
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return False
    text = read_text(path, what="the task file", hint=_HINT)
    return bool(_THEIRS.search(text)) and not _OURS.search(text)


def read_lm_eval_file(path: Path) -> dict[str, Any]:
    """Read a task file with what it includes; functions stay names (``Function``).

    Args:
        path: The file.
    Returns: Its keys, those of the files that it includes below its own.
    Raises:
        EvalError: A file that cannot be read, is not YAML of plain values, is not a mapping, includes itself, or has a
            key that holds something else than it must.
    """
    content = _read(path, ())
    if not isinstance(content.get("task", ""), (str, list)):
        raise EvalError(
            f"task must be a name, got {shorten(content['task'])}", where=str(path), hint='write task: "NAME"'
        )
    for key, (wanted, said) in _SHAPES.items():
        value = content.get(key)
        if value is None:
            continue
        if not isinstance(value, wanted) or isinstance(value, bool) or (isinstance(value, int) and value < 0):
            raise EvalError(f"{key} must be {said}, got {shorten(value)}", where=str(path), hint=_HINT)
    return content


def functions_of(value: Any, place: str = "") -> list[tuple[str, Function]]:
    """List the functions in a task's keys with the keys that hold them."""
    if isinstance(value, Function):
        return [(place, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, part in items for found in functions_of(part, f"{place}.{key}".lstrip("."))]


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    real = path.expanduser().resolve()
    if real in above:
        raise EvalError("the file includes itself", where=str(path), hint=_HINT)
    text = read_text(path, what="the task file", hint=_HINT)
    try:
        # A subclass of the safe loader: it makes plain values and names of functions.
        content = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise EvalError(f"cannot read the task: {error}", where=str(path), hint=_HINT) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise EvalError(
            f"a task file maps names to values, got {shorten(content)}", where=str(path), hint=_HINT
        )
    named = content.pop("include", [])
    merged: dict[str, Any] = {}
    for each in named if isinstance(named, list) else [named]:
        if not isinstance(each, str):
            raise EvalError(f'"include" names files, got {shorten(each)}', where=str(path), hint=_HINT)
        below = _read(real.parent / each, (*above, real))
        below.pop("task_list", None)
        merged.update(below)
    return {**merged, **content}
