from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from gendistill_evals.extract import find_letter, find_option, last_number, normalise, parse_number

TEXTS = ["red", "blue", "green", "yellow"]

# What a person reads in each text, by letter; None is what names no letter, or several.
READ: dict[str | None, list[str]] = {
    "A": [
        "It could be A or B, but I choose A.",
        "[A]",
        "{a}",
        "<A>",
        "a.",
        "a)",
        "option a",
        "A?",
        "A...",
        "A!",
        "First I thought B. Then I saw A is right.",
        "A red",
        "a) red",
        "A",
        "a",
        "A.",
        "(A)",
        "The answer is A.",
        "The answer is A",
        "The answer is a.",
        "The answer is A because it is red",
        "Answer: A The sky is red",
        "A is correct",
        "Option A is correct",
        "A because of this",
    ],
    "B": [
        "The answer is: B\n\nExplanation: Option A is wrong because it is red. Option C is wrong.",
        "Let's think step by step. The sky is blue. Option A says red, which is not right."
        " Option B says blue. Therefore, the answer is B.",
        "Step 1: A is too small.\nStep 2: B is correct.\nFinal answer: B",
        "Clearly (B), as the sky is blue.",
        "(B)\n(A) is wrong because it is red.",
        "B, because A and C are wrong.",
        "B. A and C are wrong.",
        "The answer is B, because A and C are wrong.",
        "**Answer: B**",
        "Answer:**B**",
        "**Final Answer**: B",
        "The final answer is $\\boxed{\\text{B}}$.",
        "\\boxed{\\textbf{B}}",
        "$\\boxed{\\mathbf{B}}$",
        "\\boxed {B}",
        "\\boxed{ B }",
        "boxed{B}",
        "\\boxed B",
        "\\text{B}",
        "\\textbf{(B)}",
        "\\text{The answer is B}",
        "答案\uff1a\uff08B\uff09",
        "答案是\uff1aB",
        "答案是 B\u3002",
        "正确答案\uff1aB",
        "选择B选项",
        "选项 B",
        "我认为答案是B",
        "B\uff0c因为天空是蓝色",
        "B. 蓝色",
        "答案\uff1a\uff22",
        "应该选B",
        "不是A\uff0c而是B",
        "答案不是A\uff0c是B",
        "本题选B",
        "故答案为\uff1aB\uff0e",
        "故答案选B",
        "答案B",
        "B对",
        "My choice: B",
        "I'll go with option B",
        "Let me go with (b)",
        "The best answer: B",
        "Best answer is B",
        "The right answer is B",
        "The right choice is (B)",
        "the correct letter is B",
        "A isn't the answer. B is.",
        "\u00abB\u00bb",
        "\u2039B\u203a",
        "\u27e8B\u27e9",
        "\u3014B\u3015",
        "\u3016B\u3017",
        "\u27e6B\u27e7",
        "|B|",
        "\"B.\"",
        "'B)'",
        "B)",
        "B]",
        "B}",
        "(B",
        "\u24b7 blue",
        "b.",
        "b)",
        "answer is b",
        "B, B",
        "Answer B.",
        "answer (b)",
        "Answer [B]",
        "ANSWER B",
        "Answer is: B",
        "Answer: Option B",
        "Answer: Choice (B)",
        "Answer: the letter B",
        "the answer's B",
        "The answer is,B",
        "Answer\uff1aB",
        "Answer\nB",
        "Answer:\nB\n",
        "## Answer\n\n**B**",
        "Answer:\n\n(B) blue",
        "The answer is A? No: B.",
        "B because A is the article",
        "I believe B",
        "I believe it's B",
        "I'm going with B",
        "B it is",
        "B, I think.",
        "B I think",
        "Probably B",
        "B probably",
        "Likely B",
        "Definitely B.",
        "Surely B.",
        "Of course B.",
        "Sure, B.",
        "Yes, B",
        "OK: B",
        "Hmm, B",
        "Well, B.",
        "B",
        "b",
        "(B)",
        "[b]",
        "{B}",
        "<B>",
        "【B】",
        "\uff08B\uff09",
        "「B」",
        "\uff22",
        "\u24b7",
        "\"B\"",
        "'b'",
        "\u201cB\u201d",
        "`B`",
        "B!",
        "B。",
        "B、",
        "B\uff1a",
        "B) blue",
        "b. blue",
        "B: blue",
        "B - blue",
        "B \u2013 blue",
        "B, blue",
        "B blue",
        "**B. blue**",
        "**B** blue",
        "__B__",
        "### B",
        "- B",
        "> B",
        "<b>B</b>",
        "<answer>B</answer>",
        "<think>Maybe A. The answer is A?</think>B",
        "$B$",
        "\\(B\\)",
        "\\[ \\boxed{B} \\]",
        "\\boxed{B. blue}",
        "\\boxed{(B)}",
        "\\boxed{b}",
        "\\boxed{\\textbf{(B) } blue}",
        "\\boxed{\\mathrm{B}}",
        "\\fbox{B}",
        "\\boxed{blue}",
        "Final answer: \\boxed{B}. A was tempting.",
        "Option (b)",
        "choice (b)",
        "choice B",
        "letter B",
        "answer: b",
        "Answer: (b)",
        "answer B",
        "Answer - B",
        "ANSWER IS B",
        "ANSWER: B",
        "**Answer:** B",
        "Answer: **B**",
        "The answer is: **B. blue**",
        "Final Answer: B",
        "Correct answer: B",
        "The correct choice is B",
        "The answer would be B.",
        "The answer must be (B).",
        "The answer to the question is B",
        "The answer is option B",
        "The answer is: \n\nB",
        "The best option is B, blue",
        "My answer is \"B\"",
        "So B.",
        "So the answer is B",
        "Therefore, B",
        "Thus, (B)",
        "It is B.",
        "It's B",
        "That's b.",
        "I think B",
        "I think it's B.",
        "I think the answer is B",
        "I'd go with B",
        "I would go for B.",
        "I chose B.",
        "B is the answer",
        "B is the correct answer.",
        "B is right",
        "(B) is correct",
        "Option B (blue) is correct.",
        "B) blue is correct",
        "B because the sky is blue",
        "B. Because A is wrong.",
        "B, since A is wrong",
        "B is correct, not A",
        "The answer is B, not A.",
        "The answer is B not A",
        "The answer is B rather than A",
        "Not A but B",
        "not A, but B",
        "It is not A, it is B.",
        "It's not A; it's B.",
        "A is wrong. B is correct.",
        "A. red\nB. blue\nC. green\nD. yellow\nAnswer: B",
        "The answer could be A, but B is correct.",
        "A seems right but the correct answer is B.",
        "Between A and B, I choose B.",
        "Let's see: (A) is red, (B) is blue, so the answer is (B).",
        "A: The answer is B",
        "答案是B",
        "答案是B。",
        "答案\uff1aB",
        "答案为B",
        "答案为\uff08B\uff09",
        "正确答案是 B",
        "正确答案\uff1a**B**",
        "选B",
        "我选B",
        "应选B",
        "故选B。",
        "故选\uff1aB",
        "选择B",
        "选项B",
        "选项B正确",
        "B选项正确",
        "B是正确的",
        "B项正确",
        "正确选项是B",
        "所以答案是B\uff0c蓝色",
        "因此选 B",
        "不选A\uff0c选B",
        "A不对\uff0cB正确",
        "答えはBです",
        "正解はB",
        "정답은 B입니다",
        "Réponse : B",
        "Antwort: B",
        "La respuesta es B",
        "Respuesta: B",
        "La réponse est B",
        "blue",
        "The sky is blue.",
        "It is not red but blue",
        " \nB",
        "B\n\nExplanation: A is wrong because it is red.",
        "Maybe B",
        "Perhaps (B)?",
        "B?",
        "Looking at option A, it is too small. Option B fits. The answer is option B.",
        "answer=b",
        "Answer = B",
        "Ans: B",
        "The answer is \"b\".",
        "The answer is b because it is blue",
        "Response: B",
    ],
    "C": [
        "B is wrong, C is right",
        "c: green",
        "answer is (c)",
        "i pick c",
        "I first thought A, then B, but the answer is C.",
        "The answer is not B but C.",
        "The answer is B... wait, C.",
        "The option that fits best is C",
        "I'll pick C",
        "I choose (c)",
        "I first thought A, but the answer is C",
        "I first thought A, but now C.",
        "At first I thought it was A. Actually, it's C.",
        "The answer is A. Wait, no, it's C.",
        "The answer is A. No, the answer is C.",
        "Choose A, B, C or D. The answer is C.",
        "the letter is c",
        "I believe the answer is choice c.",
    ],
    "D": [
        "d - yellow",
        "choice d.",
        "I select option D.",
        "My guess is D",
        "If A then no; the answer: D",
        "The correct option is (d) yellow.",
    ],
    None: [
        "The correct answers are A and B",
        "The answer is A and B",
        "All of the above",
        "A; B",
        "A B",
        "A\nB",
        "(A), (B)",
        "A. B.",
        "A and/or B",
        "A vs B",
        "A, or maybe B",
        "A or maybe B",
        "I am torn between A and B.",
        "It could be A or B.",
        "Either A or C.",
        "A (red) or B (blue)",
        "A) red or B) blue",
        "A) red and B) blue",
        "Answer: A) red or B) blue",
        "The answer is A) red or B) blue",
        "\uff22\uff23",
        "选\uff21\uff22",
        "不选A",
        "A不正确",
        "not B",
        "The answer is definitely not A",
        "A is not the answer",
        "It can't be A",
        "Not (A)",
        "None",
        "N/A",
        "n/a",
        "A-B",
        "A\u2013D",
        "/B/",
        "\U0001f171",
        "an apple",
        "a b c",
        "a or b",
        "a, b and c",
        "The answer is a or b.",
        "Aa",
        "BB",
        "A bird in the hand",
        "As",
        "I",
        "\\boxed{A, B}",
        "\\boxed{A} and \\boxed{B}",
        "A is incorrect",
        "A isn't right",
        "Not A.",
        "It is not A",
        "The answer is not A",
        "The answer isn't A",
        "The answer cannot be A",
        "I would not choose A",
        "I don't think it is A.",
        "Neither A nor B",
        "None of the above",
        "A, B and C",
        "A, B, C",
        "A and B",
        "A or B",
        "A/B",
        "A & B",
        "A, B",
        "A B C D",
        "AB",
        "ABCD",
        "both A and C",
        "Both A and C are correct.",
        "The answer is A or B",
        "The answer is either A or B.",
        "Options B and C",
        "Answer: A, B",
        "(A) or (B)",
        "(A) (B)",
        "(A) red (B) blue (C) green (D) yellow",
        "A. red\nB. blue\nC. green\nD. yellow",
        "A: no. B: yes",
        "A dog barks",
        "a dog barks",
        "A dog",
        "I think so",
        "I do not know",
        "The answer is a dog",
        "答案不是A",
        "不是A",
        "A错",
        "A和B",
        "A或B",
        "A、B",
        "A、B、C",
        "答案是A或B",
        "选A和B",
        "E",
        "E.",
        "The answer is E",
        "Option E",
        "F) purple",
        "red or blue",
        "Not red",
        "C++ is a language",
        "C++",
        "B-flat",
        "D.C. is a city",
        "e.g. this",
        "i.e. a dog",
        "vitamin C helps",
        "Plan B failed",
        "function f(a) is",
        "B+",
        "B's",
        "B\nA\nC",
        "1. B",
        "Maybe A, maybe B",
        "|",
        "?",
        "Option A is too small, option B is too big.",
    ],
}  # fmt: skip
MANY = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.mark.parametrize(
    ("text", "letter"), [(text, letter) for letter, texts in READ.items() for text in texts], ids=repr
)
def test_a_letter_is_read_as_a_person_reads_it(text, letter):
    assert find_letter(text, "ABCD", TEXTS) == letter


