"""Make what the inputs start from: teachers, GGUF files, rows, tasks, a finished and an interrupted run."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import areas


def make(root: Path, run_child: Callable[[Callable[[], None], Path], int]) -> areas.Base:
    """Fill a folder, in processes of their own, and import what the commands will need."""
    root.mkdir()
    base = areas.Base(root)
    # as the program does before it imports anything
    importlib.import_module("gendistill.cli.main")._quiet_libraries()
    for name in ("gendistill.runs.pipeline", "gendistill.testing", "gendistill.report"):
        importlib.import_module(name)
    for work in (_files, _finished, _stopped):
        status = run_child(lambda work=work: work(base), root)
        stopped = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        if status and not (work is _stopped and stopped):
            raise RuntimeError(f"{work.__name__} ended with {status}: {(root / 'err').read_text()[-3000:]}")
    for name in (root / "modules").read_text().splitlines():
        with suppress(ImportError):
            importlib.import_module(name)
    return base


def _files(base: areas.Base) -> None:
    from gendistill.testing import save_tiny_checkpoint

    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "max_position_embeddings": 256,
    }
    for family in areas.FAMILIES:
        save_tiny_checkpoint(base.teacher(family), family, **sizes)
    (base.root / "gguf").mkdir()
    for architecture in areas.ARCHITECTURES:
        pre = "smollm" if architecture == "llama" else "qwen2"
        _gguf_writer()(base.gguf(architecture), architecture, pre=pre)
    rows = {"texts": "text", "chat": "messages", "pairs": "prompt_completion"}
    for name, form in rows.items():
        _lines(base.root / f"{name}.jsonl", areas._ROWS[form])
    task = {"items": "colours.jsonl", "kind": "multiple_choice", "prompt": "{question}", "max_new_tokens": 2}
    base.task.write_text(json.dumps(task))
    items = [{"question": f"Colour {i}?", "options": ["red", "blue"], "gold": "red"} for i in range(3)]
    _lines(base.root / "colours.jsonl", items)
    _lines(base.questions, [{"question": "Why?"}, {"question": "Who?"}])


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


def _gguf_writer() -> Callable[..., Path]:
    path = Path(__file__).parents[1] / "conversion" / "test_gguf.py"
    spec = importlib.util.spec_from_file_location("gguf_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_gguf


def _run(base: areas.Base, name: str, *words: str) -> None:
    from gendistill.cli.main import main

    place = base.root / name
    place.mkdir()
    (place / "recipe.yaml").write_bytes(areas.as_yaml(base.recipe(output=str(place / "runs"))))
    os.environ["GENDISTILL_CACHE"] = str(place / "cache")
    sys.argv = ["gendistill", "run", str(place / "recipe.yaml"), *words]
    code = main()
    if code:
        raise RuntimeError(f"the run ended with {code}")


def _finished(base: areas.Base) -> None:
    _run(base, "finished")
    for command in (
        ["data", str(base.root / "finished" / "recipe.yaml")],
        ["report", str(base.root / "finished/runs/tiny")],
    ):
        from gendistill.cli.main import main

        sys.argv = ["gendistill", *command]
        main()
    # what the commands have imported by now, the parent imports once for all
    names = [name for name in sys.modules if name not in ("__main__", "gguf_cases")]
    (base.root / "modules").write_text("\n".join(names))


def _stopped(base: areas.Base) -> None:
    """Kill a run once the second checkpoint of its last stage is written."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and "step-000003" in os.fsdecode(str(arguments[0])):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    shutil.rmtree(base.root / "stopped", ignore_errors=True)
    _run(base, "stopped")
