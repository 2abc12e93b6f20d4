"""Save and load students, with the code that lets them load where gendistill is not installed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from gendistill.anatomy.full import FULL
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.spec import MixerSpec
from gendistill.companions import companion_files
from gendistill.errors import CheckpointError, OutputError
from gendistill.models.card import inherit_card, read_object, write_card
from gendistill.models.configuration import HybridConfig
from gendistill.models.modeling import GendistillForCausalLM
from gendistill.paths import library_writing, new_folder, read_json, write_text
from gendistill.quiet import no_library_bars

_PACKAGE = "gendistill"
_ENTRY = "gendistill.models.modeling"
_CATALOGUE = "gendistill.anatomy.mixers"
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
    ``trust_remote_code=True`` can follow. Of the mixers come those that the student has, also where they are modules
    of another package than ours; what these import from their own package comes too.

    Args:
        folder: A saved student.
        base_model: The teacher's name on the hub, for the card; None keeps what the card says.
    Returns: The modules written.
    Raises:
        OutputError: The code of a mixer is not in a file.
    """
    config_path = folder / "config.json"
    config = read_object(config_path)
    catalogue = _catalogue({*(config.get("mixers") or ()), *(config.get("mixer_configs") or ())})
    written = []
    for module, source in _needed_modules(_ENTRY, {_CATALOGUE: catalogue}).items():
        path = folder / f"{_flat_name(module)}.py"
        if path in written:
            raise OutputError(
                f"two modules would be saved as {path.name}, one of them {module}",
                where=module,
                hint="give the package of the mixer another name",
            )
        write_text(path, _flatten(source, module))
        written.append(path)
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
        # in ASCII: half of a character pair, which a template may hold, is not UTF-8
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
    with new_folder(folder) as partial, library_writing(), no_library_bars():
        student.save_pretrained(partial)
        if companions is not None:
            copy_companions(companions, partial)
        if isinstance(student, GendistillForCausalLM):
            export_code(partial)
        _follow_umask(partial)


def check_replaceable(folder: Path) -> None:
    """Refuse to replace what is not a student: a file, a folder of other things, a teacher.

    Raises:
        OutputError: The folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    config = folder / "config.json"
    if config.is_file():
        content = read_json(config, error=OutputError)
        if isinstance(content, dict) and content.get("model_type") == HybridConfig.model_type:
            return
    raise OutputError(
        "it exists and is not a student, so it is not replaced",
        where=str(folder),
        hint="save into a new folder, or remove this one first",
    )


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
        CheckpointError: The folder is not a student, an incomplete one, or has weights that are not safetensors.
    """
    folder = Path(folder)
    _check_student(folder)
    model: Any = GendistillForCausalLM
    try:
        with no_library_bars():
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


def _catalogue(kinds: Iterable[str]) -> str:
    """Write the catalogue of a student's own mixers, which imports their modules by name."""
    lines = [
        '"""The mixers of this student."""',
        "",
        "# what defines a mixer may ask for the catalogue, so it is here first",
        "MIXERS, _CLASSES = {}, {}",
        "",
    ]
    for number, kind in enumerate(sorted({FULL.kind, *kinds} & MIXERS.keys())):
        spec = MIXERS[kind]
        home, name = _home(spec)
        lines += [f"from {home} import {name} as _spec_{number}", f"MIXERS[{kind!r}] = _spec_{number}"]
        if spec.module is not None:
            module, _, name = spec.module.partition(":")
            lines += [
                f"from {module} import {name} as _class_{number}",
                f"_CLASSES[{kind!r}] = _class_{number}",
            ]
    lines += ["", "", "def mixer_class(kind):", "    return _CLASSES[kind]", ""]
    return "\n".join(lines)


def _home(spec: MixerSpec) -> tuple[str, str]:
    """Name the module that holds a spec, and its name there."""
    module = type(spec).__module__
    for name, value in vars(sys.modules[module]).items():
        if value is spec:
            return module, name
    raise OutputError(
        f'the spec of the mixer "{spec.kind}" has no name in {module}, where its class is defined',
        where=f"mixer {spec.kind}",
        hint=f"write there: {spec.kind.upper()} = {type(spec).__name__}()",
    )


def _source(module: str) -> str:
    try:
        found = importlib.util.find_spec(module) if module != "__main__" else None
    except ValueError:  # a module that was made by hand
        found = None
    if found is None or not found.origin or not found.origin.endswith(".py"):
        raise OutputError(
            f"the code of {module} is not in a file that could be saved with the student",
            where=module,
            hint="define the mixer in a module of its own, and import that",
        )
    return Path(found.origin).read_text(encoding="utf-8")


def _imports(source: str, module: str, packages: Collection[str]) -> list[tuple[ast.ImportFrom, str]]:
    """List a module's imports from the given packages, each with the full name of the module that it names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        ours = module.split(".")[0] == _PACKAGE  # which has some where nothing runs, for type checkers
        whole = not ours and any(name.split(".")[0] in packages for name in names)
        name = _imported(node, module) if isinstance(node, ast.ImportFrom) else None
        is_ours = name is not None and name.split(".")[0] in packages
        if isinstance(node, ast.ImportFrom):
            whole = node.level > 0 and not node.module
            whole = whole or (is_ours and any(_is_module(str(name), alias.name) for alias in node.names))
        if whole:
            raise OutputError(
                f"{module} imports whole modules, which cannot be saved with the student",
                where=f"{module}, line {node.lineno}",
                hint="write: from package.module import name",
            )
        if isinstance(node, ast.ImportFrom) and name is not None and is_ours:
            found.append((node, name))
    return found


def _imported(node: ast.ImportFrom, module: str) -> str | None:
    """Return the full name of the module that an import of a module names."""
    if not node.level or not node.module:
        return node.module
    # in a package's own file one dot is the package itself
    above = node.level - _is_package(module)
    parts = module.split(".")
    return ".".join([*parts[: len(parts) - above], node.module])


def _is_package(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.submodule_search_locations is not None


def _is_module(package: str, name: str) -> bool:
    """Say whether a name that is imported from a package is one of its modules, not something that one defines."""
    return _is_package(package) and isinstance(
        getattr(importlib.import_module(package), name, None), ModuleType
    )


def _needed_modules(entry: str, written: Mapping[str, str]) -> dict[str, str]:
    """Map each module that another needs, itself included, to its source, or to what is written in its place."""
    packages = _packages()
    sources: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if module not in sources:
            sources[module] = written[module] if module in written else _source(module)
            waiting.extend(name for _, name in _imports(sources[module], module, packages))
    return dict(sorted(sources.items()))


def _packages() -> set[str]:
    """Name the top packages whose code is saved: ours, and those of other mixers in the catalogue."""
    homes = {type(spec).__module__ for spec in MIXERS.values()}
    modules = {spec.module.partition(":")[0] for spec in MIXERS.values() if spec.module is not None}
    return {_PACKAGE, *(module.split(".")[0] for module in homes | modules)}


def _flat_name(module: str) -> str:
    """Name the file of a module: the path of ours without the package's name."""
    return module.removeprefix(f"{_PACKAGE}.").replace(".", "_")


def _flatten(source: str, module: str) -> str:
    """Rewrite ``from gendistill.a.b import c`` to ``from .a_b import c``, leaving everything else as it is."""
    lines = source.splitlines(keepends=True)
    for node, name in _imports(source, module, _packages()):
        line, written = lines[node.lineno - 1], "." * node.level + str(node.module)
        lines[node.lineno - 1] = line.replace(f"from {written} ", f"from .{_flat_name(name)} ", 1)
    return "".join(lines)
