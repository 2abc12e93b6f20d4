from __future__ import annotations

import pytest
import torch

from gendistill_evals import EvalError, HFModel, Question, Questions
from gendistill_evals.prompts import Prompter
from gendistill_evals.transcripts import answer_nll, repeated_ngram_share, write_answers


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        ([], 0.0),
        ([1, 2, 3], 0.0),
        ([1, 2, 3, 4], 0.0),
        (list(range(20)), 0.0),
        ([1, 1, 1, 1, 1], 1 / 2),
        ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5),
        ([7] * 103, 99 / 100),
    ],
)
def test_repeated_share_counts_ngrams_seen_before(tokens, share):
    assert repeated_ngram_share(tokens) == pytest.approx(share)


def test_answer_nll_is_the_mean_cross_entropy_of_the_answer(tiny_llama, chat_tokenizer):
    answer = chat_tokenizer("The answer is Paris")["input_ids"]
    prompt = Prompter(chat_tokenizer).prompt_ids("Where?")
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        expected = tiny_llama(ids, labels=labels).loss.item()
    assert answer_nll(HFModel(tiny_llama, chat_tokenizer), "Where?", answer) == pytest.approx(
        expected, abs=1e-5
    )


def test_an_answer_without_tokens_or_of_another_vocabulary_is_refused(tiny_llama, chat_tokenizer):
    with pytest.raises(EvalError, match="empty answer"):
        answer_nll(HFModel(tiny_llama, chat_tokenizer), "Where?", [])
    with pytest.raises(EvalError, match="token 100000"):
        answer_nll(HFModel(tiny_llama, chat_tokenizer), "Where?", [100000])


def test_answers_are_scored_by_the_teacher_and_empty_ones_are_not(speaker, chat_tokenizer, tiny_llama):
    questions = Questions("two", (Question("a", "Where?"), Question("b", "Who?")), "0" * 64)
    says = speaker(lambda prompt: "The answer is Paris" if "Where" in prompt else "")
    model, teacher = HFModel(says, chat_tokenizer), HFModel(tiny_llama, chat_tokenizer)
    rows = write_answers(model, questions, max_new_tokens=32, teacher=teacher)
    answer = chat_tokenizer("The answer is Paris")["input_ids"]
    assert [row["answer"] for row in rows] == ["The answer is Paris", ""]
    assert [row["num_tokens"] for row in rows] == [len(answer), 0]
    expected = answer_nll(HFModel(tiny_llama, chat_tokenizer), "Where?", answer)
    assert rows[0]["teacher_nll"] == pytest.approx(expected, abs=1e-5)
    assert rows[1]["teacher_nll"] is None
    assert write_answers(model, questions)[0]["teacher_nll"] is None


def test_a_loop_is_visible(speaker, chat_tokenizer):
    questions = Questions("one", (Question("a", "Where?"),), "0" * 64)
    model = HFModel(speaker(lambda prompt: "0", ends=False), chat_tokenizer)
    (row,) = write_answers(model, questions, max_new_tokens=32)
    assert row["truncated"]
    assert row["repeated_4gram_share"] == pytest.approx(28 / 29)
