"""Generative twins of multiple-choice tasks: lm-eval's own loader takes them, and the right answers stay."""

from __future__ import annotations

import json

import pytest
import yaml
from lm_eval.tasks import TaskManager

from gendistill.cli.main import main
from gendistill_evals import EvalError, load_task
from gendistill_evals.judges import JUDGES
from gendistill_evals.twins import Answers, make_twin

LETTERS = "ABCDEFGH"


def loaded(path):
    (task,) = TaskManager(include_defaults=False).load([str(path)])["tasks"].values()
    return task


def right_option(task, doc):
    """Say what lm-eval takes as the right option, as it does in process_results."""
    options, gold = task.doc_to_choice(doc), task.doc_to_target(doc)
    place = options.index(gold) if isinstance(gold, str) else gold
    return place, options[place], options


FORMS = {
    "columns": {},
    "templates": {"doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}"},
    "letters of a list": {
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "letter",
        "doc_to_text": "{{question}}\n{% for c in choices %}{{'ABCD'[loop.index0]}}. {{c}}\n{% endfor %}Answer:",
    },
    "an index by template": {"doc_to_target": "{{['A','B','C','D'].index(letter)}}"},
    "the option's text": {"doc_to_target": "{{choices[gold]}}"},
    "a part of a column": {"doc_to_choice": "{{choices[:4]}}", "doc_to_text": "question"},
    "a mapping": {"doc_to_choice": {"no": "it is not", "yes": "it is so"}, "doc_to_target": "{{gold % 2}}"},
    "a constant": {"doc_to_choice": ["yes", "no"], "doc_to_target": 1},
    "a cue with a space": {"doc_to_text": "{{question}}\nThe answer is: "},
    "shots": {"num_fewshot": 2, "description": "Well.\n\n", "fewshot_delimiter": "\n##\n"},
}


@pytest.mark.parametrize("answers", list(Answers))
@pytest.mark.parametrize("form", FORMS)
def test_every_right_answer_is_that_of_the_original(choice_task, form, answers, capsys):
    path = choice_task(**FORMS[form])
    out = path.with_name("twin.yaml")
    assert main(["twins", str(path), f"--{answers}", "--out", str(out)]) == 0
    assert "12 right answers are those of the original" in capsys.readouterr().out
    original, twin = loaded(path), loaded(out)
    assert twin.OUTPUT_TYPE == "generate_until"
    assert len(original.eval_docs) == len(twin.eval_docs) == 12
    explained = form == "letters of a list" and answers is Answers.LETTERS
    for doc, its in zip(original.eval_docs, twin.eval_docs, strict=True):
        assert doc == its
        place, text, options = right_option(original, doc)
        assert twin.doc_to_target(its) == (LETTERS[place] if answers is Answers.LETTERS else text)
        prompt = twin.doc_to_text(its)
        # the question as it was, and every option
        assert prompt.startswith(original.doc_to_text(doc).split("\n")[0])
        for number, option in enumerate(options):
            mark = "- " if answers is Answers.TEXT else f"{LETTERS[number]}. "
            assert f"\n{mark}{option}" in prompt or explained
        assert prompt.rstrip().endswith(":")


@pytest.mark.parametrize("answers", list(Answers))
@pytest.mark.parametrize("form", ["columns", "shots", "a mapping"])
def test_a_right_answer_is_judged_right_and_a_wrong_one_wrong(choice_task, form, answers):
    path = choice_task(**FORMS[form])
    out = path.with_name("twin.yaml")
    out.write_text(make_twin(path, answers, into=out.parent).content)
    task = load_task(out)
    original = load_task(path)
    for item, old in zip(task.items, original.items, strict=True):
        for number, option in enumerate(old.options):
            said = option if answers is Answers.TEXT else LETTERS[number]
            ways = (f" {said}", f"{said}.", f" {said}\n\nQuestion: more")
            more = (f"({said}) {option}", f"The answer is {said}.", f"Answer: {said}", f"{said}) {option}")
            for text in (*ways, *(more if answers is Answers.LETTERS else ())):
                text = text[: min((text.find(stop) for stop in task.stop if stop in text), default=len(text))]
                assert JUDGES[task.judge](item, text).correct == (option == old.gold), text


@pytest.mark.parametrize("text", ["A dog barks.", "I do not know", "nothing", "", "about A or so"])
def test_words_are_not_letters(choice_task, text):
    path = choice_task()
    out = path.with_name("twin.yaml")
    out.write_text(make_twin(path, Answers.LETTERS, into=out.parent).content)
    task = load_task(out)
    assert JUDGES[task.judge](task.items[0], text).extracted is None


def test_a_twin_runs_with_lm_eval(student, choice_task, capsys):
    path = choice_task(num_fewshot=1)
    out = path.with_name("choice-letters.yaml")
    assert main(["twins", str(path)]) == 0
    assert out.is_file()
    assert main(["lm-eval", "--model_args", f"pretrained={student}", "--tasks", str(out)]) == 0
    assert "tiny_choice_letters" in capsys.readouterr().out


def test_included_files_become_part_of_the_twin(choice_task, tmp_path):
    choice_task("base")
    child = tmp_path / "child.yaml"
    child.write_text("include: base.yaml\ntask: child\n")
    elsewhere = tmp_path / "elsewhere"
    assert main(["twins", str(child), "--out", str(elsewhere / "twin.yaml")]) == 0
    assert "include" not in yaml.safe_load((elsewhere / "twin.yaml").read_text())
    assert loaded(elsewhere / "twin.yaml").task_name == "child_letters"


