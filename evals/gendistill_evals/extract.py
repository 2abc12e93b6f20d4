"""Find the answer in a generated text. Imports no torch.

An extraction that finds nothing, or cannot tell which of several options is meant, is a failure: it is counted,
and the item is wrong. Every function takes time linear in the length of the text, whatever a model has written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from gendistill_evals.wording import (
    BULLETS,
    CLOSERS,
    DELIMITERS,
    OPENERS,
    QUOTES,
    Said,
    Words,
    nfkc,
    plain_text,
)

_NUMBER = re.compile(
    r"(?<![\w.])(?:\$[-\u2212]|[-\u2212]?\$?)(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)
# Four number signs before words are a heading: "#### Step 3: add".
_MARKED = re.compile(rf"####(?:(?!####)\W)*?(?P<number>{_NUMBER.pattern})")
# "answer" with its verb or colon, bold or not; a box; four number signs.
_STATEMENT = re.compile(
    r"\\(?:boxed|fbox)\s{0,3}\{|####|\banswer\b[*_\s]{0,4}(?:is\b|:)[*_\s]{0,4}:?[*_]{0,3}", re.IGNORECASE
)
_QUOTES = "\"'`*\u2018\u2019\u201c\u201d"
_EDGE = _QUOTES + ".!?,;: \n\t"
# "A" and "I" are words too, and so is any small letter; followed by one of these they are letters of options.
_AFTER_LETTERS = frozenset({
    "is", "because", "since", "as", "and", "or", "but", "the", "this", "it", "which", "rather", "instead",
    "not", "over", "remains", "seems", "looks", "i", "probably", "definitely", "ist", "est", "es",
})  # fmt: skip


def parse_number(text: str) -> Decimal | None:
    """Read a text that is one number: ``1,234``, ``$3.50``, ``-7``, ``.5``, ``40%``; None if it is anything else."""
    stripped = text.strip().rstrip("%").strip()
    return _decimal(stripped) if _NUMBER.fullmatch(stripped) else None


def last_number(text: str) -> Decimal | None:
    """Find the answer among the numbers of a text.

    Args:
        text: A generated answer.
    Returns: The last number that follows ``####`` without a word between them, else the last number, else None.
    """
    numbers = [found["number"] for found in _MARKED.finditer(text)] or _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def written_number(number: Decimal) -> str:
    """Write a number in plain digits, without zeros after its last one: ``18`` of ``18.00``."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def answer_after_thought(text: str, *, opens: bool = False) -> str | None:
    """Leave the reasoning block of an answer out.

    Args:
        text: A generated answer.
        opens: Whether the prompt has opened the block.
    Returns: What follows the last ``</think>``, without white space around it; the text itself where there is no block;
        None where the block was never closed, so that there is no answer.
    """
    _, closed, after = text.rpartition("</think>")
    if "<think>" in after or (opens and not closed):
        return None
    return after.strip() if closed else text


def stated_answer(text: str, *, number: bool = False) -> str | None:
    """Find the answer that a chain of thought states at its end.

    Args:
        text: What a model wrote: thoughts, then an answer.
        number: Whether the answer is a number, of which the first is meant, or the one after the last "=".
    Returns: The rest of the line, or the first line, after the last "answer is", "answer:", ``####``; or the content of
        the last ``\\boxed``, whichever comes last. None if nothing is stated.
    """
    last = None
    for match in _STATEMENT.finditer(text):
        last = match
    if last is None:
        return None
    after = text[last.end() :]
    if last.group().startswith("\\"):
        stated = _braced(after)
    else:
        stated = next((line for line in after.split("\n") if line.strip(_EDGE + "#")), "")
    if number:
        found = _NUMBER.search(stated.rpartition("=")[2])
        stated = found.group() if found else ""
    return stated.strip() or None


def _braced(text: str) -> str:
    """Return what stands before the brace that closes a text."""
    depth = 1
    for place, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if not depth:
            return text[:place]
    return text


def normalise(text: str) -> str:
    """Drop what never makes an answer wrong: case, width, runs of spaces, quotes and punctuation at the ends."""
    return " ".join(nfkc(text).casefold().split()).strip(_EDGE)


