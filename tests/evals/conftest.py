"""A tokenizer trained on a few lines, a random Llama, and a model that says what a test tells it to."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

from gendistill_evals.model import Generated, ModelSetup

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LINES = [
    "What color is a ripe banana? yellow blue red green",
    "Question: What is the capital of France? Answer: Paris London Rome Madrid",
    "user assistant the answer is A B C D and 0 1 2 3 4 5 6 7 8 9",
]


def build_tokenizer(*, chat_template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(chat_template=CHAT)


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(chat_template=None)


def build_llama(vocab_size: int, *, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Large enough that positions and contexts change which token is best.
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_llama(chat_tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return build_llama(len(chat_tokenizer))


class Speaker(PreTrainedModel, GenerationMixin):
    """Say a planned reply after each prompt, and prefer a planned answer among unsaid ones.

    Args:
        tokenizer: Tokenizer with the chat template above.
        says: Reply to a prompt's text; it is followed by the end of the turn if ``ends``.
        prefers: Answer that has the second-highest logit at each of its positions; None prefers nothing.
        ends: Whether the reply is followed by the end of the turn or repeated for ever.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        says: Callable[[str], str],
        *,
        prefers: Callable[[str], str] | None = None,
        ends: bool = True,
    ) -> None:
        super().__init__(PretrainedConfig(vocab_size=len(tokenizer), num_hidden_layers=1))
        self.anchor = nn.Parameter(torch.zeros(1))
        self.tokenizer = tokenizer
        self.says = says
        self.prefers = prefers
        self.ends = ends
        self.opening = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        self.num_forwards = 0

    @property
    def device(self) -> torch.device:
        return self.anchor.device

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, attention_mask=None, **kwargs) -> CausalLMOutput:
        self.num_forwards += 1
        logits = torch.zeros(*input_ids.shape, len(self.tokenizer))
        for row, ids in zip(logits, input_ids.tolist(), strict=True):
            answer_at = self._answer_start(ids)
            prompt = self.tokenizer.decode(ids[:answer_at])
            said = self._ids(self.says(prompt))
            if self.ends:
                said += self._ids("<|im_end|>")
            preferred = self._ids(self.prefers(prompt)) if self.prefers else []
            for at in range(answer_at - 1, len(ids)):
                place = at - answer_at + 1
                if place < len(preferred):
                    row[at, preferred[place]] = 5
                row[at, said[min(place, len(said) - 1)]] = 10
        return CausalLMOutput(logits=logits)

    def _answer_start(self, ids: list[int]) -> int:
        width = len(self.opening)
        return next(end for end in range(len(ids), width - 1, -1) if ids[end - width : end] == self.opening)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class Scripted:
    """A model that gives each option the log-probability of a table and says the reply of a function."""

    max_tokens = vocab_size = None

    def __init__(self, tokenizer, *, log_probs=None, says=lambda prompt: ""):
        self.tokenizer, self.generation_defaults = tokenizer, {}
        self.table, self.says = log_probs or {}, says
        self.prompts = []

    def identity(self):
        return {"weights": "scripted"}

    def setup(self):
        return ModelSetup("paper", "float32", {}, None)

    def log_probs(self, pairs):
        for index, pair in enumerate(pairs):
            self.prompts.append(self.tokenizer.decode(pair.context))
            total = self.table.get(self.tokenizer.decode(pair.continuation).strip(), -50.0)
            yield index, [total / len(pair.continuation)] * len(pair.continuation)

    def generate(self, requests, decoding):
        for index, request in enumerate(requests):
            prompt = self.tokenizer.decode(request.prompt)
            self.prompts.append(prompt)
            text = self.says(prompt)
            ids = self.tokenizer(text)["input_ids"]
            kept = self.tokenizer.decode(ids[: request.max_new_tokens])
            cut = min((kept.find(stop) for stop in request.stop if stop in kept), default=len(kept))
            ended = len(ids) <= request.max_new_tokens or cut < len(kept)
            yield index, Generated(tuple(ids[: request.max_new_tokens]), kept[:cut].strip(), ended)


@pytest.fixture
def scripted() -> type[Scripted]:
    """Return the class of models that a test writes the answers of."""
    return Scripted


@pytest.fixture
def speaker(chat_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Speaker]:
    def build(says: Callable[[str], str], **settings) -> Speaker:
        return Speaker(chat_tokenizer, says, **settings)

    return build


@pytest.fixture
def write_task(tmp_path: Path) -> Callable[..., Path]:
    """Write a task file with its items, and return the path of the YAML."""

    def write(rows: list[dict], *, stem: str = "demo", **settings) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        content = {"items": f"{stem}.jsonl", "max_new_tokens": 8, "prompt": "{question}", **settings}
        path = folder / f"{stem}.yaml"
        path.write_text(json.dumps(content))
        return path

    return write


COLORS = [
    {"id": "banana", "question": "What color is a ripe banana?", "options": ["yellow", "blue"], "gold": "yellow"},
    {"id": "sky", "question": "What color is the sky?", "options": ["red", "blue", "green"], "gold": "blue"},
    {"id": "grass", "question": "What color is grass, when it is fresh?", "options": ["blue", "green"],
     "gold": "green"},
    {"id": "blood", "question": "Blood?", "options": ["dark red", "red", "yellow", "green"], "gold": "red"},
]  # fmt: skip
GOLD = {row["question"]: row["gold"] for row in COLORS}


@pytest.fixture
def colors(write_task: Callable[..., Path]) -> Path:
    return write_task(COLORS, stem="colors", kind="multiple_choice")


@pytest.fixture
def right_answer() -> Callable[[str], str]:
    def answer(prompt: str) -> str:
        return next((gold for question, gold in GOLD.items() if question in prompt), "0")

    return answer
