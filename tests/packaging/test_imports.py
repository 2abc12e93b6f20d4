"""Who may import whom: what starts fast imports no torch, and every arrow of docs/architecture.md points one way."""

from __future__ import annotations

import ast
import graphlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"gendistill": ROOT, "gendistill_evals": ROOT / "evals", "gendistill_kernels": ROOT / "kernels"}
HEAVY = {"torch", "triton", "transformers", "accelerate", "datasets", "matplotlib", "lm_eval"}
# what must stay importable without torch; a folder stands for all its modules
TORCH_FREE = (
    *("gendistill", "gendistill.config", "gendistill.cli", "gendistill.report", "gendistill.errors"),
    *("gendistill.comparison", "gendistill.gates"),
    *(
        "gendistill.types",
        "gendistill.runs.advice",
        "gendistill.runs.answer_file",
        "gendistill.runs.prompt_file",
        "gendistill.generation.request",
        "gendistill.generation.stops",
        "gendistill.generation.streaming",
        "gendistill.paths",
        "gendistill.records",
        "gendistill.text",
        "gendistill.packages",
        "gendistill.provenance",
        "gendistill.anatomy",
        "gendistill.runs.planning",
        "gendistill.runs.fitting",
        "gendistill.runs.learning",
        "gendistill.runs.memory",
        "gendistill.runs.timing",
    ),
    *("gendistill.conversion.plan", "gendistill.checkpoints.tensors"),
    *("gendistill.conversion.render", "gendistill_evals"),
)
# folder: folders it may import, at any depth; modules directly in gendistill/ are words for everybody
LAYERS = {
    "anatomy": set(),
    "config": {"anatomy"},
    "ops": {"anatomy"},
    "mixers": {"ops", "anatomy"},
    "models": {"mixers", "ops", "anatomy"},
    "checkpoints": {"anatomy"},
    "data": {"mixers", "ops", "anatomy", "config"},
    "engine": {"mixers", "ops", "anatomy"},
    "generation": {"engine", "mixers", "ops", "anatomy"},
    "teachers": {"data", "anatomy"},
    "losses": {"teachers", "ops", "data", "anatomy", "config"},
    "training": {"losses", "teachers", "engine", "data", "ops", "anatomy", "config"},
    "conversion": {
        "checkpoints",
        "training",
        "teachers",
        "models",
        "mixers",
        "ops",
        "anatomy",
        "config",
        "data",
        "losses",
    },
    "report": {"anatomy", "config"},
    "comparison": {"report"},
    "results": {"report", "config"},
    "bench": {
        *(
            "training",
            "generation",
            "teachers",
            "engine",
            "generation",
            "conversion",
            "checkpoints",
            "models",
            "data",
            "ops",
            "report",
            "results",
        ),
        *("anatomy", "config"),
    },
    "runs": {
        *(
            "report",
            "conversion",
            "checkpoints",
            "training",
            "generation",
            "engine",
            "teachers",
            "losses",
            "data",
            "models",
            "mixers",
            "ops",
        ),
        *("anatomy", "config"),
    },
    "interop": {
        *(
            "runs",
            "report",
            "conversion",
            "checkpoints",
            "training",
            "generation",
            "engine",
            "teachers",
            "losses",
        ),
        *("data", "models", "mixers", "ops", "anatomy", "config"),
    },
    "api": {
        *("runs", "report", "conversion", "checkpoints", "training", "teachers", "data", "models"),
        "generation",
        *("anatomy", "config"),
    },
}
ABOVE_ALL = {"gendistill.testing"}


def modules() -> dict[str, Path]:
    found = {}
    for package, base in SOURCES.items():
        for path in (base / package).rglob("*.py"):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, *, top_level: bool) -> Iterator[str]:
    """Name the modules that a module imports: all of them, or those of importing it."""
    pending: list[ast.AST] = [ast.parse(MODULES[name].read_text())]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else node.module
                for alias in node.names
            )
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            pending.extend(ast.iter_child_nodes(node))


def closure(name: str) -> dict[str, str]:
    """Map everything that importing a module imports to the module that asks for it."""
    reached: dict[str, str] = {}
    pending = [name]
    while pending:
        current = pending.pop()
        for target in imports(current, top_level=True):
            parents = [".".join(target.split(".")[:depth]) for depth in range(1, target.count(".") + 2)]
            for one in parents:
                if one not in reached:
                    reached[one] = current
                    pending += [one] if one in MODULES else []
    return reached


