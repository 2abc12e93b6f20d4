"""Results name the code they come from."""

import re
import shutil
import subprocess

import pytest

from gendistill import provenance
from gendistill.provenance import source_commit


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_a_checkout_knows_its_commit_and_whether_files_differ(monkeypatch, tmp_path):
    source = tmp_path / "gendistill" / "provenance.py"
    source.parent.mkdir()
    source.write_text("one")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(source))
    commit = source_commit() or ""
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    source.write_text("two")
    assert source_commit() == f"{commit}-dirty"


def test_an_installed_package_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "gendistill" / "provenance.py"))
    assert source_commit() is None
