"""Every protocol asks and judges as it says: options ranked four ways, letters, and thought before the answer."""

from __future__ import annotations

import math

import pytest

from gendistill_evals import PROTOCOLS, EvalError, Generation, HFModel, Likelihood, evaluate_model, load_task
from gendistill_evals.extract import answer_after_thought, stated_answer
from gendistill_evals.forms import Form, by_letter, in_form, reordered
from gendistill_evals.prompts import PLAIN_STYLE, Prompter, Style, ids_sha256
from gendistill_evals.protocols import asked_items, ends_in_loop
from gendistill_evals.results import read_samples
from gendistill_evals.task import Metric

ROWS = [
    {"id": "sky", "question": "What color is the sky?", "options": ["red", "blue", "green"], "gold": "blue"},
    {"id": "grass", "question": "What color is grass?", "options": ["blue", "green", "yellow"], "gold": "green"},
]  # fmt: skip
LETTERED = {"answer": "letter", "prompt": "{question}\n{options}\nWhich?"}
LIKELIHOODS = [name for name, protocol in PROTOCOLS.items() if isinstance(protocol, Likelihood)]


@pytest.fixture
def quiz(write_task):
    return write_task(ROWS, stem="quiz", kind="multiple_choice")


def test_the_first_of_each_family_lead_and_names_are_those_of_the_table():
    assert list(PROTOCOLS) == [
        "likelihood", "generation", "likelihood_raw", "likelihood_per_token", "likelihood_per_char",
        "likelihood_letter", "generation_letter", "generation_thought",
    ]  # fmt: skip
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())
    assert len({protocol.label for protocol in PROTOCOLS.values()}) == len(PROTOCOLS)


def test_options_are_ranked_by_total_by_token_and_by_character(chat_tokenizer, write_task, scripted):
    """Three options of which each is best by one measure; the task's own metric decides plain likelihood."""
    options = ["B", "What color is a ripe banana yellow", "0 1 2 3 4 5 6 7 8 9"]
    totals = dict(zip(options, (-1.0, -5.0, -4.0), strict=True))
    row = {"question": "q", "options": options, "gold": options[0]}
    tokens = {}

    class Model(scripted):
        def log_probs(self, pairs):
            for index, pair in enumerate(pairs):
                text = self.tokenizer.decode(pair.continuation)
                tokens[text] = len(pair.continuation)
                yield index, [totals[text] / len(pair.continuation)] * len(pair.continuation)

    def choice(protocol, **settings):
        task = load_task(write_task([row], kind="multiple_choice", **settings))
        (sample,) = PROTOCOLS[protocol].run(Model(chat_tokenizer), task).samples
        return sample

    sample = choice("likelihood_raw")
    assert sample["choice"] == 0
    per_token = [totals[text] / tokens[text] for text in options]
    per_char = [totals[text] / len(text) for text in options]
    assert sample["scores_per_token"] == pytest.approx(per_token)
    assert sample["scores_per_char"] == pytest.approx(per_char)
    best_by_token, best_by_char = (values.index(max(values)) for values in (per_token, per_char))
    assert {0, best_by_token, best_by_char} == {0, 1, 2}
    assert choice("likelihood_per_token")["choice"] == best_by_token
    assert choice("likelihood_per_char")["choice"] == best_by_char
    for metric, expected in (
        (None, 0),
        ("accuracy_per_token", best_by_token),
        ("accuracy_per_char", best_by_char),
    ):
        settings = {"metric": metric} if metric else {}
        assert choice("likelihood", **settings)["choice"] == expected
        assert choice("likelihood_raw", **settings)["choice"] == 0


