"""Texts of long context: of the length that was asked for, the same for the same seed, and with one right answer."""

from __future__ import annotations

import random
import re

import pytest

from gendistill_evals import evaluate_model
from gendistill_evals.errors import EvalError
from gendistill_evals.haystack import KEY_ADJECTIVES, KEY_NOUNS, KEYS, filler, keys
from gendistill_evals.results import read_samples
from gendistill_evals.synthetic import Synthesis, heat_table, make_rows, read_synthesis

KINDS = ("needle", "multi_key", "variables", "mqar")
NEW_TOKENS = 32


def synthesis(task: str, **settings) -> Synthesis:
    return read_synthesis({"task": task, "lengths": [1500, 4000], "per_cell": 2, **settings}, "demo.yaml")


def rows(made: Synthesis, tokenizer, *, max_tokens: int | None = None) -> list[dict]:
    return make_rows(made, counter(tokenizer), max_new_tokens=NEW_TOKENS, max_tokens=max_tokens, where="demo")


def counter(tokenizer):
    def count(text: str) -> int:
        asked = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False)
        return len(tokenizer(asked, add_special_tokens=False)["input_ids"])

    return count


@pytest.mark.parametrize("task", KINDS)
def test_a_text_fills_its_length_in_tokens_of_the_models_tokenizer(task, chat_tokenizer):
    """What the chat template adds and the longest answer are part of the length; less than one sentence is left."""
    made = synthesis(task, lengths=[1600, 3000])
    count = counter(chat_tokenizer)
    found = rows(made, chat_tokenizer)
    assert {row["length"] for row in found} == {1600, 3000}
    for row in found:
        total = count(row["prompt"]) + NEW_TOKENS
        assert row["length"] - 95 <= total <= row["length"]


@pytest.mark.parametrize("task", KINDS)
def test_the_number_asked_for_stands_in_the_text_once(task, chat_tokenizer):
    for row in rows(synthesis(task), chat_tokenizer):
        numbers = re.findall(r"\d+", row["prompt"])
        assert numbers.count(row["gold"]) == 1
        assert len(numbers) == len(set(numbers))
        assert row["gold"] not in row["distractors"]
        assert len({row["gold"], *row["distractors"]}) == 4
        assert {len(number) for number in (row["gold"], *row["distractors"])} == {5}


@pytest.mark.parametrize("task", ["multi_key", "mqar", "variables"])
def test_wrong_answers_are_numbers_of_the_same_text(task, chat_tokenizer):
    for row in rows(synthesis(task), chat_tokenizer):
        assert set(row["distractors"]) <= set(re.findall(r"\d+", row["prompt"]))


@pytest.mark.parametrize("task", ["needle", "multi_key"])
def test_the_key_stands_beside_its_number_and_in_the_question_only(task, chat_tokenizer):
    for row in rows(synthesis(task), chat_tokenizer):
        key = re.search(r"What is the number of the (\w+ \w+)\?", row["prompt"])[1]
        assert row["prompt"].count(key) == 2
        assert f"The number of the {key} is {row['gold']}." in row["prompt"]


def test_filler_holds_neither_digits_nor_words_of_keys():
    text = " ".join(filler(random.Random(0))(5_000))
    words = set(re.findall(r"\w+", text.lower()))
    assert not words & {*KEY_ADJECTIVES, *KEY_NOUNS}
    assert not re.search(r"\d|VAR|number", text)
    assert len(words) > 80


def test_keys_are_all_different():
    assert len({keys(index) for index in range(KEYS)}) == KEYS
    assert not set(KEY_ADJECTIVES) & set(KEY_NOUNS)


def test_a_needle_stands_at_its_depth(chat_tokenizer):
    for row in rows(synthesis("needle", lengths=[4000], depths=[0, 25, 50, 75, 100]), chat_tokenizer):
        body = row["prompt"].split("\n\n")[1]
        place = body.index(row["gold"]) / len(body)
        assert place == pytest.approx(row["depth"] / 100, abs=0.04)


def test_a_chain_of_variables_leads_to_the_value(chat_tokenizer):
    """Followed by hand: every variable is assigned once and before it is used, and the last one has the value."""
    for row in rows(synthesis("variables", hops=3, chains=4), chat_tokenizer):
        values: dict[str, str] = {}
        for name, given in re.findall(r"VAR (\w+) = (\w+)\.", row["prompt"]):
            assert name not in values
            values[name] = given if given.isdigit() else values[given]
        assert len(values) == 16
        asked = re.search(r"value of the variable (\w+)\?", row["prompt"])[1]
        assert values[asked] == row["gold"]
        assert re.search(rf"VAR {asked} = [A-Z]+\.", row["prompt"])


def test_pairs_fill_the_whole_length_and_share_a_list(chat_tokenizer):
    found = rows(synthesis("mqar", lengths=[800, 3200], depths=[0, 50, 100]), chat_tokenizer)
    pairs = {row["length"]: len(re.findall(r"^\w+ \w+: \d+$", row["prompt"], re.MULTILINE)) for row in found}
    assert 3.5 < pairs[3200] / pairs[800] < 6
    by_context = {row["context"]: [] for row in found}
    for row in found:
        by_context[row["context"]].append(row)
    assert len(by_context) == 4
    for shared in by_context.values():
        lists = {row["prompt"].split("\n\n")[1] for row in shared}
        assert len(lists) == 1
        lines = lists.pop().splitlines()
        assert [lines.index(next(line for line in lines if row["gold"] in line)) for row in shared] == [
            0,
            round((len(lines) - 1) / 2),
            len(lines) - 1,
        ]


