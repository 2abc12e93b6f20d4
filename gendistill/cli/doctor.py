"""``gendistill doctor``: what on this machine will work, what will not, and the command that fixes it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path

from gendistill.cli.arguments import add_json, print_json
from gendistill.errors import GendistillError
from gendistill.paths import cache_dir
from gendistill.text import printable

_MIN_FREE_GB, _WARN_FREE_GB = 2.0, 10.0
_MIN_TORCH, _MIN_TRANSFORMERS = "2.11", "5.17"
_TESTED_TRANSFORMERS = "5.23"
# imports of torch and transformers from a slow disk included
_PATIENCE_SECONDS = 120.0
# what libraries raise on import or first use when installation or environment are broken
_CANNOT_CHECK = (
    *(GendistillError, ImportError, OSError, RuntimeError, ValueError, LookupError, TypeError),
    *(AttributeError, ArithmeticError, AssertionError, MemoryError, SyntaxError),
)


class Status(StrEnum):
    """How a check ended."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found: a row of the table.

    Attributes:
        name: What was checked.
        status: How it ended.
        detail: What was found.
        fix: The command or edit that helps; None when the check passed.
    """

    name: str
    status: Status
    detail: str
    fix: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run every check; fail if one of them failed."""
    checks = [_bounded(check) for check in CHECKS]
    if arguments.json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            print(f"{check.status:6}{check.name:16}{printable(check.detail, longest=1000)}")
            if check.fix:
                print(f"{'':22}fix: {check.fix}")
    return 1 if any(check.status is Status.FAIL for check in checks) else 0


def _bounded(check: Callable[[], Finding]) -> Finding:
    """Run one check; one that cannot be done, or does not end, has failed."""
    name = check.__name__.removeprefix("check_").replace("_", " ")
    done: list[Finding] = []

    def work() -> None:
        try:
            done.append(check())
        except _CANNOT_CHECK as error:
            message = error.message if isinstance(error, GendistillError) else str(error)
            hint = (
                getattr(error, "hint", None) or "correct or unset the environment variable that this is about"
            )
            done.append(Finding(name, Status.FAIL, f"{type(error).__name__}: {message}", hint))

    # a thread, because drivers and network disks can hang where no signal reaches; it may be left behind at exit
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_PATIENCE_SECONDS)
    if not done:
        detail = f"no answer within {_PATIENCE_SECONDS:.0f} s"
        return Finding(
            name, Status.FAIL, detail, "look at drivers, network disks and the load of this machine"
        )
    return done[0]


def check_python() -> Finding:
    """Python is new enough."""
    version = platform.python_version()
    if sys.version_info < (3, 11):  # noqa: UP036 - a forced install gets this far
        return Finding("python", Status.FAIL, version, "install Python 3.11 or newer")
    return Finding("python", Status.PASS, version)


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _at_least(version: str, floor: str) -> bool:
    from packaging.version import Version

    return Version(version).release >= Version(floor).release


def check_torch() -> Finding:
    """Torch is new enough."""
    version = _installed("torch")
    fix = f'pip install "torch>={_MIN_TORCH}"'
    if version is None:
        return Finding("torch", Status.FAIL, "not installed", fix)
    if not _at_least(version, _MIN_TORCH):
        return Finding("torch", Status.FAIL, f"{version}, older than {_MIN_TORCH}", fix)
    return Finding("torch", Status.PASS, version)


def check_device() -> Finding:
    """A GPU that torch can use, or a CPU build on a machine without one."""
    import torch

    if torch.cuda.is_available():
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory / 1e9
        return Finding("device", Status.PASS, f"{torch.cuda.device_count()} x {name}, {memory:.0f} GB")
    if shutil.which("nvidia-smi"):
        detail = f"an NVIDIA driver is installed, but torch {torch.__version__} cannot use the GPU"
        return Finding(
            "device", Status.FAIL, detail, "install a CUDA build of torch: https://pytorch.org/get-started"
        )
    flags = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return Finding(
        "device", Status.PASS, f"CPU, {threads} threads, {flags} (small models and short runs only)"
    )


def check_transformers() -> Finding:
    """Transformers is inside the tested window."""
    version = _installed("transformers")
    fix = f'pip install "transformers>={_MIN_TRANSFORMERS},<6"'
    if version is None or not _at_least(version, _MIN_TRANSFORMERS) or _at_least(version, "6"):
        return Finding("transformers", Status.FAIL, version or "not installed", fix)
    if _at_least(version, f"5.{int(_TESTED_TRANSFORMERS.split('.')[1]) + 1}"):
        detail = f"{version} is newer than {_TESTED_TRANSFORMERS}, the newest that was tested"
        return Finding(
            "transformers", Status.WARN, detail, f'pip install "transformers=={_TESTED_TRANSFORMERS}.*"'
        )
    return Finding(
        "transformers", Status.PASS, f"{version} (tested: {_MIN_TRANSFORMERS} to {_TESTED_TRANSFORMERS})"
    )


def check_kernels_package() -> Finding:
    """The optional Hugging Face ``kernels`` package is one that transformers accepts."""
    version = _installed("kernels")
    if version is None:
        return Finding(
            "kernels", Status.PASS, "the Hugging Face kernels package is not installed; not needed"
        )
    from packaging.requirements import Requirement
    from transformers.dependency_versions_table import deps

    wanted = Requirement(deps.get("kernels", "kernels"))
    if not wanted.specifier.contains(version, prereleases=True):
        detail = (
            f"{version} makes transformers {_installed('transformers')} fail, which needs {wanted.specifier}"
        )
        return Finding("kernels", Status.FAIL, detail, f'pip install "{wanted}", or pip uninstall kernels')
    return Finding("kernels", Status.PASS, f"{version}, inside {wanted.specifier}")


