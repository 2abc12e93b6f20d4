"""Ask a model: texts and turns in, answers of the generation engine out, drawn and ended in one manner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

from gendistill.errors import DataError, RecipeError
from gendistill.generation.engine import Engine
from gendistill.generation.request import Answer, Prompt
from gendistill.generation.sampling import Sampling
from gendistill.generation.stops import whole_text
from gendistill.generation.streaming import Stream
from gendistill.text import printable
from gendistill_evals import EvalError, HFModel, Message
from gendistill_evals.decoding import end_tokens
from gendistill_evals.prompts import Prompter, text_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# longest answer in tokens where nobody says it, if the model has so many positions left
NEW_TOKENS = 512

Asked = str | Sequence[Message]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How a model is asked, and how its answers are drawn and end.

    Attributes:
        raw: Whether texts are completed as they are; without a chat template they always are.
        system: The first turn of chats that have no system turn; None for none.
        sampling: How tokens are chosen.
        end_tokens: Texts of the tokens that end an answer, in place of those that model, tokenizer and chat template
            name; none of them for answers of full length.
    """

    raw: bool = False
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    end_tokens: Sequence[str] | None = None


class Answerer:
    """A model that is asked in one manner.

    Args:
        model: Of a family that the engine runs, where it will run.
        tokenizer: Its tokenizer.
        manner: How it is asked.
        max_rows: Most answers at a time; None for as many as memory allows.

    Attributes:
        engine: Runs the model; its ``stats`` are those of the last answers.
        is_raw: Whether texts are completed as they are.
        end_ids: Tokens that end an answer.

    Raises:
        RecipeError: A system turn without a chat template, or an end token that is not one or that nobody names.
        EvalError: A chat template that cannot be used.
        GendistillError: A model that the engine cannot run; says why.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        manner: Manner,
        *,
        max_rows: int | None = None,
    ) -> None:
        self.tokenizer, self.manner = tokenizer, manner
        self.is_raw = manner.raw or not tokenizer.chat_template
        self._prompter = None if self.is_raw else Prompter(tokenizer)
        if self._prompter is None and manner.system is not None:
            raise RecipeError(
                "a system turn needs a chat"
                + (", and raw texts are none" if manner.raw else ", and the tokenizer has no chat template"),
                where="system",
                hint="write it into the text, before the prompt",
            )
        described = HFModel(model, tokenizer)
        self._positions = described.max_tokens
        if manner.end_tokens is not None:
            self.end_ids = frozenset(_token_id(tokenizer, text) for text in manner.end_tokens)
        else:
            template = self._prompter.template if self._prompter else None
            self.end_ids = frozenset(end_tokens(tokenizer, template, described.generation_defaults))
            if not self.end_ids:
                raise RecipeError(
                    "nothing says which token ends an answer: neither the model's generation settings, nor its "
                    "tokenizer, nor a chat template",
                    where="end tokens",
                    hint="name one with --end-token TEXT, or ask for answers of full length with --end-token none; "
                    'in Python: end_tokens=["TEXT"], or []',
                )
        self.engine = Engine(model, tokenizer, max_rows=max_rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()

    def prompt(
        self, asked: Asked, *, max_new_tokens: int | None = None, stop: Sequence[str] = (), seed: int = 0
    ) -> Prompt:
        """Make a prompt of a text, which is one user turn where the model chats, or of turns.

        Args:
            asked: The text or the turns.
            max_new_tokens: Longest answer; None for 512, or as many as the model has positions left.
            stop: Texts that end the answer.
            seed: Of its draws.
        Raises:
            DataError: It cannot be asked: no room for a token, an empty stop text, turns without a chat template, or
                turns that the template does not take.
        """
        if "" in stop or (max_new_tokens is not None and max_new_tokens < 1):
            raise DataError(
                f"a stop text must have a character, got {list(stop)!r}"
                if "" in stop
                else f"max_new_tokens must be at least 1, got {max_new_tokens}",
                hint="correct it, or leave it out",
            )
        ids = self._text_ids(asked) if self._prompter is None else self._turn_ids(self._prompter, asked)
        if max_new_tokens is None:
            left = NEW_TOKENS if self._positions is None else self._positions - len(ids)
            max_new_tokens = max(1, min(NEW_TOKENS, left))
        return Prompt(ids, max_new_tokens, tuple(stop), seed)

    def answers(
        self, prompts: Sequence[Prompt], *, watch: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[int, Answer]]:
        """Yield number and answer of every prompt as it ends; ``watch`` gets number and token as each comes.

        The text of an answer to a raw text keeps the white space around it, which may be an indentation.
        """
        found = self.engine.generate(
            prompts, end_ids=self.end_ids, sampling=self.manner.sampling, watch=watch
        )
        for number, answer in found:
            if self.is_raw and answer.error is None:
                text = whole_text(self.tokenizer, answer.token_ids, prompts[number].stop)
                answer = dataclasses.replace(answer, text=text)
            yield number, answer

    def stream(self, prompt: Prompt) -> Stream:
        """Return what makes text of the tokens of an answer to this prompt."""
        return Stream(self.tokenizer, end_ids=self.end_ids, stop=prompt.stop, strip=not self.is_raw)

    def _text_ids(self, asked: Asked) -> list[int]:
        if not isinstance(asked, str):
            reason = (
                "texts are completed as they are" if self.manner.raw else "the tokenizer has no chat template"
            )
            raise DataError(f"these are turns of a chat, and {reason}", hint="give a text as prompt")
        return text_ids(self.tokenizer, _encodable(asked))

    def _turn_ids(self, prompter: Prompter, asked: Asked) -> list[int]:
        turns = [Message(role="user", content=asked)] if isinstance(asked, str) else list(asked)
        for turn in turns:
            _encodable(turn["content"])
        if turns and turns[-1]["role"] == "assistant":
            raise DataError(
                "the last turn is the assistant's: there is nothing to answer",
                hint="leave it out, or complete it as raw text",
            )
        if self.manner.system is not None and turns[:1] and turns[0]["role"] != "system":
            turns.insert(0, Message(role="system", content=self.manner.system))
        try:
            return prompter.prompt_ids(tuple(turns))
        except EvalError as error:
            raise DataError(
                error.message, where=error.where, hint="ask in other turns, or with raw text"
            ) from error


def why(prompt: Prompt, answer: Answer) -> str:
    """Say in a few words why an answer ended."""
    if answer.error is not None:
        return answer.error
    if not answer.ended:
        return f"cut at {prompt.max_new_tokens:,} tokens"
    # of all tokens that were chosen, the end token alone is not part of the answer
    by_token = len(answer.log_probs) > len(answer.token_ids)
    return "ended by the model" if by_token else "ended by a stop text"


def _token_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Find the one token of a text."""
    known = tokenizer.get_vocab().get(text)
    if known is not None:
        return known
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if len(ids) != 1:
        raise RecipeError(
            f"{printable(text)!r} is not a token of the model's tokenizer, which makes {len(ids)} of it",
            where="end token",
            hint="give the text of one token; a stop text (--stop) may have any length",
        )
    return ids[0]


def _encodable(text: str) -> str:
    """Refuse text that no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text is not UTF-8: it holds half of a character at {error.start:,}",
            hint="save it as UTF-8",
        ) from error
    return text
