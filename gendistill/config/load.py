"""Load a recipe: a file, what it extends, overrides; every problem with its line. Imports no torch.

Precedence: defaults < ``extends`` < file < ``key=value``. Sections merge key by key. Three rules keep merging
unsurprising: another ``kind`` replaces the whole section, a stage length replaces the length it inherits
(``steps`` over ``tokens``), and ``null`` removes an inherited stage or source. Paths become absolute.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gendistill.config.base import Affects, affects_at
from gendistill.config.document import (
    COMMAND_LINE,
    MOST_CHARACTERS,
    MOST_LEVELS,
    Node,
    Path,
    RecipeDumper,
    dotted,
    parse_yaml,
    shortened,
)
from gendistill.config.explain import (
    annotations_at,
    bounds_at,
    closest,
    explain,
    is_section,
    none_words,
    unprintable,
)
from gendistill.config.locate import exists, folders_of, resolve, with_absolute_paths
from gendistill.config.problems import Problem, RecipeProblems
from gendistill.config.schema import Recipe
from gendistill.errors import RecipeError
from gendistill.paths import asset_dir

_LENGTHS = ("tokens", "steps", "minutes")
_REMOVABLE = ("stages", "data")


@dataclass(frozen=True, slots=True)
class LoadedRecipe:
    """A recipe, and where each of its values was written.

    Attributes:
        recipe: The validated recipe.
        file: The file it was read from.
        written: The tree of written values, after ``extends`` and overrides.
    """

    recipe: Recipe
    file: FilePath
    written: Node

    def origin(self, path: Path) -> str:
        """Return ``file:line``, ``command line`` or ``default`` for a setting."""
        node = self.written.at(path)
        return node.origin if node is not None else "default"


def recipe_names() -> list[str]:
    """List the built-in recipes."""
    return sorted(path.stem for path in asset_dir("recipes").glob("*.yaml"))


def means_recipe(name: str) -> bool:
    """Tell whether a word means a recipe rather than a model: a built-in name, a YAML file or a run folder."""
    return (
        name in recipe_names()
        or name.endswith((".yaml", ".yml"))
        or (FilePath(name) / "recipe.yaml").is_file()
    )


def recipe_file(path_or_name: str | FilePath) -> FilePath:
    """Find a recipe: a built-in name, a YAML file, or a run folder that holds ``recipe.yaml``.

    Raises:
        RecipeError: There is no such recipe.
    """
    text, names = str(path_or_name), recipe_names()
    if text in names:
        return asset_dir("recipes") / f"{text}.yaml"
    where = shortened(text)
    try:
        path = FilePath(text).expanduser()
    except RuntimeError as error:
        raise RecipeError(f"{error}", where=where, hint="write the whole path") from error
    if path.name and exists(path / "recipe.yaml"):
        path = path / "recipe.yaml"
    if not exists(path):
        raise RecipeError(
            f'there is no recipe "{where}"{closest(path.stem, names)}\n  built in: {", ".join(names)}',
            where=where,
            hint="gendistill recipe ls",
        )
    if path.is_dir():
        raise RecipeError(f"{path} is a folder without recipe.yaml", where=where, hint="name a .yaml file")
    if not path.is_file():
        raise RecipeError(
            f"{path} is not a regular file", where=where, hint="write the recipe to a .yaml file"
        )
    return path


def load_recipe(path_or_name: str | FilePath, overrides: Sequence[str] = ()) -> Recipe:
    """Load and validate a recipe.

    Args:
        path_or_name: Built-in name, YAML file, or run folder.
        overrides: ``dotted.path=yaml`` texts, applied last.
    Raises:
        RecipeError: No such recipe, or everything that is wrong in it.
    """
    return read_recipe(path_or_name, overrides).recipe


def read_recipe(path_or_name: str | FilePath, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Load a recipe and keep where each value was written.

    Args:
        path_or_name: Built-in name, YAML file, or run folder.
        overrides: ``dotted.path=yaml`` texts, applied last.
    Raises:
        RecipeError: No such recipe, or everything that is wrong in it.
    """
    file = recipe_file(path_or_name)
    problems: list[Problem] = []
    root = _read_file(file, problems)
    root = _apply_extends(root, file, problems)
    for override in overrides:
        root = _apply_override(root, override, problems)
    recipe, root = _validated(_without_nulls(root), problems)
    return LoadedRecipe(recipe=recipe, file=file, written=root)


def build_recipe(content: Mapping[str, Any], *, caller: str) -> Recipe:
    """Validate a recipe that was written in Python; relative paths start from the current folder.

    Args:
        content: Sections as in YAML; tuples count as lists, paths as text.
        caller: Where it was written, for errors.
    Raises:
        RecipeError: Everything that is wrong in it.
    """
    problems: list[Problem] = []
    root = _node(content, (), caller, problems)
    return _validated(root, problems)[0]


