"""A prompt may be turns: earlier questions with their answers before the one that is asked."""

from __future__ import annotations

import copy

import pytest

from gendistill_evals import EvalError, HFModel, Item, evaluate_model, load_task
from gendistill_evals.prompts import Prompter
from gendistill_evals.results import read_samples

ROWS = [{"question": "B?", "options": ["red", "blue"], "gold": "blue", "id": "b"}]
SYSTEM = {"role": "system", "content": "Be short."}
SHOT = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "red"}]
ASKED = {"role": "user", "content": "{question} {options}?"}
RENDERED = [SYSTEM, *SHOT, {"role": "user", "content": "B? red or blue?"}]


@pytest.fixture
def few_shot(write_task):
    return write_task(ROWS, stem="shots", kind="multiple_choice", prompt=[SYSTEM, *SHOT, ASKED])


def test_turns_are_rendered_into_the_item(few_shot):
    (item,) = load_task(few_shot).items
    assert item.messages == list(item.prompt) == RENDERED


def test_a_text_is_one_turn_of_the_user():
    item = Item("0", "A?", "b", None, None)
    assert item.messages == [{"role": "user", "content": "A?"}]


def test_a_text_and_its_one_turn_are_the_same_tokens(chat_tokenizer, plain_tokenizer):
    for tokenizer in (chat_tokenizer, plain_tokenizer):
        prompter = Prompter(tokenizer)
        one = ({"role": "user", "content": "What {color}?"},)
        assert prompter.prompt_ids(one) == prompter.prompt_ids("What {color}?")


def test_turns_go_through_the_chat_template(few_shot, chat_tokenizer):
    (item,) = load_task(few_shot).items
    ids = Prompter(chat_tokenizer).prompt_ids(item.prompt)
    expected = chat_tokenizer.apply_chat_template(RENDERED, tokenize=False, add_generation_prompt=True)
    assert chat_tokenizer.decode(ids) == expected


def test_without_a_template_turns_are_questions_and_answers(few_shot, plain_tokenizer):
    (item,) = load_task(few_shot).items
    prompter = Prompter(plain_tokenizer)
    text = "Be short.\n\nQuestion: A?\nAnswer: red\n\nQuestion: B? red or blue?\nAnswer:"
    assert plain_tokenizer.decode(prompter.prompt_ids(item.prompt)) == text
    context, endings = prompter.split(item.prompt, ["red", "blue"])
    assert plain_tokenizer.decode(context + endings[0]) == f"{text} red"


def test_turns_are_scored_under_both_protocols_and_kept_in_the_samples(
    few_shot, speaker, chat_tokenizer, tmp_path
):
    says = speaker(
        lambda prompt: "blue" if "red<|im_end|>" in prompt else "red", prefers=lambda prompt: "blue"
    )
    evaluate_model(HFModel(says, chat_tokenizer), tasks=[few_shot], out_dir=tmp_path / "out", model_name="m")
    (row,) = read_samples(tmp_path / "out")
    assert row["prompt"] == RENDERED
    assert (row["likelihood"]["correct"], row["generation"]["correct"]) == (True, True)


def test_turns_enter_the_identity_of_the_task(write_task):
    def sha256(prompt):
        return load_task(write_task(ROWS, stem="one", kind="multiple_choice", prompt=prompt)).prompt_sha256

    prompts = [
        "{question}",
        [{"role": "user", "content": "{question}"}],
        [*SHOT, ASKED],
        [SYSTEM, *SHOT, ASKED],
    ]
    assert len({sha256(prompt) for prompt in prompts}) == len(prompts)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "got none"),
        (SHOT, "got user, assistant"),
        ([SHOT[1], ASKED], "got assistant, user"),
        ([ASKED, ASKED], "got user, user"),
        ([SYSTEM], "got system"),
        ([SYSTEM, SYSTEM, ASKED], "got system, system, user"),
        ([*SHOT, SYSTEM, ASKED], "got user, assistant, system, user"),
        (["{question}"], r"prompt\.0.* must hold role and content"),
        ([{"role": "user"}], r"prompt\.0.* must hold role and content"),
        ([*SHOT, {**ASKED, "name": "x"}], r"prompt\.2.* must hold role and content"),
        ([{"role": "human", "content": "x"}], r"prompt\.0\.role.* must be one of system, user, assistant"),
        ([{"role": "user", "content": 3}], r"prompt\.0\.content.* must be a text"),
        ([{"role": "user", "content": " "}], r"prompt\.0\.content.* must be a text"),
        ([{"role": "user", "content": "{question.x}"}], "only plain names"),
        ([{"role": "user", "content": "{topic}"}], "which the row lacks"),
    ],
    ids=str,
)
def test_turns_that_lead_to_no_answer_are_refused(write_task, prompt, message):
    with pytest.raises(EvalError, match=message) as caught:
        load_task(write_task(ROWS, kind="multiple_choice", prompt=prompt))
    assert caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1]['content'] }}", "leaves a turn out: .* without the system's 'Be short.'"),
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
         "{% for m in messages %}{{ m['content'] }}{% endfor %}",
         "cannot render the turns system, user, assistant, user: no system"),
    ],
)  # fmt: skip
def test_templates_that_cannot_take_the_turns_are_refused_before_anything_runs(
    few_shot, tiny_llama, chat_tokenizer, tmp_path, template, message
):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = template
    with pytest.raises(EvalError, match=message) as caught:
        evaluate_model(tiny_llama, tokenizer, tasks=[few_shot], out_dir=tmp_path / "out", model_name="m")
    assert "template" in caught.value.where
    assert not (tmp_path / "out").exists()
