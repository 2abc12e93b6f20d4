"""Save and load students, with the code that lets them load where gendistill is not installed."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

import gendistill
from gendistill.companions import companion_files
from gendistill.models.modeling import HybridForCausalLM
from gendistill.paths import library_writing, new_folder, write_text

_PACKAGE = "gendistill"
_ENTRY = "gendistill.models.modeling"
_AUTO_MAP = {
    "AutoConfig": "models_configuration.HybridConfig",
    "AutoModel": "models_modeling.HybridModel",
    "AutoModelForCausalLM": "models_modeling.HybridForCausalLM",
}


def export_code(folder: Path) -> list[Path]:
    """Write the student's modules into its folder and name them in ``config.json``.

    Every module that the model needs becomes one file beside the weights, with imports made relative, which is what
    ``trust_remote_code=True`` can follow.

    Args:
        folder: A saved student.
    Returns: The files written.
    """
    written = []
    for module in _needed_modules(_ENTRY):
        path = folder / f"{_flat_name(module)}.py"
        write_text(path, _flatten(_source(module)))
        written.append(path)
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["auto_map"] = _AUTO_MAP
    write_text(config_path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return written


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licences unchanged."""
    for name, path in companion_files(source).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)


def save_student(
    student: HybridForCausalLM | PreTrainedModel, folder: Path, *, companions: Path | None
) -> None:
    """Save a model, with its code when it is a hybrid; the folder appears whole or not at all.

    Args:
        student: The model; its weights are saved in their own dtype.
        folder: Where; what was there is replaced.
        companions: Checkpoint folder whose tokenizer, chat template and generation settings are copied.
    """
    with new_folder(folder) as partial, library_writing():
        student.save_pretrained(partial)
        if companions is not None:
            copy_companions(companions, partial)
        if isinstance(student, HybridForCausalLM):
            export_code(partial)


def load_student(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> HybridForCausalLM:
    """Load a student from a folder.

    Args:
        folder: A saved student.
        dtype: Of the weights; gate parameters stay float32.
        device: Where the weights go.
        impl: Implementation of the linear mixers.
    """
    return HybridForCausalLM.from_pretrained(folder, dtype=dtype, impl=impl).to(device)  # pyright: ignore


def _source(module: str) -> str:
    relative = Path(*module.split(".")[1:])
    return (Path(gendistill.__file__).parent / relative).with_suffix(".py").read_text(encoding="utf-8")


def _imports(source: str) -> list[ast.ImportFrom]:
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [node for node in found if (node.module or "").split(".")[0] == _PACKAGE]


def _needed_modules(entry: str) -> list[str]:
    seen: dict[str, None] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module not in seen:
            seen[module] = None
            waiting.extend(node.module for node in _imports(_source(module)) if node.module)
    return sorted(seen)


def _flat_name(module: str) -> str:
    return "_".join(module.split(".")[1:])


def _flatten(source: str) -> str:
    """Rewrite ``from gendistill.a.b import c`` to ``from .a_b import c``, leaving everything else as it is."""
    lines = source.splitlines(keepends=True)
    for node in _imports(source):
        assert node.module
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = line.replace(f"from {node.module} ", f"from .{_flat_name(node.module)} ", 1)
    return "".join(lines)
