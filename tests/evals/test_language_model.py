"""The protocols see a LanguageModel alone: whatever answers, in whatever order, gives the same scores."""

from __future__ import annotations

import pytest
import torch

from gendistill_evals import PROTOCOLS, EvalError, HFModel, LanguageModel, evaluate_model, load_task
from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.model import Request
from gendistill_evals.prompts import Prompter
from gendistill_evals.protocols import Generation, ProtocolFamily, lead_protocols


class Backwards:
    """A Hugging Face model whose results come last first."""

    def __init__(self, inner: HFModel) -> None:
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def log_probs(self, pairs):
        return reversed(list(self.inner.log_probs(pairs)))

    def generate(self, requests, decoding):
        return reversed(list(self.inner.generate(requests, decoding)))


def test_a_hugging_face_model_is_one(tiny_llama, chat_tokenizer):
    model = HFModel(tiny_llama, chat_tokenizer)
    assert isinstance(model, LanguageModel)
    assert not isinstance(tiny_llama, LanguageModel)
    assert (model.max_tokens, model.vocab_size) == (512, len(chat_tokenizer))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_order_of_results_changes_nothing(tiny_llama, chat_tokenizer, colors, protocol):
    model, task = HFModel(tiny_llama, chat_tokenizer, batch_size=2), load_task(colors)
    first, second = (PROTOCOLS[protocol].run(each, task) for each in (model, Backwards(model)))
    assert first == second


def test_a_wrapped_model_shares_what_a_bare_one_was_asked(
    tiny_llama, chat_tokenizer, colors, tmp_path, monkeypatch
):
    where = {"tasks": [colors], "out_dir": tmp_path, "model_name": "m"}
    bare = evaluate_model(tiny_llama, chat_tokenizer, **where, batch_size=2)
    kept = sorted(tmp_path.glob("parts/*"))
    monkeypatch.setattr(tiny_llama, "forward", pytest.fail)
    wrapped = evaluate_model(HFModel(tiny_llama, chat_tokenizer, batch_size=3), **where)
    assert wrapped["tasks"] == bare["tasks"]
    assert sorted(tmp_path.glob("parts/*")) == kept
    assert wrapped["settings"]["batch_size"] == 3


def test_a_hugging_face_model_needs_its_tokenizer(tiny_llama, colors, tmp_path):
    with pytest.raises(EvalError, match=r"LlamaForCausalLM is not a LanguageModel.*needs its tokenizer"):
        evaluate_model(tiny_llama, tasks=[colors], out_dir=tmp_path, model_name="m")


def test_requests_of_other_lengths_and_stops_do_not_share_a_batch(speaker, chat_tokenizer):
    model = HFModel(speaker(lambda prompt: "0\n1", ends=False), chat_tokenizer)
    prompter = Prompter(chat_tokenizer)
    ids = [prompter.prompt_ids(text) for text in ("a", "b b b", "c")]
    requests = [Request(ids[0], 2), Request(ids[1], 5), Request(ids[2], 5, ("\n",))]
    found = dict(model.generate(requests, greedy_decoding(model, prompter)))
    assert [len(found[index].token_ids) for index in range(2)] == [2, 5]
    assert (found[2].text, found[2].ended) == ("0", True)


def test_generation_holds_nothing_between_results(tiny_llama, chat_tokenizer):
    tiny_llama.train()
    theirs = tiny_llama.generation_config
    model, prompter = HFModel(tiny_llama, chat_tokenizer, batch_size=1), Prompter(chat_tokenizer)
    requests = [Request(prompter.prompt_ids(text), 2) for text in ("a", "b")]
    for _ in model.generate(requests, greedy_decoding(model, prompter)):
        assert tiny_llama.training
        assert tiny_llama.generation_config is theirs
        assert torch.is_grad_enabled()


def test_the_leading_protocols_are_the_first_of_each_family(monkeypatch):
    assert lead_protocols() == {
        ProtocolFamily.LIKELIHOOD: "likelihood",
        ProtocolFamily.GENERATION: "generation",
    }
    monkeypatch.setitem(PROTOCOLS, "again", Generation("again", "2"))
    assert lead_protocols()[ProtocolFamily.GENERATION] == "generation"
    assert lead_protocols(["again"]) == {ProtocolFamily.GENERATION: "again"}
    assert lead_protocols([]) == {}


def test_a_protocol_is_not_called_like_something_else_in_the_files(
    tiny_llama, chat_tokenizer, colors, tmp_path, monkeypatch
):
    monkeypatch.setitem(PROTOCOLS, "gold", Generation("gold", "g"))
    with pytest.raises(EvalError, match="called gold, which names something else"):
        evaluate_model(tiny_llama, chat_tokenizer, tasks=[colors], out_dir=tmp_path, model_name="m")
