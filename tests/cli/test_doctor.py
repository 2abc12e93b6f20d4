"""The doctor: every row that is not a pass ends with what fixes it, and broken set-ups are recognised."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from gendistill.cli import doctor
from gendistill.cli.doctor import Finding, Status
from gendistill.errors import OutputError


def pretend(monkeypatch, versions):
    real = metadata.version

    def version(package):
        if package in versions:
            if versions[package] is None:
                raise metadata.PackageNotFoundError(package)
            return versions[package]
        return real(package)

    monkeypatch.setattr(metadata, "version", version)


def test_every_row_that_does_not_pass_says_how_to_fix_it(cli_json, workspace):
    rows = cli_json("doctor")
    assert len(rows) == len(doctor.CHECKS)
    assert all(row["fix"] for row in rows if row["status"] != "pass")
    assert {row["name"]: row["status"] for row in rows}["kda op"] == "pass"


def test_a_failed_check_fails_the_command(cli, monkeypatch):
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Finding("x", Status.FAIL, "broken", "mend it"),))
    code, out, _ = cli("doctor")
    assert code == 1
    assert "fix: mend it" in out
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Finding("x", Status.WARN, "odd", "look"),))
    assert cli("doctor")[0] == 0


@pytest.mark.parametrize(
    ("version", "status"),
    [
        (None, "fail"),
        ("5.16.3", "fail"),
        ("5.17.0", "pass"),
        ("5.23.4", "pass"),
        ("5.24.0", "warn"),
        ("6.0", "fail"),
    ],
)
def test_transformers_window(monkeypatch, version, status):
    pretend(monkeypatch, {"transformers": version})
    assert doctor.check_transformers().status == status


@pytest.mark.parametrize(("version", "status"), [(None, "pass"), ("0.1.0", "fail"), ("99.0", "fail")])
def test_kernels_package_window(monkeypatch, version, status):
    pretend(monkeypatch, {"kernels": version})
    assert doctor.check_kernels_package().status == status


def test_kernels_version_that_transformers_asks_for_passes(monkeypatch):
    from packaging.requirements import Requirement
    from transformers.dependency_versions_table import deps

    floor = next(one.version for one in Requirement(deps["kernels"]).specifier if one.operator == ">=")
    pretend(monkeypatch, {"kernels": floor})
    assert doctor.check_kernels_package().status == "pass"


def test_folder_called_kernels_is_noticed(monkeypatch, tmp_path):
    rest = [entry for entry in sys.path if not (Path(entry) / "kernels").is_dir()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *rest])
    monkeypatch.delitem(
        sys.modules, "kernels", raising=False
    )  # where this suite runs, the folder may be imported
    assert doctor.check_kernels_folder().status == "pass"
    (tmp_path / "kernels").mkdir()
    sys.path_importer_cache.pop(str(tmp_path), None)
    assert doctor.check_kernels_folder().status == "warn"
    (tmp_path / "kernels" / "__init__.py").touch()
    assert doctor.check_kernels_folder().status == "fail"


def test_gradient_accumulation_from_the_environment_is_refused(monkeypatch):
    name = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    monkeypatch.setenv(name, "4")
    assert doctor.check_accelerate().fix == f"unset {name}"
    monkeypatch.setenv(name, "1")
    assert doctor.check_accelerate().status == "pass"


def test_cache_folder_that_cannot_be_written_fails(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "file" / "cache"))
    assert doctor.check_cache().status == "fail"


def test_wrong_maths_fails(monkeypatch):
    import gendistill.ops as ops

    def wrong(*arguments, **named):
        result = ops.recurrent_delta_rule(*arguments, **named)
        return type(result)(result.out * 1.01, result.state)

    monkeypatch.setattr(ops, "chunk_delta_rule", wrong)
    assert doctor.check_ops().status == "fail"


@pytest.mark.parametrize(
    "error",
    [
        ImportError("no libtorch"),
        OSError(5, "Input/output error"),
        RuntimeError("CUDA driver"),
        ValueError("invalid literal for int(): 'abc'"),
        AttributeError("no attribute"),
        KeyError("key"),
        OutputError("no folder", hint="make one"),
    ],
)
def test_a_check_that_breaks_has_failed_and_the_others_go_on(cli, monkeypatch, error):
    def check_broken():
        raise error

    monkeypatch.setattr(doctor, "CHECKS", (check_broken, lambda: Finding("y", Status.PASS, "fine")))
    code, out, err = cli("doctor")
    assert (code, err) == (1, "")
    assert f"fail  broken          {type(error).__name__}: " in out
    assert "fix: " in out
    assert "pass  y" in out


def test_a_check_that_does_not_end_has_failed(cli, monkeypatch):
    import threading

    released = threading.Event()

    def check_hanging():
        released.wait(60)
        return Finding("late", Status.PASS, "late")

    monkeypatch.setattr(doctor, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(doctor, "CHECKS", (check_hanging,))
    code, out, _ = cli("doctor")
    released.set()
    assert code == 1
    assert "fail  hanging         no answer within 0 s" in out


@pytest.mark.parametrize("value", ["~nobody-of-this-name/x", "{file}", "{file}/x", "x" * 300, "\x1b[31m"])
def test_odd_cache_folders_are_named(monkeypatch, cli, tmp_path, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("GENDISTILL_CACHE", value.format(file=tmp_path / "file"))
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_disk, doctor.check_cache))
    code, out, err = cli("doctor")
    assert err == ""
    assert "\x1b" not in out
    assert code == (value != "\x1b[31m")
    assert ("fail  cache" in out) == (code == 1)


def test_a_cache_of_the_hub_that_cannot_be_written_fails(monkeypatch, tmp_path):
    from huggingface_hub import constants

    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    found = doctor.check_hub()
    assert (found.status, found.fix) == ("fail", "export HF_HOME=FOLDER")


def test_hostile_environments_are_reported_without_a_traceback(tmp_path):
    """One process with all of them: libraries read these when they are imported."""
    hostile = {
        "GENDISTILL_CACHE": "~nobody-of-this-name/x",
        "OMP_NUM_THREADS": "abc",
        "HF_HOME": "~nobody-of-this-name/\x1b[31m",
        "HF_HUB_ETAG_TIMEOUT": "abc",
        "TRANSFORMERS_VERBOSITY": "abc",
        "COLUMNS": "abc",
        "PYTHONIOENCODING": "ascii",
    }
    done = subprocess.run(
        [sys.executable, "-m", "gendistill", "doctor"],
        env={**os.environ, **hostile},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert "ValueError: invalid literal for int() with base 10: 'abc'" in done.stdout
    assert "kda op" in done.stdout