def _node(value: Any, path: Path, caller: str, problems: list[Problem]) -> Node:
    """Turn plain data into a tree whose every value was written by ``caller``."""
    if isinstance(value, Mapping):
        children = {str(key): _node(each, (*path, str(key)), caller, problems) for key, each in value.items()}
        return Node(children, caller)
    if isinstance(value, list | tuple):
        return Node([_node(each, (*path, at), caller, problems) for at, each in enumerate(value)], caller)
    if isinstance(value, FilePath):
        value = str(value)
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(Problem(caller, dotted(path), f"{value} is not a finite number", "give a number"))
        value = 0
    elif value is not None and not isinstance(value, bool | int | float | str):
        allowed = "numbers, texts, true and false, None, lists and dictionaries"
        problems.append(Problem(caller, dotted(path), f"a {type(value).__name__} is not a setting", allowed))
        value = None
    return Node(value, caller)


def _validated(root: Node, problems: list[Problem]) -> tuple[Recipe, Node]:
    """Return the recipe that a tree describes, and the tree with absolute paths; or raise all its problems."""
    problems = problems + none_words(root)
    if bad := unprintable(root):
        raise RecipeProblems([*problems, *bad])
    root = with_absolute_paths(root, problems)
    problems = [_with_bounds(problem, root) for problem in problems]
    try:
        # strict JSON: no quoted numbers, no true for 1, yet lists for tuples and words for enums
        recipe = Recipe.model_validate_json(json.dumps(root.plain()), strict=True)
    except ValidationError as error:
        problems += explain(error, root, known=problems)
        raise RecipeProblems(problems) from error
    if problems:
        raise RecipeProblems(problems)
    return recipe, root


def _with_bounds(problem: Problem, root: Node) -> Problem:
    """Say which numbers are allowed where the one written is not finite."""
    path = tuple(problem.path.split("."))
    if not problem.message.endswith("is not a finite number") or not (bounds := bounds_at(path, root)):
        return problem
    return replace(problem, message=f"{problem.message}\nallowed: {bounds}")


def _shown(file: FilePath) -> str:
    """Name a file the short way when it lies under the current folder."""
    relative = os.path.relpath(file)
    return str(file) if relative.startswith("..") else relative


def parse_file(file: FilePath) -> Node:
    """Read one file of a recipe as it is written, without what it extends.

    Raises:
        RecipeError: It cannot be read.
    """
    return _read_file(file, [])


def _read_file(file: FilePath, problems: list[Problem]) -> Node:
    place = _shown(file)
    try:
        with file.open("rb") as source:
            content = source.read(4 * MOST_CHARACTERS + 1)  # UTF-8 has at most four bytes a character
        text = content.decode("utf-8-sig") if len(content) <= 4 * MOST_CHARACTERS else None
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe: {error.strerror}", where=place, hint="gendistill recipe ls"
        ) from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"cannot read the recipe: it is not UTF-8 text, see byte 0x{content[error.start]:02x}",
            where=f"{place}:{line}",
            hint="save it as UTF-8, or name another file",
        ) from error
    if text is None:
        raise RecipeError(
            f"{file.stat().st_size:,} bytes are too much for a recipe; at most {MOST_CHARACTERS:,} characters",
            where=place,
            hint="gendistill recipe ls",
        )
    root = parse_yaml(text, place=place, problems=problems)
    if not isinstance(root.content, dict):
        problem = Problem(
            root.origin, "", "a recipe is a mapping (key: value lines)", "gendistill recipe show tiny"
        )
        raise RecipeProblems([problem])
    return root


def _apply_extends(root: Node, file: FilePath, problems: list[Problem]) -> Node:
    extends = root.content.get("extends")
    if extends is None:
        return root
    rest = Node({key: node for key, node in root.content.items() if key != "extends"}, root.place, root.line)
    name = extends.content
    if not isinstance(name, str):
        problems.append(
            Problem(extends.origin, "extends", "needs the name of one file", "write base/qwen3.yaml")
        )
        return rest
    try:
        found = asset_dir("recipes") / f"{name}.yaml"
        if name not in recipe_names():
            found = FilePath(resolve(name, ("extends",), folders_of(extends, ("extends",))))
    except ValueError as error:
        problems.append(Problem(extends.origin, "extends", str(error), "write base/qwen3.yaml"))
        return rest
    if not (exists(found) and found.is_file()):
        known = [
            *recipe_names(),
            *(f"base/{each.name}" for each in sorted(asset_dir("recipes").glob("base/*"))),
        ]
        message = f'there is no file "{shortened(name)}"{closest(name, known)}\nbuilt in: {", ".join(known)}'
        problems.append(Problem(extends.origin, "extends", message, "correct the path, or delete the line"))
        return rest
    base = _read_file(found, problems)
    if "extends" in base.content:
        problem = base.content["extends"]
        problems.append(
            Problem(problem.origin, "extends", "a base cannot extend another file", "copy what it needs")
        )
        base.content.pop("extends")
    return _merge(base, rest, ())


def _merge(base: Node, over: Node, path: Path) -> Node:
    """Lay one tree over another; the second wins."""
    if not (isinstance(base.content, dict) and isinstance(over.content, dict)) or _is_other_kind(
        base, over, path
    ):
        return over
    kept = dict(base.content)
    if len(path) == 2 and path[0] == "stages" and any(name in over.content for name in _LENGTHS):
        kept = {key: node for key, node in kept.items() if key not in _LENGTHS}
    for key, node in over.content.items():
        kept[key] = _merge(kept[key], node, (*path, key)) if key in kept else node
    return Node(kept, over.place, over.line)


