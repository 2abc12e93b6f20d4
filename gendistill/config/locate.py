"""Make the paths of a recipe absolute, so that it means the same from every folder. Imports no torch.

A path is relative to the file in which it is written, or lies among the shipped recipes; on the command line, and for
``output``, it is relative to the current folder.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from glob import has_magic
from pathlib import Path as FilePath

from gendistill.config.document import CALL, COMMAND_LINE, Node, Path, dotted, shortened
from gendistill.config.problems import Problem
from gendistill.config.schema import Recipe
from gendistill.paths import asset_dir

DEFAULT = "default"
_SCHEMES = ("pypi:", "builtin:", "lm_eval:")
_DATA_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", ".text", ".parquet", ".gz")


def with_absolute_paths(root: Node, problems: list[Problem]) -> Node:
    """Return a copy of a recipe's tree in which every path is absolute, ``output`` included.

    Args:
        root: The tree of written values.
        problems: Receives paths that lead nowhere.
    """
    content = dict(root.content)
    content.setdefault("output", Node(Recipe.model_fields["output"].default, DEFAULT))
    return _resolved(Node(content, root.place, root.line), (), problems)


def _resolved(node: Node, path: Path, problems: list[Problem]) -> Node:
    if isinstance(node.content, dict):
        items = {key: _resolved(child, (*path, key), problems) for key, child in node.content.items()}
        return Node(items, node.place, node.line)
    if isinstance(node.content, list):
        children = [_resolved(child, (*path, index), problems) for index, child in enumerate(node.content)]
        return Node(children, node.place, node.line)
    if not isinstance(node.content, str) or not may_be_path(path):
        return node
    try:
        text = resolve(node.content, path, folders_of(node, path))
    except ValueError as error:
        problems.append(Problem(node.origin, dotted(path), str(error), "write the whole path"))
        return node
    return node if text == node.content else Node(text, node.place, node.line)


def may_be_path(path: Path) -> bool:
    """Whether a setting can name a file or folder."""
    return (
        path in (("output",), ("teacher", "model"), ("student", "from"), ("student", "placement"))
        or path in (("eval", "questions"), ("watch", "questions"), ("watch", "task"))
        or path[:2] == ("eval", "tasks")
        or (path[0] == "stages" and path[2:] == ("stop_early", "task"))
        or (len(path) == 3 and path[0] == "data" and path[2] == "path")
    )


def folders_of(node: Node, path: Path) -> tuple[FilePath, ...]:
    """List the folders that a relative path may start from, the first choice first."""
    if path == ("output",) or node.place in (COMMAND_LINE, DEFAULT) or node.place.endswith(CALL):
        return (FilePath.cwd(),)
    return _absolute(FilePath(node.place)).parent, asset_dir("recipes")


def resolve(text: str, path: Path, folders: Sequence[FilePath]) -> str:
    """Turn the value of a setting into an absolute path if it names one; hub ids and built-in names stay.

    Args:
        text: As written.
        path: Of the setting; it decides what counts as a path.
        folders: Where a relative path may start.
    Raises:
        ValueError: It is empty, or names the home of nobody.
    """
    if not text.strip():
        raise ValueError("the text is empty")
    if text.startswith(_SCHEMES):
        return text
    if text.startswith("~"):
        try:
            return str(FilePath(text).expanduser())
        except RuntimeError:
            raise ValueError(f'"{shortened(text)}" names the home folder of nobody here') from None
    for folder in folders:
        if _can_be_found(path) and exists(folder / text):
            return str(_absolute(folder / text))
    return str(_absolute(folders[0] / text)) if _is_path(text, path) else text


def _can_be_found(path: Path) -> bool:
    """Whether a file that exists is meant even if its name does not look like a path."""
    return path[0] in ("teacher", "student", "data", "extends") and path != ("student", "placement")


def _is_path(text: str, path: Path) -> bool:
    if path == ("output",):
        return True
    if path == ("student", "placement"):
        return text.strip().endswith(".json")
    if path[0] in ("eval", "watch", "stages"):
        return "/" in text or text.endswith(".jsonl" if path[1] == "questions" else ".yaml")
    if text in (".", "..") or text.startswith(("./", "../", "/")):
        return True
    if path[0] == "data":
        return has_magic(text) or text.count("/") > 1 or text.lower().endswith(_DATA_SUFFIXES)
    return text.lower().endswith(".gguf")


def _absolute(path: FilePath) -> FilePath:
    """Without following links, so that a link stays what the recipe names."""
    return FilePath(os.path.abspath(path))  # noqa: PTH100


def exists(path: FilePath) -> bool:
    """Whether something is there; a name that no file system takes is nowhere."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
