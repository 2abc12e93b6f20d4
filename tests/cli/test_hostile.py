"""Arguments and recipes that try to break the command line: nothing crashes, nothing is called a bug."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest

import gendistill.runs.pipeline as pipeline
from gendistill.cli.arguments import with_dashes
from gendistill.config.load import recipe_file
from gendistill.text import printable_lines


def said(code, out, err, *, codes=(1, 2)):
    assert code in codes, out + err
    assert "Traceback" not in err
    assert "internal error" not in err
    assert "next:" in err or "allowed" in err, err
    assert printable_lines(err) == err


ODD = [
    "\0",
    "a\0b",
    "\udcff",
    "\x1b[31m",
    "x" * 5000,
    "~nobody-has-this-name",
    "[red]x[/red]",
    "",
    " ",
    "é" * 300,
]


@pytest.mark.parametrize("word", ODD)
@pytest.mark.parametrize(
    "words",
    [
        ("run", "WORD", "--dry-run"),
        ("run", "tiny", "--dry-run", "output=WORD/\x01"),
        ("run", "tiny", "--dry-run", "teacher.model=./WORD"),
        ("run", "tiny", "WORD"),
        ("run", "tiny", "--WORD"),
        ("distill", "tiny", "--only", "WORD/"),
        ("recipe", "show", "WORD"),
        ("recipe", "check", "WORD"),
        ("recipe", "diff", "tiny", "WORD"),
        ("recipe", "cp", "WORD", "new.yaml"),
        ("recipe", "schema", "--at", "x.WORD"),
        ("report", "WORD/x"),
        ("WORD",),
        ("recipe", "WORD"),
        ("doctor", "WORD"),
    ],
)
def test_odd_words_are_refused_in_words(cli, workspace, words, word):
    given = [part.replace("WORD", word) for part in words]
    if given[0].strip() == "" or "--" in given:
        pytest.skip("a command without a word")
    said(*cli(*given))
    assert list(workspace.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["--debug"], ["--", "--debug"], ["run", "--debug", "--help"], ["-x"], ["--=3"]]
)
def test_flags_alone_do_not_crash(cli, words):
    code, _, err = cli(*words)
    assert code in (0, 2)
    assert "Traceback" not in err


@pytest.mark.parametrize("word", ["--", "---", "--_", "--=", "--a_b=c_d", "-_", "", "--__x", "=", "--é_x"])
def test_dashes_are_the_only_change_to_odd_words(word):
    (changed,) = with_dashes([word])
    assert len(changed) == len(word)
    assert changed.partition("=")[2] == word.partition("=")[2]


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("ascii", ("run", "tiny", "--dry-run")),
        ("ascii", ("recipe", "show", "tiny", "output=é→")),
        ("ascii", ("recipe", "show", "tiny", "output=é→", "--json")),
        ("latin-1", ("recipe", "show", "tiny", "output=é→", "--json")),
        ("utf-8", ("recipe", "show", "tiny", "output=é→", "--json")),
        ("ascii", ("recipe", "check", "é→.yaml")),
    ],
)
def test_terminals_of_few_characters_get_escapes(workspace, encoding, words):
    command = [sys.executable, "-m", "gendistill", *words]
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True)
    assert done.returncode == (2 if words[1] == "check" else 0), done.stderr
    assert b"Traceback" not in done.stderr
    if "--json" in words:
        assert json.loads(done.stdout.decode(encoding))["output"].endswith("é→")


def test_a_recipe_whose_name_is_not_text_still_runs(workspace):
    """The command goes into the manifest, which is UTF-8."""
    (workspace / os.fsdecode(b"\xff.yaml")).write_text(recipe_file("tiny").read_text())
    command = [sys.executable, "-m", "gendistill", "convert", b"\xff.yaml", "name=odd"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "udcff" in json.loads((workspace / "runs" / "odd" / "manifest.json").read_text())["command"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("CUDA out of memory. Tried to allocate 3 GiB\nmore"),
            ["memory error", "micro_batch_size"],
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            ["memory error", "next:"],
        ),
        (MemoryError(), ["memory error", "MemoryError"]),
        (
            OSError(errno.EMFILE, "Too many open files"),
            ["system error", "Too many open files (EMFILE)", "next:"],
        ),
        (OSError(errno.EIO, "Input/output error", b"\xff.bin"), ["EIO", ".bin", "next:"]),
        (OSError("only words"), ["only words", "next:"]),
        (OSError(), ["OSError", "next:"]),
        (RecursionError("maximum recursion depth exceeded"), ["nested too deeply", "next:"]),
        (ValueError("\x1b[31m\udcff"), ["internal error", "\\x1b[31m\\udcff"]),
    ],
)
def test_an_error_that_nobody_foresaw_is_put_into_words(cli, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    code, _, err = cli("run", "tiny")
    assert code == 1
    assert all(word in err for word in words), err
    assert "Traceback" not in err


@pytest.mark.parametrize("text", ["[red]x[/red]", "[/]", "[bold", "x[0]", "\\[x]"])
def test_brackets_in_a_path_are_printed_as_they_are(cli, workspace, text):
    code, out, err = cli("run", "tiny", f"output='{text}'", "--dry-run")
    assert code == 0, err
    assert f"output goes to {text}/tiny" in out
    folder = workspace / text
    folder.mkdir(parents=True)
    code, _, err = cli("run", "tiny", f"teacher.model='./{text}'", "--dry-run")
    said(code, "", err)
    assert text in err
    code, out, _ = cli("recipe", "show", "tiny", f"output='{text}'")
    assert text in out
