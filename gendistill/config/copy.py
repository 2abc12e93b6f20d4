"""The text of a copied recipe: it speaks of itself, and its paths mean what they meant. Imports no torch."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path as FilePath

from gendistill.config.document import Node
from gendistill.config.load import LoadedRecipe, parse_file
from gendistill.config.locate import folders_of, may_be_path, resolve
from gendistill.paths import asset_dir


def copied_text(source: LoadedRecipe, target: FilePath) -> str:
    """Return the text of a recipe for another file.

    Its ``name`` becomes that of the file, so that the copy gets a run folder of its own; commands in its comments
    name the copy; relative paths that the new folder would break become absolute. Everything else stays.

    Args:
        source: The recipe.
        target: Where the copy will be.
    """
    lines = source.file.read_text(encoding="utf-8-sig").split("\n")
    if not source.file.is_relative_to(asset_dir("recipes")):
        _keep_paths(lines, parse_file(source.file), target)
    old = source.recipe.name
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", target.stem).lstrip("._-")[:100]
    command = re.compile(rf"(gendistill [^#]*?)(?<![\w./-]){re.escape(old)}(?![\w./=-])")
    renamed = not name
    for index, line in enumerate(lines):
        if line.startswith("#"):
            lines[index] = command.sub(lambda match: f"{match[1]}{shlex.quote(str(target))}", line)
        elif not renamed and re.match(r"name\s*:", line):
            lines[index], renamed = f"name: {name}", True
    return "\n".join(lines)


def _keep_paths(lines: list[str], root: Node, target: FilePath) -> None:
    """Write out the relative paths of a file, each in its own line, where the copy would not find them."""
    settings = {("extends",): root.content["extends"]} if "extends" in root.content else {}
    settings |= {path: node for path, node in root.scalars() if may_be_path(path)}
    for path, node in settings.items():
        if not isinstance(node.content, str) or path == ("output",) or node.line is None:
            continue
        meant = resolve(node.content, path, folders_of(node, path))
        beside = Node(node.content, str(target))
        if meant != node.content and resolve(node.content, path, folders_of(beside, path)) != meant:
            shown = os.path.relpath(meant, target.parent)
            written = shown if shown.startswith(".") else f"./{shown}"
            line = lines[node.line - 1]
            lines[node.line - 1] = (
                written.join(line.rsplit(node.content, 1)) if node.content in line else line
            )
