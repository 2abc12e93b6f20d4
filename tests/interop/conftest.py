"""A trained tokenizer, checkpoints of a tiny teacher and a tiny student with it, and lm-eval tasks in files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gendistill.models.io import save_student
from gendistill.testing import tiny_student, tiny_teacher

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# every answer stands at every place once in five, and options differ in length
DOCS = [
    {
        "question": f"What comes after {number}?",
        "choices": [f"{(number + step) * 7 % 23} apples", f"{number + step} ripe bananas", "none", "a fish"],
        "gold": number % 4,
        "letter": "ABCD"[number % 4],
    }
    for number, step in zip(range(12), [1, 2, 3] * 4, strict=True)
]
_LINES = [json.dumps(doc) for doc in DOCS] + ["Question: Answer: A B C D user assistant the answer is"]


def _tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    backend.train_from_iterator(
        _LINES,
        trainers.BpeTrainer(
            vocab_size=330,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", special.index("<s>"))]
        )
    names = {"eos_token": special[0], "pad_token": special[0], **({"bos_token": "<s>"} if bos else {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT, **names)


def _save(folder: Path, model: Any, *, bos: bool) -> Path:
    tokens = folder.with_name(f"{folder.name}-tokenizer")
    _tokenizer(bos=bos).save_pretrained(tokens)
    save_student(model, folder, companions=tokens)
    return folder


@pytest.fixture(scope="session")
def teacher(tmp_path_factory) -> Path:
    """A Llama of few positions, whose tokenizer begins every text with a token."""
    size = len(_tokenizer(bos=True))
    model = tiny_teacher(vocab_size=size, max_position_embeddings=96, bos_token_id=3, eos_token_id=0)
    return _save(tmp_path_factory.mktemp("models") / "teacher", model, bos=True)


@pytest.fixture(scope="session")
def student(tmp_path_factory) -> Path:
    """A hybrid student, whose tokenizer begins texts with nothing."""
    model = tiny_student(vocab_size=len(_tokenizer(bos=False)), bos_token_id=None, eos_token_id=0)
    return _save(tmp_path_factory.mktemp("models") / "student", model, bos=False)


@pytest.fixture(autouse=True)
def _offline(tmp_path_factory, monkeypatch):
    """Keep lm-eval from the network and its data sets out of the home folder."""
    import datasets
    from lm_eval import evaluator
    from lm_eval.tasks._index import TaskIndex

    # the variable for processes that tests start, the constant for this one, which has read it already
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # it lists the packages of the machine, which takes seconds
    monkeypatch.setattr(evaluator, "add_env_info", lambda storage: None)
    # so does reading the thousands of tasks that lm-eval ships, of which none is asked here
    build = TaskIndex.build
    shipped = Path(evaluator.__file__).parent / "tasks"
    monkeypatch.setattr(
        TaskIndex, "build", staticmethod(lambda paths: build([each for each in paths if each != shipped]))
    )
    monkeypatch.setattr(
        datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets")
    )
    torch.manual_seed(0)


@pytest.fixture
def write_task(tmp_path) -> Callable[..., Path]:
    """Write an lm-eval task file; keys that are None are left out."""

    def write_task(name: str = "task", docs: list[dict[str, Any]] | None = None, **keys: Any) -> Path:
        rows = tmp_path / f"{name}.jsonl"
        rows.write_text("".join(json.dumps(doc) + "\n" for doc in docs or DOCS))
        content = {
            "task": f"tiny_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows)}},
            "test_split": "test",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            **keys,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
        return path

    return write_task


MEAN = {"aggregation": "mean", "higher_is_better": True}


@pytest.fixture
def choice_task(write_task) -> Callable[..., Path]:
    """Write a multiple-choice task."""

    def choice_task(name: str = "choice", **keys: Any) -> Path:
        usual = {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
        }
        return write_task(name, **{**usual, **keys})

    return choice_task


@pytest.fixture
def answer_task(write_task) -> Callable[..., Path]:
    """Write a task of generated answers."""

    def answer_task(name: str = "answer", **keys: Any) -> Path:
        usual = {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[gold]}}",
            "generation_kwargs": {"until": ["\n\n", "Question:"], "max_gen_toks": 14, "do_sample": False},
            "filter_list": [
                {
                    "name": "first",
                    "filter": [
                        {"function": "regex", "regex_pattern": r"(\w)"},
                        {"function": "take_first"},
                    ],
                }
            ],
            "metric_list": [{"metric": "exact_match", **MEAN}],
        }
        return write_task(name, **{**usual, **keys})

    return answer_task