def test_characters_are_counted_as_lm_eval_counts_them(chat_tokenizer, write_task, scripted):
    """lm-eval's acc_norm divides by ``len(choice)``: characters, not the bytes of UTF-8, of which "日本" has six."""
    np = pytest.importorskip("numpy")
    options = ["日本日本", "abcde"]
    lls = {"日本日本": -4.5, "abcde": -5.0}

    class Model(scripted):
        def log_probs(self, pairs):
            for index, pair in enumerate(pairs):
                text = self.tokenizer.decode(pair.continuation)
                yield index, [lls[text] / len(pair.continuation)] * len(pair.continuation)

    task = load_task(
        write_task([{"question": "q", "options": options, "gold": "abcde"}], kind="multiple_choice")
    )
    (sample,) = PROTOCOLS["likelihood_per_char"].run(Model(chat_tokenizer), task).samples
    totals = np.array([lls[text] for text in options])
    assert sample["choice"] == int(np.argmax(totals / np.array([float(len(text)) for text in options]))) == 1
    assert int(np.argmax(totals / np.array([float(len(text.encode())) for text in options]))) == 0


def test_lm_eval_divides_by_characters_still():
    """The rule above is that of the version that is installed."""
    task = pytest.importorskip("lm_eval.api.task")
    import inspect

    source = inspect.getsource(task.ConfigurableTask.process_results)
    assert "completion_len = np.array([float(len(i)) for i in choices])" in source
    assert "pred_norm = np.argmax(lls / completion_len)" in source


def test_by_letter_the_prompt_lists_the_options_and_asks_for_one(quiz, chat_tokenizer, scripted):
    task = load_task(quiz)
    listed = "What color is the sky?\nA. red\nB. blue\nC. green\nAnswer with the letter."
    model = scripted(
        chat_tokenizer, log_probs={"A": -3.0, "B": -1.0, "C": -2.0}, says=lambda prompt: "(B) blue"
    )
    ranked, written = (
        PROTOCOLS[name].run(model, task) for name in ("likelihood_letter", "generation_letter")
    )
    assert all(listed in prompt for prompt in (model.prompts[0], model.prompts[-2]))
    # "B" is blue of the first item and green of the second, and the right answer to both.
    assert [sample["choice"] for sample in ranked.samples] == [1, 1]
    assert [sample["extracted"] for sample in written.samples] == ["B", "B"]
    assert ranked.score["value"] == written.score["value"] == 1
    assert [sample["prompt_sha256"] for sample in ranked.samples] == [
        sample["prompt_sha256"] for sample in written.samples
    ]
    assert len(ranked.samples[0]["scores"]) == 3


@pytest.mark.parametrize(
    "settings",
    [
        LETTERED,
        {"prompt": "{question}\nA. red\nB. blue\nC. green", "options": ["A", "B", "C"], "gold": "letter"},
    ],
    ids=["answer: letter", "letters that the prompt explains"],
)
def test_a_task_that_lists_letters_itself_is_asked_as_it_is(write_task, settings):
    rows = [{"question": "Sky?", "options": ["red", "blue", "green"], "gold": "blue"}]
    if "gold" in settings:
        rows = [{"question": "Sky?", "gold": "B"}]
    (item,) = load_task(write_task(rows, kind="multiple_choice", **settings)).items
    assert by_letter(item) == item


def test_letters_follow_a_prompt_of_turns(write_task):
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "b"}]
    path = write_task(
        ROWS, kind="multiple_choice", prompt=[*turns, {"role": "user", "content": "{question}"}]
    )
    item = by_letter(load_task(path).items[0])
    assert item.messages[:2] == turns
    assert item.messages[2]["content"].endswith("?\nA. red\nB. blue\nC. green\nAnswer with the letter.")
    assert (item.gold, item.options, item.texts) == ("B", ("A", "B", "C"), ("red", "blue", "green"))


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("The sky is blue. The answer is blue.", "blue."),
        ("First, the answer is red. No: the answer is blue.\nI hope that helps; 7 days.", "blue."),
        ("**Answer:** blue", "blue"),
        ("**Answer**: blue", "blue"),
        ("Final answer: blue", "blue"),
        ("So \\boxed{blue}", "blue"),
        ("\\boxed{\\text{dark {blue}}} is it", "\\text{dark {blue}}"),
        ("The answer is\n\nblue\nred", "blue"),
        ("the answer is \\boxed{4}", "4"),
        ("I thought of 4 things\n#### 5\n", "5"),
        ("The sky is blue.", None),
        ("", None),
        ("The answer is", None),
        ("The answer isn't known", None),
        ("My answers are many", None),
    ],
)
def test_what_a_thought_ends_in_is_its_answer(text, stated):
    assert stated_answer(text) == stated


