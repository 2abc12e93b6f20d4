"""Measured results as files, and the tables of README and docs that come from them.

``python -m gendistill.results.table README.md docs/*.md`` fills every block between
``<!-- results:NAME -->`` and ``<!-- /results -->`` from ``docs/results/NAME.json``; ``--check`` only says which
documents are out of date. ``<!-- results:NAME rows=REGEX -->`` takes the rows in whose names the regular expression is
found, without their notes. ``<!-- value:NAME ROW -->`` and ``<!-- /value -->`` stand around a single number inside a
sentence, that of the row of exactly this name; ``peer:`` takes the peer's.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from gendistill.config.base import Section
from gendistill.errors import ReportError
from gendistill.pages import fill_pages
from gendistill.paths import write_json
from gendistill.provenance import installed_versions, source_commit, today
from gendistill.report.tables import markdown_cell

DEFAULT_FOLDER = Path("docs/results")
_BLOCK = re.compile(
    r"(<!-- results:(?P<name>[\w.-]+)(?: rows=(?P<rows>[^\n]+?))? -->\n).*?(<!-- /results -->)", re.DOTALL
)
_VALUE = re.compile(
    r"(<!-- (?P<what>value|peer):(?P<name>[\w.-]+) (?P<row>[^\n]+?) -->)[^\n]*?(<!-- /value -->)"
)
_MARKERS = (
    (_BLOCK, re.compile(r"<!-- /?results\b")),
    (_VALUE, re.compile(r"<!-- (?:(?:value|peer):|/value\b)")),
)

Number = Annotated[float, Field(allow_inf_nan=False, strict=True)]


class ResultRow(Section):
    """One measured number, with the bar it had to meet and the peer it is compared with."""

    name: str = Field(min_length=1)
    value: Number
    unit: str
    better: Literal["lower", "higher"]
    bar: Number | None = None
    peer: str | None = None
    peer_value: Number | None = None
    n: int | None = Field(None, ge=1)
    ci95: tuple[Number, Number] | None = None
    note: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.peer is None) != (self.peer_value is None):
            raise ValueError("peer and peer_value are given together or not at all")
        if self.ci95 and not self.ci95[0] <= self.value <= self.ci95[1]:
            raise ValueError(f"ci95 {list(self.ci95)} does not contain value {self.value}")
        return self

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar."""
        if self.bar is None:
            return None
        return self.value <= self.bar if self.better == "lower" else self.value >= self.bar


class ResultsFile(Section):
    """One file of ``docs/results``."""

    version: Literal[1] = Field(alias="schema")
    command: str = Field(min_length=1)
    commit: str = Field(pattern=r"^[0-9a-f]{7,40}(-dirty)?$")
    date: str = Field(pattern=r"^\d{4}-\d{2}-\d{2}$")
    device: str = Field(min_length=1)
    versions: dict[str, str]
    rows: tuple[ResultRow, ...] = Field(min_length=1)


def load_results(path: Path) -> ResultsFile:
    """Read and validate one results file.

    Raises:
        ReportError: Missing, no JSON, or not of the schema; every problem is listed.
    """
    try:
        return ResultsFile.model_validate_json(path.read_text(encoding="utf-8"), by_name=False, by_alias=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"cannot read the results: {error}", where=str(path)) from error
    except ValidationError as error:
        raise _invalid(path, error) from error


