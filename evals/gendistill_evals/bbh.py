"""Find the answer to an item of BIG-Bench-Hard in a generated text. Imports no torch.

The subtasks ask for an option's letter, one of two words (yes and no, true and false, valid and invalid), a number,
words in order, or closing brackets. As elsewhere the last statement counts ("so the answer is ..."), several joined
answers are none, and finding nothing is a failure.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal

from gendistill_evals.extract import find_letter, find_option, last_number, parse_number, written_number
from gendistill_evals.items import Item
from gendistill_evals.wording import Words, nfkc, plain_text

_LETTERED = re.compile(r"^\(([A-Z])\)[ \t]*(.*?)[ \t]*$", re.MULTILINE)
# What states an answer; the answer follows within a few words of one sentence.
_STATES = r"(?:answer|answers|conclusion|verdict|result|boxed)"
_STATED_NUMBER = re.compile(
    rf"\b{_STATES}\b(?:[ \t]*(?:is|was|be|equals|of|:|=|\*|`|\{{|\(|\$|to|the|this|expression|problem|thus|final|then"
    r"|therefore|so))*\s{0,3}([-\u2212]?[ \t]?\$?\d[\d,]*(?:\.\d+)?)"
    r"(?![\w]|\.\d|[ \t]*[-+*/\u00d7\u2212=][ \t]*[\d(-])",
    re.IGNORECASE,
)
_EQUATION = re.compile(
    r"=[ \t*`$]*([-\u2212]?[ \t]?\d[\d,]*(?:\.\d+)?)(?![\w]|\.\d)[ \t*`$.]*$", re.MULTILINE
)
_BRACKETS = re.compile(r"[()\[\]{}<>](?:[\s,\"'`\\]*[()\[\]{}<>])*")
_PAIRS = {")": "(", "]": "[", "}": "{", ">": "<"}
_NOT = r"\b(?:not|isn't|aren't|wasn't|never|cannot be|doesn't|don't|didn't)"
_CONCLUDES = re.compile(
    r"\b(?:therefore|thus|hence|so|overall|consequently|conclude|conclusion|finally|because of this)\b", re.I
)
# After "no", words that go on after an answer; before any other word it is an article: "no steps".
_AFTER_NO = frozenset({
    "because", "since", "as", "it", "he", "she", "they", "you", "we", "i", "this", "that", "the", "there", "but",
    "and", "if", "although", "though",
})  # fmt: skip
# What stands for yes and no without saying so, by words of the question; {name} is who the question is about.
_MEANING = (
    (re.compile(r"\bplausible\b"), r"\bplausible\b", r"\bimplausible\b"),
    (
        re.compile(r"\breturn to the starting point\b"),
        r"\b(?:return|returned|end up|are back|is back|be back|back)\b[^.\n]{0,20}\b(?:starting point|start|origin)\b",
        r"$^",
    ),
    (
        re.compile(r"\bDoes (?P<name>\w+) tell the truth\b"),
        r"(?<!says )(?<!says that )\b{name}\b[^.,;\n]{0,25}\btell(?:s|ing)? the truth\b",
        r"(?<!says )(?<!says that )\b{name}\b[^.,;\n]{0,25}\b(?:lies|lying|lied)\b",
    ),
)
_OPEN = re.compile(r"\?\s*$|\bwhether\b|\bto (?:answer|see|determine|find out|decide)\b", re.IGNORECASE)
_DENIED = re.compile(_NOT + r"|\bfails? to\b|\bfar from\b|\bunable to\b", re.IGNORECASE)
_NEXT_WORD = re.compile(r"[ \t]+([A-Za-z]+)")
_NEAR = 20
_MARKUP = " \t\"'*`.!()-#>:"
_LIST_NOISE = re.compile(r"^(?:\d{1,2}[.):]|[-*\u2022>]|and|then|<|>|\u2192|->|=>)$", re.IGNORECASE)
_WORD_EDGE = "\"'`*_.,;:!?()[]{}<>\u201c\u201d\u2018\u2019"


def bbh_answer(item: Item, text: str) -> str | None:
    """Find the answer that a text gives, in the form of the item's gold answer.

    Args:
        item: An item with options that are letters in brackets, or two words; or without options.
        text: A generated answer, with or without the thought that leads to it.
    Returns: One of the options; a number; words or brackets between single spaces; or None.
    """
    question = item.messages[-1]["content"]
    text = nfkc(text).rpartition("</think>")[2]
    if item.options:
        if all(re.fullmatch(r"\([A-Z]\)", option) for option in item.options):
            return _letter(text, item.options, question)
        return _word(text, item.options, question)
    if parse_number(item.gold) is not None:
        found = _number(text)
        if found is None:
            return None
        return written_number(found)
    if not set(item.gold) - set("()[]{}<> "):
        return _brackets(text, question)
    return _sorted_words(text, item.gold.split())


def same_answer(found: str, gold: str) -> bool:
    """Compare an answer with gold: numbers by value, everything else as it is."""
    number = parse_number(gold)
    return parse_number(found) == number if number is not None else found == " ".join(gold.split())


def _letter(text: str, options: Sequence[str], question: str) -> str | None:
    said: Mapping[str, str] = dict(_LETTERED.findall(question))
    letters = [option[1] for option in options]
    texts = [said.get(letter, "") for letter in letters]
    known = all(texts) and len(set(texts)) == len(texts)
    found = find_letter(text, letters, texts if known else ())
    if found is None and known and all(parse_number(each) is not None for each in texts):
        # "There are 3 penguins of more than 5 years": 5 is the question's.
        asked = Words((question.rpartition("Options:")[0].splitlines() or [""])[-1]).lower
        named = find_option(text, [each for each in texts if each not in asked])
        found = None if named is None else letters[texts.index(named)]
    return None if found is None else f"({found})"


def _word(text: str, options: Sequence[str], question: str) -> str | None:
    """Find one of two words that are opposites."""
    by_name = {option.casefold(): option for option in options}
    text = plain_text(text)
    first, second = by_name
    # "Yes or no", "valid/invalid" name the question, not an answer to it.
    either = "|".join(
        rf"\b{a}\b[\"'*,)]*\s*(?:/|\bor\b)\s*[\"'*(]*\b{b}\b" for a, b in ((first, second), (second, first))
    )
    text = re.sub(either, " \u2026 ", text, flags=re.IGNORECASE)
    text = re.sub(r"\bperfectly valid\b", " \u2026 ", text, flags=re.IGNORECASE)
    name = rf"(?P<not>{_NOT}\s+(?:\w+\s+){{0,3}})?\b(?P<word>{'|'.join(map(re.escape, by_name))})\b"

    def read(match: re.Match[str]) -> str:
        word = match["word"].casefold()
        if match["not"] and word not in ("yes", "no"):
            word = second if word == first else first
        return by_name[word]

    stated = re.compile(rf"\b{_STATES}\b[^.\n]{{0,60}}?(?:\n[\s*]{{0,3}})?{name}", re.IGNORECASE)
    if found := [match for match in stated.finditer(text) if not _is_article(match)]:
        return read(found[-1])
    named = [match for match in re.finditer(name, text, re.IGNORECASE) if not _is_article(match)]
    alone = [match for match in named if _is_alone(match)]
    if alone:
        return read(alone[-1])
    if named and not text[: named[0].start()].strip(" \n\"'*`(-"):
        after = text[named[0].end() :].lstrip("\"'*`) ")
        if not after or after[0] in ".,;:!\n-\u2013\u2014" or after.split()[0].casefold() in _AFTER_NO:
            return read(named[0])
    sentences = [each for each in re.split(r"(?<=[.!?])\s+|\n+", text) if each.strip()]
    for sentence in reversed(sentences):
        if not _CONCLUDES.search(sentence) and sentence is not sentences[-1]:
            continue
        here = [match for match in re.finditer(name, sentence, re.IGNORECASE) if not _is_article(match)]
        answers = {read(match) for match in here}
        if len(answers) == 1:
            return answers.pop()
        if not answers and (meant := _meant(sentence, by_name, question)):
            return meant
    answers = {read(match) for match in named}
    if not answers and sentences:
        return _meant(sentences[0], by_name, question)
    return answers.pop() if len(answers) == 1 else None


def _is_article(match: re.Match[str]) -> bool:
    """Whether a "no" belongs to the word after it, as in "no steps"."""
    if match["word"].casefold() != "no":
        return False
    after = _NEXT_WORD.match(match.string, match.end())
    return after is not None and after[1].casefold() not in _AFTER_NO


def _is_alone(match: re.Match[str]) -> bool:
    """Whether a word is a line of its own, markup aside."""
    # Markup takes a few characters, so that what is looked at is bounded.
    before = match.string[max(0, match.start() - _NEAR) : match.start()]
    after = match.string[match.end() : match.end() + _NEAR]
    starts = "\n" in before or match.start() <= _NEAR
    ends = "\n" in after or match.end() + _NEAR >= len(match.string)
    return starts and ends and not (before.rpartition("\n")[2] + after.partition("\n")[0]).strip(_MARKUP)


def _meant(sentence: str, by_name: Mapping[str, str], question: str) -> str | None:
    """Read a sentence that answers yes or no in other words: "you end up at the starting point"."""
    if set(by_name) != {"yes", "no"} or _OPEN.search(sentence):
        return None
    for asks, says_yes, says_no in _MEANING:
        if not (asked := asks.search(question)):
            continue
        denied = _DENIED.search(sentence) is not None
        for pattern, word in ((says_no, "no"), (says_yes, "yes")):
            if re.search(
                pattern.replace("{name}", asked.groupdict().get("name", "")), sentence, re.IGNORECASE
            ):
                return by_name[{"yes": "no", "no": "yes"}[word] if denied else word]
    return None


def _number(text: str) -> Decimal | None:
    """Find a number: the last one stated, else the last that ends an equation, else the last."""
    text = plain_text(text)
    for pattern in (_STATED_NUMBER, _EQUATION):
        if found := pattern.findall(text):
            # "- 20" is a number of two signs.
            return parse_number(re.sub(r"\s", "", found[-1]).rstrip(","))
    return last_number(text)


def _brackets(text: str, question: str) -> str | None:
    """Find the brackets that complete a sequence; one that is written out whole is cut to what completes it."""
    given = _BRACKETS.findall(question.rpartition("Input:")[2])
    start = "".join(_only_brackets(run) for run in given)
    boxed = re.findall(r"\\boxed\{(.*)\}", text)
    if boxed:
        text = boxed[-1]
    runs = []
    for match in _BRACKETS.finditer(text):
        run = _only_brackets(match.group())
        before, after = text[max(0, match.start() - 1) : match.start()], text[match.end() : match.end() + 1]
        # "(so)" and "f(x)" are brackets of the language.
        if before.isalnum() or after.isalnum() or not set(run) & set(_PAIRS):
            continue
        runs.append((match.start(), run))
    runs = [(at, run) for at, run in runs if run != start]
    if not runs:
        return None
    stated = [
        match.end() for match in re.finditer(rf"\b{_STATES}\b|\brest\b|\bcompleted?\b", text, re.IGNORECASE)
    ]
    # Of several runs after the last statement the first is what is stated; without a statement the last counts.
    after = [run for at, run in runs if stated and at >= stated[-1]]
    run = after[0] if after else runs[-1][1]
    if start and run.startswith(start) and len(run) > len(start):
        run = run[len(start) :]
    return " ".join(run)


def _only_brackets(text: str) -> str:
    return "".join(character for character in text if character in "()[]{}<>")


def _sorted_words(text: str, gold: Sequence[str]) -> str | None:
    """Find the last list of words that is as long as the gold list, else the last list of two or more.

    Args:
        text: A generated answer.
        gold: The words in order; a list may hold other words between them, such as a misspelt one.
    """
    known = {word.casefold() for word in gold}
    lists: list[list[str]] = [[]]
    unknown: list[str] = []
    for token in re.sub(r"(?<=\w),(?=\w)|\\[a-z]+", " ", plain_text(text)).split():
        word = token.strip(_WORD_EDGE).casefold()
        if word in known:
            lists[-1] += [*unknown, word] if lists[-1] else [word]
            unknown = []
        elif not word or _LIST_NOISE.match(token):
            continue
        else:
            unknown.append(word)
        # A full stop ends a list, and so do two words that are not in it.
        if len(unknown) > 1 or (lists[-1] and token.endswith((".", ":")) and not _LIST_NOISE.match(token)):
            lists.append([])
            unknown = []
    lists = [words for words in lists if len(words) > 1]
    whole = [words for words in lists if len(words) == len(gold)]
    found = whole or lists
    return " ".join(found[-1]) if found else None
