"""What cannot be scored is refused before anything is: templates, lengths, tokens, weights, repeated names."""

from __future__ import annotations

import copy

import pytest

from gendistill_evals import EvalError, HFModel, evaluate_model, load_tasks
from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.prompts import Prompter

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def evaluate(chat_tokenizer, tmp_path, colors):
    def run(model, tokenizer=chat_tokenizer, **settings):
        settings = {"tasks": [colors], "batch_size": 2, **settings}
        return evaluate_model(model, tokenizer, out_dir=tmp_path / "out", model_name="demo", **settings)

    return run


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}",
            "system first",
        ),
        ({"rag": CHAT, "tool_use": CHAT}, "none is the default: rag, tool_use"),
        ("{% for m in messages %}", "cannot render"),
        ("{{ messages[0]['content'] ", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render"),
        ("{{ messages[7]['content'] }}", "cannot render"),
        ("{{ messages[0]['content'] + 3 }}", "cannot render"),
        ("{{ missing.attribute }}", "cannot render"),
        ("{{ 'x' * 10 ** 15 }}", "cannot render"),
        ("{% for i in range(10 ** 12) %}x{% endfor %}", "cannot render"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render"),
        ("{{ ''.__class__.__mro__ }}", "leaves the user's message out|cannot render"),
        ("   ", "leaves the user's message out"),
        ("{# nothing #}", "leaves the user's message out"),
        ("<|im_start|>user<|im_end|>", "leaves the user's message out"),
        (
            "{% for m in messages if m['role'] == 'system' %}{{ m['content'] }}{% endfor %}",
            "leaves the user's",
        ),
        ("{{ messages[0]['content'] | upper }}", "leaves the user's message out"),
        (CHAT + "\ud800", "not a text"),
        ({"default": ["a"]}, "not a text"),
    ],
    ids=lambda value: str(value).encode("ascii", "replace").decode()[:40],
)
def test_templates_that_cannot_ask_are_refused_by_name(
    evaluate, tiny_llama, chat_tokenizer, template, message
):
    with pytest.raises(EvalError, match=message) as caught:
        evaluate(tiny_llama, with_template(chat_tokenizer, template))
    assert "template" in caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize(
    "template", [{"default": CHAT, "rag": "{{ 1 / 0 }}"}, CHAT.replace("m['content']", "m['content'] | trim")]
)
def test_templates_that_can_ask_are_used(evaluate, tiny_llama, chat_tokenizer, template):
    assert evaluate(tiny_llama, with_template(chat_tokenizer, template))["tasks"][0]["generation"]["n"] == 4


def test_items_that_are_too_long_are_said_for_all_tasks_before_the_first_is_scored(
    evaluate, tiny_llama, colors, write_task, tmp_path
):
    long = "long " * 600
    rows = [{"question": q, "options": ["a", "b"], "gold": "a"} for q in ("short", long, long)]
    path = write_task(rows, stem="essays", kind="multiple_choice")
    for protocol in ("likelihood", "generation"):
        with pytest.raises(EvalError, match=r"of \d items are too long .* 512 positions") as caught:
            evaluate(tiny_llama, tasks=[colors, path], protocols=[protocol])
        assert caught.value.where == f"essays, {protocol}"
    assert not (tmp_path / "out").exists()
    assert evaluate(tiny_llama, tasks=[colors, path], limit=1)["tasks"][1]["n"] == 1


def test_new_tokens_and_open_questions_count_towards_the_positions(
    evaluate, tiny_llama, write_task, tmp_path
):
    rows = [{"question": "a?", "gold": "b"}]
    path = write_task(rows, stem="words", kind="exact_match", max_new_tokens=512)
    with pytest.raises(EvalError, match="512 new ones included"):
        evaluate(tiny_llama, tasks=[path])
    (tmp_path / "open.jsonl").write_text('{"question": "Where?"}\n')
    with pytest.raises(EvalError, match="positions") as caught:
        evaluate(tiny_llama, questions=tmp_path / "open.jsonl", question_tokens=600)
    assert "transcripts" in caught.value.where
    small = copy.deepcopy(tiny_llama)
    small.config.max_position_embeddings = 20
    with pytest.raises(EvalError, match="20 positions") as caught:
        evaluate(tiny_llama, questions=tmp_path / "open.jsonl", question_tokens=20, teacher=small)
    assert "teacher" in caught.value.where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("protocol", ["likelihood", "generation"])
