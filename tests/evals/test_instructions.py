"""IFEval: every instruction is told from a text both ways, and items that cannot be checked are refused by name."""

from __future__ import annotations

import json
import time

import pytest

from gendistill_evals import EvalError, Item, load_task
from gendistill_evals.instructions import (
    CHECKERS,
    Followed,
    Instruction,
    followed,
    instructions_of,
    judge_instructions,
    lacks,
    language,
    summarise,
    task_row,
)
from gendistill_evals.instructions.words import count_capital_words, count_sentences, count_words
from gendistill_evals.judges import check_judge

DETECTS = pytest.mark.skipif(
    not language.is_available(), reason="langdetect is not installed (gendistill[ifeval])"
)
ENGLISH = "the river runs to the sea and nobody knows how long it has been doing so"

# kind, arguments, texts that follow, texts that break
TABLE = [
    ("keywords:existence", {"keywords": ["sea", "c++"]}, ["The SEA; C++", "overseas c++"], ["sea", "c+", ""]),
    (
        "keywords:frequency",
        {"keyword": "rain", "frequency": 2, "relation": "at least"},
        ["rain Rain", "rainrain", "trains in the rain"],
        ["rain", "ra in rain"],
    ),
    (
        "keywords:frequency",
        {"keyword": "rain", "frequency": 2, "relation": "less than"},
        ["rain", "sun"],
        ["rain RAIN"],
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, ["trains", "rainy"], ["Rain!", "a RAIN b"]),
    (
        "keywords:letter_frequency",
        {"letter": "Q", "let_frequency": 2, "let_relation": "at least"},
        ["qQ", "quick Q"],
        ["q", "none"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "!", "let_frequency": 1, "let_relation": "less than"},
        ["calm."],
        ["loud!"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
        ["One. Two! Three?", "One.\nTwo.\nThree"],
        ["One. Two.", "Mr. One met Dr. Two. Yes."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na***b\n***"],
        ["a", "a******b"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        ["two words"],
        ["it's three", "a b c d"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
        ["a\n\nthen b", 'a\n\n"Then," b', "a\n\nTHEN"],
        ["a\n\nthenceforth b", "then\n\na", "a\n\nthen\n\nb", "then", "a\nthen b"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[a] [b]", "[a]\n[]"],
        ["[a]", "[a\n] [b]", "]["],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["x\nP.S. y", "p. s. y"],
        ["PS y", "p.p.s"],
    ),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP.P.S y", "p. p. s"], ["P.S. y"]),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n - b", "text\n* a\n- b\nmore"],
        ["* a", "* a\n* b\n* c", "** a\n** b", "1. a\n2. b"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "So: My answer is no."],
        ["Yes.", "my answer is yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "**a** **b**", "*a* **b**"],
        ["*a*", "* * *b*", "*a\nb* *c*", "****"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb", "Section1 Section2"],
        ["Section 1", "SECTION 1\nSECTION 2", "Section a Section b"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', '```json\n{"a": [1]}\n```', "```\n[]\n```", " 3 "],
        ["{a: 1}", 'Here: {"a": 1}', "```json\n{\n```", "[" * 100_000],
    ),
    (
        "detectable_format:title",
        {},
        ["<<a>>", "x <<a b>> y"],
        ["<a>", "<<>>", "<< >>", "<<a\nb>>", ">>a<<", "<<<>>>"],
    ),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b******"],
        ["a", "a******a", "a******b******c", "a***b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say it."},
        ["Say it. It.", " SAY IT.\nYes"],
        ["It. Say it.", "Say it!"],
    ),
    (
        "startend:end_checker",
        {"end_phrase": "Any questions?"},
        ["x Any questions?", 'a "any questions?" '],
        ["Any questions? x"],
    ),
    ("startend:quotation", {}, ['"a"', ' "a b" '], ['"', "a", '"a', "'a'", "\u201ca\u201d"]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        ["A WELL-KNOWN", "NASA, ESA", "I'M", "*BIG* and (BOLD)"],
        ["NASA", "Nasa Esa", "well-KNOWN A"],
    ),
    ("punctuation:no_comma", {}, ["a b; c", "\uff0c"], ["a, b", ","]),
]
BY_LANGUAGE = [
    (
        "language:response_language",
        {"language": "fr"},
        ["Le chat dort sur la chaise et il fait froid dehors.", "123"],
        [ENGLISH],
    ),
    (
        "change_case:english_capital",
        {},
        ["THIS IS ENGLISH, AND IT SHOULD BE EASY ENOUGH TO TELL THAT IT IS WHAT THEY SAY IT IS."],
        [ENGLISH, "РЕКА ТЕЧЁТ К МОРЮ, И НИКТО НЕ ЗНАЕТ, КАК ДОЛГО"],  # noqa: RUF001
    ),
    (
        "change_case:english_lowercase",
        {},
        [ENGLISH],
        [ENGLISH.capitalize(), "le chat dort sur la chaise et il fait froid"],
    ),
]


def item_of(*instructions: dict, prompt: str = "Write.") -> Item:
    return Item("i-0", prompt, json.dumps(list(instructions)), None, None)


@pytest.mark.parametrize(
    ("kind", "told", "good", "bad"), TABLE, ids=[f"{n}-{row[0]}" for n, row in enumerate(TABLE)]
)
def test_following_is_told_from_the_text(kind, told, good, bad):
    check = CHECKERS[kind].check
    assert [text for text in good if not check(text, told)] == []
    assert [text for text in bad if check(text, told)] == []


@DETECTS
@pytest.mark.parametrize(("kind", "told", "good", "bad"), BY_LANGUAGE, ids=[row[0] for row in BY_LANGUAGE])
def test_languages_are_told_from_the_text(kind, told, good, bad):
    for _ in range(3):
        assert all(CHECKERS[kind].check(text, told) for text in good)
        assert not any(CHECKERS[kind].check(text, told) for text in bad)


def test_every_instruction_is_tested():
    assert {row[0] for row in [*TABLE, *BY_LANGUAGE]} == set(CHECKERS)
    assert len(CHECKERS) == 25


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("   \n ", 0),
        ("no stop", 1),
        ("One. Two. Three.", 3),
        ("Really?! Yes!!! No.", 3),
        ("He paid $3.50 to Mr. Oak of the U.S. Navy on Jan. 5.", 1),
        ("Version 2.0 is out. See www.example.com for it.", 2),
        ('"Is it so?" he asked. "It is."', 3),
        ("(He left.) She stayed.", 2),
        ("wait... then go", 1),
        ("It rained... Then it stopped.", 2),
        ("J. K. Rowling wrote it.", 2),
        ("They met at 5 p.m. in May. He left.", 2),
        ("one. two. three", 3),
        ("Line one\nLine two\nLine three", 1),
        ("\u201cYes.\u201d She left.", 2),
        ("**Bold.** Next.", 2),
    ],
)
def test_sentences_are_counted(text, count):
    assert count_sentences(text) == count


def test_words_are_runs_of_letters():
    assert count_words("Don't stop - it's 5,000!") == 7
    assert count_words("") == 0
    assert count_words("পণ্য नदी_१ é") == 3


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("A B", 2),
        ("CAN'T", 2),
        ("I'm", 1),
        ("NASA's", 1),
        ("AC/DC", 1),
        ("A,B A:B", 4),
        ("7 8", 0),
        ("O'NEIL", 1),
    ],
)
def test_words_in_capitals_are_counted(text, count):
    assert count_capital_words(text) == count


@pytest.mark.parametrize("kind", CHECKERS)
def test_checkers_take_linear_time(kind):
    if CHECKERS[kind].needs_language:
        pytest.skip("langdetect reads a sample of the text")
    told = next(row[1] for row in TABLE if row[0] == kind)
    for piece in (
        "<<",
        "[",
        "*",
        '"',
        ". ",
        ".",
        "a",
        "A'",
        "Section ",
        "\n\n",
        "***",
        "- \n",
        "P.",
        "{",
        "?!)",
    ):
        text = piece * (120_000 // len(piece))
        started = time.process_time()
        followed([Instruction(kind, told)], text)
        assert time.process_time() - started < 4, repr(piece)


def test_an_item_is_right_if_all_its_instructions_are_followed():
    item = item_of({"kind": "punctuation:no_comma"}, {"kind": "startend:quotation"})
    assert judge_instructions(item, '"Well done."').correct
    judgement = judge_instructions(item, '"Well, done."')
    assert not judgement.correct
    assert judgement.extracted == "1 of 2 followed strictly, 1 loosely; broken: punctuation:no_comma"


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_answer_follows_nothing(text):
    item = item_of({"kind": "punctuation:no_comma"})
    assert judge_instructions(item, text) == (None, False)
    assert followed(instructions_of(item), text) == Followed((False,), (False,))


@pytest.mark.parametrize(
    ("text", "strict", "loose"),
    [
        ("Sure, here it is:\nno comma here", False, True),
        ("no comma here\nBye, friend", False, True),
        ("Sure, so:\nno comma here\nBye, friend", False, True),
        ("one, comma", False, False),
        ("no comma", True, True),
    ],
)
def test_loosely_the_first_and_last_lines_do_not_count(text, strict, loose):
    assert followed([Instruction("punctuation:no_comma", {})], text) == Followed((strict,), (loose,))


def test_loosely_asterisks_do_not_count():
    assert followed([Instruction("startend:quotation", {})], '**"a"**') == Followed((False,), (True,))


def test_the_four_accuracies():
    answers = [
        Followed((True, True), (True, True)),
        Followed((True, False), (True, True)),
        Followed((False,), (False,)),
    ]
    assert summarise(answers) == pytest.approx(
        {
            "prompt_strict": 1 / 3,
            "instruction_strict": 3 / 5,
            "prompt_loose": 2 / 3,
            "instruction_loose": 4 / 5,
        }
    )


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("x", "not a list of instructions"),
        ("3", "not a list of instructions"),
        ("[]", "there are no instructions"),
        ('[{"kind": "keywords:rhyme"}]', "there is no instruction 'keywords:rhyme'"),
        ('[{"kind": "keywords:existence"}]', "keywords:existence needs keywords, a list of texts, got None"),
        ('[{"kind": "keywords:existence", "keywords": [1]}]', "needs keywords"),
        (
            '[{"kind": "length_constraints:number_words", "num_words": 3, "relation": "at most"}]',
            "relation of length_constraints:number_words must be one of less than, at least, got 'at most'",
        ),
        (
            '[{"kind": "detectable_format:number_bullet_lists", "num_bullets": true}]',
            "a whole number, got True",
        ),
    ],
)
def test_items_that_cannot_be_checked_are_refused_by_name(gold, said):
    item = Item("i-0", "p", gold, None, None)
    with pytest.raises(EvalError) as caught:
        judge_instructions(item, "text")
    assert said in str(caught.value)
    assert said in (lacks(item) or "")