def find_option(text: str, options: Sequence[str]) -> str | None:
    """Find the one option that a text names.

    An option is named where its words stand as whole words, outside a longer option that is named, and not denied
    ("not red").

    Args:
        text: A generated answer.
        options: The possible answers.
    Returns: The last option that the text states as its answer ("the answer is ...", "I choose ...", ``\\boxed``)
        unless it joins another one to it ("red or blue"); without a statement the only option named; else None.
    """
    words = Words(normalise(plain_text(text)))
    named = [name for name in _option_names(words, options) if name.said is not Said.DENIED]
    stated = [name for name in named if name.said is Said.STATED]
    if stated:
        return None if _is_joined(words, stated[-1], named) else stated[-1].answer
    answers = {name.answer for name in named}
    return answers.pop() if len(answers) == 1 else None


def find_letter(text: str, letters: Sequence[str], texts: Sequence[str]) -> str | None:
    """Find the letter of the option that a text chooses.

    The first rule that applies decides; where it finds several letters, nothing is read.

    1. The last letter stated as the answer ("the answer is B", "I choose (b)", "B is correct", ``\\boxed{B}``), in
       any case, bracket or width.
    2. A letter that the text begins with: alone on its line, in brackets, before punctuation or before its option's
       text, unless it begins a list of letters ("A: no. B: yes").
    3. The only letter in brackets or called an option.
    4. The only letter that is not denied among some that are, if it is a sentence ("Not A. Not B. C.").
    5. The only option named by its text.

    Denied letters ("not A", "A is wrong") are never read. Several letters joined ("A or B", "both A and C") are
    nothing. "A", "I" and small letters before another word are words of the language ("A dog barks").

    Args:
        text: A generated answer.
        letters: The letters on offer.
        texts: The options' texts, in the same order; empty where they are not known.
    Returns: One of ``letters``, or None.
    """
    words = Words(plain_text(text))
    own = {
        letter: Words(nfkc(option)).lower
        for letter, option in zip(letters, texts or [""] * len(letters), strict=True)
    }
    names = _letter_names(words, own)
    named = [name for name in names if name.said is not Said.DENIED]
    stated = [name for name in named if name.said is Said.STATED]
    if stated:
        return None if _is_joined(words, stated[-1], named) else stated[-1].answer
    if named and _begins(words, named[0]):
        alone = not (_is_joined(words, named[0], named) or _is_listed(words, named, letters))
        return named[0].answer if alone else None
    mentioned = [name for name in named if name.said is Said.MENTIONED or _shape(words, name) == "brackets"]
    if mentioned:
        several = len({name.answer for name in mentioned}) > 1 or _is_joined(words, mentioned[-1], named)
        return None if several else mentioned[-1].answer
    if len(named) < len(names) and len({name.answer for name in named}) == 1:
        left = named[-1]
        if words.begins_clause(left.start) and words.ends_clause(left.end):
            return left.answer
    option = find_option(text, texts)
    return None if option is None else letters[list(texts).index(option)]


@dataclass(frozen=True, slots=True)
class _Name:
    """A place where a text names an answer: words from ``start`` up to ``end``, and what is said of it."""

    answer: str
    start: int
    end: int
    said: Said


def _option_names(words: Words, options: Sequence[str]) -> list[_Name]:
    # With a mark around every word, whole words are found by plain search, which takes linear time.
    joined = "".join(f"\0{word}" for word in words.lower) + "\0"
    places = {}
    offset = 0
    for place, word in enumerate(words.lower):
        places[offset] = place
        offset += len(word) + 1
    places[offset] = len(words.lower)
    found = []
    for option in options:
        spelled = Words(normalise(option)).lower
        wanted = "".join(f"\0{word}" for word in spelled) + "\0"
        at = joined.find(wanted) if spelled else -1
        while at >= 0:
            found.append((places[at], -len(spelled), option))
            at = joined.find(wanted, at + len(wanted) - 1)
    names: list[_Name] = []
    # Of two options at one place the longer one is named: "dark red" uses up "red".
    for start, length, option in sorted(found):
        if not names or start >= names[-1].end:
            end = start - length
            names.append(_Name(option, start, end, words.said(start, end)))
    return names