@pytest.mark.parametrize(
    ("text", "correct"),
    [
        ("5 eggs a day for 3 days. The answer is 15 eggs in 3 days.", True),
        ("The answer is 5 * 3 = 15.", True),
        ("5 * 3 = 15\n#### 15", True),
        ("\\boxed{15}", True),
        ("The answer is $15", True),
        ("The answer is **15**.", True),
        ("15", False),
        ("It is 15 because 3 * 5 = 15", False),
        ("The answer is fifteen", False),
        ("The answer is 16. I first said 15", False),
    ],
)
def test_a_number_counts_where_it_is_stated(chat_tokenizer, write_task, text, correct, scripted):
    task = load_task(write_task([{"question": "5 eggs a day, 3 days?", "gold": "15"}], kind="numeric"))
    (sample,) = (
        PROTOCOLS["generation_thought"].run(scripted(chat_tokenizer, says=lambda _: text), task).samples
    )
    assert sample["correct"] is correct
    assert sample["text"] == text
    if "answer" not in text and "#" not in text and "box" not in text:
        assert sample["extracted"] is None


def test_thought_is_asked_for_and_has_tokens_of_its_own(quiz, chat_tokenizer, write_task, scripted):
    said = "Think. " * 15 + "\n\nThe answer is blue."
    model = scripted(chat_tokenizer, says=lambda prompt: said)
    task = load_task(quiz)
    run = PROTOCOLS["generation_thought"].run(model, task)
    assert 'end with "The answer is ...".' in model.prompts[0]
    assert [sample["correct"] for sample in run.samples] == [True, False]
    assert PROTOCOLS["generation"].run(model, task).score["truncated"] == 2
    thought = PROTOCOLS["generation_thought"]
    assert isinstance(thought, Generation)
    assert (thought.max_new_tokens(task), PROTOCOLS["generation"].max_new_tokens(task)) == (264, 8)
    longer = load_task(write_task(ROWS, kind="multiple_choice", thought_tokens=20))
    assert thought.max_new_tokens(longer) == 28
    assert longer.prompt_sha256 != load_task(write_task(ROWS, kind="multiple_choice")).prompt_sha256
    (sample, _) = thought.run(model, longer).samples
    assert (sample["truncated"], sample["extracted"], sample["correct"]) == (True, None, False)


def test_letters_are_thought_about_too(write_task, chat_tokenizer, scripted):
    task = load_task(write_task(ROWS, kind="multiple_choice", **LETTERED))
    model = scripted(chat_tokenizer, says=lambda prompt: "A is red, C is green. The answer is (b) blue.")
    run = PROTOCOLS["generation_thought"].run(model, task)
    assert "where X is the letter" in model.prompts[0]
    assert [sample["choice"] for sample in run.samples] == [1, 1]


def test_a_stop_text_of_the_task_does_not_end_a_thought(write_task, chat_tokenizer, scripted):
    task = load_task(write_task(ROWS, kind="multiple_choice", stop=["\n"]))
    model = scripted(chat_tokenizer, says=lambda prompt: "Let me think.\nThe answer is blue.")
    assert PROTOCOLS["generation_thought"].run(model, task).score["extraction_failures"] == 0
    assert PROTOCOLS["generation"].run(model, task).score["extraction_failures"] == 2


@pytest.mark.parametrize(
    ("text", "opens", "answer"),
    [
        ("blue", False, "blue"),
        ("<think>red</think>\n blue ", False, "blue"),
        ("red</think>blue", True, "blue"),
        ("<think>red", False, None),
        ("red", True, None),
        ("<think>a</think>b<think>c", False, None),
        ("<think>a</think>", False, ""),
    ],
)
def test_a_reasoning_block_is_not_part_of_the_answer(text, opens, answer):
    assert answer_after_thought(text, opens=opens) == answer