def write_results_json(
    path: Path,
    *,
    command: str,
    device: str,
    rows: Sequence[ResultRow],
    commit: str | None = None,
    date: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> ResultsFile:
    """Write measured rows as a results file.

    Args:
        path: Usually ``docs/results/<name>.json``.
        command: The command that measures these numbers again.
        device: What it ran on, in words.
        rows: The measured numbers.
        commit: Code that was measured; if None, git's HEAD, with ``-dirty`` if tracked files differ from it.
        date: ``YYYY-MM-DD``; today if None.
        versions: Version by package; if None, those installed.
    Returns: What was written.
    Raises:
        ReportError: A value outside the schema, or no commit given where git knows none.
    """
    commit = commit or source_commit()
    if commit is None:
        raise ReportError("git does not know the commit of this code", hint="run inside the checkout")
    try:
        results = ResultsFile(
            schema=1,
            command=command,
            commit=commit,
            date=date or today(),
            device=device,
            versions=dict(versions if versions is not None else installed_versions()),
            rows=tuple(rows),
        )
    except ValidationError as error:
        raise _invalid(path, error) from error
    write_json(path, results.model_dump(mode="json", by_alias=True))
    return results


def _invalid(path: Path, error: ValidationError) -> ReportError:
    problems = [f"{'.'.join(map(str, each['loc'])) or 'file'}: {each['msg']}" for each in error.errors()]
    return ReportError(
        "; ".join(problems), where=str(path), hint="fix the program that measured it, then run it again"
    )


def render_results(results: ResultsFile) -> str:
    """Lay out one results file as a markdown table with its origin underneath; empty columns are left out."""
    table = [_cells(row) for row in results.rows]
    used = [header for header in table[0] if any(cells[header] for cells in table)]
    lines = [
        "| " + " | ".join(used) + " |",
        "|" + "|".join("---" if h in _TEXT else "---:" for h in used) + "|",
    ]
    lines += ["| " + " | ".join(markdown_cell(cells[header]) for header in used) + " |" for cells in table]
    versions = ", ".join(f"{package} {version}" for package, version in results.versions.items())
    origin = f"Measured {results.date} on {results.device} with {versions}, commit {results.commit[:10]}"
    return "\n".join(lines) + f"\n\n{origin}:\n`{results.command}`\n"


_TEXT = frozenset({"", "result", "note"})


def _cells(row: ResultRow) -> dict[str, str]:
    sign = "≤" if row.better == "lower" else "≥"
    return {
        "": row.name,
        "measured": f"{_number(row.value)} {row.unit}".strip(),
        "95% interval": f"{_number(row.ci95[0])} to {_number(row.ci95[1])}" if row.ci95 else "",
        "n": f"{row.n:,}" if row.n else "",
        "bar": f"{sign} {_number(row.bar)}" if row.bar is not None else "",
        "result": {True: "met", False: "**missed**", None: ""}[row.met],
        "peer": f"{_number(row.peer_value)} ({row.peer})" if row.peer_value is not None else "",
        "note": row.note or "",
    }


def _number(value: float) -> str:
    """Write a number with four significant digits, and integers whole."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 10_000 else f"{value:.4g}"


def fill_document(text: str, *, folder: Path, where: str = "document") -> str:
    """Replace the content of every results block and of every single value of a document.

    Args:
        text: Markdown with zero or more blocks.
        folder: Folder of the results files.
        where: Name of the document, for errors.
    Raises:
        ReportError: A results file is missing or invalid, or a marker has no partner.
    """
    if any(len(marker.findall(text)) != 2 * len(whole.findall(text)) for whole, marker in _MARKERS):
        raise ReportError(
            "a results marker has no partner",
            where=where,
            hint="write <!-- results:NAME --> and <!-- /results -->, each on its own line, or "
            "<!-- value:NAME ROW --> and <!-- /value --> on one line",
        )

    def table(match: re.Match[str]) -> str:
        found = load_results(folder / f"{match['name']}.json")
        if match["rows"]:
            found = _selected(found, match["rows"], where)
        return match[1] + render_results(found) + match[4]

    def number(match: re.Match[str]) -> str:
        return match[1] + _single(load_results(folder / f"{match['name']}.json"), match, where) + match[5]

    return _VALUE.sub(number, _BLOCK.sub(table, text))


def _single(results: ResultsFile, match: re.Match[str], where: str) -> str:
    """Write the number of one row; shares as percent."""
    rows = [row for row in results.rows if row.name == match["row"]]
    value = None if len(rows) != 1 else rows[0].value if match["what"] == "value" else rows[0].peer_value
    if value is None:
        raise ReportError(
            f'{match["name"]} has no single row "{match["row"]}" with such a number',
            where=where,
            hint="correct the marker",
        )
    return f"{_number(100 * value)}%" if rows[0].unit == "share" else _number(value)


def _selected(results: ResultsFile, pattern: str, where: str) -> ResultsFile:
    """Take the rows in whose names a regular expression is found, without their notes."""
    try:
        rows = [row for row in results.rows if re.search(pattern, row.name)]
    except re.error as error:
        raise ReportError(f"rows={pattern} is not a regular expression: {error}", where=where) from error
    if not rows:
        raise ReportError(
            f"rows={pattern} is found in the name of no row", where=where, hint="correct the marker"
        )
    return results.model_copy(update={"rows": tuple(row.model_copy(update={"note": None}) for row in rows)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Fill the documents, or with ``--check`` fail if one is out of date."""
    parser = argparse.ArgumentParser(prog="python -m gendistill.results.table", allow_abbrev=False)
    parser.add_argument("documents", nargs="+", type=Path, help="markdown files with results blocks")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="folder of the results files")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail if a document is out of date"
    )
    options = parser.parse_args(arguments)
    return fill_pages(
        options.documents,
        lambda page, text: fill_document(text, folder=options.folder, where=str(page)),
        check=options.check,
        program=parser.prog,
    )


if __name__ == "__main__":
    sys.exit(main())
