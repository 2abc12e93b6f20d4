"""Pages, docstrings and messages are in plain English; links lead somewhere, and tests and commands named exist."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from gendistill.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# "there is no file" is English, "this is no file" is not; "has no" and "is no longer" are fine
_FOREIGN = re.compile(
    r"(?<!there )(?<!There )\b(?:is|was|are|were) no (?!longer\b|more\b|less\b|better\b|worse\b|faster\b)"
    r"|\b(?:names?|holds?|means?) no \b"
)
# rooms whose docstrings, comments and messages are held to the same
ROOMS = (
    "evals/gendistill_evals",
    "gendistill/api.py",
    "gendistill/cli",
    "gendistill/config",
    "gendistill/data",
    "gendistill/errors.py",
    "gendistill/losses",
    "gendistill/packages.py",
    "gendistill/pages.py",
    "gendistill/paths.py",
    "gendistill/records.py",
    "gendistill/report",
    "gendistill/results",
    "gendistill/runs",
    "gendistill/teachers",
    "gendistill/text.py",
    "gendistill/training",
)
# how a class's docstring must not begin: a class is something, functions do something
_VERB = re.compile(
    r"(?:Hold|Say|Describe|Name|Keep|Report|Remember|Refuse|Reject|Carry|Yield|Show|Shape|Leave|Give) "
)
# what a page may show as what not to write
_QUOTED = re.compile(r'"[^"\n]*"|`[^`\n]*`')
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_COMMAND = re.compile(r"`gendistill ([a-z]+)")


def pages():
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in PAGES]


def prose(page: Path) -> str:
    """Return the text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """List the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    plain = [_LINK.sub(lambda link: link[0][1:].split("]")[0], heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", pages())
def test_nothing_is_no_something(page):
    text = _QUOTED.sub("", prose(page))
    assert not [
        " ".join(text[match.start() - 30 : match.end() + 30].split()) for match in _FOREIGN.finditer(text)
    ]


def modules(room: str) -> list[Path]:
    return [ROOT / room] if room.endswith(".py") else sorted((ROOT / room).rglob("*.py"))


def texts(module: Path) -> list[tuple[int, str]]:
    """List a module's texts and comments with their lines; a text that is put together from several counts as one."""
    source = module.read_text(encoding="utf-8")
    comments = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    ]
    nodes = [
        (node.lineno, "".join(part.value for part in parts))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant | ast.JoinedStr)
        for parts in [[part for part in getattr(node, "values", [node]) if _is_text(part)]]
    ]
    return comments + nodes


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_in_code_is_no_something(room):
    assert not [
        f"{module.relative_to(ROOT)}:{line}: {text[max(0, match.start() - 30) : match.end() + 30]}"
        for module in modules(room)
        for line, text in texts(module)
        for match in _FOREIGN.finditer(text)
    ]


@pytest.mark.parametrize("room", ROOMS)
def test_classes_are_called_what_they_are(room):
    assert not [
        f"{module.relative_to(ROOT)}:{node.lineno}: {said}"
        for module in modules(room)
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and _VERB.match(said := ast.get_docstring(node) or "")
    ]


@pytest.mark.parametrize("page", pages())
def test_links_lead_somewhere(page):
    broken = []
    for link in _LINK.findall(prose(page)):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if "://" in link or not (name or anchor):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", pages())
def test_tests_and_commands_that_a_page_names_exist(page):
    text = prose(page)
    missing = [
        f"{file}::{name}"
        for file, name in _TEST.findall(text)
        if not (ROOT / file).is_file()
        or (name and not re.search(rf"def {name}\(", (ROOT / file).read_text(encoding="utf-8")))
    ]
    missing += [f"gendistill {name}" for name in _COMMAND.findall(text) if name not in COMMANDS]
    assert not missing
