from __future__ import annotations

import copy

import pytest
import torch
from transformers import GenerationConfig

from gendistill_evals import PROTOCOLS, EvalError, HFModel, load_task
from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.model import Request
from gendistill_evals.prompts import Prompter

GENERATION = PROTOCOLS["generation"]

MESSAGES = [
    "What color is a ripe banana?",
    "A?",
    "Question: What is the capital of France, and of Spain?",
    "B",
]


def answers(model, tokenizer, messages=MESSAGES, *, max_new_tokens=8, stop=(), batch_size=4):
    prompter, wrapped = Prompter(tokenizer), HFModel(model, tokenizer, batch_size=batch_size)
    requests = [Request(prompter.prompt_ids(message), max_new_tokens, tuple(stop)) for message in messages]
    found = dict(wrapped.generate(requests, greedy_decoding(wrapped, prompter)))
    return [found[index] for index in range(len(requests))]


def decoding_of(model, tokenizer):
    return greedy_decoding(HFModel(model, tokenizer), Prompter(tokenizer))


def naive_greedy(model, prompt: list[int], ends: tuple[int, ...], max_new_tokens: int) -> list[int]:
    """Take the best next token again and again: no cache, no padding, no ``generate``."""
    said: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            best = model(torch.tensor([prompt + said])).logits[0, -1].argmax().item()
        if best in ends:
            break
        said.append(best)
    return said


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_padded_batches_say_what_each_prompt_says_alone(tiny_llama, chat_tokenizer, batch_size):
    prompter = Prompter(chat_tokenizer)
    ends = decoding_of(tiny_llama, chat_tokenizer).eos_token_ids
    for message, answer in zip(
        MESSAGES, answers(tiny_llama, chat_tokenizer, batch_size=batch_size), strict=True
    ):
        expected = naive_greedy(tiny_llama, prompter.prompt_ids(message), ends, 8)
        assert list(answer.token_ids) == expected
        assert answer.ended == (len(expected) < 8)


@pytest.mark.parametrize(
    "theirs",
    [
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 200))},
        {"do_sample": True, "temperature": 9.0},
        {"num_beams": 3},
        {"min_new_tokens": 3, "forced_eos_token_id": 7},
    ],
    ids=lambda value: next(iter(value)),
)
def test_nothing_in_the_checkpoint_changes_greedy_decoding(tiny_llama, chat_tokenizer, theirs):
    plain = answers(tiny_llama, chat_tokenizer)
    changed = GenerationConfig(**theirs)
    tiny_llama.generation_config = changed
    torch.manual_seed(1)
    assert answers(tiny_llama, chat_tokenizer) == plain
    assert decoding_of(tiny_llama, chat_tokenizer).overrode == theirs
    assert tiny_llama.generation_config is changed


def test_every_field_that_decides_a_token_is_recorded(tiny_llama, chat_tokenizer):
    settings = decoding_of(tiny_llama, chat_tokenizer).settings()
    expected = {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
    }
    assert expected.items() <= settings.items()
    ends = chat_tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert settings["eos_token_id"] == ends
    assert settings["pad_token_id"] == ends[0]


def test_pad_is_an_end_token_where_the_tokenizer_has_none(tiny_llama, plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.pad_token = None
    decoding = decoding_of(tiny_llama, tokenizer)
    assert decoding.pad_token_id == decoding.eos_token_ids[0]


def test_an_answer_ends_by_token_by_text_or_at_the_limit(speaker, chat_tokenizer):
    short = answers(speaker(lambda prompt: "yellow"), chat_tokenizer, ["a"])[0]
    assert (short.text, short.ended, short.truncated) == ("yellow", True, False)

    endless = answers(speaker(lambda prompt: "0", ends=False), chat_tokenizer, ["a"])[0]
    assert (endless.text, endless.ended, endless.truncated) == ("0" * 8, False, True)

    talker = speaker(
        lambda prompt: "red\nblue green" if "Sky" in prompt else "yellow yellow yellow", ends=False
    )
    stopped, other = answers(talker, chat_tokenizer, ["Sky?", "Banana?"], stop=["\n"])
    assert (stopped.text, stopped.ended) == ("red", True)
    assert other.truncated


def test_an_end_token_as_the_last_allowed_token_is_no_truncation(speaker, chat_tokenizer):
    reply = "0123456"
    assert len(chat_tokenizer(reply)["input_ids"]) == 7
    (answer,) = answers(speaker(lambda prompt: reply), chat_tokenizer, ["a"])
    assert (answer.text, answer.ended) == (reply, True)


def test_counts_add_up(speaker, chat_tokenizer, colors):
    replies = {"banana": "It is yellow", "sky": "blue", "grass": "0", "Blood": "red or green"}
    model = speaker(lambda prompt: next(reply for word, reply in replies.items() if word in prompt))
    run = GENERATION.run(HFModel(model, chat_tokenizer, batch_size=3), load_task(colors))
    assert [sample["extracted"] for sample in run.samples] == ["yellow", "blue", None, None]
    assert run.score["value"] == 0.5
    assert run.score["n"] == 4
    assert run.score["extraction_failures"] == 2
    truncated = [sample["num_tokens"] == 8 and not sample["ended"] for sample in run.samples]
    assert run.score["truncated"] == sum(truncated)
    assert run.score["eos_rate"] == 1 - sum(truncated) / 4
    assert run.score["mean_new_tokens"] == sum(sample["num_tokens"] for sample in run.samples) / 4


def test_a_model_that_always_says_a_scores_the_share_of_a(speaker, chat_tokenizer, write_task):
    rows = [
        {"question": f"{n}?", "options": ["red", "blue", "green"], "gold": n % 3, "id": n} for n in range(9)
    ]
    task = load_task(
        write_task(
            rows, kind="multiple_choice", answer="letter", gold="index", prompt="{question}\n{options}"
        )
    )
    run = GENERATION.run(HFModel(speaker(lambda prompt: "A"), chat_tokenizer), task)
    assert run.score["value"] == 1 / 3
    assert run.score["extraction_failures"] == 0


def test_plain_prompts_stop_where_the_model_asks_itself_the_next_question(plain_tokenizer):
    prompter = Prompter(plain_tokenizer)
    assert prompter.stop == ("\nQuestion:",)
    text = plain_tokenizer.decode(prompter.prompt_ids("What color?"))
    assert text == "Question: What color?\nAnswer:"
    assert prompter.settings()["chat_template_sha256"] is None


def test_new_tokens_must_fit_the_model(tiny_llama, chat_tokenizer):
    with pytest.raises(EvalError, match="512 positions"):
        answers(tiny_llama, chat_tokenizer, max_new_tokens=512)
