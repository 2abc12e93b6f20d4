"""The doctor: every row that is not a pass ends with what fixes it, and broken set-ups are recognised."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from gendistill.cli import doctor
from gendistill.cli.doctor import Check, Status


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
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("x", Status.FAIL, "broken", "mend it"),))
    code, out, _ = cli("doctor")
    assert code == 1
    assert "fix: mend it" in out
    monkeypatch.setattr(doctor, "CHECKS", (lambda: Check("x", Status.WARN, "odd", "look"),))
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
