"""The layout that keeps ./kernels, ./evals and ./recipes from shadowing installed packages, and the built wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE_ROOTS = ("kernels", "evals", "recipes", "tests")
DATA = (".md", ".yaml", ".jsonl", ".j2", ".css", ".json", ".txt", ".html", ".typed")


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Run Python with ``cwd`` on its path, as it is for anyone who has not set PYTHONSAFEPATH."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    if overlay := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), overlay]))
    command = [sys.executable, *arguments]
    result = subprocess.run(
        command, cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("folder", SOURCE_ROOTS)
def test_source_roots_are_no_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists()


def test_test_folders_are_no_packages():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


@pytest.mark.parametrize("folder", ["kernels", "evals"])
def test_source_roots_hold_no_name_of_another_package(folder):
    stems = {path.stem for path in (ROOT / folder).iterdir()}
    assert stems.isdisjoint({"triton", "torch", "types", "kernels"})


def test_transformers_works_from_the_top_of_the_repository():
    python("-c", "from transformers import AutoModelForCausalLM", cwd=ROOT)


def test_installed_kernels_package_beats_the_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("real = True\n")
    found = python("-c", "import kernels; print(kernels.__file__)", cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert Path(found) == tmp_path / "kernels" / "__init__.py"


def test_declared_packages_are_those_on_disk():
    setuptools = project()["tool"]["setuptools"]
    roots = {ROOT: "gendistill", ROOT / "kernels": "gendistill_kernels", ROOT / "evals": "gendistill_evals"}
    found = {
        ".".join(path.parent.relative_to(base).parts)
        for base, package in roots.items()
        for path in (base / package).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) - {"gendistill.recipes"} == found
    assert setuptools["package-dir"]["gendistill.recipes"] == "recipes"


def data_files() -> set[str]:
    """Name every data file under its place in the wheel."""
    roots = {
        "gendistill": "gendistill",
        "evals/gendistill_evals": "gendistill_evals",
        "recipes": "gendistill/recipes",
    }
    return {
        f"{target}/{path.relative_to(ROOT / source).as_posix()}"
        for source, target in roots.items()
        for path in (ROOT / source).rglob("*")
        if path.suffix in DATA and "__pycache__" not in path.parts
    }


def test_wheel_holds_three_packages_their_data_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("gendistill", "kernels", "evals", "recipes"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "site")
    assert {name.split("/")[0] for name in names} == {"gendistill", "gendistill_kernels", "gendistill_evals"}
    assert {name for name in names if not name.endswith(".py")} == data_files()
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import gendistill, sys; from gendistill.cli.main import main; print(gendistill.__file__); "
        "sys.exit(main(['recipe', 'check', 'qwen3-0.6b-kda']))"
    )
    output = python("-c", code, cwd=empty, PYTHONPATH=str(tmp_path / "site"))
    assert output.startswith(str(tmp_path / "site"))
    assert "ok        qwen3-0.6b-kda" in output


def test_constraints_never_name_triton_and_agree_with_the_project():
    from packaging.requirements import Requirement

    pins = {}
    for name in ("constraints.txt", "constraints-5.17.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
        pins[name] = {Requirement(line).name.lower(): Requirement(line).specifier for line in lines}
        assert "triton" not in pins[name]
    wanted = project()["project"]
    requirements = [*wanted["dependencies"], *wanted["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, requirements):
        for pinned in pins.values():
            for pin in pinned.get(requirement.name.lower(), ()):
                assert requirement.specifier.contains(pin.version), f"{requirement} excludes {pin}"


def test_version_is_stated_once():
    import gendistill

    assert gendistill.__version__ == project()["project"]["version"]
