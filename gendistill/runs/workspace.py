"""A run folder: what one recipe shows of the store, and who may write to it. Imports no torch."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ConfigDict
from typing_extensions import TypedDict

from gendistill.config.load import dump_recipe, load_recipe
from gendistill.config.schema import Recipe, SourceConfig
from gendistill.errors import OutputError, RecipeError
from gendistill.paths import RunDir, clear_remains, new_folder, read_json, write_json, write_text, writing
from gendistill.runs.steps import CONVERT, Step, differences
from gendistill.runs.store import Store


class _Manifest(TypedDict):
    """What a run folder says of its steps, among other things."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    steps: dict[str, str]
    complete: bool


# what tells how a stage went; without it the student is as good
_STORY = frozenset({"metrics.jsonl", "plan.json"})


class Workspace:
    """The run folder of a recipe and the store that its steps live in.

    The folder holds the recipe, the manifest, links to the recipe's steps in the store, a copy of the finished
    student and the report. A folder that an earlier command completed with other steps stays as it is until this
    command has completed its own: failing, or being killed, changes nothing that is finished.

    Args:
        recipe: What the folder shows.
        say: Receives title and text of a line for people.

    Attributes:
        run: The run folder.
        store: The store.
        steps: All steps of the recipe by name, in order, once they are planned.
        entries: What else the manifest says.
        warnings: Said so far; the manifest has them too.
    """

    def __init__(self, recipe: Recipe, *, say: Callable[[str, str], None]) -> None:
        self.run = RunDir(recipe.run_folder)
        self.store = Store(recipe.run_folder.parent / ".store")
        self.steps: dict[str, Step] = {}
        self.entries: dict[str, Any] = {}
        self.warnings: list[str] = []
        self._recipe = dump_recipe(recipe)
        self._data = recipe.data
        self._say = say
        self._said_before = 0
        self._was_complete = False
        self._held = False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process out of the run folder.

        Raises:
            OutputError: Another process works in it, or it cannot be written.
        """
        root = self.run.root
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
        lock, owner = FileLock(root / ".lock"), root / ".owner.json"
        with writing(root):
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise OutputError(
                    f"another process works in {root}{_described(owner)}",
                    where=str(root),
                    hint="wait for it, or give this run a folder of its own with name=...",
                ) from error
        try:
            for folder in (root, root / "stages", root / "eval", self.store.root, *self.store.folders()):
                clear_remains(folder, own=True)
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def plan(self, steps: Sequence[Step]) -> None:
        """Take the steps of the recipe, and compare them with those that the folder shows."""
        self.steps = {step.name: step for step in steps}
        keys = {name: step.key for name, step in self.steps.items()}
        shown = self._manifest()
        same = self._written_recipe() == self._recipe and shown.get("steps", {}).items() <= keys.items()
        self._was_complete = bool(shown.get("complete"))
        self._held = self._was_complete and not same
        if self._held:
            root = self.run.root
            self._say("folder", f"{root} shows a finished run; it stays as it is until this one has finished")

    def shown_inputs(self, name: str) -> dict[str, Any] | None:
        """Return what the step of this name that the run folder shows was made from, or None if it shows none."""
        link = self.run.root / _links(name)[0][0]
        return self.store.inputs(link) if link.is_symlink() else None

    def shown_content(self, name: str, source: str) -> dict[str, Any] | None:
        """Return what the shown step of this name read of a source, if the shown recipe has it at the same place."""
        try:
            shown = load_recipe(self.run.recipe).data if self.run.recipe.is_file() else {}
        except RecipeError:
            return None  # edited since, or of another version
        there, here = shown.get(source), self._data[source]
        if not isinstance(there, SourceConfig) or not isinstance(here, SourceConfig):
            return None
        if Path(there.path).absolute() != Path(here.path).absolute():
            return None
        return ((self.shown_inputs(name) or {}).get("data", {}).get(source) or {}).get("content")

    def folder(self, name: str) -> Path:
        """Folder of a step in the store."""
        return self.store.folder(self.steps[name])

    @property
    def student(self) -> Path:
        """The student after the last stage, in the store: the run folder may still show an older one."""
        return self.folder(self._training[-1]) / "student"

    @property
    def _training(self) -> list[str]:
        """Names of the steps that make a student."""
        return [name for name, step in self.steps.items() if step.kind in (CONVERT, "stage")]

    def is_done(self, name: str) -> bool:
        """Whether a step has finished with these inputs, and its output is as it was.

        A damaged step is forgotten, with a line that says so: it is to be made again.
        """
        step = self.steps[name]
        found = self.store.record(step)
        if found is None:
            return False
        if "result.json" in self.store.damage(step) and "result" in found:
            write_json(self.folder(name) / "result.json", found["result"])
        damage = self.store.damage(step)
        said = f"{name}: {', '.join(f'{file} {what}' for file, what in damage.items())} since it finished"
        if not damage or (step.kind == "stage" and damage.keys() <= _STORY):
            if damage:
                self.warn(f"{said}; the report goes without, the student is intact")
            self.store.tidy(step)
            return True
        self.warn(f"{said}; it is made again")
        self.store.clear(step)
        return False

    @contextmanager
    def making(self, name: str) -> Iterator[Path]:
        """Give the folder of a step to fill, after saying why it is made although the folder shows another one."""
        step = self.steps[name]
        old = self.shown_inputs(name)
        if old is not None and (changed := differences(old, step.inputs)):
            self._say(name.split()[-1], f"made anew: {'; '.join(changed[:3])}")
        with self.store.working(step, say=lambda line: self._say("wait", line)) as folder:
            self.sync(current=name)
            self._said_before = len(self.warnings)
            yield folder

    def finish(self, name: str, found: dict[str, Any]) -> None:
        """Record that a step has finished, with what it found and warned of, and show it."""
        said = self.warnings[self._said_before :]
        self.store.finish(self.steps[name], {**found, "warnings": said})
        self.sync()

    def warn(self, text: str) -> None:
        """Say a warning once, now and in the report."""
        if text not in self.warnings:
            self._say("warning", text)
            self.warnings.append(text)

    def sync(self, *, current: str | None = None) -> None:
        """Bring the run folder up to what the store holds, as far as that changes nothing that is complete.

        Args:
            current: A step that is being made; its unfinished folder is shown, too.
        """
        if not self._held:
            self._show(current)
            if not self._was_complete:
                self._describe(complete=False)

    def complete(self) -> None:
        """Show this recipe's steps, whatever the folder showed before."""
        self._show(None)
        self._describe(complete=True)
        self._held, self._was_complete = False, True

    def _finished(self) -> dict[str, dict[str, Any]]:
        records = {name: self.store.record(step) for name, step in self.steps.items()}
        return {name: record for name, record in records.items() if record is not None}

    def _show(self, current: str | None) -> None:
        """Link the finished steps and the current one, and nothing else."""
        found, root = self._finished(), self.run.root
        wanted = {
            link: self.folder(name) / inner
            for name in self.steps
            if name in found or name == current
            for link, inner in _links(name)
        }
        with writing(root):
            for path in (root / "convert", root / "student-init", *_children(root / "stages", root / "eval")):
                link = path.relative_to(root).as_posix()
                if link not in wanted and path.is_symlink():
                    path.unlink()
            for link, target in wanted.items():
                _link(root / link, target)
            self._show_student(found)

    def _describe(self, *, complete: bool) -> None:
        """Write recipe and manifest."""
        found = self._finished()
        write_text(self.run.recipe, self._recipe)
        said = [line for record in found.values() for line in record.get("warnings", [])]
        manifest = {
            **found.get(CONVERT, {}),
            **self.entries,
            "steps": {name: self.steps[name].key for name in found},
            "warnings": list(dict.fromkeys([*said, *self.warnings])),
            "complete": complete,
        }
        write_json(self.run.manifest, manifest)

    def _show_student(self, found: dict[str, Any]) -> None:
        """Copy the student of the last stage once all have finished; weights share their disk space."""
        target, source = self.run.student, self.student
        if any(name not in found for name in self._training):
            shutil.rmtree(target, ignore_errors=True)
            return
        if not target.is_dir() or not _same_files(source, target):
            with new_folder(target) as partial:
                shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)

    def _manifest(self) -> dict[str, Any]:
        if not self.run.manifest.is_file():
            return {}
        try:
            return read_json(self.run.manifest, shape=_Manifest)
        except OutputError:
            return {}  # everything in it is written anew

    def _written_recipe(self) -> str | None:
        try:
            return self.run.recipe.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None


