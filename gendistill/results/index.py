"""The index of the measured results: one row for every file of ``docs/results``. Imports no torch.

``python -m gendistill.results.index docs/results/README.md`` fills the table between ``<!-- index -->`` and
``<!-- /index -->`` from the files beside the page. The column ``what`` is written by hand and kept. ``--check`` changes
nothing and fails if the table is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gendistill.errors import ReportError
from gendistill.pages import fill_pages
from gendistill.paths import read_json
from gendistill.report.tables import markdown_cell
from gendistill.results.table import load_results

_BLOCK = re.compile(r"(?<=<!-- index -->\n).*?(?=<!-- /index -->)", re.DOTALL)
_ROW = re.compile(r"^\| \[([^\]]+)\]\([^)]*\) \| (.*?) \|", re.MULTILINE)
_HEADERS = ("file", "what", "rows", "bars", "device", "date", "commit")


def fill_index(page: Path) -> str:
    """Return the text of the index page with its table made anew.

    Args:
        page: ``README.md`` in the folder of the results files.
    Raises:
        ReportError: A results file is invalid, one of them is not described, or the page has no table.
    """
    text = page.read_text(encoding="utf-8")
    if len(_BLOCK.findall(text)) != 1:
        raise ReportError(
            "it does not hold exactly one index block",
            where=str(page),
            hint="write <!-- index --> and <!-- /index -->, each on its own line",
        )
    described = dict(_ROW.findall(_BLOCK.findall(text)[0]))
    rows = [_row(path, described.get(path.name, "").strip()) for path in sorted(page.parent.glob("*.json"))]
    lines = ["| " + " | ".join(_HEADERS) + " |", "|---|---|---:|---|---|---|---|"]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return _BLOCK.sub(lambda _: "\n".join(lines) + "\n", text)


def undescribed(text: str) -> list[str]:
    """List the files whose ``what`` is empty."""
    return [name for name, what in _ROW.findall(text) if not what.strip()]


def _row(path: Path, what: str) -> list[str]:
    name = f"[{path.name}]({path.name})"
    content = read_json(path, shape=dict[str, Any], error=ReportError, hint="measure it again")
    if "rows" not in content:
        return [name, what, "", "", markdown_cell(str(content.get("device", ""))), "", ""]
    found = load_results(path)
    met = Counter(row.met for row in found.rows if row.met is not None)
    bars = ", ".join(f"{met[one]} {word}" for one, word in ((True, "met"), (False, "missed")) if met[one])
    return [
        name,
        what,
        f"{len(found.rows):,}",
        bars,
        markdown_cell(found.device),
        found.date,
        found.commit.split("-")[0][:10] + ("-dirty" if found.commit.endswith("-dirty") else ""),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the index, or with ``--check`` fail if it is out of date."""
    parser = argparse.ArgumentParser(prog="python -m gendistill.results.index", allow_abbrev=False)
    parser.add_argument("page", type=Path, help="markdown file with an index block, beside the results files")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if it is out of date")
    options = parser.parse_args(arguments)
    code = fill_pages(
        [options.page], lambda page, _: fill_index(page), check=options.check, program=parser.prog
    )
    if code == 0 and (empty := undescribed(options.page.read_text(encoding="utf-8"))):
        print(
            f"{options.page}: nothing is said about {', '.join(empty)}\n  next: write it into the column what",
            file=sys.stderr,
        )
        return 1
    return code


if __name__ == "__main__":
    sys.exit(main())
