"""How prompts are made: chat template or plain text, system turn, reasoning, examples as turns; and what is refused."""

from __future__ import annotations

import copy
import json

import pytest

from gendistill_evals import PROTOCOLS, EvalError, HFModel, evaluate_model, load_task
from gendistill_evals.evaluate import check_evaluation
from gendistill_evals.forms import Form, example_turns
from gendistill_evals.model import Limits
from gendistill_evals.prompts import ChatTemplate, Prompter, Style, opened
from gendistill_evals.protocols import asked_items
from gendistill_evals.results import read_results, read_samples

ROWS = [
    {"id": "sky", "question": "Sky?", "options": ["red", "blue"], "gold": "blue"},
    {"id": "grass", "question": "Grass?", "options": ["blue", "green"], "gold": "green"},
]
SHOWN = [
    {"question": "Blood?", "options": ["red", "blue"], "gold": "red"},
    {"question": "Snow?", "options": ["white", "black"], "gold": "white"},
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = CHAT + "{% if add_generation_prompt and not enable_thinking %}<think>\n\n</think>\n{% endif %}"
OPENS = CHAT + "{% if add_generation_prompt and enable_thinking %}<think>\n{% endif %}"
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
DROPS = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def shots(write_task, tmp_path):
    """Write a task with two examples."""

    def write(shown=SHOWN, **settings):
        path = write_task(ROWS, stem="shots", kind="multiple_choice", examples="shown.jsonl", **settings)
        (path.parent / "shown.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shown))
        return path

    return write


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def text_of(tokenizer, task, style, form=Form.PLAIN):
    item = asked_items(load_task(task), form, style)[0]
    return tokenizer.decode(Prompter(tokenizer, style).prompt_ids(item.prompt))


def test_a_template_that_is_off_leaves_plain_text(colors, chat_tokenizer, plain_tokenizer):
    off = Style(ChatTemplate.OFF)
    text = text_of(chat_tokenizer, colors, off)
    assert (
        text == text_of(plain_tokenizer, colors, Style()) == "Question: What color is a ripe banana?\nAnswer:"
    )
    prompter = Prompter(chat_tokenizer, off)
    assert prompter.template is None
    assert prompter.stop == ("\nQuestion:",)
    assert prompter.settings()["chat_template_sha256"] is None
    # A template that cannot be used is in nobody's way.
    assert Prompter(with_template(chat_tokenizer, "{{ 1 / 0 }}"), off).template is None


def test_examples_and_system_are_turns_before_the_question(shots, chat_tokenizer):
    text = text_of(chat_tokenizer, shots(), Style(system="Be short.", few_shot=2))
    turns = [("system", "Be short."), ("user", "Blood?"), ("assistant", "red"), ("user", "Snow?"),
             ("assistant", "white"), ("user", "Sky?")]  # fmt: skip
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    assert text == f"{expected}<|im_start|>assistant\n"


def test_without_a_template_they_are_text(shots, plain_tokenizer):
    text = text_of(plain_tokenizer, shots(), Style(system="Be short.", few_shot=1))
    assert text == "Be short.\n\nQuestion: Blood?\nAnswer: red\n\nQuestion: Sky?\nAnswer:"


def test_examples_take_the_form_of_the_question(shots, plain_tokenizer):
    letters = text_of(plain_tokenizer, shots(), Style(few_shot=1), Form.LETTER)
    assert letters == (
        "Question: Blood?\nA. red\nB. blue\nAnswer with the letter.\nAnswer: A\n\n"
        "Question: Sky?\nA. red\nB. blue\nAnswer with the letter.\nAnswer:"
    )
    assert "Answer: The answer is red.\n\nQuestion: Sky?" in text_of(
        plain_tokenizer, shots(), Style(few_shot=1), Form.THOUGHT
    )


def test_a_worked_example_shows_its_solution(write_task):
    rows = [{"question": "2 + 3?", "gold": "Two and three are five.\n#### 5"}]
    path = write_task(rows, stem="sums", kind="numeric", gold_after="####", examples="more.jsonl")
    (path.parent / "more.jsonl").write_text(
        json.dumps({"question": "1 + 1?", "gold": "It is two.\n#### 2"}) + "\n"
    )
    (example,) = load_task(path).examples
    assert example_turns(example, Form.PLAIN)[1]["content"] == "It is two.\n#### 2"
    assert example_turns(example, Form.THOUGHT)[1]["content"] == "It is two.\nThe answer is 2."


def test_a_prompt_of_turns_keeps_its_own_before_the_examples():
    turns = tuple({"role": role, "content": role} for role in ("system", "user", "assistant", "user"))
    shot = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
    assert opened(turns, shots=shot) == (*turns[:3], *shot, turns[3])
    with pytest.raises(EvalError, match="a system turn of its own, 'system', and system: gives another"):
        opened(turns, system="Be short.")


def test_two_system_turns_name_the_item(write_task, chat_tokenizer):
    prompt = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "{question}"}]
    path = write_task(ROWS, kind="multiple_choice", prompt=prompt)
    with pytest.raises(EvalError, match="system turn of its own") as caught:
        check_evaluation(Limits(None, None), chat_tokenizer, tasks=[path], style=Style(system="Be short."))
    assert caught.value.where == "demo, item sky"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM + CHAT, "takes no system turn: .*System role not supported"),
        (DROPS, "takes no system turn: .* leaves a turn out|drops the system turn"),
    ],
)
def test_a_system_text_that_the_template_forbids_or_drops_is_refused(
    colors, chat_tokenizer, tiny_llama, tmp_path, template, message
):
    tokenizer = with_template(chat_tokenizer, template)
    settings = {"tasks": [colors], "out_dir": tmp_path / "out", "model_name": "m"}
    with pytest.raises(EvalError, match=message) as caught:
        evaluate_model(tiny_llama, tokenizer, style=Style(system="Be short."), **settings)
    assert "--chat-template off" in caught.value.hint
    assert not (tmp_path / "out").exists()
    assert evaluate_model(tiny_llama, tokenizer, **settings)["settings"]["style"]["system"] is None
    plain = Style(ChatTemplate.OFF, "Be short.")
    assert (
        evaluate_model(tiny_llama, tokenizer, style=plain, **settings)["settings"]["style"]["system"]
        == "Be short."
    )