@pytest.mark.parametrize(
    "name", [name for name in PROTOCOLS if name not in ("generation", "generation_thought")]
)
def test_tasks_without_options_have_a_reason(write_task, chat_tokenizer, tmp_path, name, scripted):
    path = write_task([{"question": "a?", "gold": "b"}], kind="exact_match")
    task, protocol = load_task(path), PROTOCOLS[name]
    assert protocol.why_not(task)
    model = scripted(chat_tokenizer)
    with pytest.raises(EvalError, match="cannot score demo: the items have no"):
        protocol.run(model, task)
    if name != "likelihood":
        with pytest.raises(
            EvalError, match=f"{name} can score none of the tasks: demo: the items have no"
        ) as caught:
            evaluate_model(
                model, tasks=[path], out_dir=tmp_path, model_name="m", protocols=["generation", name]
            )
        assert caught.value.exit_code == 2
        assert caught.value.hint
        assert not model.prompts


def test_a_leading_protocol_that_fits_no_task_is_null(write_task, chat_tokenizer, tmp_path, scripted):
    path = write_task([{"question": "a?", "gold": "b"}], kind="exact_match")
    (entry,) = evaluate_model(scripted(chat_tokenizer), tasks=[path], out_dir=tmp_path, model_name="m")[
        "tasks"
    ]
    assert entry["likelihood"] is None
    assert "no distractors" in entry["likelihood_reason"]
    assert not any("letter" in key for key in entry)
    with pytest.raises(EvalError, match="likelihood can score none of the tasks"):
        evaluate_model(
            scripted(chat_tokenizer), tasks=[path], out_dir=tmp_path, model_name="m", protocols=["likelihood"]
        )


def test_a_judge_of_whole_texts_is_not_given_the_end_of_one(write_task, monkeypatch):
    from gendistill_evals import JUDGES, Judgement

    monkeypatch.setitem(JUDGES, "whole", lambda item, text: Judgement(text, correct=True))
    task = load_task(write_task([{"question": "a?", "gold": "b"}], kind="exact_match", judge="whole"))
    assert "judges a whole text" in (PROTOCOLS["generation_thought"].why_not(task) or "")
    assert PROTOCOLS["generation"].why_not(task) is None


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_entry_has_the_hash_of_what_was_asked(quiz, tiny_llama, chat_tokenizer, name):
    protocol, task = PROTOCOLS[name], load_task(quiz)
    run = protocol.run(HFModel(tiny_llama, chat_tokenizer), task)
    form = getattr(protocol, "form", Form.PLAIN)
    expected = [
        ids_sha256(Prompter(chat_tokenizer).prompt_ids(item.prompt))
        for item in asked_items(task, form, PLAIN_STYLE)
    ]
    assert [sample["prompt_sha256"] for sample in run.samples] == expected
    assert len(set(expected)) == 2
    for sample in run.samples:
        assert sample["choice"] is None or 0 <= sample["choice"] < 3


def test_a_hash_of_tokens_is_that_of_eight_bytes_each():
    import hashlib
    import struct

    assert ids_sha256([1, 2, 70_000]) == hashlib.sha256(struct.pack("<3q", 1, 2, 70_000)).hexdigest()


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([], False),
        ([1] * 11, False),
        ([1] * 12, True),
        (list(range(40)), False),
        ([9, 8, *[1, 2, 3, 4] * 3], True),
        ([*[1, 2, 3, 4] * 3, 5], False),
        ([1, 2, 3, 4] * 2, False),
        ([*range(20)] * 3, True),
        ([*range(40)] * 3, False),
    ],
)
def test_an_answer_loops_if_it_ends_in_the_same_words_three_times(tokens, loops):
    assert ends_in_loop(tokens) is loops


@pytest.mark.parametrize("metric", Metric)
def test_every_metric_can_be_named_by_a_task(write_task, metric):
    assert load_task(write_task(ROWS, kind="multiple_choice", metric=str(metric))).metric is metric


