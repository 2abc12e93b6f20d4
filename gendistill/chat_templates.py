"""Try the chat templates of a tokenizer: they are programs of the checkpoint's author, and need not come to an end."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2

from gendistill.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what a template can raise besides jinja2's own errors, when a conversation is not as it expects
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)

_MOST_SECONDS = 5.0
_MOST_CHARACTERS = 1 << 20
_MOST_BYTES = 2 << 30
_PROBE = [{"role": "user", "content": "Which colour is the sky?"}]
_HINT = "correct chat_template.jinja, or chat_template in tokenizer_config.json, of a copy of the checkpoint"


class _TooSlow(Exception):
    """A template that has run for too long."""


def check_templates(tokenizer: PreTrainedTokenizerBase, *, where: str) -> None:
    """Refuse templates that a short question keeps busy for seconds, or that make a book of it.

    What a template refuses to render is left to whoever asks it something: it may never be asked.

    Args:
        tokenizer: With one template, several by name, or none.
        where: Its folder, for errors.
    Raises:
        CheckpointError: A template takes too long or writes too much.
    """
    templates: Any = tokenizer.chat_template
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        if isinstance(template, str) and template:
            _check_template(tokenizer, template, where)


def _check_template(tokenizer: PreTrainedTokenizerBase, template: str, where: str) -> None:
    for with_prompt in (True, False):
        try:
            with _limited_memory(), _limited_time():
                text = tokenizer.apply_chat_template(
                    _PROBE, chat_template=template, tokenize=False, add_generation_prompt=with_prompt
                )
        except (_TooSlow, MemoryError) as error:
            raise CheckpointError(
                f"the chat template has not rendered one short question after {_MOST_SECONDS:g} seconds"
                if isinstance(error, _TooSlow)
                else f"the chat template needs more than {_MOST_BYTES >> 30} GiB of memory for one short question",
                where=where,
                hint=_HINT,
            ) from error
        except TEMPLATE_ERRORS:
            continue
        if len(text) > _MOST_CHARACTERS:
            raise CheckpointError(
                f"the chat template makes {len(text):,} characters of one short question",
                where=where,
                hint=_HINT,
            )


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    """Raise ``_TooSlow`` in the block after a time; only the main thread of a process can be interrupted so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Raise ``MemoryError`` in the block where it asks for too much; without limits where the system has none."""
    sizes = Path("/proc/self/statm")
    if not sizes.is_file():
        yield
        return
    used = int(sizes.read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = used + _MOST_BYTES
    resource.setrlimit(
        resource.RLIMIT_AS, (most if soft == resource.RLIM_INFINITY else min(most, soft), hard)
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
