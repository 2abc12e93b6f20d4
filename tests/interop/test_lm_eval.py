"""The gendistill model in lm-eval beside lm-eval's own hf model, and lm-eval's command line on it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from gendistill.checkpoints.resolve import load_causal_lm, load_tokenizer
from gendistill.cli.main import main
from gendistill.errors import GendistillError, RecipeError
from gendistill.interop.lm_eval import GendistillLM
from gendistill.runs.asking import EngineModel

PAIRS = [
    ("Question: What comes after 3?\nAnswer:", " none"),
    ("Question: What comes after 3?\nAnswer: ", "a fish"),
    ("Question: What comes after 3?\nAnswer:", " 4 ripe bananas"),
    ("", "a fish"),
    ("", " and so on"),
    ("Answer:", "A"),
    ("é日本 ", "😀"),
]
ASKED = ["a fish", "one", "Question: What comes after 7?"]
TEXTS = ["a fish", "Question: What comes after 7? " * 30, "", "one"]


def requests(kind, arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def stock(folder, **settings):
    model = load_causal_lm(folder, dtype=torch.float32)
    return HFLM(pretrained=model, tokenizer=load_tokenizer(folder), batch_size=3, **settings)


@pytest.fixture(params=["teacher", "student"])
def folder(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def ours(folder):
    made = GendistillLM(str(folder), device="cpu", batch_size="auto")
    yield made
    made.close()


def test_likelihoods_are_those_of_hf(folder, ours):
    asked = requests("loglikelihood", PAIRS)
    expected = stock(folder).loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    for one, other in zip(found, expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-4)
        assert one[1] is other[1]


def test_whether_a_continuation_is_greedy_is_known(folder, ours):
    """What the model itself says after a prompt is greedy, and anything else after it is not."""
    prompt = "Question: What comes after 3?\nAnswer:"
    ids = ours.tok_encode(prompt)
    with torch.no_grad():
        said = (
            load_causal_lm(folder, dtype=torch.float32)
            .generate(
                torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(ids) :]
            .tolist()
        )
    other = [*said[:-1], (said[-1] + 1) % 97]
    found = ours._loglikelihood_tokens([(None, ids, said), (None, ids, other)], disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False]


def test_whole_texts_are_scored_in_the_windows_of_hf(folder, ours):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS if text])
    expected = stock(folder, max_length=50).loglikelihood_rolling(asked, disable_tqdm=True)
    narrow = GendistillLM(str(folder), device="cpu", max_length=50)
    assert narrow.loglikelihood_rolling(asked, disable_tqdm=True) == pytest.approx(expected, abs=1e-3)
    narrow.close()


@pytest.mark.parametrize("until", [[], ["a"], ["\n\n", " "]])
def test_answers_are_those_of_hf(folder, ours, until):
    settings = {"until": until, "max_gen_toks": 9, "do_sample": False, "temperature": 0.0}
    asked = requests("generate_until", [(text or "x", dict(settings)) for text in TEXTS if len(text) < 200])
    expected = stock(folder).generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked, disable_tqdm=True) == expected
    assert any(expected)


@pytest.mark.parametrize("runs_on", ["engine", "transformers"])
def test_a_stop_text_that_is_a_special_token_ends_as_in_hf(folder, runs_on, monkeypatch):
    """``until: ["<|im_end|>"]`` of a model whose end token is another one: nothing behind it is part of the answer."""
    if runs_on == "transformers":
        monkeypatch.setattr("gendistill.runs.asking.why_not", lambda model: "a test says so")
    ours = GendistillLM(str(folder), device="cpu")
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    plain = ours.generate_until(requests("generate_until", [(text, settings) for text in ASKED]))
    words = [word for text in plain for word in ours.tokenizer.tokenize(text)]
    mark = next(word for word in words if word.isascii() and word.isalpha() and len(word) > 1)
    model = load_causal_lm(folder, dtype=torch.float32)
    tokenizer = load_tokenizer(folder)
    for each in (tokenizer, ours.tokenizer):
        each.add_special_tokens({"additional_special_tokens": [mark]})
    asked = requests("generate_until", [(text, {**settings, "until": [mark]}) for text in ASKED])
    # a row at a time: beside others that go on, hf goes on behind a special token
    expected = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).generate_until(
        asked, disable_tqdm=True
    )
    assert ours.generate_until(asked, disable_tqdm=True) == expected
    assert expected != plain
    ours.close()


def test_contexts_that_are_too_long_lose_their_beginning_as_in_hf_and_it_is_said(teacher, caplog):
    ours = GendistillLM(str(teacher), device="cpu")
    long = "Question: What comes after 7? " * 30
    pairs = requests("loglikelihood", [(long, " none"), ("short", " none")])
    written = requests("generate_until", [(long, {"until": ["\n"], "max_gen_toks": 5})])
    with caplog.at_level("WARNING", logger="lm_eval"):
        scores = ours.loglikelihood(pairs, disable_tqdm=True)
        answers = ours.generate_until(written, disable_tqdm=True)
    said = [record.getMessage() for record in caplog.records if record.name.endswith("gendistill")]
    assert any("1 of 2 contexts are longer than the model's 96 positions" in line for line in said)
    assert any("1 of 1 prompts are longer" in line for line in said)
    other = stock(teacher)
    assert scores[0][0] == pytest.approx(other.loglikelihood(pairs, disable_tqdm=True)[0][0], abs=1e-4)
    assert answers == other.generate_until(written, disable_tqdm=True)
    ours.close()


def test_a_temperature_draws_as_its_seed_says(student):
    settings = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.3, "top_k": 40}
    asked = requests("generate_until", [("a fish", dict(settings))] * 3)
    texts = []
    for seed in (1, 1, 2):
        model = GendistillLM(str(student), device="cpu", seed=seed)
        texts.append(model.generate_until(asked, disable_tqdm=True))
        model.close()
    assert texts[0] == texts[1] != texts[2]
    # repeats of one request are other draws
    assert len(set(texts[0])) > 1


def test_a_model_that_the_engine_cannot_run_is_asked_on_transformers(student, monkeypatch, caplog):
    monkeypatch.setattr("gendistill.runs.asking.why_not", lambda model: "a test says so")
    with caplog.at_level("WARNING", logger="lm_eval"):
        plain = GendistillLM(str(student), device="cpu")
    assert "a test says so" in caplog.text
    assert not isinstance(plain.language_model, EngineModel)
    asked = requests("loglikelihood", PAIRS)
    expected = stock(student).loglikelihood(asked, disable_tqdm=True)
    for one, other in zip(plain.loglikelihood(asked, disable_tqdm=True), expected, strict=True):
        assert one == (pytest.approx(other[0], abs=1e-4), other[1])
    hot = requests("generate_until", [("a", {"do_sample": True, "temperature": 1.0})])
    with pytest.raises(GendistillError, match="needs our engine"):
        plain.generate_until(hot, disable_tqdm=True)
    cold = requests("generate_until", [("a fish", {"max_gen_toks": 5, "until": ["\n"]})])
    assert plain.generate_until(cold, disable_tqdm=True) == stock(student).generate_until(
        cold, disable_tqdm=True
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "no model was named"),
        ({"pretrained": "builtin:tiny", "pretrainde": 1}, 'did you mean "pretrained"'),
        ({"pretrained": "builtin:tiny", "parallelize": True}, 'no argument "parallelize"'),
        ({"pretrained": "builtin:tiny", "dtype": "int3"}, "dtype must be"),
        ({"pretrained": "builtin:tiny", "device": "cpu", "batch_size": "x"}, "batch size must be"),
        ({"pretrained": "builtin:tiny", "device": "cpu", "max_length": 10**6}, "max_length must be"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        GendistillLM(**settings)


def test_settings_of_generation_that_would_do_nothing_are_refused(student):
    model = GendistillLM(str(student), device="cpu")
    asked = requests("generate_until", [("a", {"num_beams": 4, "until": []})])
    with pytest.raises(GendistillError, match="does not know: num_beams"):
        model.generate_until(asked, disable_tqdm=True)
    model.close()


def test_tasks_score_as_with_hf(folder, ours, choice_task, answer_task):
    tasks = [str(choice_task()), str(answer_task())]
    settings = {"bootstrap_iters": 0, "log_samples": True}
    found = simple_evaluate(ours, tasks=list(tasks), **settings)
    expected = simple_evaluate(stock(folder), tasks=list(tasks), **settings)
    for name, rows in expected["samples"].items():
        assert len(rows) == 12
        for one, other in zip(found["samples"][name], rows, strict=True):
            for key in ("prompt_hash", "acc", "acc_norm", "exact_match"):
                assert one.get(key) == other.get(key)
            if name == "tiny_answer":
                assert one["resps"] == other["resps"]


def test_chat_templates_render_as_with_hf(student, choice_task):
    ours = GendistillLM(str(student), device="cpu")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(turns) == stock(student).apply_chat_template(turns)
    open_end = [*turns, {"role": "assistant", "content": "The answer"}]
    assert ours.apply_chat_template(open_end, add_generation_prompt=False).endswith("The answer")
    assert ours.chat_template(True)
    found = simple_evaluate(
        ours,
        tasks=[str(choice_task(num_fewshot=2))],
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        bootstrap_iters=0,
    )
    prompt = found["samples"]["tiny_choice"][0]["arguments"][0][0]
    assert prompt.count("<|im_start|>assistant\n") == 3
    ours.close()


# ----- the command line -----


def run(words, capsys):
    before = list(sys.argv)
    code = main(["lm-eval", *words])
    assert sys.argv == before
    said = capsys.readouterr()
    return code, said.out, said.err


def test_the_command_line_runs_our_model_unless_another_is_named(teacher, choice_task, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model_args", f"pretrained={teacher},dtype=float32", "--tasks", str(choice_task())]
    code, said, _ = run([*words, "--output_path", str(out), "--log_samples", "--limit", "5"], capsys)
    assert code == 0
    assert "gendistill (" in said
    assert "tiny_choice" in said
    (results,) = out.rglob("results_*.json")
    content = json.loads(results.read_text())
    assert content["config"]["model"] == "gendistill"
    assert content["config"]["gendistill_runs_on"] == "engine"
    assert content["n-samples"]["tiny_choice"] == {"original": 12, "effective": 5}
    (samples,) = out.rglob("samples_tiny_choice_*.jsonl")
    assert len(samples.read_text().splitlines()) == 5


def test_a_config_file_may_name_another_model(teacher, choice_task, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("model: dummy\n")
    code, said, _ = run(["run", "--config", str(config), "--tasks", str(choice_task())], capsys)
    assert code == 0
    assert "dummy (" in said


def test_what_lm_eval_refuses_is_said_in_our_form(teacher, choice_task, capsys, tmp_path):
    code, _, error = run(
        ["--model_args", f"pretrained={teacher}", "--tasks", str(tmp_path / "no.yaml")], capsys
    )
    assert code == 1
    assert "Tasks not found" in error
    assert "internal error" not in error
    code, _, error = run(["run", "--model_args", "pretrainde=x", "--tasks", str(choice_task())], capsys)
    assert code == 2
    assert 'did you mean "pretrained"' in error


def test_recipes_name_their_students(tmp_path, choice_task, capsys):
    code, _, error = run(["--model_args", "pretrained=tiny", "--tasks", str(choice_task())], capsys)
    assert code == 1
    assert "has no finished student" in error
    assert "gendistill run tiny" in error
