"""Keep what other libraries print out of our output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_library_bars() -> Iterator[None]:
    """Hide the bars of transformers for loading and saving weights; those for downloads stay."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda _factory, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
