"""Rows to token ids, with the tokens that a stage's mask counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
from tokenizers import Encoding
from transformers import BatchEncoding, PreTrainedTokenizerBase

from gendistill.chat_templates import TEMPLATE_ERRORS
from gendistill.config.schema import SourceConfig
from gendistill.data.answers import (
    assistant_spans,
    find_end_of_turn,
    marked_spans,
    marks_answers,
    token_spans,
    with_visible_marks,
)
from gendistill.data.chat import PROBE, Message, RowDropped, read_conversation
from gendistill.data.files import BadRow, Row
from gendistill.errors import DataError
from gendistill.text import encodable

Mask = Literal["all", "completion"]

_BARREN_ROWS = 10_000
_SHOWN_CHARS = 1500
# more than English has; where a text has still more, it is encoded whole
_MANY_CHARS_PER_TOKEN = 6
# reasons may quote a row; what is counted stays small
_MOST_REASONS = 20
_OTHER_REASON = "other reasons"


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
    """The way from the rows of one source to samples for one stage.

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
        self._template = ""
        self._marking_template: str | None = None
        self._end_of_turn: str | None = None
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

    def render(self, rows: Sequence[Row | BadRow]) -> list[list[TokenizedSample]]:
        """Render rows, batched through the tokenizer.

        Args:
            rows: Rows of the source; one that could not be read is left out.
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
                self._leave_out(str(reason))
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

    def _leave_out(self, reason: str) -> None:
        is_known = reason in self.dropped or len(self.dropped) < _MOST_REASONS
        self.dropped[reason if is_known else _OTHER_REASON] += 1

    def _read(self, row: Row | BadRow) -> Any:
        if isinstance(row, BadRow):
            raise RowDropped(row.reason)
        values = []
        for column in self._columns:
            if column not in row:
                raise RowDropped(f'no column "{column}"')
            values.append(row[column])
        if self._config.format == "messages":
            return self._with_text(read_conversation(values[0]))
        if not all(isinstance(value, str) for value in values):
            raise RowDropped("a column is not text")
        if not values[-1].strip():
            raise RowDropped("blank text")
        _refuse_half_characters(values)
        return values[0] if len(values) == 1 else tuple(values)

    def _with_text(self, messages: list[Message]) -> tuple[list[Message], str]:
        _refuse_half_characters([text for message in messages for text in message.values()])
        try:
            text = self._render_chat(messages, False)
        except TEMPLATE_ERRORS as error:
            raise RowDropped(encodable(f"the chat template refuses it: {error}")[:100]) from error
        _refuse_half_characters([text])
        return messages, text

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
            self._leave_out("no answer within seq_len" if self._mask == "completion" else "a single token")
        return kept

    def _note_progress(self, rendered: list[list[TokenizedSample]]) -> None:
        self.rows += len(rendered)
        self._barren = 0 if any(rendered) else self._barren + len(rendered)
        # twice the rows of an epoch: shuffled anew, the only good row may come first once and last the next time
        if self._barren >= self._barren_limit:
            raise self.unusable()

    def unusable(self, *, rows: str = "rows", hint: str = "") -> DataError:
        """Build the error that says why no row could be used.

        Args:
            rows: What to call them.
            hint: What to do first, if something else is at fault than the format of all rows.
        """
        reasons = ", ".join(f"{count:,} x {reason}" for reason, count in self.dropped.most_common(5))
        shown = f"\nlast rendered sample:\n{self._unmatched}" if self._unmatched else ""
        return DataError(
            f"none of {self._barren:,} {rows} of {self._config.path} can be used: {reasons}{shown}",
            where=self._where,
            hint=f"{hint}compare {self._where}.format and column with the rows of the dataset"
            + (", and them with the tokenizer's chat template" if self._config.format == "messages" else ""),
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

    def _render_chat(self, messages: list[Message], with_prompt: bool, *, marked: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            messages,
            chat_template=self._marking_template if marked else self._template,
            tokenize=False,
            add_generation_prompt=with_prompt,
        )
        if not isinstance(text, str):
            raise TypeError("it renders no text")
        return text

    def _template_error(self, message: str) -> DataError:
        return DataError(
            message,
            where=self._where,
            hint="set mask: all for this stage, or use a teacher whose template marks its answers"
            if self._mask == "completion"
            else "repair chat_template in the teacher's tokenizer_config.json or chat_template.jinja",
        )

    def _check_template(self) -> None:
        """Refuse a template whose answers cannot be found, before any row is read."""
        self._template = self._choose_template()
        if self._mask == "completion" and not self._tokenizer.is_fast:
            raise self._template_error(
                "completion masks need a fast tokenizer: this one does not tell where its tokens begin"
            )
        refusals: list[str] = []
        # some templates want a system message first, or take one turn of each alone; rows may be like that
        system: list[Message] = [{"role": "system", "content": "Answer briefly."}]
        for probe in (PROBE, [*system, *PROBE], PROBE[:2], [*system, *PROBE[:2]]):
            try:
                text = self._render_chat(probe, False)
            except jinja2.TemplateSyntaxError as error:
                raise self._template_error(f"the tokenizer's chat template is broken: {error}") from error
            except TEMPLATE_ERRORS as error:
                refusals.append(str(error))
                continue
            if self._mask == "completion":
                self._check_answers(probe, text)
            return
        if self._mask == "completion":
            raise self._template_error(
                f"the tokenizer's chat template refuses a plain conversation: {refusals[0]}"
            )

    def _choose_template(self) -> str:
        """Choose the template of plain conversations where a tokenizer has several by name."""
        template: Any = self._tokenizer.chat_template
        if isinstance(template, list | tuple):
            template = {each["name"]: each["template"] for each in template}
        if isinstance(template, dict) and "default" not in template:
            raise DataError(
                f"the teacher's tokenizer has templates named {', '.join(map(str, template)) or '(none)'}, but none "
                'named "default"',
                where=self._where,
                hint='name one of them "default" in chat_template of the teacher\'s tokenizer_config.json',
            )
        if isinstance(template, dict):
            template = template["default"]
        if not template:
            raise DataError(
                "the teacher's tokenizer has no chat template, so messages cannot be rendered",
                where=self._where,
                hint="use an instruction-tuned teacher, or format: text or prompt_completion",
            )
        return template

    def _check_answers(self, probe: list[Message], text: str) -> None:
        """Refuse a template that does not tell, of a plain conversation, which part of it the assistant says."""
        try:
            self._end_of_turn = find_end_of_turn(self._render_chat, probe, _special_tokens(self._tokenizer))
            if marks_answers(self._template):
                self._marking_template = with_visible_marks(self._template)
                spans = self._spans_of(probe, text)
                if spans is None:
                    raise self._template_error(
                        "the generation blocks of the tokenizer's chat template mark no answer in what it renders:\n"
                        + text
                    )
                return
            if self._end_of_turn is None:
                raise self._template_error(
                    "the chat template ends no answer with a special token, so a student could not learn to stop; "
                    f"a conversation renders as\n{text}"
                )
            spans = self._spans_of(probe, text)
        except TEMPLATE_ERRORS as error:
            raise self._template_error(
                f"the tokenizer's chat template refuses a plain conversation: {error}"
            ) from error
        if not spans:
            raise self._template_error(
                f"the answers cannot be found in what the chat template renders:\n{text}"
            )

    def _spans_of(
        self, messages: list[Message], text: str, *, stop: int | None = None
    ) -> list[tuple[int, int]] | None:
        """Find the characters of the answers; None if they cannot be told for sure."""
        if self._marking_template is not None:
            return marked_spans(self._render_chat(messages, False, marked=True), text, self._end_of_turn)
        assert self._end_of_turn is not None
        return assistant_spans(self._render_chat, messages, text, self._end_of_turn, stop=stop)

    def _chats(self, chats: list[tuple[list[Message], str]]) -> list[TokenizedSample | None]:
        if self._mask == "all":
            token_ids = self._encode([text for _, text in chats], special=False)["input_ids"]
            return [_sample(ids, spans=None) for ids in token_ids]
        samples: list[TokenizedSample | None] = []
        for chat, encoding in zip(chats, self._encode_heads([text for _, text in chats]), strict=True):
            found = self._found_spans(encoding, *chat)
            if found is None:
                self._leave_out("an answer cannot be found in the rendered conversation")
                self._unmatched = chat[1][:_SHOWN_CHARS]
            samples.append(None if found is None else _sample(encoding.ids, spans=found))
        return samples

    def _encode_heads(self, texts: list[str]) -> list[Encoding]:
        """Encode conversations as far as a sample reaches: many are far longer.

        The cut comes after a special token, a border for the tokenizer: the tokens before it are those of the whole.
        """
        heads = []
        for text in texts:
            cut = (
                text.find(self._end_of_turn, self._seq_len * _MANY_CHARS_PER_TOKEN)
                if self._end_of_turn
                else -1
            )
            heads.append(text if cut < 0 else text[: cut + len(self._end_of_turn or "")])
        encodings = list(self._encode(heads, special=False).encodings or ())
        for index, (text, head) in enumerate(zip(texts, heads, strict=True)):
            if len(head) < len(text) and len(encodings[index].ids) <= self._seq_len:
                encodings[index : index + 1] = self._encode([text], special=False).encodings or ()
        return encodings

    def _found_spans(
        self, encoding: Encoding, messages: list[Message], text: str
    ) -> list[tuple[int, int]] | None:
        """Find the tokens of the answers; None if they cannot be told for sure."""
        offsets = encoding.offsets
        # what is cut off anyway need not be rendered prompt by prompt
        stop = offsets[self._seq_len][0] if len(offsets) > self._seq_len else None
        try:
            spans = self._spans_of(messages, text, stop=stop)
        except TEMPLATE_ERRORS:
            # the whole was rendered, but not each prompt in it
            return None
        return None if spans is None else token_spans(encoding.tokens, offsets, text, spans)


def _sample(ids: list[int], *, spans: list[tuple[int, int]] | None) -> TokenizedSample:
    counted = np.full(len(ids), spans is None)
    for start, end in spans or ():
        counted[start:end] = True
    return TokenizedSample(np.asarray(ids, dtype=np.int64), counted)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def _refuse_half_characters(texts: Sequence[str]) -> None:
    """Leave a row out that holds half of a surrogate pair: it is not text, and no tokenizer takes it."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowDropped("half of a surrogate pair or a broken byte in its text") from error
