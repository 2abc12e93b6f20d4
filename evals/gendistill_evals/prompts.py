"""Render messages and an answer as token ids: by the chat template, or as plain text without one. Imports no torch."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from gendistill_evals.errors import EvalError
from gendistill_evals.items import Message, Prompt, messages_of
from gendistill_evals.reading import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = "Question: {message}\nAnswer:"
# Between earlier turns and the question, where there is no chat template.
_BETWEEN_TURNS = "\n\n"
# A model without a chat template goes on with a question of its own instead of ending its answer.
PLAIN_STOP = "\nQuestion:"
# The words by which templates switch reasoning; each ignores those that it does not know.
_REASONING_SWITCHES = ("enable_thinking", "thinking")
_OPENS_THOUGHT = "<think>"
_OTHER_TEMPLATE = (
    "correct chat_template.jinja, or chat_template in tokenizer_config.json, of a copy of the model; "
    "delete it to ask in plain text"
)
_PROBE = "What is 4821?"


class ChatTemplate(StrEnum):
    """The use of a tokenizer's chat template: ``auto`` where it has one, or ``off`` for plain text."""

    AUTO = "auto"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class Style:
    """The way in which prompts are made of items, for every task and protocol alike.

    Attributes:
        chat_template: Whether the tokenizer's chat template is used.
        system: Text of a system turn, or of what stands first in plain text; None for none.
        reasoning: Whether templates that can open a reasoning block are asked to. What a model writes there is not
            judged, and it gets ``thought_tokens`` more for it. Otherwise they are asked not to.
        few_shot: Examples of the task that are shown first, as turns.
    Raises:
        EvalError: Values that mean nothing, with exit code 2.
    """

    chat_template: ChatTemplate = ChatTemplate.AUTO
    system: str | None = None
    reasoning: bool = False
    few_shot: int = 0

    def __post_init__(self) -> None:
        def refuse(name: str, wanted: str, value: object) -> EvalError:
            return EvalError(f"{name} must be {wanted}, got {shorten(value)}", where="style", exit_code=2)

        if self.chat_template not in list(ChatTemplate):
            raise refuse("chat_template", f"one of {', '.join(ChatTemplate)}", self.chat_template)
        if self.system is not None and (not isinstance(self.system, str) or not self.system.strip()):
            raise refuse("system", "a text with words in it, or left out", self.system)
        if not isinstance(self.reasoning, bool):
            raise refuse("reasoning", "true or false", self.reasoning)
        if not isinstance(self.few_shot, int) or isinstance(self.few_shot, bool) or self.few_shot < 0:
            raise refuse("few_shot", "a whole number from 0", self.few_shot)
        object.__setattr__(self, "chat_template", ChatTemplate(self.chat_template))

    def settings(self) -> dict[str, Any]:
        """Return plain data, for the record."""
        return {**asdict(self), "chat_template": str(self.chat_template)}


PLAIN_STYLE = Style()