def _links(name: str) -> list[tuple[str, str]]:
    """Say where a run folder shows a step: the link, and what it points to inside the step's folder."""
    kind, _, rest = name.partition(" ")
    if kind == CONVERT:
        return [("convert", "."), ("student-init", "student")]
    return [(f"{'stages' if kind == 'stage' else kind}/{rest}", ".")]


def _children(*folders: Path) -> list[Path]:
    return [path for folder in folders if folder.is_dir() for path in folder.iterdir()]


def _link(path: Path, target: Path) -> None:
    """Make a relative link, replacing an older one."""
    if path.is_dir() and not path.is_symlink():
        raise OutputError(
            f"{path} is a folder, where a link to a step belongs",
            where=str(path),
            hint="move the run folder away, or give this run a folder of its own with name=...",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # relative, so that the folder of all runs can be moved
    wanted = os.path.relpath(target, path.parent)
    if path.is_symlink() and os.readlink(path) == wanted:  # noqa: PTH115 - pathlib changes the spelling
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    partial.symlink_to(wanted)
    os.replace(partial, path)


def _link_or_copy(source: str, target: str) -> None:
    """Share the disk space of weights; copy what people edit."""
    if source.endswith(".safetensors"):
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without hard links
    shutil.copyfile(source, target)


def _same_files(source: Path, target: Path) -> bool:
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    return all(
        (target / name).is_file()
        and (
            (source / name).samefile(target / name)
            or filecmp.cmp(source / name, target / name, shallow=False)
        )
        for name in names
    )


def _described(owner: Path) -> str:
    try:
        content = json.loads(owner.read_text(encoding="utf-8"))
        return f" (process {content['pid']} on {content['host']})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""
