"""Render a user's message and an answer as token ids: by the chat template, or as plain text without one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from gendistill_evals.errors import EvalError

PLAIN_TEMPLATE = "Question: {message}\nAnswer:"
# A model without a chat template goes on with a question of its own instead of ending its answer.
PLAIN_STOP = "\nQuestion:"
# Answers are short, so templates that can open a reasoning block are asked not to; others ignore it.
TEMPLATE_SETTINGS: dict[str, Any] = {"enable_thinking": False}


class Prompter:
    """Turn messages into token ids, the same way for every protocol.

    Args:
        tokenizer: Tokenizer of the model. With a chat template, a message is one user turn and the answer is the
            start of the assistant's; the template alone places special tokens. Without one, both are plain text
            after the tokenizer's BOS, if it adds one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.template = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self._bos = [] if self.template else _added_bos(tokenizer)

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
            "chat_template_settings": TEMPLATE_SETTINGS if self.template else None,
            "plain_template": None if self.template else PLAIN_TEMPLATE,
        }

    def prompt_ids(self, message: str) -> list[int]:
        """Tokenize a message up to where the answer begins."""
        return self._ids(self._prompt(message))

    def split(self, message: str, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokenize a message with each possible answer, and split them at one place.

        The last characters of the prompt and the first of an answer may share a token. The split is therefore
        the longest beginning that the prompt and all the tokenized answers have in common; what follows it is
        scored for every option, so that their totals compare the same text.

        Args:
            message: The user's message.
            options: Possible answers.
        Returns: Token ids of the common beginning, and for each option the ids that follow it, at least one.
        Raises:
            EvalError: Nothing is common, so that the first token would have no context.
        """
        prompt = self._prompt(message)
        lead = "" if self.template else " "
        whole = [self._ids(f"{prompt}{lead}{option}") for option in options]
        # The shortest answer may not be swallowed whole: every one keeps a token to score.
        length = min(_common_length([self._ids(prompt), *whole]), min(map(len, whole)) - 1)
        if length < 1:
            raise EvalError(
                "the prompt and its options have no first token in common",
                hint="give the task a prompt that is not empty",
            )
        return whole[0][:length], [ids[length:] for ids in whole]

    def _prompt(self, message: str) -> str:
        if self.template is None:
            return PLAIN_TEMPLATE.format(message=message)
        turn = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, **TEMPLATE_SETTINGS
        )
        assert isinstance(text, str)
        return text

    def _ids(self, text: str) -> list[int]:
        return self._bos + list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


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