def test_functions_of_data_stay_beside_their_file(choice_task, tmp_path, capsys):
    path = choice_task()
    path.with_name("code.py").write_text("def process(docs):\n    return docs.select(range(5))\n")
    path.write_text(path.read_text() + "process_docs: !function code.process\n")
    assert main(["twins", str(path), "--out", str(tmp_path / "other" / "twin.yaml")]) == 2
    assert "must stand in" in capsys.readouterr().err
    assert main(["twins", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("written ")
    assert "not compared with the original" in said
    assert main(["twins", str(path), "--trust-task-code"]) == 0
    assert "5 right answers" in capsys.readouterr().out
    assert len(loaded(path.with_name("choice-letters.yaml")).eval_docs) == 5


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"output_type": "generate_until"}, "output_type is generate_until"),
        ({"process_results": "x"}, "process_results: a twin cannot take it over"),
        ({"gen_prefix": "x"}, "gen_prefix: a twin cannot take it over"),
        ({"use_prompt": "x"}, "use_prompt: a twin cannot take it over"),
        ({"fewshot_config": {"doc_to_text": "x"}}, "fewshot_config.doc_to_text"),
        ({"doc_to_choice": "{{a}} and {{b}}"}, "doc_to_choice must be a column"),
        ({"doc_to_choice": "{% for a in b %}{% endfor %}"}, "doc_to_choice must be a column"),
        ({"doc_to_target": ["x"]}, "doc_to_target must be a number"),
        ({"doc_to_text": 0}, "doc_to_text must be a column or a template"),
        ({"task": ["one", "two"]}, "its tasks are one, two"),
        ({"class": "x"}, "class: a twin cannot"),
    ],
)
def test_what_a_template_cannot_take_over_is_refused_by_name(choice_task, keys, said, capsys):
    assert main(["twins", str(choice_task(**keys))]) == 1
    assert said in capsys.readouterr().err


def test_python_in_the_question_is_refused_by_name(choice_task, capsys):
    path = choice_task(doc_to_text=None)
    path.write_text(path.read_text() + "doc_to_text: !function code.ask\n")
    assert main(["twins", str(path)]) == 1
    assert "doc_to_text: !function code.ask is Python" in capsys.readouterr().err


def test_a_twin_whose_answers_are_others_is_refused(choice_task, capsys):
    """An option that reads as a list is one for lm-eval."""
    docs = [{"question": "q", "choices": [first, "x"], "gold": 0} for first in ("[1, 2]", "y")]
    path = choice_task(docs=docs)
    assert main(["twins", str(path), "--text"]) == 1
    assert "--letters" in capsys.readouterr().err
    assert main(["twins", str(path), "--letters"]) == 0


# ----- ours -----

OURS = {
    "kind": "multiple_choice",
    "items": "rows.jsonl",
    "gold": "index",
    "fields": {"options": "choices", "gold": "gold"},
    "prompt": "{question}",
    "max_new_tokens": 8,
}


@pytest.fixture
def our_task(tmp_path):
    def our_task(**keys):
        rows = [
            {"question": f"Which is {n}?", "choices": [f"one {n}", f"two {n}", f"none {n}"], "gold": n % 3}
            for n in range(6)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "ours.yaml"
        content = {key: value for key, value in {**OURS, **keys}.items() if value is not None}
        path.write_text(yaml.safe_dump(content))
        return path

    return our_task


@pytest.mark.parametrize(
    "prompt",
    [
        "{question}",
        "{question}\n{options}\nWhich one?",
        [{"role": role, "content": "{question}"} for role in ("system", "user")],
    ],
)
def test_a_task_of_ours_is_answered_by_letter(our_task, prompt, tmp_path, capsys):
    path, out = our_task(prompt=prompt, judge="option"), tmp_path / "below" / "twin.yaml"
    assert main(["twins", str(path), "--out", str(out)]) == 0
    assert "6 right answers" in capsys.readouterr().out
    twin, original = load_task(out), load_task(path)
    assert twin.judge == "letter"
    for item, old in zip(twin.items, original.items, strict=True):
        assert item.options == ("A", "B", "C")
        assert item.options.index(item.gold) == old.options.index(old.gold)
        asked = item.messages[-1]["content"]
        assert asked.count(f"A. {old.options[0]}") == 1
    back = tmp_path / "back.yaml"
    assert main(["twins", str(out), "--text", "--out", str(back)]) == 0
    assert [item.gold for item in load_task(back).items] == [item.gold for item in original.items]


def test_only_multiple_choice_has_a_twin(our_task, capsys, tmp_path):
    path = our_task(kind="exact_match", gold=None, fields={"gold": "question"})
    assert main(["twins", str(path)]) == 1
    assert "kind is exact_match" in capsys.readouterr().err
    assert main(["twins", str(tmp_path / "no.yaml")]) == 2
    assert main(["twins", "sciq"]) == 2
    assert "a task that is known by its name has its file in" in capsys.readouterr().err
    assert main(["twins", str(path), "--out", str(path)]) == 2
    with pytest.raises(EvalError):
        make_twin(path, None, into=tmp_path)
