"""A hub that refuses, keeps silent or has no such model is one clear error within seconds; complete copies are used."""

import shutil
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gendistill.checkpoints import hub
from gendistill.checkpoints.resolve import resolve_checkpoint
from gendistill.errors import CheckpointError, GendistillError
from gendistill.runs.planning import read_model


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Give every test an empty cache of the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture(params=["refuses", "keeps silent"])
def endpoint(request, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if request.param == "keeps silent":
            server.listen()
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}"
        )
        assert 0 < hub._TIMEOUT_S <= 10
        monkeypatch.setattr(hub, "_TIMEOUT_S", 0.2)
        yield request.param


def resolve(spec):
    return resolve_checkpoint(spec)


def plan(spec):
    return read_model(spec, revision="main", where="teacher.model")


def fill_cache(home, folder, *, leave_out=()):
    snapshot = home / "models--owner--name" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot, ignore=lambda *_: leave_out)
    (home / "models--owner--name" / "refs").mkdir()
    (home / "models--owner--name" / "refs" / "main").write_text("0" * 40)
    return snapshot


@pytest.mark.parametrize("act", [resolve, plan])
def test_no_answer_is_one_line_within_seconds(endpoint, act):
    started = time.monotonic()
    with pytest.raises(
        CheckpointError, match="owner/name could not be downloaded, and no complete copy"
    ) as caught:
        act("owner/name")
    assert time.monotonic() - started < 5
    assert len(caught.value.message.splitlines()) == 1
    assert "check the network" in (caught.value.hint or "")
    assert "if owner/name was meant as a folder, there is none" in (caught.value.hint or "")


@pytest.mark.parametrize("act", [resolve, plan])
def test_complete_copies_are_used_without_an_answer(endpoint, home, save_teacher, act):
    _, folder = save_teacher()
    snapshot = fill_cache(home, folder)
    found = act("owner/name")
    assert found.config["model_type"] == "llama"
    assert act is plan or found.folder == snapshot


def test_incomplete_copies_are_not_used(endpoint, home, save_teacher):
    _, folder = save_teacher()
    fill_cache(home, folder, leave_out=["model.safetensors"])
    assert plan("owner/name").config["model_type"] == "llama"
    with pytest.raises(CheckpointError, match=r"no complete copy is cached \(.*has no safetensors"):
        resolve("owner/name")


@pytest.mark.parametrize("act", [resolve, plan])
@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (404, "RepoNotFound", "neither a folder here nor a model on the hub"),
        (404, "RevisionNotFound", 'has no revision "main"'),
        (403, "GatedRepo", "needs a permission"),
        (418, "", "could not be downloaded"),
        (503, "", "could not be downloaded"),
        (200, "", "could not be downloaded"),
    ],
)
def test_answers_of_the_hub_are_told_apart(monkeypatch, act, status, code, message):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"[]" if status == 200 else b"{}")

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(CheckpointError, match=message) as caught:
            act("owner/name")
        server.shutdown()
    assert caught.value.hint


SPECS = [
    *(
        "a\0b",
        "\ud800",
        "owner/na\nme",
        "x" * 5_000,
        "x/" * 3_000,
        "owner/" + "y" * 300,
        "../..",
        "owner/..",
        "..",
    ),
    *(
        "a..b/c",
        "owner/name..x",
        "~nobody-of-this-name",
        "~nobody-of-this-name/x",
        "",
        " ",
        "a/b/c",
        "é/ü",
        "owner/",
    ),
    *(
        "pypi:\0",
        "pypi:" + "x" * 5_000,
        "~/nothing\0here",
        "file:///etc/passwd",
        "https://huggingface.co/a/b",
    ),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: ascii(spec)[:30])
@pytest.mark.parametrize("act", [resolve, plan])
def test_specs_that_name_nothing_are_refused_without_the_hub(monkeypatch, tmp_path, act, spec):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_reach", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(GendistillError) as caught:
        act(spec)
    assert caught.value.hint
    str(caught.value).encode()


def test_the_home_folder_is_found(save_teacher, monkeypatch):
    _, folder = save_teacher()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve("~/teacher").folder == folder


def test_unreadable_files_are_named(save_teacher, monkeypatch):
    _, folder = save_teacher()

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("gendistill.checkpoints.resolve.file_digest", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read: Permission denied") as caught:
        resolve(str(folder))
    assert "permissions" in (caught.value.hint or "")
