"""Find the local files that a source under `data:` names, in the order of their rows."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from gendistill.config.schema import SourceConfig
from gendistill.data.packages import package_file
from gendistill.errors import DataError
from gendistill.packages import PREFIX
from gendistill.paths import read_json

JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text")
TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
# what a run writes changes with every run of a recipe that reads the folder around it
_RUN_FOLDER = {"manifest.json", "recipe.yaml"}
KNOWN_SUFFIXES = (*JSON_SUFFIXES, *TABLE_DELIMITERS, *TEXT_SUFFIXES, ".parquet")


@dataclass(frozen=True, slots=True)
class Located:
    """The files of a local source.

    Attributes:
        files: In the order of their rows.
        saved: The folder that the datasets library wrote them to, if it did.
    """

    files: tuple[Path, ...]
    saved: Path | None = None


def row_suffix(path: Path) -> str:
    """Name the kind of a file by its suffix, looking through ``.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def reading(path: Path | str, *, where: str) -> Iterator[None]:
    """Turn a file that cannot be read into an error that names it."""
    try:
        yield
    except OSError as error:
        reason = "it does not exist" if error.errno == errno.ENOENT else error.strerror or str(error)
        raise DataError(
            f"cannot read {error.filename or path}: {reason}",
            where=f"{where}.path",
            hint=f"check that it is there and that you may read it, or correct {where}.path",
        ) from error


def locate(config: SourceConfig, *, where: str) -> Located | None:
    """Find the files of a source.

    Args:
        config: Names a file, folder, glob or file in a package.
        where: Recipe path, for errors.
    Returns: The files; None for a dataset of the hub.
    Raises:
        DataError: Nothing there, not readable, or of an unknown kind.
    """
    if config.path.startswith(PREFIX):
        _refuse_hub_settings(config, where=where, revision_too=False)
        return _known_kinds(
            [package_file(config.path, version=config.revision, where=where)], config, where=where
        )
    path = _expanded(config.path, where=where)
    with reading(path, where=where):
        if path.is_dir():
            return _in_folder(path, config, where=where)
        if path.exists():
            _refuse_hub_settings(config, where=where)
            return _known_kinds([path], config, where=where)
        if glob.has_magic(config.path):
            _refuse_hub_settings(config, where=where)
            return _known_kinds(_matching(path, config, where=where), config, where=where)
        if (
            config.path.startswith((".", "/", "~"))
            or config.path.count("/") > 1
            or row_suffix(path) in KNOWN_SUFFIXES
        ):
            raise _no_such_file(path, where=where)
    return None


def _expanded(text: str, *, where: str) -> Path:
    place = f"{where}.path"
    if not text.strip():
        raise DataError(
            "the path is empty", where=place, hint="name a file, a folder, a glob or a hub dataset"
        )
    if "\0" in text:
        raise DataError(
            f"{text!r} holds a NUL character, which no path can", where=place, hint=f"correct {place}"
        )
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(
            f'cannot tell the home folder in "{text}": {error}', where=place, hint="write the whole path"
        ) from error


def _refuse_hub_settings(config: SourceConfig, *, where: str, revision_too: bool = True) -> None:
    given = {"subset": config.subset, "split": None if config.split == "train" else config.split}
    if revision_too:
        given["revision"] = config.revision
    for key, value in given.items():
        if value is not None:
            raise DataError(
                f'{key} "{value}" means nothing for files on disk',
                where=f"{where}.{key}",
                hint=f"remove {key}, and name the files that you want in {where}.path",
            )


def _no_such_file(path: Path, *, where: str) -> DataError:
    parent = path.parent
    if not parent.is_dir():
        return DataError(
            f"there is no file {path}: the folder {parent} does not exist",
            where=f"{where}.path",
            hint=f"correct {where}.path",
        )
    close = get_close_matches(path.name, [sibling.name for sibling in parent.iterdir()], n=1)
    return DataError(
        f"there is no file {path}",
        where=f"{where}.path",
        hint=f"did you mean {parent / close[0]}?" if close else f"look into {parent.resolve()}",
    )


def _matching(pattern: Path, config: SourceConfig, *, where: str) -> list[Path]:
    found = [Path(each) for each in glob.glob(str(pattern), recursive=True)]  # noqa: PTH207
    files = sorted(each for each in found if not each.is_dir())
    if files:
        return files
    if found:
        raise DataError(
            f"{config.path} matches folders only, such as {found[0]}",
            where=f"{where}.path",
            hint=f"name the files in them, as in {config.path}/*.jsonl, or one folder",
        )
    raise DataError(f"no file matches {config.path}", where=where, hint=f"correct {where}.path")


def _in_folder(path: Path, config: SourceConfig, *, where: str) -> Located:
    if (path / "dataset_dict.json").is_file():
        shape, hint = dict[str, object], "save the dataset again"
        saved = read_json(path / "dataset_dict.json", shape=shape, error=DataError, hint=hint)
        splits = [str(split) for split in saved["splits"]] if isinstance(saved.get("splits"), list) else []
        if config.split not in splits:
            raise DataError(
                f'{path} has no split "{config.split}"; it has: {", ".join(splits) or "none"}',
                where=where,
                hint=f"set {where}.split to one of them",
            )
        path = path / config.split
    if (path / "state.json").is_file():
        return Located(tuple(sorted(path.glob("*.arrow"))), saved=path)
    _refuse_hub_settings(config, where=where)
    files = []
    for folder, folders, names in os.walk(path, onerror=_raise):
        if Path(folder) != path and set(names) >= _RUN_FOLDER:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        visible = [Path(folder, name) for name in names if not name.startswith(".")]
        files += [file for file in visible if row_suffix(file) in KNOWN_SUFFIXES]
    if not files:
        raise DataError(
            f"the folder {path} holds no {', '.join(KNOWN_SUFFIXES)} file",
            where=where,
            hint=f"correct {where}.path",
        )
    return _known_kinds(sorted(files), config, where=where)


def _raise(error: OSError) -> None:
    raise error


def _known_kinds(files: list[Path], config: SourceConfig, *, where: str) -> Located:
    """Refuse what cannot be read as rows, before anything waits for it."""
    place = f"{where}.path"
    for file in files:
        if row_suffix(file) not in KNOWN_SUFFIXES:
            raise DataError(
                f"cannot read {file.name}: known kinds are {', '.join(KNOWN_SUFFIXES)}, all but parquet also as .gz",
                where=place,
                hint="convert the file to JSON lines, or name only files of these kinds",
            )
        if not stat.S_ISREG(file.stat().st_mode):
            raise DataError(
                f"{file} is not a regular file, and rows are read by their place in one",
                where=place,
                hint="write the rows to a file",
            )
    kinds = {row_suffix(file) == ".parquet" for file in files}
    if len(kinds) > 1:
        raise DataError(
            f"{config.path} mixes parquet with other files",
            where=where,
            hint="name one kind, as in data/*.parquet",
        )
    if True in kinds and any(file.suffix.lower() == ".gz" for file in files):
        raise DataError(
            f"{config.path} names a parquet file inside .gz",
            where=place,
            hint="unpack it with gunzip: parquet is compressed in itself",
        )
    return Located(tuple(files))
