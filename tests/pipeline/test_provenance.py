"""Results name the code they come from."""

import re

from gendistill import provenance
from gendistill.provenance import source_commit


def test_a_checkout_knows_its_commit_and_an_installed_package_has_none(monkeypatch, tmp_path):
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", source_commit() or "")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "gendistill" / "provenance.py"))
    assert source_commit() is None
