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
    r"(?<!there )(?<!There )\b(?:is|was|are|were) no (?!longer\b|more\b|less\b|better\b|worse\b|faster\b|slower\b)"
    r"|\b(?:names?|holds?|means?) no \b(?!more\b)"
)
# a class is a thing: its first line is not an order to the reader, nor what it does
_ORDER = re.compile(
    r"(?:Hold|Say|Describe|Name|Keep|List|Give|Return|Map|Count|Make|Take|Run|Read|Write|Store|Tell|Know|Check|Remember"
    r"|Collect|Compute|Measure|Track|Answer|Carry|Walk|Stand|Yield|Train|Try|Allocate|Refuse|Reject|Show|Shape"
    r"|Leave)s? "
)
# what a page may show as what not to write
_QUOTED = re.compile(r'"[^"\n]*"|`[^`\n]*`')
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_COMMAND = re.compile(r"`gendistill ([a-z]+(?:-[a-z]+)*)")


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


def modules():
    files = [
        path for room in ("gendistill", "kernels", "evals") for path in sorted((ROOT / room).rglob("*.py"))
    ]
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in files]


def words(source: str) -> str:
    """Return the comments and literals of a module, those that stand side by side in one piece."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return " ".join(
        " ".join(token.string.strip("#\"'fr ").split()) for token in tokens if token.type in kinds
    )


def test_words_of_code_are_found_across_lines():
    source = 'x = (  # what it is\n    f"{y} is"\n    " no file"\n)\n# this is\n# no file\n'
    assert len(_FOREIGN.findall(words(source))) == 2


@pytest.mark.parametrize("module", modules())
def test_code_says_what_things_are(module):
    source = module.read_text(encoding="utf-8")
    text = words(source)
    found = [text[match.start() - 30 : match.end() + 30] for match in _FOREIGN.finditer(text)]
    for node in ast.walk(ast.parse(source)):
        about = ast.get_docstring(node) if isinstance(node, ast.ClassDef) else None
        if about and _ORDER.match(about):
            found.append(f"{node.name}: {about.splitlines()[0]}")  # pyright: ignore[reportAttributeAccessIssue]
    assert not found