@pytest.mark.parametrize("root", TORCH_FREE)
def test_light_modules_import_nothing_heavy(root):
    exact = MODULES[root].name != "__init__.py" or root == "gendistill"
    for name in MODULES:
        if name == root or (not exact and name.startswith(f"{root}.")):
            if name.startswith("gendistill_evals.") or name == "gendistill.report.plots":
                continue  # loaded on first use
            heavy = {target: via for target, via in closure(name).items() if target in HEAVY}
            assert not heavy, f"{name} imports {heavy}"


@pytest.mark.parametrize("folder", LAYERS)
def test_layers_import_only_what_lies_below_them(folder):
    for name in MODULES:
        if name.startswith(f"gendistill.{folder}."):
            for target in imports(name, top_level=False):
                parts = target.split(".")
                assert target not in ABOVE_ALL, f"{name} imports {target}"
                if parts[0] == "gendistill" and len(parts) > 2:
                    assert parts[1] in LAYERS[folder] | {folder}, f"{name} imports {target}"


def test_neither_folders_nor_modules_import_each_other_in_a_circle():
    graphlib.TopologicalSorter(LAYERS).prepare()
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    graph = {
        name: {target for target in imports(name, top_level=True) if target in MODULES} - packages
        for name in MODULES
    }
    graphlib.TopologicalSorter(graph).prepare()


def test_evaluation_knows_no_gendistill_and_kernels_know_only_torch_and_triton():
    for name in MODULES:
        roots = {target.split(".")[0] for target in imports(name, top_level=False)}
        if name.startswith("gendistill_evals"):
            assert "gendistill" not in roots, name
        if name.startswith("gendistill_kernels"):
            allowed = {"torch", "triton", "gendistill_kernels", "__future__", *sys.stdlib_module_names}
            assert roots <= allowed, f"{name} imports {roots - allowed}"


# what only a mixer's own files may name, and what tests and documents name
NAMED = {
    "gendistill.anatomy.kda",
    "gendistill.mixers.kda",
    "gendistill.mixers.published",
    "gendistill.testing",
    "gendistill.ops",  # the name of a function in __all__
}


def test_a_mixer_is_named_in_its_own_files_only():
    """Whoever needs to know kinds asks the catalogue, so that a new one is an addition."""
    found = {
        name
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value == "kda"
    }
    assert found <= NAMED, found - NAMED


# modules of the standard library alone: they travel inside exported students
TRAVELLING = ("family", "full", "kda", "mixers", "settings", "sink", "spec", "student", "swa")


@pytest.mark.parametrize("name", TRAVELLING)
def test_what_travels_in_exports_needs_the_standard_library_alone(name):
    for target in closure(f"gendistill.anatomy.{name}"):
        known = {f"gendistill.anatomy.{one}" for one in TRAVELLING} | {"gendistill", "gendistill.anatomy"}
        assert target in known or target.split(".")[0] in sys.stdlib_module_names, f"{name} imports {target}"


READ_ONLY = """
import contextlib, io, json, sys
import gendistill
from gendistill.cli.main import main

for words in {commands}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(words)
print(json.dumps(sorted(name for name in sys.modules if "." not in name)))
"""


@pytest.mark.parametrize(
    "commands",
    [
        [["--help"]],
        [
            *(
                ["run", "--help"],
                ["recipe", "ls"],
                ["recipe", "check", "qwen3-0.6b-kda"],
                ["recipe", "show", "tiny"],
            ),
            *(
                ["recipe", "schema"],
                ["recipe", "diff", "tiny", "qwen3-0.6b-kda"],
                ["recipe", "check", "nothing"],
            ),
        ],
    ],
    ids=["help", "recipe"],
)
def test_commands_that_only_read_recipes_import_no_torch(commands, record_property):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = READ_ONLY.format(commands=commands)
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imported = set(json.loads(output))
    assert imported.isdisjoint(HEAVY)
    assert "pydantic" not in imported or len(commands) > 1
    seconds = after.ru_utime - before.ru_utime
    record_property("cpu_seconds", seconds)
    assert seconds < 2.0  # about 0.05 and 0.4 on an idle machine
