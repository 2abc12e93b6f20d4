"""A run folder: what one recipe shows of the store, and who may write to it. Imports no torch."""

from __future__ import annotations

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
from gendistill.config.schema import Recipe
from gendistill.errors import OutputError, RecipeError
from gendistill.paths import (
    RunDir,
    clear_remains,
    new_folder,
    read_file,
    read_json,
    real_path,
    write_json,
    write_text,
    writing,
)
from gendistill.runs.seal import Seal, check, read_sealed_json, seal, write_sealed_json
from gendistill.runs.steps import CONVERT, Step, differences
from gendistill.runs.store import Store
from gendistill.text import printable_lines

STORE = ".store"
# steps of a command that has begun and not completed yet
PENDING = ".pending.json"
_SEAL = ".student.json"
_PIECE = 2**30


class _Manifest(TypedDict):
    """What a run folder says of its steps, among other things."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    steps: dict[str, str]
    complete: bool


class _Copied(TypedDict):
    """The step that ``student/`` is a copy from, and the copy's files."""

    step: str
    files: Seal


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
        self.store = Store(recipe.run_folder.parent / STORE)
        self.steps: dict[str, Step] = {}
        self.entries: dict[str, Any] = {}
        self.warnings: list[str] = []
        self._recipe = dump_recipe(recipe)
        self._teacher = recipe.teacher.model
        self._say = say
        self._said_before = 0
        self._before: tuple[str | None, dict[str, str] | None] = (None, None)
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
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
            for folder in (root, root / "stages", root / "eval", self.run.report):
                clear_remains(folder, own=True)
            self.store.clear_remains()
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def plan(self, steps: Sequence[Step]) -> None:
        """Take the steps of the recipe, and compare them with those that the folder shows.

        Raises:
            OutputError: Something else lies where the folder would show a step.
        """
        self.steps = {step.name: step for step in steps}
        self._refuse_strangers()
        keys = {name: step.key for name, step in self.steps.items()}
        shown = self._manifest()
        same = self._written_recipe() == self._recipe and shown.get("steps", {}).items() <= keys.items()
        self._before = (self._written_recipe(), shown.get("steps"))
        self._was_complete = bool(shown.get("complete"))
        self._held = self._was_complete and not same
        if self._held:
            root = self.run.root
            self._say("folder", f"{root} shows a finished run; it stays as it is until this one has finished")

    def shown_inputs(self, name: str) -> dict[str, Any] | None:
        """Return what the step of this name that the run folder shows was made from, or None if it shows none."""
        link = self.run.root / _links(name)[0][0]
        return self.store.inputs(link) if link.is_symlink() else None

    def shown_recipe(self) -> Recipe | None:
        """Return the recipe that the run folder shows; None if there is none, or none that can be read."""
        try:
            return load_recipe(self.run.recipe) if self.run.recipe.is_file() else None
        except RecipeError:
            return None

    def folder(self, name: str) -> Path:
        """Folder of a step in the store."""
        return self.store.folder(self.steps[name])

    @property
    def student(self) -> Path:
        """The student after the last stage, in the store: the run folder may still show an older one."""
        return self.store.folder(self._last) / "student"

    @property
    def _last(self) -> Step:
        """The last step that makes a student."""
        return [step for step in self.steps.values() if step.kind in (CONVERT, "stage")][-1]

    def is_done(self, name: str) -> bool:
        """Whether a step has finished with these inputs, and its output is as it was; damage is said."""
        step = self.steps[name]
        if not self.store.has_record(step):
            return False
        with self.store.holding(step, say=self._say_waiting):
            return self._is_intact(step)

    @contextmanager
    def making(self, name: str) -> Iterator[Path | None]:
        """Give the folder of a step to fill, after saying why it is made although the folder shows another one.

        Returns: The folder, with what an interrupted attempt left; None if another process has just made the step.
        """
        step = self.steps[name]
        with self.store.holding(step, say=self._say_waiting) as folder:
            if self._is_intact(step):
                yield None
                return
            old = self.shown_inputs(name)
            if old is not None and (changed := differences(old, step.inputs)):
                self._say(name.split()[-1], f"made anew: {'; '.join(changed[:3])}")
            self.store.begin(step)
            self.sync()
            self._said_before = len(self.warnings)
            yield folder

    def finish(self, name: str, found: dict[str, Any]) -> None:
        """Record that a step has finished, with what it found and warned of, and show it."""
        said = self.warnings[self._said_before :]
        self.store.finish(self.steps[name], {**found, "warnings": said})
        self.sync()

    def warn(self, text: str) -> None:
        """Say a warning now, once, and in the report."""
        text = printable_lines(text)
        if text not in self.warnings:
            self._say("warning", text)
            self.warnings.append(text)

    def sync(self) -> None:
        """Bring the run folder up to what the store holds, as far as that changes nothing that is complete."""
        # before anybody relies on a step that nothing links to yet: another command may be pruning
        write_json(self.run.root / PENDING, [step.slug for step in self.steps.values()])
        if self._held:
            return
        self._show()
        if not self._was_complete:
            self._describe(complete=False)

    def complete(self, *, forget: Callable[[Path], object] = lambda root: None) -> None:
        """Show this recipe's steps, whatever the folder showed before.

        Args:
            forget: Receives the run folder when it shows something new: a report in it is of what it showed before.
        """
        self._show()
        if self._before != (self._recipe, self._keys()):
            forget(self.run.root)
        self._describe(complete=True)
        with writing(self.run.root):
            (self.run.root / PENDING).unlink(missing_ok=True)
        self._held, self._was_complete = False, True

    def _is_intact(self, step: Step) -> bool:
        """Whether a step that this process holds has finished and is as it was."""
        if not self.store.has_record(step):
            return False
        found = self.store.record(step) or {}
        if "result.json" in self.store.damage(step) and "result" in found:
            write_json(self.store.folder(step) / "result.json", found["result"])
        damage = self.store.damage(step)
        said = (
            f"{step.name}: {', '.join(f'{file} {what}' for file, what in damage.items())} since it finished"
        )
        if not damage or (step.kind == "stage" and damage.keys() <= _STORY):
            if damage:
                self.warn(f"{said}; the report goes without, the student is intact")
            self.store.tidy(step)
            return True
        self.warn(f"{said}; it has to be made again")
        return False

    def _say_waiting(self, line: str) -> None:
        self._say("wait", line)

    def _finished(self) -> dict[str, dict[str, Any]]:
        records = {name: self.store.record(step) for name, step in self.steps.items()}
        return {name: record for name, record in records.items() if record is not None}

    def _keys(self) -> dict[str, str]:
        return {name: self.steps[name].key for name in self._finished()}

    def _show(self) -> None:
        """Link the steps that have begun or finished, and nothing else; what takes long or much space comes first."""
        root = self.run.root
        wanted = {
            link: self.folder(name) / inner
            for name in self.steps
            if self.folder(name).is_dir()
            for link, inner in _links(name)
        }
        with writing(root):
            self._show_student()
            for path in (root / "convert", root / "student-init", *_children(root / "stages", root / "eval")):
                link = path.relative_to(root).as_posix()
                if link not in wanted and path.is_symlink():
                    path.unlink()
            for link, target in wanted.items():
                self._link(root / link, target)

    def _describe(self, *, complete: bool) -> None:
        """Write recipe and manifest."""
        found = self._finished()
        write_text(self.run.recipe, self._recipe)
        said = [line for record in found.values() for line in record.get("warnings", [])]
        manifest = {
            **found.get(CONVERT, {}),
            **self.entries,
            "steps": self._keys(),
            "warnings": list(dict.fromkeys([*said, *self.warnings])),
            "complete": complete,
        }
        if "teacher" in manifest:
            # the step may come from a recipe that names the same teacher by another path
            manifest["teacher"] = {**manifest["teacher"], "spec": self._teacher}
        write_json(self.run.manifest, manifest)

    def _show_student(self) -> None:
        """Copy the student of the last stage once that has finished. People may do with the copy what they like."""
        target, source, sealed = self.run.student, self.student, self._sealed()
        names = {
            name.removeprefix("student/"): entry
            for name, entry in self.store.files(self._last).items()
            if name.startswith("student/")
        }
        if not names or check(source, names)[0]:
            if sealed is None or sealed["step"] != self._last.slug or not names:
                shutil.rmtree(target, ignore_errors=True)
            return
        if sealed is not None and sealed["step"] == self._last.slug and not check(target, sealed["files"])[0]:
            return
        with new_folder(target) as partial:
            shutil.copytree(source, partial, copy_function=_copy, dirs_exist_ok=True)
            # before the copy is in its place: what lies there without a seal is not ours
            copied = {"step": self._last.slug, "files": seal(partial, names)}
            write_sealed_json(self.run.root / _SEAL, copied)

    def describe_student(self, describe: Callable[[Path], object]) -> None:
        """Change files of the run's copy of the student that its weights do not depend on, such as its card.

        The copy is changed alone: the store keeps what the stage made. Nothing happens where the copy is missing, or
        where people changed it.

        Args:
            describe: Receives the copy's folder.
        """
        target, sealed = self.run.student, self._sealed()
        if sealed is None or sealed["step"] != self._last.slug or check(target, sealed["files"])[0]:
            return
        with writing(target):
            describe(target)
            changed = check(target, sealed["files"])[0]
            files = {**sealed["files"], **seal(target, changed)}
            write_sealed_json(self.run.root / _SEAL, {"step": sealed["step"], "files": files})

    def _sealed(self) -> _Copied | None:
        try:
            return read_sealed_json(self.run.root / _SEAL, _Copied)
        except OutputError:
            return None

    def _refuse_strangers(self) -> None:
        """Refuse a folder that holds something else where this class writes links and the student.

        Raises:
            OutputError: It does.
        """
        root = self.run.root
        links = [root / link for name in self.steps for link, _ in _links(name)]
        strange = [path for path in links if path.exists() and not path.is_symlink()]
        if self.run.student.exists() and not (root / _SEAL).exists():
            strange.append(self.run.student)
        if strange:
            raise OutputError(
                f"{strange[0]} is a folder, where a link to a step or a copy of the student belongs; an older "
                "version of gendistill, or a copy that followed links, leaves such folders",
                where=str(root),
                hint="move the run folder away, or give this run a folder of its own with name=...",
            )

    def _link(self, path: Path, target: Path) -> None:
        """Make a link, replacing an older one; relative, so that the folder of all runs can be moved."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # the run folder may itself be a link to elsewhere
        store = real_path(self.store.root.parent) / self.store.root.name
        wanted = os.path.relpath(store / target.relative_to(self.store.root), real_path(path.parent))
        if path.is_symlink() and os.readlink(path) == wanted:  # noqa: PTH115 - pathlib changes the spelling
            return
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(wanted)
        os.replace(partial, path)

    def _manifest(self) -> dict[str, Any]:
        if not self.run.manifest.is_file():
            return {}
        try:
            return read_json(self.run.manifest, shape=_Manifest)
        except OutputError:
            return {}  # everything in it is written anew

    def _written_recipe(self) -> str | None:
        try:
            return read_file(self.run.recipe).decode("utf-8")
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


def _copy(source: str, target: str) -> None:
    """Copy a file; file systems that can share the disk space of equal content do."""
    if hasattr(os, "copy_file_range"):
        try:
            with Path(source).open("rb") as old, Path(target).open("wb") as new:
                while os.copy_file_range(old.fileno(), new.fileno(), _PIECE):
                    pass
        except OSError:
            pass  # between these file systems it cannot
        else:
            return
    shutil.copyfile(source, target)


def _described(owner: Path) -> str:
    try:
        content = json.loads(read_file(owner))
        return f" (process {content['pid']} on {content['host']})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""