def _letter_names(words: Words, own: Mapping[str, Sequence[str]]) -> list[_Name]:
    names = []
    for place, word in enumerate(words.words):
        letter = word.upper()
        if len(word) != 1 or letter not in own or _is_glued(words, place):
            continue
        # The option's text belongs to its letter: "B) blue or C) green" joins two letters.
        end = words.after(place + 1, own[letter])
        may_be_a_word = word in "AI" or word != letter
        goes_on = words.is_word(place + 1) and words.at(place + 1) not in _AFTER_LETTERS
        if may_be_a_word and goes_on and end == place + 1:
            continue
        said = words.said(place, place + 1)
        names.append(_Name(letter, place, end, words.said(place, end) if said is Said.NOTHING else said))
    return names


def _is_glued(words: Words, place: int) -> bool:
    """Whether a character is part of something longer: "C++", "B-flat", "U.S.", "f(a)"."""
    text, start = words.text, words.starts[place]
    before, after = text[max(0, start - 2) : start], text[start + 1 : start + 4]
    if after[:1] in ("+", "#", "%") or re.match(
        r"[-\u2013&@_'\u2019][A-Za-z0-9]|\.[A-Za-z0-9](?![A-Za-z0-9])", after
    ):
        return True
    if words.words[place].islower() and re.fullmatch(r"[A-Za-z0-9][(\[]", before):
        return True
    return re.fullmatch(r"[A-Za-z0-9][-\u2013&@_.'\u2019]|.?\u00b0", before) is not None


def _shape(words: Words, name: _Name) -> str:
    """Tell how a letter is set off: in "brackets", alone on its "line", by a delimiter, or not at all."""
    before, after = words.at(name.start - 1), words.at(name.start + 1)
    if before in OPENERS and (after in CLOSERS or after in DELIMITERS):
        return "brackets"
    alone, end = name.start, name.start + 1
    while words.at(alone - 1) in QUOTES | OPENERS | BULLETS:
        alone -= 1
    while words.at(end) in QUOTES or words.at(end) in CLOSERS or words.at(end) in ".!?\u3002":
        end += 1
    if words.at(alone - 1) == "\n" == words.at(end):
        return "line"
    return after if after in DELIMITERS else ""


def _begins(words: Words, name: _Name) -> bool:
    """Whether a text begins with a letter that is meant as one."""
    if any(words.at(place) not in OPENERS | QUOTES | BULLETS | {"\n"} for place in range(name.start)):
        return False
    after = words.at(name.start + 1)
    if _shape(words, name) or name.end > name.start + 1:
        # "I, for one, ..." speaks of the speaker.
        return not (words.words[name.start] in "Ii" and after == ",")
    if after in QUOTES:
        return words.ends_clause(name.start + 1)
    return words.words[name.start].isupper() and after in _AFTER_LETTERS


def _is_joined(words: Words, name: _Name, named: Sequence[_Name]) -> bool:
    """Whether another answer is joined to one, as in "A or B"."""
    place = next(place for place, other in enumerate(named) if other.start == name.start)
    for first, second in zip(
        named[max(0, place - 1) : place + 1], named[max(0, place - 1) + 1 : place + 2], strict=False
    ):
        if first.answer != second.answer and words.joins(first.end, second.start):
            return True
    return False


def _is_listed(words: Words, named: Sequence[_Name], letters: Sequence[str]) -> bool:
    """Whether the first letter begins a list: others are set off like it.

    They are if one of them is the next letter, or begins a sentence or a line.
    """
    first = named[0]
    shape = _shape(words, first)
    following = [
        name for name in named[1:] if name.answer != first.answer and shape and _shape(words, name) == shape
    ]
    if not following:
        return False
    successor = list(letters).index(following[0].answer) == list(letters).index(first.answer) + 1
    return successor or any(words.begins_clause(name.start) for name in following)


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("$", "").replace("\u2212", "-"))
