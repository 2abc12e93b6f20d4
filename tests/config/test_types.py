"""Placements from files and words, and counts for people."""

import json
import os

import pytest

from gendistill.anatomy.placement import Placement
from gendistill.errors import RecipeError
from gendistill.types import short_count

KINDS = ["kda", "full", "swa", "kda"]


@pytest.mark.parametrize(
    ("count", "words"),
    [
        *(
            (0, "0"),
            (1, "1"),
            (999, "999"),
            (1_000, "1k"),
            (1_234, "1.23k"),
            (9_999, "10k"),
            (999_499, "999k"),
        ),
        *((999_500, "1M"), (999_999, "1M"), (1_200_000, "1.2M"), (134_515_008, "135M"), (999_999_999, "1B")),
        *(
            (1_200_000_000, "1.2B"),
            (int(1.24e9), "1.24B"),
            (70 * 10**9, "70B"),
            (10**12, "1T"),
            (10**13, "10T"),
        ),
    ],
)
def test_counts_have_three_digits_and_are_never_nothing(count, words):
    assert short_count(count) == words


@pytest.mark.parametrize("content", [KINDS, {"kinds": KINDS}, {"kinds": KINDS, "note": "why"}])
def test_a_placement_is_read_from_a_file(tmp_path, monkeypatch, content):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "placement.json").write_text(json.dumps(content))
    for spec in (str(tmp_path / "placement.json"), "~/placement.json"):
        assert Placement.parse(spec, num_layers=4) == Placement(tuple(KINDS))


BROKEN = [
    *(
        b"",
        b"{",
        b"null",
        b"5",
        b'"kda"',
        b"[1, 2, 3, 4]",
        b"[[]]",
        b"{}",
        b'{"kinds": 5}',
        b'{"kinds": null}',
    ),
    *(
        b'{"kinds": "kda"}',
        b'{"kinds": [null]}',
        b'{"kinds": {"0": "kda"}}',
        b"NaN",
        b"[NaN]",
        b"\xff\xfe",
        b"\x80\x04",
    ),
    *(b"[" * 100_000 + b"]" * 100_000, b'{"kinds": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    *(b'["kda"]', b'["kda", "full", "swa", "nope"]'),
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_files_that_are_no_placement_are_refused(tmp_path, content):
    (tmp_path / "placement.json").write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        Placement.parse(str(tmp_path / "placement.json"), num_layers=4)
    assert caught.value.hint
    assert caught.value.where == "student.placement"


SPECS = [
    "a\0.json",
    "\ud800.json",
    "x" * 5_000 + ".json",
    "~nobody-of-this-name/p.json",
    "nothing.json",
    "",
    " ",
]
SPECS += [
    "full@\u00b2 kda",
    "full@" + "9" * 5_000 + " kda",
    "full@-1 kda",
    "full@ kda",
    "@1 kda",
    "full@0,0 kda",
    "kda@",
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: ascii(spec)[:20])
def test_words_that_are_no_placement_are_refused(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        Placement.parse(spec, num_layers=4)
    assert caught.value.where == "student.placement"
    str(caught.value).encode()


def test_a_placement_comes_from_a_file_only(tmp_path):
    folder, pipe, loop = (tmp_path / f"{name}.json" for name in ("folder", "pipe", "loop"))
    folder.mkdir()
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    for path in (folder, pipe, loop):
        with pytest.raises(RecipeError, match="cannot read a placement"):
            Placement.parse(str(path), num_layers=4)