def test_a_system_text_inside_the_users_turn_is_taken(chat_tokenizer):
    """Some templates have no system role and write its text before the first question."""
    folded = (
        "{% set first = messages[0]['content'] + '\n' if messages[0]['role'] == 'system' else '' %}"
        "{% for m in messages if m['role'] != 'system' %}<u>{{ (first if loop.first else '') + m['content'] }}"
        "{% endfor %}"
    )
    assert Prompter(with_template(chat_tokenizer, folded), Style(system="Be short.")).template


def test_a_system_text_that_stands_in_the_question_by_chance_is_missed_by_nobody(chat_tokenizer):
    with pytest.raises(EvalError, match="drops the system turn 'What'"):
        Prompter(with_template(chat_tokenizer, DROPS), Style(system="What"))


def test_reasoning_is_switched_by_the_template(chat_tokenizer, tiny_llama):
    tokenizer = with_template(chat_tokenizer, THINKS)
    on, off = (Prompter(tokenizer, Style(reasoning=reasoning)) for reasoning in (True, False))
    assert tokenizer.decode(off.prompt_ids("a")).endswith("assistant\n<think>\n\n</think>\n")
    assert tokenizer.decode(on.prompt_ids("a")).endswith("assistant\n")
    assert on.settings()["chat_template_settings"] == {"enable_thinking": True, "thinking": True}
    for each in (chat_tokenizer, with_template(chat_tokenizer, None)):
        with pytest.raises(EvalError, match=r"no reasoning to switch on|prompts are plain text") as caught:
            Prompter(each, Style(reasoning=True))
        assert caught.value.hint


@pytest.mark.parametrize("template", [THINKS, OPENS], ids=["the model opens", "the prompt opens"])
def test_what_is_written_while_reasoning_is_not_judged(write_task, scripted, chat_tokenizer, template):
    tokenizer = with_template(chat_tokenizer, template)
    begin = "" if template == OPENS else "<think>"
    task = load_task(
        write_task(ROWS, kind="multiple_choice", stop=["\n"], max_new_tokens=16, thought_tokens=100)
    )
    on = Style(reasoning=True)
    replies = {"Sky": f"{begin}red?\nno</think>\n\nblue\nred", "Grass": f"{begin}it is green"}
    model = scripted(
        tokenizer, says=lambda prompt: next(text for word, text in replies.items() if word in prompt)
    )
    run = PROTOCOLS["generation"].run(model, task, style=on)
    assert [sample["extracted"] for sample in run.samples] == ["blue", None]
    assert run.score["extraction_failures"] == 1
    assert run.samples[0]["text"] == replies["Sky"]
    assert PROTOCOLS["generation"].max_new_tokens(task, on) == 116
    assert PROTOCOLS["generation_thought"].max_new_tokens(task, on) == 216


