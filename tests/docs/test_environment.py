"""docs/environment.md names every environment variable that the code reads or sets."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_NAMES = (
    re.compile(r"environ(?:\.get|\.setdefault)?[\[(]\s*\"([A-Z][A-Z0-9_]+)\""),
    re.compile(r"\"((?:GENDISTILL|ACCELERATE|TRITON|HF|PIP)_[A-Z0-9_]+)\""),
    re.compile(r"\bconstants\.(HF_[A-Z_]+)|import (HF_[A-Z_]+)"),
)


def test_every_variable_is_documented():
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    missing = {}
    for folder in ("gendistill", "kernels", "evals"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            found = {
                name
                for pattern in _NAMES
                for match in pattern.finditer(text)
                for name in match.groups()
                if name
            }
            missing |= {name: str(path.relative_to(ROOT)) for name in found if f"`{name}`" not in page}
    assert not missing
