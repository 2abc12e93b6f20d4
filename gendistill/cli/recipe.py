"""``gendistill recipe``: list, show, copy, check and compare recipes. Imports no torch."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill.cli.arguments import Parser, add_json, add_recipe, find_tasks, print_json
from gendistill.errors import RecipeError
from gendistill.text import printable

if TYPE_CHECKING:
    from gendistill.config.load import LoadedRecipe
    from gendistill.config.schema import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommands."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    add_json(actions.add_parser("ls", help="list the built-in recipes"))
    show = actions.add_parser("show", help="print every setting with where it comes from")
    add_recipe(show)
    add_json(show)
    copy = actions.add_parser("cp", help="copy a recipe, to edit it")
    copy.add_argument("recipe", metavar="RECIPE", help="a built-in name or a YAML file")
    copy.add_argument("target", metavar="FILE", help="the new file, such as my-recipe.yaml")
    copy.add_argument("--force", action="store_true", help="replace the file if it exists")
    check = actions.add_parser("check", help="validate a recipe without running anything")
    add_recipe(check)
    add_json(check)
    schema = actions.add_parser("schema", help="print the settings that a recipe can have")
    schema.add_argument(
        "--at", metavar="PATH", default="", help="one section, as in stages.distill.objective"
    )
    add_json(schema)
    diff = actions.add_parser("diff", help="print the settings in which two recipes differ")
    diff.add_argument("recipe", metavar="A", help="a built-in name, a YAML file, or a run folder")
    diff.add_argument("other", metavar="B", help="the same, for the second recipe")
    add_json(diff)


def run(arguments: argparse.Namespace) -> int:
    """Run one subcommand."""
    actions = {"ls": _ls, "show": _show, "cp": _copy, "check": _check, "schema": _schema, "diff": _diff}
    return actions[arguments.action](arguments)


def _ls(arguments: argparse.Namespace) -> int:
    from gendistill.config.load import load_recipe, recipe_file, recipe_names

    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        file = recipe_file(name)
        rows.append({"name": name, "about": _about(file), "stages": list(recipe.stages), "file": str(file)})
    if arguments.json:
        print_json(rows)
        return 0
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        print(f"{row['name']:{width}}  {row['about']}")
    print(f"next: gendistill recipe show {rows[0]['name']}")
    return 0


def _about(file: Path) -> str:
    """Return the first sentence of the comment at the top of a recipe."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return re.split(r"(?<=\.)\s", " ".join(lines), maxsplit=1)[0]


def _show(arguments: argparse.Namespace) -> int:
    from gendistill.config.load import read_recipe, resolved

    loaded = read_recipe(arguments.recipe, arguments.overrides)
    if arguments.json:
        print_json(resolved(loaded.recipe))
    else:
        print("\n".join(_annotated(loaded)))
    return 0


def _annotated(loaded: LoadedRecipe) -> list[str]:
    """Write the resolved recipe as YAML, with the origin of each value as a comment."""
    from gendistill.config.load import resolved

    lines = [f"# {loaded.file}"]

    def walk(value: Any, path: tuple[str | int, ...]) -> None:
        indent = "  " * (len(path) - 1)
        if isinstance(value, dict) and value:
            if path:
                lines.append(f"{indent}{path[-1]}:")
            for key, child in value.items():
                walk(child, (*path, key))
            return
        text = f"{indent}{path[-1]}: {_one_line(value)}"
        lines.append(f"{text:<56}  # {loaded.origin(path)}")

    walk(resolved(loaded.recipe), ())
    return lines