@pytest.mark.parametrize("few_shot", [1, 3])
def test_more_examples_than_there_are_are_refused(
    shots, colors, tiny_llama, chat_tokenizer, tmp_path, few_shot
):
    tasks = [shots()] if few_shot == 3 else [colors]
    has = "2" if few_shot == 3 else "none"
    with pytest.raises(
        EvalError, match=f"few_shot asks for {few_shot} examples, and the task has {has}"
    ) as caught:
        evaluate_model(
            tiny_llama, chat_tokenizer, tasks=tasks, out_dir=tmp_path / "out", model_name="m",
            style=Style(few_shot=few_shot),
        )  # fmt: skip
    assert "examples:" in caught.value.hint
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("question", ["Sky?", " sky? "])
def test_examples_that_are_items_are_refused(shots, question):
    with pytest.raises(EvalError, match='example "1" is item "sky"') as caught:
        load_task(shots([SHOWN[0], {"question": question, "options": ["blue", "red"], "gold": "blue"}]))
    assert caught.value.where.endswith("shown.jsonl")


def test_one_question_with_other_options_is_another_item(shots):
    row = {"question": "Sky?", "options": ["azure", "red"], "gold": "azure"}
    assert len(load_task(shots([row])).examples) == 1


def test_examples_enter_the_identity_of_the_task(shots):
    hashes = {load_task(shots(rows)).prompt_sha256 for rows in (SHOWN, SHOWN[:1])}
    assert len(hashes) == 2
    assert len({load_task(shots(rows)).items_sha256 for rows in (SHOWN, SHOWN[:1])}) == 1


def test_a_missing_or_broken_file_of_examples_is_named(write_task):
    path = write_task(ROWS, kind="multiple_choice", examples="none.jsonl")
    with pytest.raises(EvalError, match="the file of examples is missing"):
        load_task(path)
    (path.parent / "none.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(EvalError, match="there is no column"):
        load_task(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": "on"}, "chat_template must be one of auto, off, got 'on'"),
        ({"system": " "}, "system must be a text with words"),
        ({"system": 3}, "system must be a text"),
        ({"reasoning": "on"}, "reasoning must be true or false"),
        ({"few_shot": -1}, "few_shot must be a whole number from 0"),
        ({"few_shot": True}, "few_shot must be a whole number from 0"),
    ],
)
def test_styles_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(EvalError, match=message) as caught:
        Style(**settings)
    assert caught.value.exit_code == 2


def test_the_style_is_in_the_settings_and_asks_anew(shots, tiny_llama, chat_tokenizer, tmp_path):
    where = {"tasks": [shots()], "model_name": "m", "parts_dir": tmp_path / "parts"}
    style = Style(system="Be short.", few_shot=2)
    evaluate_model(tiny_llama, chat_tokenizer, **where, out_dir=tmp_path / "a")
    evaluate_model(tiny_llama, chat_tokenizer, **where, out_dir=tmp_path / "b", style=style)
    settings = read_results(tmp_path / "b")["settings"]
    assert settings["style"] == {
        "chat_template": "auto",
        "system": "Be short.",
        "reasoning": False,
        "few_shot": 2,
    }
    assert read_results(tmp_path / "a")["settings"]["style"]["few_shot"] == 0
    hashes = [
        {
            row[name]["prompt_sha256"]
            for row in read_samples(tmp_path / folder)
            for name in ("likelihood", "generation")
        }
        for folder in "ab"
    ]
    assert [len(each) for each in hashes] == [2, 2]
    assert not hashes[0] & hashes[1]


def test_open_questions_are_asked_in_the_style_too(scripted, chat_tokenizer, tmp_path):
    (tmp_path / "open.jsonl").write_text('{"question": "Where?"}\n')
    model = scripted(chat_tokenizer, says=lambda prompt: "Here.")
    evaluate_model(
        model, tasks=[], questions=tmp_path / "open.jsonl", out_dir=tmp_path, model_name="m",
        style=Style(system="Be short.", few_shot=2),
    )  # fmt: skip
    assert model.prompts == ["<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nWhere?<|im_end|>\n"
                             "<|im_start|>assistant\n"]  # fmt: skip


def test_a_style_changes_nothing_where_it_is_the_default(colors, tiny_llama, chat_tokenizer):
    model, task = HFModel(tiny_llama, chat_tokenizer), load_task(colors)
    for protocol in PROTOCOLS.values():
        assert protocol.run(model, task) == protocol.run(model, task, style=Style())


def test_examples_without_options_are_not_shown_by_letter(write_task):
    path = write_task(
        [{"question": "2 + 2?", "gold": "4", "distractors": ["5"]}],
        stem="sums",
        kind="numeric",
        examples="shown.jsonl",
    )
    (path.parent / "shown.jsonl").write_text(json.dumps({"id": "one", "question": "1 + 1?", "gold": "2"}))
    task, style = load_task(path), Style(few_shot=1)
    assert len(asked_items(task, Form.PLAIN, style)) == 1
    with pytest.raises(EvalError, match="example one by letter, and it has 0 options"):
        asked_items(task, Form.LETTER, style)