# More spellings, hedges, several letters, denials and other scripts, each labelled by hand before it was tried.
LABELLED = [
    json.loads(line)
    for line in (Path(__file__).parent / "letters_in_answers.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.mark.parametrize("row", LABELLED, ids=lambda row: repr(row["text"])[:60])
def test_labelled_answers_are_read_as_they_were_labelled(row):
    assert find_letter(row["text"], "ABCD", TEXTS) == row["letter"]


def test_labelled_answers_are_many_and_none_stands_above():
    assert len({row["text"] for row in LABELLED}) == len(LABELLED) >= 60
    assert not {row["text"] for row in LABELLED} & {text for texts in READ.values() for text in texts}
    assert {row["letter"] for row in LABELLED} == {"A", "B", "C", "D", None}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("J", "J"),
        ("The answer is (H).", "H"),
        ("\\boxed{g}", "G"),
        ("I", "I"),
        ("(I)", "I"),
        ("The answer is I.", "I"),
        ("I. nine", "I"),
        ("I think so", None),
        ("I would say it is F.", "F"),
        ("I, for one, choose G", "G"),
        ("I choose I.", "I"),
        ("Honestly, I don't know", None),
        ("e.g. this", None),
        ("i.e. that", None),
        ("Figure(s) and answer(e)", None),
        ("I and J", None),
        ("five", "E"),
        ("K", None),
    ],
)
def test_letters_beyond_d_and_the_pronoun(text, letter):
    assert find_letter(text, "ABCDEFGHIJ", MANY) == letter


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("\\boxed{red}", "red"),
        ("\\boxed{\\text{dark red}}", "dark red"),
        ("I choose yellow, since red is darker", "yellow"),
        ("It is not red but yellow", "yellow"),
        ("red is wrong, yellow is correct", "yellow"),
        ("not yellow", None),
        ("The answer is red or yellow", None),
        ("The answer is red. Wait, the answer is yellow", "yellow"),
        ("<think>red, surely</think>yellow", "yellow"),
        ("\uff39\uff25\uff2c\uff2c\uff2f\uff37", "yellow"),
        ("yellow-red", None),
    ],
)
def test_an_option_is_read_as_a_person_reads_it(text, option):
    assert find_option(text, ["yellow", "red", "dark red"]) == option