def _one_line(value: Any) -> str:
    """Write a value as YAML on one line."""
    import yaml

    from gendistill.config.document import RecipeDumper

    text = yaml.dump(value, Dumper=RecipeDumper, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _copy(arguments: argparse.Namespace) -> int:
    from gendistill.config.copy import copied_text
    from gendistill.config.load import read_recipe
    from gendistill.paths import write_text

    source = read_recipe(arguments.recipe)
    target = _target(arguments.target, source.file)
    if os.path.lexists(target) and not arguments.force:
        raise RecipeError(f"{target} exists", where=str(target), hint="choose another name, or add --force")
    write_text(target, copied_text(source, target))
    name = read_recipe(target).recipe.name
    print(f"wrote     {target}   name: {name}   next: edit it, then gendistill recipe check {target}")
    return 0


def _target(text: str, source: Path) -> Path:
    """Find the file to write; a folder gets one of the source's name."""
    if not text.strip() or printable(text) != text:
        raise RecipeError(
            f"{text!r} is empty or holds characters that cannot be printed",
            where="FILE",
            hint="write my.yaml",
        )
    target = Path(text)
    if target.is_dir():
        target = target / source.name
    if target.is_dir() or (target.exists() and not target.is_file()):
        raise RecipeError(f"{target} is not a file", where=str(target), hint="choose another name")
    if target.exists() and target.samefile(source):
        raise RecipeError(f"{target} is the recipe itself", where=str(target), hint="choose another name")
    return target


def _check(arguments: argparse.Namespace) -> int:
    from gendistill.config.load import read_recipe
    from gendistill.config.watch import check_trackers
    from gendistill.runs.advice import advise, known_teacher

    loaded = read_recipe(arguments.recipe, arguments.overrides)
    recipe = loaded.recipe
    find_tasks(recipe)
    check_trackers(recipe.trackers)
    config, chat_template = known_teacher(recipe)
    warnings = advise(recipe, config, chat_template=chat_template)
    if arguments.json:
        print_json({"ok": True, "name": recipe.name, "file": str(loaded.file), "warnings": warnings})
        return 0
    for warning in warnings:
        print(f"warn      {warning}")
    print(f"ok        {recipe.name}   {_summary(recipe)}")
    return 0


def _summary(recipe: Recipe) -> str:
    placement = recipe.student.placement
    words = placement if isinstance(placement, str) else f"{len(placement)} layers listed"
    stages = " > ".join(recipe.stages) or "no stages"
    return f"teacher {recipe.teacher.model}   placement {words}   stages {stages}"


def _schema(arguments: argparse.Namespace) -> int:
    from gendistill.config.document import shortened
    from gendistill.config.explain import annotations_at, closest, is_section, settings, words_at
    from gendistill.config.reference import type_words

    path = tuple(step for step in arguments.at.split(".") if step)
    found = annotations_at(path)
    if not found:
        parent = annotations_at(path[:-1])
        names = [name for one in parent if is_section(one) for name in settings(one)]
        near = closest(path[-1], names)
        allowed = f"; settings there: {', '.join(sorted(names))}" if names else ""
        raise RecipeError(
            f'there is no setting "{shortened(arguments.at)}"{near}{allowed}',
            where="--at",
            hint="gendistill recipe schema",
        )
    sections = [one for one in found if is_section(one)]
    if arguments.json:
        from pydantic import TypeAdapter

        schemas = [TypeAdapter(one).json_schema(by_alias=True) for one in found]
        print_json(schemas[0] if len(schemas) == 1 else {"anyOf": schemas})
        return 0
    if not sections:
        print(f"{arguments.at}: {type_words(found)}")
        words = words_at(path)
        if words:
            print(f"  allowed: {', '.join(words)}")
    for section in sections:
        _print_section(section)
    return 0


def _print_section(section: Any) -> None:
    from gendistill.config.explain import alternatives_of, is_section, settings
    from gendistill.config.reference import default_words, type_words

    print(f"{section.__name__}: {(section.__doc__ or '').strip().splitlines()[0]}")
    for name, field in settings(section).items():
        types = alternatives_of(field)
        about = f"  {field.description}" if field.description else ""
        kind = "section" if any(is_section(one) for one in types) else type_words(types)
        print(f"  {name:24} {kind:28} {default_words(field):16}{about}".rstrip())


def _diff(arguments: argparse.Namespace) -> int:
    from gendistill.config.load import diff_recipes, load_recipe
    from gendistill.config.reference import AFFECTED

    rows = diff_recipes(load_recipe(arguments.recipe), load_recipe(arguments.other))
    if arguments.json:
        print_json([{**asdict(row), "affects": row.affects.name.lower()} for row in rows])
        return 0
    for row in rows:
        change = f"{_one_line(row.first)}  ->  {_one_line(row.second)}"
        print(f"{row.setting:40} {change:32} affects {AFFECTED[row.affects]}")
    if not rows:
        print("the two recipes are equal")
    return 0