def test_without_langdetect_instructions_that_need_it_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("gendistill_evals.instructions.judge.is_available", lambda: False)
    item = item_of({"kind": "change_case:english_capital"}, {"kind": "punctuation:no_comma"})
    with pytest.raises(EvalError, match=r"change_case:english_capital needs langdetect: pip install"):
        judge_instructions(item, "TEXT")
    assert lacks(item_of({"kind": "punctuation:no_comma"})) is None


def test_a_task_that_needs_langdetect_says_what_to_install_before_another_judge(monkeypatch):
    monkeypatch.setattr("gendistill_evals.instructions.judge.is_available", lambda: False)
    with pytest.raises(EvalError, match="needs langdetect") as caught:
        check_judge("instructions", [item_of({"kind": "change_case:english_capital"})], "ifeval.yaml")
    assert 'pip install "gendistill[ifeval]"' in caught.value.message
    assert (caught.value.hint or "").startswith("give it what it lacks, or")


def test_a_missing_langdetect_says_what_to_install(monkeypatch):
    language._detector.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    with pytest.raises(EvalError) as caught:
        language.language_of("text")
    assert "gendistill[ifeval]" in str(caught.value)
    language._detector.cache_clear()


def test_rows_of_the_published_set_become_rows_of_a_task():
    row = {
        "key": 7,
        "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{"keywords": None, "language": None}, {"keywords": ["a"], "num_words": None}],
    }
    made = task_row(row)
    assert made["id"] == "7"
    assert json.loads(made["gold"]) == [
        {"kind": "punctuation:no_comma"},
        {"kind": "keywords:existence", "keywords": ["a"]},
    ]
    for broken in (
        {},
        {**row, "kwargs": [{}]},
        {**row, "kwargs": [{}, {}]},
        {**row, "instruction_id_list": ["a", "b"]},
    ):
        with pytest.raises(EvalError):
            task_row(broken)


def test_the_built_in_rows_have_every_instruction():
    task = load_task("ifeval", data="sample")
    assert len(task.items) == 40
    kinds = {each.kind for item in task.items for each in instructions_of(item)}
    assert kinds == set(CHECKERS)
    if language.is_available():
        assert [lacks(item) for item in task.items] == [None] * 40
