"""Find and remove the steps that no run folder shows. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gendistill.errors import OutputError
from gendistill.paths import parse_json, real_path, writing
from gendistill.runs.steps import Step
from gendistill.runs.store import RECORD, SCORES, Store
from gendistill.runs.workspace import PENDING, STORE

_SLUG = re.compile(r"(convert|stage|eval)-?(.*)-([0-9a-f]{16})", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Unused:
    """A folder of the store that no run folder leads to.

    Attributes:
        name: Name of the step, or ``scores`` for the results that are kept of a model.
        key: Key of the step, or hash of the model.
        finished: Whether the step has finished; kept results always have.
        num_bytes: Size of its files.
        modified: When it was last written, in seconds since 1970.
    """

    folder: Path
    name: str
    key: str
    finished: bool
    num_bytes: int
    modified: float


def prune(output: Path, *, dry_run: bool) -> tuple[list[Unused], int]:
    """Remove every step that no run folder links to, nor waits for, and that no process works on.

    Args:
        output: The folder of the run folders.
        dry_run: Whether to list only.
    Returns: What was removed, or would be, and how many steps stay.
    Raises:
        OutputError: A run folder cannot be read, so that its steps are unknown, or a step cannot be removed.
    """
    store = Store(output / STORE)
    if not store.root.is_dir():
        return [], 0
    if not dry_run:
        store.clear_remains()
    gone, kept = [], []
    for folder in store.folders():
        match = _SLUG.fullmatch(folder.name)
        unused = match and _remove_step(store, folder, match, output=output, dry_run=dry_run)
        gone.append(unused) if unused else kept.append(folder)
    models = _models(store, kept)
    for folder in sorted(store.root.glob(f"{SCORES}/[!.]*")):
        if models is not None and folder.name not in models:
            gone.append(_described(folder, SCORES, folder.name, finished=True))
            if not dry_run:
                _remove(folder)
    return gone, len(kept)


def _remove_step(
    store: Store, folder: Path, match: re.Match[str], *, output: Path, dry_run: bool
) -> Unused | None:
    """Remove a step unless it is of use, and describe what is removed."""
    with writing(store.root), store.holding_if_free(folder) as free:
        # looked up while the step is held: a command links to a step before it relies on it
        if not free or folder.name in set(_used(output, store.root)):
            return None
        kind, rest, key = match.groups()
        unused = _described(folder, f"{kind} {rest}".strip(), key, finished=(folder / RECORD).is_file())
        if not dry_run:
            _remove(folder)
            store.forget_lock(folder)
    return unused


def _used(output: Path, root: Path) -> Iterator[str]:
    """Name the folders of the store that run folders lead to."""
    store = real_path(root)
    for run in _inside(output):
        if not run.is_dir() or run.name.startswith("."):
            continue
        # before the links: a command makes its links first, and forgets last what was pending
        yield from _pending(run / PENDING)
        for link in (run / "convert", run / "student-init", *_inside(run / "stages"), *_inside(run / "eval")):
            # a command may remove a link meanwhile
            with contextlib.suppress(FileNotFoundError):
                target = Path(os.path.realpath(link))
                if store in target.parents:
                    yield target.relative_to(store).parts[0]


def _pending(path: Path) -> list[str]:
    hint = "run the command that was interrupted there again, or delete the file if nobody needs its work"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot read the file: {error.strerror}", where=str(path), hint=hint) from error
    return parse_json(text, shape=list[str], where=str(path), hint=hint)


def _inside(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(
            f"cannot read the folder, so that it is unknown which steps it leads to: {error.strerror}",
            where=str(folder),
            hint="make the folder readable, or move it elsewhere",
        ) from error


def _models(store: Store, kept: list[Path]) -> set[str] | None:
    """Hash the models that the steps that stay score; None if a step does not say what it is of."""
    models = set()
    for folder in kept:
        if folder.name.startswith("eval-"):
            inputs = store.inputs(folder)
            if inputs is None:
                return None
            models.add(Step("eval", inputs).model)
    return models


def _described(folder: Path, name: str, key: str, *, finished: bool) -> Unused:
    stats = [path.lstat() for path in folder.rglob("*") if path.is_file()]
    return Unused(
        folder=folder,
        name=name,
        key=key,
        finished=finished,
        num_bytes=sum(stat.st_size for stat in stats),
        modified=max((stat.st_mtime for stat in stats), default=folder.stat().st_mtime),
    )


def _remove(folder: Path) -> None:
    """Remove a folder; killed half-way, what is left has the name of remains."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    with writing(folder):
        os.replace(folder, partial)
        shutil.rmtree(partial)