def check_kernels_folder() -> Finding:
    """No folder called ``kernels`` takes the name of the Hugging Face package."""
    folders = [Path(entry or os.curdir) / "kernels" for entry in sys.path]
    packages = [
        folder for folder in folders if (folder / "__init__.py").is_file() and not _is_distribution(folder)
    ]
    if packages:
        detail = f"{packages[0]} is imported as the Hugging Face kernels package"
        return Finding(
            "kernels folder", Status.FAIL, detail, "run from another folder, or export PYTHONSAFEPATH=1"
        )
    spec = importlib.util.find_spec("kernels")
    if spec is not None and spec.origin is None:
        place = next(iter(spec.submodule_search_locations or ()), "a folder")
        detail = f"{place} is visible as an empty package; the supported transformers know this case"
        return Finding(
            "kernels folder", Status.WARN, detail, "run from another folder, or export PYTHONSAFEPATH=1"
        )
    return Finding("kernels folder", Status.PASS, "no folder shadows it")


def _is_distribution(folder: Path) -> bool:
    """Whether a folder was installed by the distribution that owns the name."""
    return _installed("kernels") is not None and any(folder.parent.glob("kernels-*.dist-info"))


def check_ops() -> Finding:
    """The chunked delta rule agrees with the token-by-token definition, on the device that would be used."""
    import torch

    from gendistill.ops import chunk_delta_rule, l2norm, recurrent_delta_rule

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    batch, tokens, heads, channels = 2, 100, 3, 16

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    q, k = (l2norm(draw(batch, tokens, heads, channels)) for _ in range(2))
    v = draw(batch, tokens, heads, channels)
    decay, beta = -draw(batch, tokens, heads, channels).abs(), draw(batch, tokens, heads).sigmoid()
    chunked, exact = (rule(q, k, v, decay, beta) for rule in (chunk_delta_rule, recurrent_delta_rule))
    error = float((chunked.out - exact.out).norm() / exact.out.norm())
    detail = f"chunked against token by token on {device}: relative error {error:.1e}"
    if not error < 1e-4:
        return Finding("kda op", Status.FAIL, detail, "reinstall torch; if it stays, report this line")
    return Finding("kda op", Status.PASS, detail)


def check_launches() -> Finding:
    """Kernels are launched with little work on the host, or it says why not."""
    version = _installed("triton")
    if version is None:
        return Finding("launches", Status.PASS, "triton is not installed; every op runs on its reference")
    from gendistill_kernels.runtime.launch import SWITCH, why_plain

    reason = why_plain()
    if reason is None:
        return Finding("launches", Status.PASS, f"triton {version}; kernels take the fast launcher")
    detail = f"kernels are launched by Triton itself, 20 to 50 microseconds each: {reason}"
    fix = f"unset {SWITCH}" if SWITCH in reason else 'pip install "triton==3.6.*"'
    return Finding("launches", Status.WARN, detail, fix)


def check_disk() -> Finding:
    """There is room for checkpoints here and for teachers in the cache folder."""
    places = {Path.cwd(): "here", _existing(cache_dir()): "in the cache folder"}
    free = {words: shutil.disk_usage(place).free / 1e9 for place, words in places.items()}
    detail = ", ".join(f"{gigabytes:.0f} GB free {words}" for words, gigabytes in free.items())
    if min(free.values()) < _WARN_FREE_GB:
        status = Status.FAIL if min(free.values()) < _MIN_FREE_GB else Status.WARN
        return Finding(
            "disk", status, detail, "free space; or output=FOLDER, and export GENDISTILL_CACHE=FOLDER"
        )
    return Finding("disk", Status.PASS, detail)


def _existing(path: Path) -> Path:
    return path if os.path.exists(path) else _existing(path.parent)  # noqa: PTH110 - raises nothing


def check_cache() -> Finding:
    """The cache folder can be written."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return Finding("cache", Status.FAIL, f"{folder}: {error.strerror}", "export GENDISTILL_CACHE=FOLDER")
    return Finding("cache", Status.PASS, str(folder))


def check_hub() -> Finding:
    """Hub downloads are allowed and have a place."""
    from huggingface_hub import constants

    place = _existing(Path(constants.HF_HUB_CACHE))
    if not place.is_dir() or not os.access(place, os.W_OK):
        detail = f"the cache {constants.HF_HUB_CACHE} cannot be written: {place} is in the way"
        return Finding("hub", Status.FAIL, detail, "export HF_HOME=FOLDER")
    if constants.HF_HUB_OFFLINE:
        detail = f"offline: only what is in {constants.HF_HUB_CACHE} can be loaded by hub id"
        return Finding("hub", Status.WARN, detail, "unset HF_HUB_OFFLINE, if downloads are wanted")
    return Finding(
        "hub", Status.PASS, f"downloads are allowed (not tried here); cache {constants.HF_HUB_CACHE}"
    )


def check_accelerate() -> Finding:
    """No environment variable rescales the gradients."""
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    value = os.environ.get(name)
    if value not in (None, "1"):
        return Finding(
            "accelerate", Status.FAIL, f"{name}={value} would divide every gradient", f"unset {name}"
        )
    version = _installed("accelerate")
    if version is None:
        return Finding("accelerate", Status.FAIL, "not installed", "pip install accelerate")
    return Finding("accelerate", Status.PASS, version)


CHECKS: tuple[Callable[[], Finding], ...] = (
    check_python,
    check_torch,
    check_device,
    check_transformers,
    check_kernels_package,
    check_kernels_folder,
    check_accelerate,
    check_ops,
    check_launches,
    check_disk,
    check_cache,
    check_hub,
)