def test_tokens_that_the_model_has_no_embeddings_for_are_refused(evaluate, tiny_llama, tmp_path, protocol):
    tiny_llama.resize_token_embeddings(40)
    with pytest.raises(EvalError, match=r"token \d+ of an item, .* embeddings for 40 tokens") as caught:
        evaluate(tiny_llama, protocols=[protocol])
    assert caught.value.where == f"colors, {protocol}"
    assert not (tmp_path / "out").exists()


def test_an_option_whose_last_token_is_unknown_is_refused(evaluate, tiny_llama, chat_tokenizer, write_task):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_tokens(["banana"])
    rows = [{"question": "Q", "options": ["banana", "b"], "gold": "b"}]
    with pytest.raises(EvalError, match="has embeddings for"):
        evaluate(
            tiny_llama, tokenizer, tasks=[write_task(rows, kind="multiple_choice")], protocols=["likelihood"]
        )


def test_a_pad_token_without_an_embedding_is_replaced(evaluate, tiny_llama, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id >= tiny_llama.get_input_embeddings().num_embeddings
    expected = evaluate(tiny_llama)
    found = evaluate(tiny_llama, tokenizer)
    assert found["settings"]["pad_token_id"] == 0
    assert found["tasks"][0]["generation"]["value"] == expected["tasks"][0]["generation"]["value"]


def test_models_and_tokenizers_without_end_or_pad_tokens_are_scored(evaluate, tiny_llama, chat_tokenizer):
    tokenizer = with_template(chat_tokenizer, "{{ messages[0]['content'] }}")
    tokenizer.eos_token = tokenizer.pad_token = None
    tiny_llama.generation_config = None
    decoding = greedy_decoding(HFModel(tiny_llama, tokenizer), Prompter(tokenizer))
    assert (decoding.eos_token_ids, decoding.pad_token_id) == ((), 0)
    assert evaluate(tiny_llama, tokenizer)["tasks"][0]["generation"]["eos_rate"] == 0


def test_end_tokens_that_are_no_ids_are_refused(evaluate, tiny_llama):
    tiny_llama.generation_config.eos_token_id = ["</s>"]
    with pytest.raises(EvalError, match="must be a token id"):
        evaluate(tiny_llama)


@pytest.mark.parametrize("protocol", ["likelihood", "generation"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_outputs_that_are_no_numbers_name_task_and_item(evaluate, tiny_llama, protocol, bad):
    def spoil(module, inputs, output):
        output[-1] = bad

    # The weights are finite; only what the model makes of them is not.
    tiny_llama.lm_head.register_forward_hook(spoil)
    with pytest.raises(EvalError, match="not finite") as caught:
        evaluate(tiny_llama, protocols=[protocol], batch_size=1)
    assert caught.value.where.startswith("colors, item ")
    assert caught.value.hint


@pytest.mark.parametrize("batch_size", [10**7, 10**30])
def test_a_batch_is_never_larger_than_the_items(evaluate, tiny_llama, batch_size):
    small, large = evaluate(tiny_llama), evaluate(tiny_llama, batch_size=batch_size)
    assert large["tasks"] == small["tasks"]
    assert large["settings"]["batch_size"] == batch_size


@pytest.mark.parametrize("name", ["limit", "batch_size", "question_tokens"])
@pytest.mark.parametrize("value", [0, -3, 1.5, "8", True])
def test_numbers_that_are_no_counts_are_refused(evaluate, tiny_llama, name, value):
    with pytest.raises(EvalError, match=f"{name} must be at least 1") as caught:
        evaluate(tiny_llama, **{name: value})
    assert caught.value.exit_code == 2


def test_two_files_of_one_name_are_refused_before_anything_runs(write_task, tmp_path):
    rows = [{"question": "a?", "gold": "b"}]
    paths = [write_task(rows, stem=stem, kind="exact_match", name="mine") for stem in ("one", "two")]
    with pytest.raises(EvalError, match="two tasks have the name mine") as caught:
        load_tasks([*paths, "copy"])
    assert caught.value.hint
    assert [task.name for task in load_tasks([paths[0], "copy"])] == ["mine", "copy"]


def test_a_prompt_without_tokens_is_refused(plain_tokenizer):
    tokenizer = copy.deepcopy(plain_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(EvalError, match="makes no token"):
        Prompter(tokenizer).prompt_ids("")
