"""The tutorial works from top to bottom: its Python, the files that it shows, and its commands, in their order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import gendistill as gd
from gendistill.cli.main import main

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
# a block of JSON or YAML is a file if the line before it ends with its name
_BLOCK = re.compile(r"(?:`([\w.-]+)`:\n\n)?^```(python|bash|json|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> list[tuple[int, str, str, str]]:
    text = PAGE.read_text(encoding="utf-8")
    return [
        (text[: match.start(3)].count("\n"), match[1], match[2], match[3]) for match in _BLOCK.finditer(text)
    ]


def commands(code: str) -> list[list[str]]:
    """Split the gendistill commands of a block into words, without what is for another machine."""
    lines = [shlex.split(line, comments=True) for line in code.splitlines()]
    return [words[1:] for words in lines if words[:1] == ["gendistill"] and words[1:] != ["doctor"]]


def test_the_tutorial_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    namespace: dict = {}
    for line, name, language, code in blocks():
        if language == "python":
            # empty lines before the code, so that a traceback shows the line of the page
            exec(compile("\n" * line + code, str(PAGE), "exec"), namespace)
        elif language == "bash":
            for words in commands(code):
                assert main(words) == 0, f"gendistill {shlex.join(words)}\n{capsys.readouterr().err}"
        else:
            Path(name).write_text(code, encoding="utf-8")
    assert Path("runs/my-first/report/index.html").is_file()
    assert Path("runs/longer/report/index.html").is_file()
    assert Path("scores/tiny/results.json").is_file()
    page = Path("runs/colours-run/report/index.html").read_text(encoding="utf-8")
    assert "colours" in page


def test_the_saved_student_loads_in_a_session_of_its_own(tmp_path, monkeypatch):
    """The page runs in one process above, where transformers knows students already."""
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    gd.convert(gd.load("builtin:tiny"), "kda full").save(tmp_path / "my-student")
    code = next(code for *_, code in blocks() if 'from_pretrained("my-student")' in code)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "The cat" in done.stdout