def _is_other_kind(base: Node, over: Node, path: Path) -> bool:
    """Whether two sections are different alternatives of one setting, which share no keys worth merging."""
    if sum(is_section(one) for one in annotations_at(path)) < 2:
        return False
    kind, other = base.content.get("kind"), over.content.get("kind")
    if other is not None and (kind is None or kind.content != other.content):
        return True
    return ("mix" in over.content and "path" in base.content) or (
        "path" in over.content and "mix" in base.content
    )


def _apply_override(root: Node, override: str, problems: list[Problem]) -> Node:
    name, equals, value = override.partition("=")
    steps = name.strip().split(".")
    if not equals or not all(steps):
        message = f'"{shortened(override)}" is not an override; write dotted.path=value, as in stages.distill.lr=5e-5'
        problems.append(Problem(COMMAND_LINE, "", message, "gendistill recipe schema"))
        return root
    if len(steps) > MOST_LEVELS:
        message = f'"{shortened(name)}" has {len(steps):,} steps; no setting lies so deep'
        problems.append(Problem(COMMAND_LINE, "", message, "gendistill recipe schema"))
        return root
    try:
        node = parse_yaml(value, place=COMMAND_LINE, problems=problems, numbered=False, at=tuple(steps))
    except RecipeProblems as error:
        problem = error.problems[0]
        problems.append(
            Problem(COMMAND_LINE, name, problem.message, "quote it for the shell: 'a.b=\"text\"'")
        )
        return root
    if steps == ["extends"]:
        problems.append(Problem(COMMAND_LINE, name, "extends cannot be overridden", "write it in the file"))
        return root
    return _set(root, steps, node, (), problems)


def _set(root: Node, steps: list[str], value: Node, path: Path, problems: list[Problem]) -> Node:
    """Return a copy of the tree with one value laid over what is at a path."""
    step, rest = steps[0], steps[1:]
    if isinstance(root.content, list):
        return _set_item(root, steps, value, path, problems)
    if isinstance(root.content, dict) and step in root.content and rest:
        child = _set(root.content[step], rest, value, (*path, step), problems)
    else:
        child = value
        for name in reversed(rest):
            child = Node({name: child}, COMMAND_LINE)
    if not isinstance(root.content, dict):
        return Node({step: child}, COMMAND_LINE)
    content = dict(root.content)
    if len(path) == 2 and path[0] == "stages" and step in _LENGTHS:
        content = {key: node for key, node in content.items() if key not in _LENGTHS}
    if not rest and _is_other_kind(root, Node({step: child}, COMMAND_LINE), path):
        content = {}
    content[step] = child
    return Node(content, root.place, root.line)


def _set_item(root: Node, steps: list[str], value: Node, path: Path, problems: list[Problem]) -> Node:
    step, rest = steps[0], steps[1:]
    size = len(root.content)
    if not re.fullmatch("[0-9]{1,9}", step) or int(step) >= size:
        message = f'"{shortened(step)}" is not an item of this list; ' + (
            f"items are 0 to {size - 1}" if size else "it is empty"
        )
        problems.append(Problem(COMMAND_LINE, dotted((*path, step)), message, "name one of its items"))
        return root
    items = list(root.content)
    index = int(step)
    items[index] = _set(items[index], rest, value, (*path, index), problems) if rest else value
    return Node(items, root.place, root.line)


def _without_nulls(root: Node) -> Node:
    """Remove stages and sources that were set to null."""
    content = dict(root.content)
    for name in _REMOVABLE:
        section = content.get(name)
        if section is not None and isinstance(section.content, dict):
            kept = {key: node for key, node in section.content.items() if node.content is not None}
            content[name] = Node(kept, section.place, section.line)
    return Node(content, root.place, root.line)


def resolved(recipe: BaseModel) -> dict[str, Any]:
    """Return every setting, defaults included, under the names used in YAML."""
    return recipe.model_dump(mode="json", by_alias=True)


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML that loads back to an equal recipe."""
    return yaml.dump(resolved(recipe), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=100)


def flatten(value: Any, path: Path = ()) -> dict[Path, Any]:
    """Map the path of every setting to its value; lists and empty sections count as values."""
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {key: leaf for name, child in value.items() for key, leaf in flatten(child, (*path, name)).items()}


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting in which two recipes differ; a value that one of them lacks is None."""

    setting: str
    first: Any
    second: Any
    affects: Affects


def diff_recipes(first: Recipe, second: Recipe) -> list[Difference]:
    """List every setting that differs, with what it affects."""
    left, right = flatten(resolved(first)), flatten(resolved(second))
    return [
        Difference(
            dotted(path),
            left.get(path),
            right.get(path),
            max(
                affects_at(recipe, path)
                for recipe, found in ((first, left), (second, right))
                if path in found
            ),
        )
        for path in dict.fromkeys([*left, *right])
        if left.get(path) != right.get(path)
    ]
