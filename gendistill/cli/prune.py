"""``gendistill prune``: remove what no run folder shows."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gendistill.cli.arguments import add_json, print_json
from gendistill.errors import RecipeError

if TYPE_CHECKING:
    from gendistill.runs.prune import Unused

_UNITS = ((86_400, "day"), (3600, "hour"), (60, "minute"))
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", default="runs", help="the folder of the run folders (runs)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would be removed, remove nothing")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Remove the steps that no run folder leads to."""
    from gendistill.runs.prune import prune

    folder = _checked(arguments.folder)
    unused, num_kept = prune(folder, dry_run=arguments.dry_run)
    num_bytes = sum(each.num_bytes for each in unused)
    if arguments.json:
        print_json(
            {
                "folder": str(folder),
                "dry_run": arguments.dry_run,
                "removed": [_row(each) for each in unused],
                "bytes": num_bytes,
                "kept": num_kept,
            }
        )
        return 0
    for each in unused:
        state = "finished" if each.finished else "begun"
        print(
            f"{each.name:24} {each.key}   {state:8}   {_size(each.num_bytes):>8}   {_age(each.modified)} old"
        )
    word = "to remove" if arguments.dry_run else "removed"
    rest = f"   next: gendistill prune {folder}" if arguments.dry_run and unused else ""
    print(f"ok        {word}: {len(unused)}, {_size(num_bytes)}; kept: {num_kept} that runs show{rest}")
    return 0


def _checked(text: str) -> Path:
    from gendistill.config.document import shortened
    from gendistill.config.locate import exists

    folder = Path(text)
    hint = "gendistill prune FOLDER, with the folder that output=... named (runs)"
    if not exists(folder) or not folder.is_dir():
        raise RecipeError(
            f'there is no folder "{shortened(text)}"', where="gendistill prune FOLDER", hint=hint
        )
    if (folder / "manifest.json").is_file():
        raise RecipeError(
            f"{folder} is a run folder; its steps lie beside it, with those of other runs",
            where="gendistill prune FOLDER",
            hint=f"gendistill prune {folder.parent}; what only this run shows goes once {folder} is deleted",
        )
    return folder


def _row(unused: Unused) -> dict[str, object]:
    return {
        "step": unused.name,
        "key": unused.key,
        "folder": str(unused.folder),
        "finished": unused.finished,
        "bytes": unused.num_bytes,
        "seconds_old": round(max(0.0, time.time() - unused.modified), 1),
    }


def _size(num_bytes: int) -> str:
    for size, unit in _SIZES:
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} B"


def _age(modified: float) -> str:
    seconds = max(0.0, time.time() - modified)
    for length, unit in _UNITS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count:,} {unit}{'s' if count > 1 else ''}"
    return "less than a minute"