def ids_sha256(ids: Sequence[int]) -> str:
    """Hash token ids, each as eight little-endian bytes."""
    packed = array("q", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return hashlib.sha256(packed.tobytes()).hexdigest()


def opened(prompt: Prompt, *, system: str | None = None, shots: Sequence[Message] = ()) -> Prompt:
    """Put a system turn and earlier turns before a question.

    Args:
        prompt: The question, which may have earlier turns of its own.
        system: Text of the system turn, or None.
        shots: Examples as turns of user and assistant; they stand right before the question.
    Raises:
        EvalError: The prompt has a system turn of its own.
    """
    if system is None and not shots:
        return prompt
    turns = messages_of(prompt)
    if system is not None and turns[0]["role"] == "system":
        raise EvalError(
            f"the prompt has a system turn of its own, {shorten(turns[0]['content'])}, and system: gives another",
            hint="leave system out, or take the turn out of the task's prompt",
        )
    first = [] if system is None else [Message(role="system", content=system)]
    return (*first, *turns[:-1], *shots, turns[-1])


class Prompter:
    """Prompts as token ids, made the same way for every protocol.

    Args:
        tokenizer: Tokenizer of the model. With a chat template, a text is one user turn and the answer is the
            start of the assistant's; the template alone places special tokens. Without one, both are plain text
            after the tokenizer's BOS, if it adds one.
        style: Whether the template is used, and whether it opens a reasoning block. System turn and examples are
            part of a prompt (``opened``); here it is only seen to that the template takes the former.
    Raises:
        EvalError: The chat template cannot render a user's message or the style's system turn, or leaves it out; or it
            has no reasoning to switch on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style = PLAIN_STYLE) -> None:
        self.tokenizer = tokenizer
        self.style = style
        self.template = None if style.chat_template is ChatTemplate.OFF else _chat_template(tokenizer)
        self._bos = [] if self.template else _added_bos(tokenizer)
        if self.template and _PROBE not in (rendered := self._prompt(_PROBE)):
            raise EvalError(
                f"the tokenizer's chat template leaves the user's message out: it renders {shorten(rendered)}",
                where=_template_of(tokenizer),
                hint=_OTHER_TEMPLATE,
            )
        if style.system is not None:
            self._check_system(style.system)
        if style.reasoning:
            self._check_reasoning()

    @property
    def template_sha256(self) -> str | None:
        """Hash of the chat template; None if there is none."""
        return hashlib.sha256(self.template.encode()).hexdigest() if self.template else None

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end every answer, whatever the task."""
        return () if self.template else (PLAIN_STOP,)

    def settings(self) -> dict[str, Any]:
        """Return what shapes prompts, for the record."""
        return {
            "chat_template_sha256": self.template_sha256,
            "chat_template_settings": self._switches(self.style.reasoning) if self.template else None,
            "plain_template": None if self.template else PLAIN_TEMPLATE,
            "style": self.style.settings(),
        }

    def opens_thought(self, prompt: Prompt) -> bool:
        """Whether the rendered prompt ends inside a reasoning block, which the answer therefore does not open."""
        return self._prompt(prompt).rstrip().endswith(_OPENS_THOUGHT)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Tokenize a prompt up to where the answer begins.

        Raises:
            EvalError: The tokenizer has no token for any of it, or the chat template cannot render its turns.
        """
        ids = self._ids(self._prompt(prompt))
        if not ids:
            raise EvalError(
                f"the tokenizer makes no token of the prompt {shorten(prompt)}",
                hint="score the model with the tokenizer it was trained with",
            )
        return ids

    def split(self, prompt: Prompt, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokenize a prompt with each possible answer, and split them at one place.

        The last characters of the prompt and the first of an answer may share a token. The split is therefore
        the longest beginning that the prompt and all the tokenized answers have in common; what follows it is
        scored for every option, so that their totals compare the same text.

        Args:
            prompt: The user's message, or the turns before the answer.
            options: Possible answers.
        Returns: Token ids of the common beginning, and for each option the ids that follow it, at least one.
        Raises:
            EvalError: Nothing is common, so that the first token would have no context, or the chat template cannot
                render the turns.
        """
        text = self._prompt(prompt)
        lead = "" if self.template else " "
        whole = [self._ids(f"{text}{lead}{option}") for option in options]
        # The shortest answer may not be swallowed whole: every one keeps a token to score.
        length = min(_common_length([self._ids(text), *whole]), min(map(len, whole)) - 1)
        if length < 1:
            raise EvalError(
                "the prompt and its options have no first token in common",
                hint="give the task a prompt that is not empty",
            )
        return whole[0][:length], [ids[length:] for ids in whole]

    def _prompt(self, prompt: Prompt) -> str:
        messages = messages_of(prompt)
        if self.template is None:
            return _plain_text(messages)
        alone = len(messages) == 1
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": each["role"], "content": each["content"]} for each in messages],
                tokenize=False,
                add_generation_prompt=True,
                **self._switches(self.style.reasoning),
            )
        except _template_errors() as error:
            turns = "a question without a system message" if alone else f"the turns {_roles(messages)}"
            raise EvalError(
                f"the tokenizer's chat template cannot render {turns}: {error}",
                where=_template_of(self.tokenizer),
                hint=_OTHER_TEMPLATE,
            ) from error
        assert isinstance(text, str)
        # One turn is tried when the prompter is made; what becomes of several depends on which they are.
        if not alone and (
            lost := next((each for each in messages if each["content"].strip() not in text), None)
        ):
            raise EvalError(
                f"the tokenizer's chat template leaves a turn out: it renders {_roles(messages)} without the "
                f"{lost['role']}'s {shorten(lost['content'])}",
                where=_template_of(self.tokenizer),
                hint="write the prompt of the task as one text, or score a model whose template takes such turns",
            )
        return text

    def _switches(self, reasoning: bool) -> dict[str, Any]:
        return dict.fromkeys(_REASONING_SWITCHES, reasoning)

    def _check_system(self, system: str) -> None:
        """Refuse a system turn that the template forbids or drops; plain text takes any."""
        if self.template is None:
            return
        asked = opened(_PROBE, system=system)
        hint = "leave the system text out, or ask without the template: --chat-template off"
        try:
            rendered = self._prompt(asked)
        except EvalError as error:
            raise EvalError(
                f"the chat template takes no system turn: {error.message}", where=error.where, hint=hint
            ) from error
        if system.strip() not in rendered or rendered == self._prompt(_PROBE):
            raise EvalError(
                f"the tokenizer's chat template drops the system turn {shorten(system)}: it renders "
                f"{shorten(rendered)}",
                where=_template_of(self.tokenizer),
                hint=hint,
            )

    def _check_reasoning(self) -> None:
        """Refuse to switch on what a tokenizer has no switch for."""
        hint = "leave reasoning out: a model that always reasons does so without it"
        if self.template is None:
            raise EvalError(
                "reasoning is switched by a chat template, and prompts are plain text",
                where=_template_of(self.tokenizer),
                hint=hint,
            )
        if self._prompt(_PROBE) == Prompter(self.tokenizer)._prompt(_PROBE):
            raise EvalError(
                "the tokenizer's chat template has no reasoning to switch on: it renders the same with and without "
                + " and ".join(_REASONING_SWITCHES),
                where=_template_of(self.tokenizer),
                hint=hint,
            )

    def _ids(self, text: str) -> list[int]:
        return self._bos + list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenize a text as it is, after the tokenizer's BOS if it adds one."""
    return [*_added_bos(tokenizer), *tokenizer(text, add_special_tokens=False)["input_ids"]]


