"""Count words and sentences of English as the instructions mean them. Imports no torch.

Words in capitals are counted by the rules of the Penn Treebank, and sentences by what ends one, as the reference does
with a model that it downloads; here both are rules, so that nothing is downloaded.
"""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"\w+")
_JOINERS = "\u200c\u200d"
# What stands between two words of the Treebank, beside spaces. A colon or comma before a digit does not: "7:30".
_BETWEEN = re.compile(
    r"\s+|[;@#$%&?!*()\[\]{}<>\"\u201c\u201d\u00ab\u00bb\u2018\u2019\u2014]|\.\.+|--|[:,](?!\d)|\u2026"
)
# Short forms are words of their own: "I'M" is two.
_CLITIC = re.compile(r"(?i)(?<=\w)(n't|'(?:s|m|d|ll|re|ve))$")
# Words that are written as one and counted as two.
_JOINED = {
    "CANNOT": 2,
    "GIMME": 2,
    "GONNA": 2,
    "GOTTA": 2,
    "LEMME": 2,
    "WANNA": 2,
    "D'YE": 2,
    "'TIS": 2,
    "'TWAS": 2,
}

# A sentence may end here. Quotes and brackets that close belong to it; other marks begin what follows.
_CLOSERS = "\"')\\]}\u2018\u2019\u201c\u201d\u00ab\u00bb"
_END = re.compile(rf"(?<!\S)(\S*?)([.?!]+)(?:[{_CLOSERS}]+(?=\s|$)|(?=[{_CLOSERS};*:@(\[{{\s]|$))")
# Abbreviations whose stop ends nothing. Those after which a sentence may well end ("etc.") are not among them, and
# neither are "e.g." and "i.e.", which the reference counts as ends too.
_ABBREVIATIONS_TEXT = (
    "adm ala ariz aug ave b.c bros calif chg cie co col colo conn corp cos ct d.c dec dr fla fri ft ga gen ill "
    "inc jan jr kan ky lt ltd ma maj messrs mg mich minn mr mrs ms mt n.y nev nov oct okla ore p.m pa ph.d prof "
    "rep reps sen sep sept sr st sw tenn tues u.k u.n u.s u.s.a va vs vt wash wed wis yr feb"
)
_ABBREVIATIONS = frozenset(_ABBREVIATIONS_TEXT.split())
# Single letters that are read as initials; the others are also words and labels ("plan A.").
_INITIALS = frozenset("cdefghklmnprstvw")
# With a capital these begin a sentence after an abbreviation or dots; other words may be names there.
_STARTERS_TEXT = (
    "although among both but despite even every he however if in indeed instead it many meanwhile moreover most "
    "nevertheless nonetheless nor separately she similarly since so some the then there these they this though "
    "thus under we when while yet you"
)
_STARTERS = frozenset(_STARTERS_TEXT.split())
_OPENERS = "\"'(*[{_-#>\u201c\u2018"
_NEXT = re.compile(r"\s*(\S*)")
# Initials of a person: "j.p".
_PAIR = re.compile(r"[a-z]\.[a-z]")
_DIGITS = re.compile(r"[\d.,]+")


def count_words(text: str) -> int:
    """Count runs of letters, digits and underscores: "don't" is two. Marks that combine with a letter belong to it."""
    if not text.isascii():
        text = "".join(each for each in text if unicodedata.category(each)[0] != "M" and each not in _JOINERS)
    return sum(1 for _ in _WORD.finditer(text))


def count_capital_words(text: str) -> int:
    """Count the words that have a letter and no small one; a word with a hyphen is one."""
    count = 0
    for word in _BETWEEN.split(text):
        stem, clitic, _ = _CLITIC.split(word, maxsplit=1) if _CLITIC.search(word) else (word, "", "")
        count += clitic.isupper() + (stem.isupper() and _JOINED.get(stem.strip(".'`"), 1))
    return count


def count_sentences(text: str) -> int:
    """Count sentences: what ends in a full stop, a question or an exclamation mark, and the rest if there is any.

    The stop of an abbreviation, an initial, a number before a small letter, and dots between small letters end
    nothing; a line break does not either.
    """
    count, rest = 0, 0
    for end in _END.finditer(text):
        if not _ends(end, text):
            continue
        count += 1
        rest = end.end()
    return count + bool(text[rest:].strip())


def _ends(end: re.Match[str], text: str) -> bool:
    word, marks = end[1], end[2]
    if "?" in marks or "!" in marks:
        return True
    following = _NEXT.match(text, end.end())
    after = following[1].lstrip(_OPENERS) if following else ""
    if not after:
        return True
    small = after[0].islower()
    begins = after[0].isupper() and re.split(r"[^\w]", after)[0].lower() in _STARTERS
    stem = word.lstrip(_OPENERS).lower()
    if len(marks) > 1:
        return after[0].isupper()
    if stem in _ABBREVIATIONS or (after[0].isupper() and _PAIR.fullmatch(stem)):
        return begins
    if len(stem) == 1 and stem.isalpha():
        return stem not in _INITIALS and not small
    return not (small and _DIGITS.fullmatch(stem))
