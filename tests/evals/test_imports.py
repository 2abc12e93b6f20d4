from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import gendistill_evals

_SOURCES = sorted(Path(gendistill_evals.__file__).parent.glob("*.py"))


def test_everything_but_the_hugging_face_model_imports_no_torch():
    code = (
        "import sys, gendistill_evals, gendistill_evals.task, gendistill_evals.extract, gendistill_evals.stats,"
        " gendistill_evals.results, gendistill_evals.keeping, gendistill_evals.evaluate\n"
        "print(sorted({'torch', 'transformers', 'gendistill'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_imports_gendistill():
    imported = {
        name.split(".")[0]
        for path in _SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert "gendistill_evals" in imported
    assert "gendistill" not in imported


def test_unknown_names_are_attribute_errors():
    assert callable(gendistill_evals.HFModel)
    assert not hasattr(gendistill_evals, "evaluate_models")
