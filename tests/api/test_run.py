"""A run folder as a value."""

from __future__ import annotations

import json

import pytest

import gendistill as gd
from gendistill.errors import ReportError


def test_a_folder_without_a_report_of_this_version_says_what_to_do(tmp_path):
    with pytest.raises(ReportError, match="next: write it again with gendistill report"):
        gd.Run(tmp_path).gap()
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "gap.json").write_text(json.dumps({"schema": 1, "name": "old", "tasks": []}))
    with pytest.raises(ReportError, match=r"gap\.json has schema 1, this version reads 4"):
        gd.Run(tmp_path).gap()
