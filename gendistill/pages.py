"""Pages of which a part is written by a program: fill them, or check that they are up to date."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gendistill.errors import GendistillError
from gendistill.paths import write_text


def fill_pages(pages: Sequence[Path], fill: Callable[[Path, str], str], *, check: bool, program: str) -> int:
    """Write what is out of date, and say what is wrong on standard error.

    Args:
        pages: The pages.
        fill: Given a page and its text, returns what the text should be.
        check: Whether to change nothing, and fail if a page is out of date.
        program: Command that fills pages, which are its arguments.
    Returns: Exit code.
    """
    stale = []
    try:
        for page in pages:
            old = page.read_text(encoding="utf-8")
            new = fill(page, old)
            if new == old:
                continue
            stale.append(str(page))
            if not check:
                write_text(page, new)
    except GendistillError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if stale and check:
        shown = " ".join(stale)
        print(f"out of date: {shown}\n  next: {program} {shown}", file=sys.stderr)
        return 1
    return 0