def test_options_of_signs_and_of_scripts_without_spaces_are_found():
    assert find_option("It is written in C++.", ["C", "C++"]) == "C++"
    assert find_option("天空是蓝色的", ["红", "蓝"]) == "蓝"
    assert find_option("x = -5", ["5", "-5"]) == "-5"


SIZE = 50_000
HOSTILE = {
    unit.strip() or repr(unit): unit * (SIZE // len(unit) + 1)
    for unit in (
        " ", "\n", "1", "(", ")", "*", "_", "#", "-", "$", "\\", ",", "'", "\"'", "1,111,", ",111", "1.", "-$", "A,",
        "A ", "A. ", "(A)", "'A' ", "A*", "answer is ", "answer is A ", "the answer is the ", "is ", "not ", "red ",
        "red, ", "\\boxed{", "<a", "<a  ", "<b></b>", "<think>", "x'", "选A", "答", "\u0301\u0316", "\ufdfa", "a",
    )
}  # fmt: skip
OPTIONS = {
    "short": TEXTS,
    "many": [f"red {number}" for number in range(26)],
    "long": ["a" * 20_000 + end for end in "bcde"],
    "long words": ["red " * 5_000 + end for end in "bcde"],
    "nested": [("red " * number).strip() for number in range(1, 27)],
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_no_text_takes_long_to_read(text):
    """Reading is linear: a quadratic step over this many characters takes minutes."""
    started = time.process_time()
    last_number(text)
    parse_number(text)
    normalise(text)
    find_option(text, TEXTS)
    find_letter(text, "ABCD", TEXTS)
    assert time.process_time() - started < 2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("unit", ["a", "red ", "answer is "])
def test_no_options_take_long_to_find(options, unit):
    text = unit * (SIZE // len(unit))
    started = time.process_time()
    find_option(text, options)
    assert time.process_time() - started < 2


def test_numbers_of_thousands_of_digits_are_read():
    digits = "7" * 20_000
    assert str(last_number(f"It is {digits}.")) == digits
    assert str(parse_number(digits)) == digits


@pytest.mark.parametrize(
    "text", ["NaN", "nan", "Infinity", "-inf", "1e999999999", "1E5", "0x10", "1_000", "\u0301"]
)
def test_what_is_no_plain_number_is_no_gold_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Die Antwort lautet C", "C"),
        ("Lösung: B", "B"),
        ("Ich wähle B, weil es passt.", "B"),
        ("B ist richtig.", "B"),
        ("A ist richtig.", "A"),
        ("A ist falsch, B ist richtig.", "B"),
        ("B ist nicht richtig, C ist richtig.", "C"),
        ("Nicht A, sondern C.", "C"),
        ("La réponse est la C", "C"),
        ("Je choisis B.", "B"),
        ("B est la bonne réponse.", "B"),
        ("Ce n'est pas A. La réponse est D.", "D"),
        ("B es la respuesta correcta.", "B"),
        ("Ответ: B", "B"),
        ("Bが正しいです。", "B"),
        ("Bは正解ではありません。Cが正解です。", "C"),
        ("Aは間違いで、Dが正しい。", "D"),
        ("私はBを選びます。", "B"),
        ("B가 정답입니다.", "B"),
    ],
)
def test_a_letter_is_stated_in_other_languages(text, letter):
    assert find_letter(text, list("ABCD"), []) == letter


@pytest.mark.parametrize(
    "text", ["B ist falsch.", "Je ne choisis pas B.", "Bは正しくない。", "Bを選びません。"]
)
def test_a_letter_is_denied_in_other_languages(text):
    assert find_letter(text, list("ABCD"), []) is None