def _template_errors() -> tuple[type[Exception], ...]:
    """What a template, which is a program of the checkpoint's, may raise."""
    # Imported here: recipes are read without it.
    from jinja2 import TemplateError

    return (
        *(
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
        ),
        ValueError,
    )


def _plain_text(messages: Sequence[Message]) -> str:
    """Write turns as questions and answers, up to where the last answer begins."""
    parts: list[str] = []
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            parts[-1] += f" {content}"
        else:
            parts.append(PLAIN_TEMPLATE.format(message=content) if message["role"] == "user" else content)
    return _BETWEEN_TURNS.join(parts)


def _roles(messages: Sequence[Message]) -> str:
    return ", ".join(message["role"] for message in messages)


def _chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the template for messages; None where the tokenizer has none."""
    if not tokenizer.chat_template:
        return None
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        names = ", ".join(map(str, tokenizer.chat_template))
        raise EvalError(
            f"the tokenizer has several chat templates, and none is the default: {names}",
            where=_template_of(tokenizer),
            hint='rename one of them to "default", or keep that one alone as the text of chat_template',
        )
    template = tokenizer.get_chat_template()
    try:
        template.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise EvalError(
            f"the tokenizer's chat template is not a text: {error}",
            where=_template_of(tokenizer),
            hint=_OTHER_TEMPLATE,
        ) from error
    return template


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    folder = tokenizer.name_or_path
    return f"chat template of {folder}" if folder else "chat template"


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the tokenizer puts before a text; what it puts after (an end token) has no place in a prompt."""
    with_special = list(tokenizer("a")["input_ids"])
    starts_with_bos = tokenizer.bos_token_id is not None and with_special[:1] == [tokenizer.bos_token_id]
    return with_special[:1] if starts_with_bos else []


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    length = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    return length
