"""Save and load students, with the code that lets them load where gendistill is not installed."""

from __future__ import annotations

import ast
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

import gendistill
from gendistill.companions import companion_files
from gendistill.errors import CheckpointError
from gendistill.models.card import inherit_card, read_object, write_card
from gendistill.models.configuration import HybridConfig
from gendistill.models.modeling import GendistillForCausalLM
from gendistill.paths import library_writing, new_folder, write_text

_PACKAGE = "gendistill"
_ENTRY = "gendistill.models.modeling"
_AUTO_MAP = {
    "AutoConfig": "models_configuration.HybridConfig",
    "AutoModel": "models_modeling.HybridModel",
    "AutoModelForCausalLM": "models_modeling.GendistillForCausalLM",
}
# what transformers writes into a tokenizer that knows no length is about 1e30
_LONGEST_TEXT = 1e12


def export_code(folder: Path, *, base_model: str | None = None) -> list[Path]:
    """Write the student's modules and its model card into its folder and name the modules in ``config.json``.

    Every module that the model needs becomes one file beside the weights, with imports made relative, which is what
    ``trust_remote_code=True`` can follow.

    Args:
        folder: A saved student.
        base_model: The teacher's name on the hub, for the card; None keeps what the card says.
    Returns: The modules written.
    """
    written = []
    for module in _needed_modules(_ENTRY):
        path = folder / f"{_flat_name(module)}.py"
        write_text(path, _flatten(_source(module)))
        written.append(path)
    config_path = folder / "config.json"
    config = read_object(config_path)
    config["auto_map"] = _AUTO_MAP
    write_text(config_path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_card(folder, base_model=base_model)
    return written


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licences, and note what the model card says of them.

    Nothing is changed but a longest text that the tokenizer does not know: the copy gets the model's.
    """
    for name, path in companion_files(source).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)
    _set_longest_text(source / "config.json", folder / "tokenizer_config.json")
    inherit_card(source, folder)


def _set_longest_text(config_path: Path, tokenizer_path: Path) -> None:
    if not (config_path.is_file() and tokenizer_path.is_file()):
        return
    longest = read_object(config_path).get("max_position_embeddings")
    # transformers wrote 1e30 as an integer of 31 digits
    settings = read_object(tokenizer_path)
    stored = settings.get("model_max_length")
    missing = stored is None or (isinstance(stored, int | float) and stored > _LONGEST_TEXT)
    if missing and isinstance(longest, int):
        settings["model_max_length"] = longest
        # in ASCII: half of a character pair, which a template may hold, is no UTF-8
        write_text(tokenizer_path, json.dumps(settings, indent=2) + "\n")


def save_student(
    student: GendistillForCausalLM | PreTrainedModel, folder: Path, *, companions: Path | None
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
        if isinstance(student, GendistillForCausalLM):
            export_code(partial)
        _follow_umask(partial)


def _follow_umask(folder: Path) -> None:
    """Give every file the permissions of a new one: safetensors and temporary files come with their own."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def load_student(
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    impl: str = "auto",
) -> GendistillForCausalLM:
    """Load a student from a folder.

    Args:
        folder: A saved student.
        dtype: Of the weights; gate parameters stay float32.
        device: Where the weights go.
        impl: Implementation of the linear mixers.
    Raises:
        CheckpointError: The folder holds no student, an incomplete one, or weights that are no safetensors.
    """
    folder = Path(folder)
    _check_student(folder)
    model: Any = GendistillForCausalLM
    try:
        student, found = model.from_pretrained(
            folder,
            dtype=dtype,
            impl=impl,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            # named below; transformers would draw a table on the terminal
            ignore_mismatched_sizes=True,
        )
    except (
        StrictDataclassError,
        SafetensorError,
        ValueError,
        TypeError,
        KeyError,
        OSError,
        RuntimeError,
    ) as error:
        raise CheckpointError(
            f"the student cannot be loaded: {error}",
            where=str(folder),
            hint="correct config.json, or make the student again with: gendistill run <recipe>",
        ) from error
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{len(names)} tensors are missing, among them {', '.join(names[:3])}",
            where=str(folder),
            hint="copy all weight files of the student, or make it again with: gendistill run <recipe>",
        )
    if found["mismatched_keys"]:
        name, stored, expected = sorted(found["mismatched_keys"])[0]
        raise CheckpointError(
            f"{len(found['mismatched_keys'])} tensors have other shapes than config.json says, such as {name}: "
            f"{list(stored)}, expected {list(expected)}",
            where=str(folder),
            hint="correct config.json, or make the student again with: gendistill run <recipe>",
        )
    return student.to(device)


def _check_student(folder: Path) -> None:
    """Refuse what is not a saved student before transformers looks at it."""
    where, hint = str(folder), "name the folder of a student, such as <run>/student"
    if not (folder / "config.json").is_file():
        raise CheckpointError("there is no config.json: this is not a saved student", where=where, hint=hint)
    config = read_object(folder / "config.json", hint=hint)
    if config.get("model_type") != HybridConfig.model_type:
        raise CheckpointError(
            f"config.json describes a model of type {config.get('model_type')!r}, a student's is "
            f'"{HybridConfig.model_type}"',
            where=where,
            hint=hint,
        )
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        found = f", only {', '.join(pickles)}, which may run code when loaded" if pickles else ""
        raise CheckpointError(
            f"there are no safetensors weights{found}",
            where=where,
            hint="save the student again as safetensors, with save_pretrained() or gendistill run",
        )


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
