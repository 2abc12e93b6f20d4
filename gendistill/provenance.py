"""Which code, package versions and day a result comes from. Imports no torch."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = (
    "gendistill",
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "datasets",
    "triton",
    "bitsandbytes",
)


def installed_versions() -> dict[str, str]:
    """List the versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_commit() -> str | None:
    """Name git's commit of this code, ending in ``-dirty`` if tracked files differ; None outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def today() -> str:
    """Today, as YYYY-MM-DD."""
    return datetime.date.today().isoformat()
