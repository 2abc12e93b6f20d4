"""Compare how documents begin with how the tokenizer, or its chat template, begins them."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from gendistill.chat_templates import TEMPLATE_ERRORS
from gendistill.config.schema import SourceConfig
from gendistill.data.chat import PROBE
from gendistill.data.cursor import RowSource
from gendistill.data.render import Mask, Renderer
from gendistill.errors import DataError

_LOOKED_AT = 32
_LONG = 1 << 20


def note_first_tokens(
    source: RowSource, tokenizer: PreTrainedTokenizerBase, config: SourceConfig, *, mask: Mask, name: str
) -> str | None:
    """Say so if documents lack the beginning-of-sequence token that usually comes first, or have it twice.

    Args:
        source: Its first rows are looked at; it does not move on.
        tokenizer: The teacher's.
        config: The source's.
        mask: Which tokens count.
        name: Name under ``data:``.
    Returns: One sentence for people, or None if all is well or no such token is usual.
    """
    bos = tokenizer.bos_token_id
    usual = _who_puts_it(tokenizer)
    if not isinstance(bos, int) or usual is None:
        return None
    # a renderer of its own: what it leaves out is counted when the rows are drawn
    renderer = Renderer(tokenizer, config, columns=source.columns, mask=mask, seq_len=_LONG, name=name)
    try:
        rendered = renderer.render(source.first_rows(_LOOKED_AT))
    except DataError:
        return None
    begins = [pieces[0].ids[:2].tolist() for pieces in rendered if pieces]
    lacking = sum(begin[0] != bos for begin in begins)
    twice = sum(begin == [bos, bos] for begin in begins)
    if not lacking and not twice:
        return None
    fault = (
        f"{lacking:,} of {len(begins):,} samples looked at do not begin with {tokenizer.bos_token}"
        if lacking
        else f"{twice:,} of {len(begins):,} samples looked at begin with {tokenizer.bos_token} twice"
    )
    return f"data.{name}: {fault}, which {usual} puts first once: the teacher may know such text less well"


def _who_puts_it(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Name what begins a document with the beginning-of-sequence token, if anything does."""
    ids = tokenizer(["a"], add_special_tokens=True)["input_ids"][0]
    if ids[0] == tokenizer.bos_token_id:
        return "the teacher's tokenizer"
    bos = tokenizer.bos_token
    try:
        text = tokenizer.apply_chat_template(PROBE, tokenize=False)
    except TEMPLATE_ERRORS:
        return None
    # a token that begins every turn begins no document
    is_first = (
        isinstance(text, str) and isinstance(bos, str) and text.startswith(bos) and text.count(bos) == 1
    )
    return "the teacher's chat template" if is_first else None
