from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from gendistill_evals import PROTOCOLS, EvalError, HFModel, load_task
from gendistill_evals.model import Pair
from gendistill_evals.prompts import Prompter
from gendistill_evals.scoring import continuation_scores

LIKELIHOOD = PROTOCOLS["likelihood"]


def log_probs(model, pairs, **settings) -> list[list[float]]:
    """Score pairs and put them back in order."""
    found = {index: values for index, values, _ in continuation_scores(model, pairs, **settings)}
    return [found[index] for index in range(len(pairs))]


def naive_log_probs(model, context, continuation) -> list[float]:
    """Score one continuation alone, from the logits of the whole sequence in float64."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    table = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    return [table[len(context) + i - 1, token].item() for i, token in enumerate(continuation)]


@pytest.fixture
def pairs() -> list[Pair]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(3, 300, (n,), generator=generator).tolist()  # noqa: E731
    prompt, other = draw(7), draw(23)
    return [
        Pair(prompt, [5]),
        Pair(prompt, [9]),
        Pair(prompt, [5, 6, 7]),
        Pair(prompt, [5, 6, 8]),
        Pair(other, draw(4)),
        Pair(draw(1), draw(1)),
        Pair(other[:3], other[3:6]),
        Pair(prompt, [5]),
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_log_probs_match_one_full_forward_per_continuation(tiny_llama, pairs, batch_size):
    found = log_probs(tiny_llama, pairs, batch_size=batch_size)
    for pair, values in zip(pairs, found, strict=True):
        assert values == pytest.approx(naive_log_probs(tiny_llama, pair.context, pair.continuation), abs=2e-5)


def test_models_that_cannot_restrict_logits_are_scored_alike(tiny_llama, pairs):
    class Plain(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.config = inner.config

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    expected = log_probs(tiny_llama, pairs)
    for values, wanted in zip(log_probs(Plain(tiny_llama), pairs), expected, strict=True):
        assert values == pytest.approx(wanted, abs=1e-5)


def test_options_of_one_token_share_a_forward_row(tiny_llama, monkeypatch):
    rows = []
    forward = tiny_llama.forward
    monkeypatch.setattr(type(tiny_llama), "forward", lambda self, input_ids, logits_to_keep, **inputs: (
        rows.append(tuple(input_ids.shape)) or forward(input_ids, logits_to_keep=logits_to_keep, **inputs)
    ))  # fmt: skip
    log_probs(tiny_llama, [Pair([4, 5, 6], [option]) for option in (7, 8, 9, 10)], batch_size=8)
    assert rows == [(1, 3)]


def test_gradients_and_training_mode_are_left_alone(tiny_llama):
    """Between two results the caller may train: nothing is held over a yield."""
    tiny_llama.train()
    for _ in continuation_scores(tiny_llama, [Pair([4, 5], [6]), Pair([7, 8], [9])], batch_size=1):
        assert tiny_llama.training
        assert tiny_llama(torch.tensor([[4, 5]])).logits.requires_grad


def test_numbers_that_are_not_finite_stop_the_evaluation(tiny_llama):
    with torch.no_grad():
        tiny_llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvalError, match="not finite"):
        log_probs(tiny_llama, [Pair([4, 5], [6])])


def test_a_sequence_longer_than_the_model_is_refused(tiny_llama):
    with pytest.raises(EvalError, match="512 positions"):
        log_probs(tiny_llama, [Pair([4] * 600, [6])])


@pytest.mark.parametrize("chat", [True, False])
def test_prompt_and_option_join_into_the_whole_text(chat_tokenizer, plain_tokenizer, chat):
    prompter = Prompter(chat_tokenizer if chat else plain_tokenizer)
    options = ["yellow", "blue", "blue and red", "42"]
    context, endings = prompter.split("What color?", options)
    assert context == prompter.prompt_ids("What color?")
    for option, ending in zip(options, endings, strict=True):
        text = prompter.tokenizer.decode(context + ending)
        assert text.endswith("<|im_start|>assistant\n" + option if chat else f"Answer: {option}")


def merging_tokenizer(*, bos: bool) -> PreTrainedTokenizerFast:
    """Characters, and one merge across the end of the prompt: ": y" is one token, ":" and " " are others."""
    letters = sorted(set("Question: What?\nAnswer: yellow blue red"))
    words = ["<s>", *letters, ": ", ": y"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(":", " "), (": ", "y")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A <s>", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def test_tokens_merged_across_the_boundary_are_scored_from_one_place():
    """Every option is scored after the same tokens, and what is scored spells the rest of the text."""
    prompter = Prompter(merging_tokenizer(bos=False))
    context, endings = prompter.split("What?", ["yellow", "blue"])
    spell = lambda ids: "".join(prompter.tokenizer.convert_ids_to_tokens(ids))  # noqa: E731
    assert spell(context) == "Question: What?\nAnswer"
    assert [spell(ending) for ending in endings] == [": yellow", ": blue"]
    assert len(endings[0]) == 6


@pytest.mark.parametrize("bos", [True, False])
def test_plain_prompts_begin_with_the_bos_of_the_tokenizer_and_end_without_eos(bos):
    ids = Prompter(merging_tokenizer(bos=bos)).prompt_ids("What?")
    assert ids.count(0) == bos
    assert (ids[0] == 0) == bos


def test_a_template_that_writes_bos_gets_no_second_one():
    tokenizer = merging_tokenizer(bos=True)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    assert Prompter(tokenizer).prompt_ids("What?").count(0) == 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_choice_is_the_option_of_highest_log_likelihood(tiny_llama, chat_tokenizer, colors, batch_size):
    task = load_task(colors)
    run = LIKELIHOOD.run(HFModel(tiny_llama, chat_tokenizer, batch_size=batch_size), task)
    prompter = Prompter(chat_tokenizer)
    for item, sample in zip(task.items, run.samples, strict=True):
        prompt = prompter.prompt_ids(item.prompt)
        options = [chat_tokenizer(option, add_special_tokens=False)["input_ids"] for option in item.options]
        totals = [sum(naive_log_probs(tiny_llama, prompt, option)) for option in options]
        assert sample["scores"] == pytest.approx(totals, abs=1e-4)
        assert sample["scores_per_token"] == pytest.approx(
            [total / len(option) for total, option in zip(totals, options, strict=True)], abs=1e-4
        )
        assert sample["choice"] == max(range(len(totals)), key=totals.__getitem__)
        assert sample["correct"] == (item.options[sample["choice"]] == item.gold)
    assert run.score["value"] == sum(sample["correct"] for sample in run.samples) / len(task.items)


def test_the_metric_decides_between_total_and_mean(tiny_llama, chat_tokenizer, write_task):
    rows = [
        {"question": f"{n}?", "options": ["red", "a very long and odd answer"], "gold": "red"}
        for n in range(6)
    ]
    model = HFModel(tiny_llama, chat_tokenizer)
    total, mean = (
        LIKELIHOOD.run(model, load_task(write_task(rows, kind="multiple_choice", metric=metric)))
        for metric in ("accuracy", "accuracy_per_token")
    )
    for key, run in (("scores", total), ("scores_per_token", mean)):
        assert all(sample["choice"] == sample[key].index(max(sample[key])) for sample in run.samples)
    assert [sample["choice"] for sample in total.samples] != [sample["choice"] for sample in mean.samples]


def test_a_task_without_options_says_why_likelihood_cannot_score_it(tiny_llama, chat_tokenizer, write_task):
    task = load_task(write_task([{"question": "a?", "gold": "1"}], kind="numeric"))
    with pytest.raises(EvalError, match="no distractors"):
        LIKELIHOOD.run(HFModel(tiny_llama, chat_tokenizer), task)