@pytest.mark.parametrize("style", [PLAIN_STYLE, Style(few_shot=0, system="Be short.")])
@pytest.mark.parametrize("form", Form)
def test_a_form_changes_neither_ids_nor_what_is_right(quiz, form, style):
    task = load_task(quiz)
    for item, asked in zip(task.items, asked_items(task, form, style), strict=True):
        assert (asked.id, asked.group) == (item.id, item.group)
        assert asked.options is not None
        place = asked.options.index(asked.gold)
        assert (asked.texts or asked.options)[place] == item.gold
        assert (in_form(item, form).prompt == item.prompt) is (form is Form.PLAIN)


def test_samples_hold_the_options_of_the_task_and_the_places_chosen(quiz, chat_tokenizer, tmp_path, scripted):
    model = scripted(chat_tokenizer, log_probs={"C": -0.5}, says=lambda prompt: "C")
    evaluate_model(
        model,
        tasks=[quiz],
        out_dir=tmp_path,
        model_name="m",
        protocols=["likelihood_letter", "generation_letter"],
    )
    for row in read_samples(tmp_path):
        assert row["options"] == next(each["options"] for each in ROWS if each["id"] == row["id"])
        assert row["likelihood_letter"]["choice"] == row["generation_letter"]["choice"] == 2
        assert row["likelihood"] is None


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0), (0, 1, 2)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompt": "{question} {options}?"},
        LETTERED,
        {
            "answer": "letter",
            "prompt": "{question}\n(A) red\n(B) blue\n(C) green",
            "options": ["red", "blue", "green"],
        },
        {"prompt": "{question}\nA: red\nB: blue\nC: green\n", "options": ["A", "B", "C"], "gold": "letter"},
    ],
    ids=["not shown", "words", "letters", "letters written out", "letters only the prompt explains"],
)
def test_options_in_another_order_move_with_their_answer(write_task, settings, order):
    rows = [{"question": "Sky?", "options": ["red", "blue", "green"], "gold": "blue"}]
    if "options" in settings:
        rows = [{"question": "Sky?", "gold": "B" if settings.get("gold") else "blue"}]
    (item,) = load_task(write_task(rows, kind="multiple_choice", **settings)).items
    moved = reordered(item, order)
    assert moved is not None
    texts = [["red", "blue", "green"][place] for place in order]
    assert (moved.options or ()).index(moved.gold) == texts.index("blue")
    prompt = str(moved.prompt)
    if settings:
        assert sorted(texts, key=prompt.index) == texts
        assert len(prompt) == len(str(item.prompt))
    else:
        assert moved.prompt == item.prompt
    back = reordered(moved, [order.index(place) for place in range(3)])
    assert back == item


@pytest.mark.parametrize(
    "prompt", ["{question}", "{question}\nA. red\nC. green\nB. blue", "A. red B. blue C. green"]
)
def test_letters_that_are_nowhere_explained_cannot_be_reordered(write_task, prompt):
    rows = [{"question": "Sky?", "gold": "B"}]
    path = write_task(rows, kind="multiple_choice", options=["A", "B", "C"], gold="letter", prompt=prompt)
    assert reordered(load_task(path).items[0], (1, 2, 0)) is None


def test_an_item_without_options_has_no_order(write_task):
    (item,) = load_task(write_task([{"question": "a?", "gold": "b"}], kind="exact_match")).items
    assert reordered(item, ()) is None


def test_likelihoods_of_one_form_ask_the_model_once(quiz, tiny_llama, chat_tokenizer, tmp_path):
    where = {"tasks": [quiz], "out_dir": tmp_path, "model_name": "m"}
    evaluate_model(tiny_llama, chat_tokenizer, **where, protocols=["likelihood"])
    kept = sorted(path.stat().st_size for path in tmp_path.glob("parts/*"))
    names = [name for name in LIKELIHOODS if name != "likelihood_letter"]
    (entry,) = evaluate_model(tiny_llama, chat_tokenizer, **where, protocols=names)["tasks"]
    assert sorted(path.stat().st_size for path in tmp_path.glob("parts/*")) == kept
    assert all(math.isfinite(entry[name]["value"]) for name in names)
