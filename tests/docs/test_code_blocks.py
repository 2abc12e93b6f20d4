"""The pages' examples run, and what they say about signatures and saved tensors is so."""

import ast
import contextlib
import inspect
import math
import re
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from gendistill import ops
from gendistill.config import objectives
from gendistill.losses import build
from gendistill.mixers import KDA
from gendistill.training.monitors import MONITORS
from gendistill_evals import JUDGES, PROTOCOLS

ROOT = Path(__file__).parents[2]
PAGES = (
    *("kda.md", "kernels/how.md", "kernels/divergence.md"),
    *("extend-evals.md", "extend.md", "lora.md", "generation.md"),
)


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Return the fenced blocks of a page with the line before their first."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: match.start(1)].count("\n"), match[1]) for match in found]


def run(page: str) -> dict:
    namespace: dict = {}
    for line, code in blocks(page, "python"):
        # empty lines before the code, so that a traceback shows the line of the page
        exec(compile("\n" * line + code, f"docs/{page}", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENDISTILL_CACHE", str(tmp_path / "cache"))
    # what a page registers is for that page
    with contextlib.ExitStack() as stack:
        for known in (JUDGES, PROTOCOLS, MONITORS, objectives.OBJECTIVES, build.OBJECTIVES):
            stack.enter_context(patch.dict(known))
        assert run(page)


SHOWN = {
    "chunk_kda": ops.chunk_kda,
    "decode_delta_rule": ops.decode_delta_rule,
    "causal_conv": ops.causal_conv,
    "gated_rms_norm": ops.gated_rms_norm,
    "chunk_delta_rule": ops.chunk_delta_rule,
    "__init__": KDA.__init__,
    "forward": KDA.forward,
}


def test_signatures_are_those_of_the_source():
    texts = [code for _, code in blocks("kda.md", "text") if re.search(r"^ *def ", code, re.MULTILINE)]
    shown = [
        node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)
    ]
    assert sorted(node.name for node in shown) == sorted(SHOWN)
    for node in shown:
        source = ast.parse(inspect.cleandoc("\n" + inspect.getsource(SHOWN[node.name]))).body[0]
        assert isinstance(source, ast.FunctionDef)
        assert ast.unparse(node.args) == ast.unparse(source.args)
        assert node.returns is not None
        assert source.returns is not None
        assert ast.unparse(node.returns) == ast.unparse(source.returns)


def test_saved_bytes_are_those_of_the_kernels():
    pytest.importorskip("triton", reason="triton is not installed")
    from gendistill_kernels.delta.layout import Sizes, work_spaces
    from gendistill_kernels.delta.rule import Rule

    code = next(code for _, code in blocks("kernels/how.md", "python") if "saved = {" in code)
    page: dict = {}
    exec(code, page)
    tokens, heads, channels = 128, 2, 128
    wide = (1, tokens, heads, channels)
    works = work_spaces(
        Sizes.of(wide, wide, wide, wide, None),
        Rule(),
        torch.bfloat16,
        beta=True,
        scalar=False,
        spans=0,
        save=True,
    )
    sizes = {
        name: math.prod(space[0]) * space[1].itemsize / (tokens * heads)
        for spaces in works
        for name, space in spaces.items()
        if space is not None
    }
    assert sizes == page["saved"]
