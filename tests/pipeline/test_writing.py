"""A full disk is said as one whoever writes, and what killed processes left behind is removed."""

import os
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from gendistill.errors import OutputError
from gendistill.models.io import save_student
from gendistill.paths import clear_remains, library_writing, new_folder, write_json
from gendistill.testing import tiny_student

FULL = [
    'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })',
    "Error while serializing: I/O error: No space left on device (os error 28)",
    "I/O error: StorageFull",
]


@pytest.mark.parametrize("kind", [SafetensorError, Exception])
@pytest.mark.parametrize("message", FULL)
def test_a_full_disk_is_an_output_error(tmp_path, kind, message):
    full = pytest.raises(OutputError, match=r"the disk is full while writing .*out")
    with full as caught, new_folder(tmp_path / "out"), library_writing():
        raise kind(message)
    assert "free space" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write"), new_folder(tmp_path / "out"), library_writing():
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")


@pytest.mark.parametrize(
    "error", [SafetensorError("InvalidHeader"), ValueError("os error 28"), Exception("a bug")]
)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, library_writing():
        raise error
    assert caught.value is error


def test_saving_a_student_on_a_full_disk_keeps_the_old_one(tmp_path, monkeypatch):
    student = tiny_student()
    save_student(student, tmp_path / "student", companions=None)
    before = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}

    def full(*_, **__):
        raise SafetensorError(FULL[1])

    monkeypatch.setattr(type(student), "save_pretrained", full)
    with pytest.raises(OutputError, match="the disk is full"):
        save_student(student, tmp_path / "student", companions=None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


@pytest.fixture
def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_remains_of_processes_that_are_gone_are_removed(tmp_path, gone):
    own = os.getpid()
    kept = [
        f".model.{own}.partial",
        f".model.{own}.old",
        ".model.1.partial",
        ".model.0.partial",
        ".model.lock",
    ]
    kept += [
        "model",
        f"model.{gone}.partial",
        f".model.{gone}.tmp",
        f".model.{gone}",
        ".model.x.partial",
        ".partial",
    ]
    removed = [
        f".model.{gone}.partial",
        f".a.b c.{gone}.partial",
        f".model.{gone}.old",
        f".model.{10**18}.partial",
    ]
    for name in (*kept, *removed):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / f".file.json.{gone}.partial").write_text("half")
    (tmp_path / f".link.{gone}.partial").symlink_to(tmp_path / "model")
    clear_remains(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert (tmp_path / "model" / "inner").is_dir()


def test_what_was_being_replaced_is_put_back(tmp_path, gone):
    (tmp_path / f".model.{gone}.old").mkdir()
    (tmp_path / f".model.{gone}.old" / "weights").write_text("whole")
    (tmp_path / f".model.{gone}.partial").mkdir()
    clear_remains(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "weights").read_text() == "whole"


def test_clearing_needs_no_folder(tmp_path):
    clear_remains(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    clear_remains(tmp_path / "file")


def test_what_a_killed_writer_leaves_is_recognised(tmp_path):
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom gendistill.paths import new_folder, write_json\n"
        "folder = Path(sys.argv[1])\nos.replace = lambda *_: os._exit(9)\n"
        "if sys.argv[2] == 'file': write_json(folder / 'a.json', {})\n"
        "with new_folder(folder / 'b') as partial:\n    os._exit(9)\n"
    )
    for kind in ("file", "folder"):
        subprocess.run([sys.executable, "-c", code, str(tmp_path), kind], check=False)
    assert len(list(tmp_path.iterdir())) == 2
    write_json(tmp_path / "kept.json", {})
    clear_remains(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
