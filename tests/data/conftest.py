"""A tiny byte-level tokenizer, chat templates of the families that users bring, and recipes over local rows."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gendistill.config.schema import Recipe

SPECIALS = [
    "<|bos|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "</s>",
]

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# thinking survives only in the last answer, which gets an empty block if it has none
QWEN3 = (
    "{% for m in messages %}{% if m['role'] != 'assistant' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% else %}{% set ns = namespace(c=m['content'], r='') %}"
    "{% if m['reasoning_content'] %}{% set ns.r = m['reasoning_content'] %}"
    "{% elif '</think>' in ns.c %}"
    "{% set ns.r = ns.c.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set ns.c = ns.c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.last %}<think>\n{{ ns.r }}\n</think>\n\n{% endif %}{{ ns.c }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# the generation prompt opens a thinking block that earlier answers do not have
THINKING_PROMPT = QWEN3.removesuffix("{% endif %}") + "<think>\n{% endif %}"
# thinking is stripped from every answer, yet the generation prompt opens it
REASONER = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|im_start|>{{ m['content'].split('</think>')[-1] }}</s>{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHOUTING = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% else %}"
    "{{ m['content'] | upper }}{% endif %}<|im_end|>{% endfor %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "thinking_prompt": THINKING_PROMPT,
    "reasoner": REASONER,
    "mistral": MISTRAL,
    "marked": MARKED,
    "no_end": NO_END,
    "shouting": SHOUTING,
}

WORDS = "river stone Anna's blue 42 über naïve 日本 😀 <b> {x} tea; (maybe) light? if == 1: end. a I of system user"


@pytest.fixture(scope="session")
def hub_twin() -> ModuleType:
    """The module ``hub_twin``."""
    spec = importlib.util.spec_from_file_location("hub_twin", Path(__file__).with_name("hub_twin.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every test's cache to itself."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GENDISTILL_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def trained() -> str:
    """Train a byte-level BPE once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    tokenizer.train_from_iterator(
        (" ".join(rng.choices(WORDS.split(), k=30)) + "\n\n" for _ in range(200)), trainer
    )
    return tokenizer.to_str()


@pytest.fixture(scope="session")
def make_tokenizer(trained: str) -> Callable[..., PreTrainedTokenizerFast]:
    """Build tokenizers that differ in chat template and in what they add by themselves."""

    def make(
        template: str | None = "chatml",
        *,
        eos: str | None = "<|im_end|>",
        adds: str = "",
        newline_runs: bool = False,
        **more: Any,
    ) -> PreTrainedTokenizerFast:
        backend = Tokenizer.from_str(trained)
        if newline_runs:
            # as in Llama 3 and Qwen: line breaks stay together, whatever follows
            whole_runs = pre_tokenizers.Split(Regex("\n+"), "isolated")
            backend.pre_tokenizer = pre_tokenizers.Sequence([whole_runs, backend.pre_tokenizer])
        single = {
            "": "$A",
            "bos": "<|bos|> $A",
            "eos": "$A <|im_end|>",
        }[adds]
        used = [(token, backend.token_to_id(token)) for token in ("<|bos|>", "<|im_end|>")]
        byte_level = processors.ByteLevel(trim_offsets=True)
        backend.post_processor = processors.Sequence(
            [byte_level, processors.TemplateProcessing(single=single, special_tokens=used)]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<|bos|>",
            eos_token=eos,
            extra_special_tokens=SPECIALS,
            **more,
        )
        tokenizer.chat_template = TEMPLATES[template] if template else None
        return tokenizer

    return make


def random_text(rng: random.Random, low: int = 1, high: int = 12) -> str:
    """Join random words with the white space that tokenizers merge."""
    words = rng.choices(WORDS.split(), k=rng.randint(low, high))
    return words[0] + "".join(rng.choice([" ", " ", "\n", "  ", "\n\n"]) + word for word in words[1:])


@pytest.fixture(scope="session")
def make_text() -> Callable[..., str]:
    """Random texts with awkward characters; never blank at either end."""
    return random_text


@pytest.fixture
def text_rows(tmp_path: Path) -> Path:
    """Write 40 numbered documents of many lengths."""
    rng = random.Random(1)
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"{index}: {random_text(rng, 1, 60)}"} for index in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def chat_rows(tmp_path: Path) -> Path:
    """Write 40 ShareGPT conversations, a quarter of them unusable, as one JSON array."""
    rng = random.Random(2)
    path = tmp_path / "chat.json"
    rows = []
    for index in range(40):
        first = "gpt" if index % 4 == 3 else "human"
        second = "human" if first == "gpt" else "gpt"
        turns = [
            {"from": (first, second)[turn % 2], "value": f"{index}.{turn} {random_text(rng)}"}
            for turn in range(2 * rng.randint(1, 3))
        ]
        rows.append({"id": str(index), "conversations": turns})
    path.write_text(json.dumps(rows, indent=2))
    return path


@pytest.fixture
def make_recipe() -> Callable[..., Recipe]:
    """Build a recipe of two equal stages over the first dataset, or over the one named."""

    def make(
        data: dict[str, Any],
        *,
        heldout: dict[str, Any] | None = None,
        on: str = "",
        seed: int = 7,
        engine: dict[str, Any] | None = None,
        **stage: Any,
    ) -> Recipe:
        settings = {"data": on or next(iter(data)), "train": ["mixer"], "steps": 5, "lr": 1e-3}
        settings |= {"seq_len": 48, "batch_size": 4, "micro_batch_size": 2, **stage}
        reserve = {"data": next(iter(data)), "rows": 5, "seq_len": 48, **(heldout or {})}
        return Recipe.model_validate(
            {
                "schema": 1,
                "name": "test",
                "seed": seed,
                "teacher": {"model": "teacher"},
                "student": {"placement": "kda"},
                "data": data,
                "heldout": reserve,
                "engine": engine or {},
                "stages": {"distill": settings, "instruct": settings},
            }
        )

    return make
