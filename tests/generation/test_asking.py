"""Evaluations on the engine beside those on transformers."""

from __future__ import annotations

import json

import pytest
import torch

from gendistill.checkpoints.builtin import save_tiny_checkpoint
from gendistill.checkpoints.resolve import load_causal_lm, load_tokenizer
from gendistill.engine.decoder import is_fused
from gendistill.runs.asking import EngineModel, asked
from gendistill_evals import evaluate_model
from gendistill_evals.errors import EvalError
from gendistill_evals.hf import HFModel
from gendistill_evals.model import Decoding, LanguageModel, Request


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny_checkpoint(path)
    return path


@pytest.fixture
def model(folder):
    return load_causal_lm(folder, dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def tokenizer(folder):
    return load_tokenizer(folder)


def scored(model, folder, out):
    evaluate_model(
        model,
        tasks=["everyday", "arithmetic"],
        protocols=["likelihood", "generation"],
        limit=5,
        questions="demo",
        question_tokens=8,
        out_dir=out,
        model_name="it",
    )
    rows = {}
    for name in ("samples", "transcripts"):
        rows[name] = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    return rows


def test_scores_are_those_of_transformers(model, tokenizer, folder, tmp_path):
    plain = scored(HFModel(model, tokenizer), folder, tmp_path / "plain")
    with asked(model, tokenizer, batch_size=3) as opened:
        assert isinstance(opened, EngineModel)
        assert isinstance(opened, LanguageModel)
        found = scored(opened, folder, tmp_path / "engine")
    assert not is_fused(model)
    for name in plain:
        assert len(plain[name]) == len(found[name]) > 0
        for one, other in zip(found[name], plain[name], strict=True):
            assert_alike(one, other)


def assert_alike(one, other):
    if isinstance(one, float):
        assert one == pytest.approx(other, abs=1e-3)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for part, its in zip(one, other, strict=True):
            assert_alike(part, its)
    else:
        assert one == other


def test_what_the_engine_cannot_run_is_said_and_runs_on_transformers(model, tokenizer):
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    lines = []
    with asked(model, tokenizer, batch_size=None, say=lines.append) as opened:
        assert type(opened) is HFModel
    assert "hook" in lines[0]
    assert "transformers" in lines[0]


def test_a_prompt_that_cannot_be_answered_is_an_error_behind_the_other_answers(model, tokenizer):
    decoding = Decoding({}, (), 0, {})
    requests = [Request([1, 2], 4), Request([10**6], 4, name="a far one"), Request([3], 4)]
    done = []
    with asked(model, tokenizer, batch_size=None) as opened, pytest.raises(EvalError) as caught:
        done.extend(index for index, _ in opened.generate(requests, decoding))
    assert sorted(done) == [0, 2]
    assert "a far one" in str(caught.value)
    assert "knows tokens" in str(caught.value)


def test_a_model_that_is_trained_keeps_its_parameters_where_they_are(model, tokenizer):
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    with asked(model, tokenizer, batch_size=None, learns=True) as opened:
        list(opened.generate([Request([1, 2], 4)], Decoding({}, (), 0, {})))
        assert before == {name: value.data_ptr() for name, value in model.named_parameters()}
    assert before == {name: value.data_ptr() for name, value in model.named_parameters()}