@pytest.mark.parametrize("task", KINDS)
def test_the_same_seed_makes_the_same_rows_and_another_one_others(task, chat_tokenizer):
    first, again, other = (rows(synthesis(task, seed=seed), chat_tokenizer) for seed in (3, 3, 4))
    assert first == again
    assert len(first) == synthesis(task).num_items
    assert not {row["prompt"] for row in first} & {row["prompt"] for row in other}
    assert len({row["id"] for row in first}) == len(first)


def test_texts_are_the_same_on_every_machine_and_with_every_version():
    made = read_synthesis(
        {"task": "needle", "lengths": [64], "depths": [50], "per_cell": 1, "seed": 7}, "demo.yaml"
    )
    (row,) = make_rows(made, lambda text: len(text.split()), max_new_tokens=8, max_tokens=None, where="demo")
    assert row == EXPECTED


def test_the_first_items_cover_every_length_and_depth(chat_tokenizer):
    made = synthesis("needle", depths=[0, 50, 100], per_cell=3)
    first = rows(made, chat_tokenizer)[:6]
    assert {(row["length"], row["depth"]) for row in first} == {
        (n, d) for n in (1500, 4000) for d in (0, 50, 100)
    }


def test_lengths_beyond_the_models_positions_are_refused(chat_tokenizer):
    with pytest.raises(EvalError, match=r"texts of 4,000 tokens .* 2,048 positions") as raised:
        rows(synthesis("needle"), chat_tokenizer, max_tokens=2048)
    assert raised.value.exit_code == 2
    assert raised.value.hint == "--lengths 1500"


@pytest.mark.parametrize("task", KINDS)
def test_lengths_that_cannot_hold_the_question_are_refused(task, chat_tokenizer):
    with pytest.raises(EvalError, match="are too few") as raised:
        rows(synthesis(task, lengths=[64]), chat_tokenizer)
    assert "longer texts" in raised.value.hint


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("needle", "must hold task and lengths"),
        ({"task": "hay", "lengths": [100]}, "must be one of needle, multi_key, variables, mqar"),
        ({"task": "needle"}, "lengths must be whole numbers"),
        ({"task": "needle", "lengths": [10]}, "from 64"),
        ({"task": "needle", "lengths": [True]}, "from 64"),
        ({"task": "needle", "lengths": [100], "depths": [101]}, "percentages"),
        ({"task": "needle", "lengths": [100], "depths": []}, "percentages"),
        ({"task": "needle", "lengths": [100], "per_cell": 0}, "per_cell"),
        ({"task": "needle", "lengths": [100], "keys": 3}, r"unknown key 'generate\.keys'"),
        ({"task": "variables", "lengths": [100], "depths": [0]}, r"unknown key 'generate\.depths'"),
        ({"task": "mqar", "lengths": [100], "per_cel": 3}, r"unknown key 'generate\.per_cel'"),
    ],
)
def test_what_cannot_be_generated_is_refused(value, says):
    with pytest.raises(EvalError, match=says) as raised:
        read_synthesis(value, "demo.yaml")
    assert raised.value.hint


def test_scores_make_a_table_of_lengths_and_depths():
    cells = [(length, depth) for length in (700, 300) for depth in (0, 100) for _ in range(2)]
    assert heat_table([*cells, None, (300, 50)], [1, 1, 1, 0, 0, 0, 1, 0, 1, 1]) == {
        "lengths": [300, 700],
        "depths": [0, 50, 100],
        "values": [[0.0, 1.0, 0.5], [1.0, None, 0.5]],
        "n": [[2, 1, 2], [2, 0, 2]],
    }
    assert heat_table([(300, None), (700, None)], [1, 0]) == {
        "lengths": [300, 700], "depths": [None], "values": [[1.0], [0.0]], "n": [[1], [1]],
    }  # fmt: skip
    assert heat_table([None, None], [1, 0]) is None


EXPECTED = {
    "id": "64-50-0",
    "prompt": "Read the text and remember its numbers.\n"
    "\n"
    "A traveler and a doctor walked to the library before the rain began. The number of the "
    "rusty sword is 15654. When the weather was good, the neighbor talked about the large "
    "meadow.\n"
    "\n"
    "What is the number of the rusty sword? Answer with the number only.",
    "gold": "15654",
    "distractors": ["20130", "37443", "85837"],
    "context": "64-50-0",
    "length": 64,
    "depth": 50,
}


def test_a_generated_task_is_scored_by_both_protocols_at_its_lengths(tmp_path, write_task, speaker):
    """A model that knows the number is right at every length and depth under both; the cells say so."""
    path = tmp_path / "near.yaml"
    path.write_text(
        "generate: {task: multi_key, lengths: [700, 900], depths: [0, 100], keys: 2, per_cell: 2}\nmax_new_tokens: 16\n"
    )

    def known(prompt: str) -> str:
        key = re.findall(r"What is the number of the (\w+ \w+)\?", prompt)
        found = re.search(rf"The number of the {key[-1]} is (\d+)\.", prompt) if key else None
        return found[1] if found else "0"

    model = speaker(known, prefers=known)
    results = evaluate_model(
        model, model.tokenizer, tasks=[path], out_dir=tmp_path / "out", model_name="oracle", batch_size=2
    )
    (task,) = results["tasks"]
    assert (task["n"], task["likelihood"]["value"], task["generation"]["value"]) == (8, 1.0, 1.0)
    heat = results["diagnostics"]["tasks"]["near"]["generation"]["lengths"]
    assert heat == {"lengths": [700, 900], "depths": [0, 100], "values": [[1.0, 1.0]] * 2, "n": [[2, 2]] * 2}
    samples = read_samples(tmp_path / "out")
    assert {(row["length"], row["depth"]) for row in samples} == {(700, 0), (700, 100), (900, 0), (900, 100)}
