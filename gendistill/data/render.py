"""Rows to token ids, with the tokens that a stage's mask counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jinja2
import numpy as np
from tokenizers import Encoding
from transformers import BatchEncoding, PreTrainedTokenizerBase

from gendistill.config.schema import SourceConfig
from gendistill.data.chat import (
    PROBE,
    Message,
    RowDropped,
    assistant_spans,
    find_end_of_turn,
    read_conversation,
)
from gendistill.data.files import Row
from gendistill.errors import DataError

Mask = Literal["all", "completion"]

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BARREN_ROWS = 10_000
_SHOWN_CHARS = 1500
# more than English has; where a text has still more, it is encoded whole
_MANY_CHARS_PER_TOKEN = 6


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """One document, or one piece of a long one.

    Attributes:
        ids: ``[T]`` int64 token ids.
        counted: ``[T]`` bool, the tokens that the model is trained to predict. The first token of a document has
            no predecessor, so its entry has no effect.
    """

    ids: np.ndarray
    counted: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_labels(self) -> int:
        """Counted tokens that have a predecessor."""
        return int(self.counted[1:].sum())


class Renderer:
    """Render the rows of one source for one stage.

    Under mask ``all`` a long document is split into consecutive pieces. Under mask ``completion`` a sample is never
    split: it is cut at its end, and left out when no answer remains. Every row left out is counted in ``dropped``.

    Args:
        tokenizer: The teacher's tokenizer, with its chat template for messages.
        config: Format of the rows.
        columns: Columns that the format reads.
        mask: Which tokens count.
        seq_len: Longest sample, in tokens.
        name: Name of the source under ``data:``, for errors.
        num_rows: Rows of one epoch of the source, if known: none usable in a whole epoch is an error.
    Raises:
        DataError: The tokenizer cannot serve this format and mask.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        config: SourceConfig,
        *,
        columns: Sequence[str],
        mask: Mask,
        seq_len: int,
        name: str,
        num_rows: int | None = None,
    ) -> None:
        self.dropped: Counter[str] = Counter()
        self.rows = 0
        self._tokenizer = tokenizer
        self._config = config
        self._columns = tuple(columns)
        self._mask = mask
        self._seq_len = seq_len
        self._where = f"data.{name}"
        self._barren = 0
        self._barren_limit = min(2 * num_rows if num_rows else _BARREN_ROWS, _BARREN_ROWS)
        self._unmatched = ""
        self._template_marks_answers = False
        self._end_of_turn = ""
        if not isinstance(tokenizer.eos_token_id, int):
            raise DataError(
                "the tokenizer has no end-of-sequence token, so no document could end",
                where="teacher.model",
                hint="set eos_token in the teacher's tokenizer_config.json",
            )
        self._eos = tokenizer.eos_token_id
        self._appends_eos = self._encode(["a"], special=True)["input_ids"][0][-1] == self._eos
        if config.format == "text" and mask == "completion":
            raise DataError(
                "text rows have no completion to train on",
                where=self._where,
                hint="set mask: all for this stage, or format: messages or prompt_completion for this source",
            )
        if config.format == "messages":
            self._check_template()

    def render(self, rows: Sequence[Row]) -> list[list[TokenizedSample]]:
        """Render rows, batched through the tokenizer.

        Args:
            rows: Rows of the source.
        Returns:
            The samples of each row in order: one, or several pieces, or none if the row is left out.
        Raises:
            DataError: Nothing but unusable rows for longer than chance allows.
        """
        inputs: list[Any] = []
        places: list[int] = []
        for place, row in enumerate(rows):
            try:
                inputs.append(self._read(row))
                places.append(place)
            except RowDropped as reason:
                self.dropped[str(reason)] += 1
        batch: dict[str, Callable[[list[Any]], list[TokenizedSample | None]]] = {
            "text": self._texts,
            "messages": self._chats,
            "prompt_completion": self._pairs,
        }
        rendered: list[list[TokenizedSample]] = [[] for _ in rows]
        if inputs:
            for place, sample in zip(places, batch[self._config.format](inputs), strict=True):
                rendered[place] = self._fit(sample) if sample else []
        self._note_progress(rendered)
        return rendered

    def _read(self, row: Row) -> Any:
        values = []
        for column in self._columns:
            if column not in row:
                raise RowDropped(f'no column "{column}"')
            values.append(row[column])
        if self._config.format == "messages":
            return self._with_text(read_conversation(values[0]))
        if not all(isinstance(value, str) for value in values):
            raise RowDropped("a column is no text")
        if not values[-1].strip():
            raise RowDropped("blank text")
        return values[0] if len(values) == 1 else tuple(values)

    def _with_text(self, messages: list[Message]) -> tuple[list[Message], str]:
        try:
            return messages, self._render_chat(messages, False)
        except jinja2.TemplateError as error:
            raise RowDropped(f"the chat template refuses it: {error}"[:100]) from error

    def _fit(self, sample: TokenizedSample) -> list[TokenizedSample]:
        """Bring a sample to the sequence length; drop what has no label."""
        length = self._seq_len
        if self._mask == "completion":
            starts = [0]
        else:
            starts = list(range(0, len(sample), length))
        pieces = [
            TokenizedSample(sample.ids[start : start + length], sample.counted[start : start + length])
            for start in starts
        ]
        kept = [piece for piece in pieces if piece.num_labels]
        if not kept:
            self.dropped["no answer within seq_len" if self._mask == "completion" else "a single token"] += 1
        return kept

    def _note_progress(self, rendered: list[list[TokenizedSample]]) -> None:
        self.rows += len(rendered)
        self._barren = 0 if any(rendered) else self._barren + len(rendered)
        # twice the rows of an epoch: shuffled anew, the only good row may come first once and last the next time
        if self._barren >= self._barren_limit:
            raise self.unusable()

    def unusable(self) -> DataError:
        """Build the error that says why no row could be used."""
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in self.dropped.most_common(5))
        shown = f"\nlast rendered sample:\n{self._unmatched}" if self._unmatched else ""
        return DataError(
            f"none of {self._barren:,} rows of {self._config.path} can be used: {reasons}{shown}",
            where=self._where,
            hint=f"compare {self._where}.format and column with the rows of the dataset",
        )

    # text

    def _encode(self, texts: list[str], *, special: bool) -> BatchEncoding:
        return self._tokenizer(
            texts,
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )

    def _ended(self, ids: list[int]) -> list[int]:
        return ids if ids and ids[-1] == self._eos else [*ids, self._eos]

    def _texts(self, texts: list[str]) -> list[TokenizedSample | None]:
        samples: list[TokenizedSample | None] = []
        for ids in self._encode(texts, special=True)["input_ids"]:
            samples.append(_sample(self._ended(ids), spans=None))
        return samples

    # prompt and completion

    def _pairs(self, pairs: list[tuple[str, str]]) -> list[TokenizedSample | None]:
        prompts = self._encode([prompt for prompt, _ in pairs], special=True)["input_ids"]
        wholes = self._encode([prompt + completion for prompt, completion in pairs], special=True)[
            "input_ids"
        ]
        samples: list[TokenizedSample | None] = []
        for (_, completion), prompt_ids, whole_ids in zip(pairs, prompts, wholes, strict=True):
            # what such a tokenizer puts at the end of the prompt belongs after the completion
            prompt_ids = prompt_ids[:-1] if self._appends_eos else prompt_ids
            if whole_ids[: len(prompt_ids)] != prompt_ids:
                # a token would span the border; generation starts from the prompt's own tokens, so training does too
                whole_ids = prompt_ids + self._encode([completion], special=False)["input_ids"][0]
            ids = self._ended(whole_ids)
            spans = None if self._mask == "all" else [(len(prompt_ids), len(ids))]
            samples.append(_sample(ids, spans=spans))
        return samples

    # messages

    def _render_chat(self, messages: list[Message], with_prompt: bool) -> str:
        text = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=with_prompt
        )
        assert isinstance(text, str)
        return text

    def _check_template(self) -> None:
        """Refuse a template whose answers cannot be found, before any row is read."""
        template = self._tokenizer.chat_template
        fail = partial(
            DataError,
            where=self._where,
            hint="set mask: all for this stage, or use a teacher whose template marks its answers",
        )
        if not template:
            raise DataError(
                "the teacher's tokenizer has no chat template, so messages cannot be rendered",
                where=self._where,
                hint="use an instruction-tuned teacher, or format: text or prompt_completion",
            )
        if self._mask == "all":
            return
        if not self._tokenizer.is_fast:
            raise fail(
                "completion masks need a fast tokenizer: this one does not tell where its tokens begin"
            )
        try:
            text = self._render_chat(PROBE, False)
            specials = _special_tokens(self._tokenizer)
            end_of_turn = find_end_of_turn(self._render_chat, specials)
            self._template_marks_answers = isinstance(template, str) and bool(
                _GENERATION_BLOCK.search(template)
            )
            if self._template_marks_answers:
                return
            spans = end_of_turn and assistant_spans(self._render_chat, PROBE, text, end_of_turn)
        except jinja2.TemplateError as error:
            raise fail(f"the chat template refuses a plain conversation: {error}") from error
        if end_of_turn is None:
            raise fail(
                "the chat template ends no answer with a special token, so a student could not learn to stop; "
                f"a conversation renders as\n{text}"
            )
        if not spans:
            raise fail(f"the answers cannot be found in what the chat template renders:\n{text}")
        self._end_of_turn = end_of_turn

    def _chats(self, chats: list[tuple[list[Message], str]]) -> list[TokenizedSample | None]:
        if self._mask == "all" or self._template_marks_answers:
            token_ids = self._encode([text for _, text in chats], special=False)["input_ids"]
        if self._mask == "all":
            return [_sample(ids, spans=None) for ids in token_ids]
        if self._template_marks_answers:
            spans = [self._marked_spans(chat[0], ids) for chat, ids in zip(chats, token_ids, strict=True)]
        else:
            encodings = self._encode_heads([text for _, text in chats])
            token_ids = [encoding.ids for encoding in encodings]
            spans = [
                self._found_spans(encoding, *chat) for chat, encoding in zip(chats, encodings, strict=True)
            ]
        samples: list[TokenizedSample | None] = []
        for (_, text), ids, found in zip(chats, token_ids, spans, strict=True):
            if found is None:
                self.dropped["an answer cannot be found in the rendered conversation"] += 1
                self._unmatched = text[:_SHOWN_CHARS]
            samples.append(None if found is None else _sample(ids, spans=found))
        return samples

    def _encode_heads(self, texts: list[str]) -> list[Encoding]:
        """Encode conversations as far as a sample reaches: many are far longer.

        The cut comes after a special token, a border for the tokenizer: the tokens before it are those of the whole.
        """
        heads = []
        for text in texts:
            cut = text.find(self._end_of_turn, self._seq_len * _MANY_CHARS_PER_TOKEN)
            heads.append(text if cut < 0 else text[: cut + len(self._end_of_turn)])
        encodings = list(self._encode(heads, special=False).encodings or ())
        for index, (text, head) in enumerate(zip(texts, heads, strict=True)):
            if len(head) < len(text) and len(encodings[index].ids) <= self._seq_len:
                encodings[index : index + 1] = self._encode([text], special=False).encodings or ()
        return encodings

    def _found_spans(
        self, encoding: Encoding, messages: list[Message], text: str
    ) -> list[tuple[int, int]] | None:
        """Find the answers in the text and map them to tokens; None if they cannot be told for sure."""
        num_tokens = len(encoding.ids)
        # what is cut off anyway need not be rendered prompt by prompt
        stop = _chars(encoding, self._seq_len)[0] if num_tokens > self._seq_len else None
        spans = assistant_spans(self._render_chat, messages, text, self._end_of_turn, stop=stop)
        if spans is None:
            return None
        reach = _chars(encoding, num_tokens - 1)[1]
        return [_token_span(encoding, start, min(end, reach)) for start, end in spans if start < reach]

    def _marked_spans(self, messages: list[Message], ids: list[int]) -> list[tuple[int, int]] | None:
        """Read the answers from the template's own {% generation %} blocks, with the end of turn that follows."""
        marked = self._tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        if marked["input_ids"] != ids:  # type: ignore[index]
            return None
        mask = np.asarray(marked["assistant_masks"], dtype=bool)  # type: ignore[index]
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
        special = set(self._tokenizer.all_special_ids)
        spans = []
        for start, end in edges.reshape(-1, 2).tolist():
            follows = end < len(ids) and ids[end - 1] not in special and ids[end] in special
            spans.append((start, end + follows))
        return spans or None


def _sample(ids: list[int], *, spans: list[tuple[int, int]] | None) -> TokenizedSample:
    counted = np.full(len(ids), spans is None)
    for start, end in spans or ():
        counted[start:end] = True
    return TokenizedSample(np.asarray(ids, dtype=np.int64), counted)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def _chars(encoding: Encoding, token: int) -> tuple[int, int]:
    chars = encoding.token_to_chars(token)
    assert chars is not None
    return chars


def _token_span(encoding: Encoding, start: int, end: int) -> tuple[int, int]:
    """Map a character span to tokens; one that begins in the prompt is none that the model would generate."""
    first = next(token for at in range(start, end) if (token := encoding.char_to_token(at)) is not None)
    if _chars(encoding, first)[0] < start:
        first += 1
    # white space may be trimmed from offsets: such tokens lie in the span although no character maps to them
    while first > 0 and _chars(encoding, first - 1)[0] >= start:
        first -= 1
    last = next(
        token for at in range(end - 1, start - 1, -1) if (token := encoding.char_to_token(at)) is not None
    )
    return first, last + 1
