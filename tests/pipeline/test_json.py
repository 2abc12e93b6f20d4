"""JSON from disk is checked before it is believed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gendistill.errors import CheckpointError, GendistillError, OutputError
from gendistill.models.card import front_matter
from gendistill.paths import parse_json, read_file, read_json, write_json
from gendistill.records import read_metrics_file, read_rows

HINT = "delete it"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut off"),
        pytest.param(b"\xff\xfe", id="no utf-8"),
        pytest.param(b"[NaN]", id="nan"),
        pytest.param(b"[-Infinity]", id="infinity"),
        pytest.param(b"[1e999]", id="beyond float"),
        pytest.param(b"[" + b"9" * 5000 + b"]", id="beyond int"),
        pytest.param(b"[" * 100_000 + b"]" * 100_000, id="nested deep"),
    ],
)
def test_what_is_no_json_is_an_error_with_place_and_next_step(text, tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(text)
    with pytest.raises(CheckpointError, match="this is not JSON") as caught:
        read_json(path, error=CheckpointError, hint=HINT)
    assert caught.value.where == str(path)
    assert caught.value.hint == HINT


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null", '{"step": "three"}', '{"step": true}'])
def test_another_shape_is_an_error(content):
    with pytest.raises(OutputError, match="something else"):
        parse_json(content, shape=dict[str, int], where="here", hint=HINT)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        read_json(tmp_path / "none.json", hint=HINT)


def test_good_content_is_returned_as_it_is():
    assert parse_json('{"a": [1, 2.5, null, "x"]}', shape=dict[str, Any], where="here", hint=HINT) == {
        "a": [1, 2.5, None, "x"]
    }


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\\\ud800", "é→😀", "\x1b\0\u2028"])
def test_every_text_comes_back_as_it_was_written(tmp_path, text):
    write_json(tmp_path / "file.json", {text: [text]})
    assert read_json(tmp_path / "file.json") == {text: [text]}


@pytest.fixture(params=["pipe", "device", "link to a device"])
def endless(request, tmp_path) -> Path:
    """A path that can be opened, and never read to its end."""
    if request.param == "device":
        return Path("/dev/zero")
    path = tmp_path / "file"
    os.mkfifo(path) if request.param == "pipe" else path.symlink_to("/dev/zero")
    return path


def test_what_has_no_end_is_not_read(endless):
    with pytest.raises(OSError, match="not a regular file"):
        read_file(endless)
    with pytest.raises(OutputError, match="not a regular file"):
        read_json(endless)
    with pytest.raises(GendistillError, match="not a regular file"):
        read_rows(endless, Any, error=OutputError, hint=HINT)
    with pytest.raises(GendistillError, match="not a regular file"):
        read_metrics_file(endless, error=OutputError)
    assert front_matter(endless) == {}
