"""Tell the language of a text, by ``langdetect`` where it is installed. Imports no torch."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from gendistill_evals.errors import EvalError


def is_available() -> bool:
    """Whether languages can be told here."""
    return importlib.util.find_spec("langdetect") is not None


def language_of(text: str) -> str | None:
    """Tell the language of a text, the same at every call.

    Returns: A code such as ``en`` or ``zh-cn``; None if there is nothing to tell it by.
    Raises:
        EvalError: ``langdetect`` is not installed.
    """
    detect, nothing_found = _detector()
    try:
        return detect(text)
    except nothing_found:
        return None


@functools.cache
def _detector() -> tuple[Any, type[Exception]]:
    try:
        import langdetect
    except ImportError as error:
        raise EvalError(
            "the language of an answer cannot be told: langdetect is not installed",
            hint='pip install "gendistill[ifeval]"',
        ) from error
    # It draws from a random sample of the text.
    langdetect.DetectorFactory.seed = 0
    return langdetect.detect, langdetect.LangDetectException
