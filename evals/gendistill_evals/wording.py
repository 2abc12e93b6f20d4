"""How a text speaks of one word in it: as its answer, as no answer, beside another word. Imports no torch.

A text is cut into words once; what is asked about a word looks at a fixed number of words around it, so every
question takes constant time.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from enum import IntEnum

# Scripts that put no spaces between words: each character is a word of its own.
_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
# Scripts of India, whose vowel signs belong to words and are not letters of their own; their full stops do not.
_INDIC = "\u0900-\u0963\u0966-\u0dff"
_LETTERS = rf"(?:[^\W_{_UNSPACED}]|[{_INDIC}])+"
_WORD = re.compile(rf"[{_UNSPACED}]|{_LETTERS}(?:['\u2019]{_LETTERS})*|[^\w\s]|\n")
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_TAG = re.compile(r"<(/?)([A-Za-z]\w{0,20})\s{0,3}/?>")
# More combining marks in a row than any language writes; sorting them takes time quadratic in their number.
_MOST_MARKS = 30
# Words looked at around a word, and further back in its sentence.
_NEAR, _SENTENCE = 12, 30

OPENERS = frozenset("([{<\u3010\u300c\u300e\u300a\u3008\u3014\u3016\u27e6\u27e8")
CLOSERS = frozenset(")]}>\u3011\u300d\u300f\u300b\u3009\u3015\u3017\u27e7\u27e9")
BULLETS = frozenset("->=\u2022\u2013\u2014\u2234\u2192\u21d2\u2705\u2713\u2714\ufe0f")
QUOTES = frozenset("\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb\u2039\u203a*#$|~")
DELIMITERS = frozenset(").:,;!?]}\u3011\u3002\u3001-\u2013\u2014")
_ENDS = frozenset(".!?;\u3002\u0964\u061f\n")
_CONNECTORS = frozenset(
    {"and", "or", "nor", "versus", "vs", *",;/&+\u3001", *"\u548c\u6216\u4e0e\u8207\u53ca\u8ddf\u8fd8\u662f"}
)
_BETWEEN = frozenset({"boxed", ":", "option", "choice", "letter", "maybe", "perhaps", "possibly"})

_ANSWERS = frozenset({
    "answer", "answers", "answer's", "ans", "solution", "response", "verdict", "selection", "pick", "correct",
    "boxed", "choose", "choosing", "select", "selecting", "go", "going", "guess", "think", "believe",
    "say", "opt", "vote", "antwort", "lösung", "wähle", "nehme", "réponse", "choisis", "respuesta", "elijo",
    "risposta", "scelgo", "resposta", "escolho", "ответ", "выбираю", "richtig", "antwoord", "svar", "svaret",
    "lean", "leaning", "inclined",
    "odpowiedź", "odpověď", "cevap", "yan\u0131t", "án", "jawaban", "jawabannya", "απάντηση", "الإجابة", "الجواب",
    "उत्तर", "जवाब", "відповідь", "vastaus", "răspuns", "răspunsul",
})  # fmt: skip
_OPTIONS = frozenset({
    "option", "options", "choice", "choices", "letter", "maybe", "perhaps", "possibly", "chose",
    "selected", "picked", "lettre", "letra", "lettera", "buchstabe", "opción", "opzione", "opção", "вариант", "буква",
})  # fmt: skip
_COPULAS = frozenset({
    "is", "are", "was", "be", "becomes", "ist", "lautet", "est", "es", "è", "é", "är", "là", "adalah", "هي", "هو",
})  # fmt: skip
_POINTERS = frozenset({"it", "that", "this"})
_POINTING = frozenset({"it's", "that's"})
_TURNS = frozenset({
    "so", "therefore", "thus", "hence", "actually", "definitely", "probably", "certainly", "obviously",
    "clearly", "finally", "but", "now", "rather", "instead", "no", "wait", "likely", "surely", "sure",
    "yes", "ok", "okay", "well", "hmm", "course", "elimination", "sondern", "daher", "donc", "sino",
})  # fmt: skip
_FILLERS = frozenset({
    "the", "an", "would", "should", "must", "will", "might", "may", "could", "can", "most",
    "simply", "indeed", "then", "really", "final", "right", "best", "either", "both", "only", "one",
    "with", "for", "to", "towards", "toward", "has", "đúng", "yang", "benar", "الصحيحة", "الصحيح", "doğru",
    "der", "die", "das", "le", "la", "el", "il",
})  # fmt: skip
_DENIALS = frozenset({
    "not", "neither", "nor", "never", "cannot", "except", "excluding", "besides", "without",
    "nicht", "pas", "não", "non", "не", "niet", "inte", "không", "nie", "ليست", "ليس",
})  # fmt: skip
# "Anything but B" denies B; "nothing but B" does not.
_ALL_BUT = frozenset({"anything", "everything", "all", "any"})
# "No" denies before these, and turns elsewhere: "la respuesta no es B", "no, B".
_AFTER_NO = frozenset({"es", "era", "sería"})
_WRONG = frozenset({
    "not", "wrong", "incorrect", "false", "never", "impossible", "out", "eliminated", "nicht", "falsch", "pas",
    "faux", "fausse", "incorrecte", "incorrecta", "incorrecto",
})  # fmt: skip
_RIGHT = frozenset({
    "correct", "right", "true", "best", "answer", "richtig", "korrekt", "antwort", "correcte", "juste", "bonne",
    "réponse", "correcta", "correcto", "respuesta",
})  # fmt: skip
_HOLDS = frozenset({"remains", "fits", "wins"})
_STATES = frozenset({
    "is", "are", "was", "seems", "looks", "would", "must", "should", "can", "could", "the", "being",
    "ist", "est", "es",
})  # fmt: skip
_DENIED_BEFORE = ("不是", "不选", "不選", "不为", "不為", "不能选", "不應選", "并非", "排除")
_STATED_BEFORE = ("答案", "选", "選", "答え", "正解", "正しいのは", "정답", "답은")
_DENIED_AFTER = re.compile(
    "(?:[选選]?[项項])?(?:是|也)?(?:错|錯|不|排除)|[がはも](?:正しく|正解(?:で[はも]|じゃ)|間違|誤)"
    "|(?:では|じゃ)(?:な|あり)|[이가은는](?:아[니닙]|틀)"
)
_STATED_AFTER = re.compile(
    "(?:[选選]?[项項])?(?:是|才)?(?:正确|正確|对|對|答案|最)|[がは](?:正しい|正解|答え)"
    "|を選(?:ぶ|び|択)(?!ませ|しませ)|[이가](?:정답|맞)"
)


class Said(IntEnum):
    """The sense in which a text names a word: not this one, nothing, that it exists, or that it is the answer."""

    DENIED = 0
    NOTHING = 1
    MENTIONED = 2
    STATED = 3


def nfkc(text: str) -> str:
    """Unify the forms of characters, such as full-width ones, in time linear in the length of the text."""
    if text.isascii():
        return text
    kept, marks = [], 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= _MOST_MARKS:
            kept.append(character)
    return unicodedata.normalize("NFKC", "".join(kept))


def plain_text(text: str) -> str:
    """Take markup out of an answer: the reasoning block, HTML tags, and LaTeX commands except ``boxed``."""
    text = nfkc(text).rpartition("</think>")[2]
    text = _COMMAND.sub(_without_command, text)
    closed = {name.lower() for slash, name in _TAG.findall(text) if slash}

    def without_tag(match: re.Match[str]) -> str:
        slash, name = match.groups()
        if not slash and name.lower() in ("answer", "final_answer"):
            return " answer: "
        # "<B>" is a letter in brackets unless something closes it.
        return " " if len(name) > 1 or name.lower() in closed else match.group()

    return _TAG.sub(without_tag, text)


def _without_command(match: re.Match[str]) -> str:
    name = match.group(1)
    if name in ("boxed", "fbox"):
        return " boxed: "
    return name if name in "()[]{}" else " "


class Words:
    """The words of a text.

    Args:
        text: From ``plain_text``.

    Attributes:
        text: The text.
        words: Its words, punctuation marks and line breaks, in order.
        lower: The same without case.
        starts: Where each begins in the text.
    """

    def __init__(self, text: str) -> None:
        matches = list(_WORD.finditer(text))
        self.text = text
        self.words = [match.group() for match in matches]
        self.lower = [word.lower().replace("\u2019", "'") for word in self.words]
        self.starts = [match.start() for match in matches]

    def at(self, place: int) -> str:
        """Return the word at a place without case; a line break beyond the ends."""
        return self.lower[place] if 0 <= place < len(self.lower) else "\n"

    def is_word(self, place: int) -> bool:
        """Whether a word of a script with spaces stands at a place, not punctuation and not the end."""
        word = self.at(place)
        return word[0].isalnum() and not self._unspaced(place)

    def ends_clause(self, place: int) -> bool:
        """Whether nothing but closing marks stands between a place and a punctuation mark or the end."""
        while self.at(place) in CLOSERS or self.at(place) in QUOTES:
            place += 1
        return self.at(place) in _ENDS or self.at(place) in DELIMITERS

    def begins_clause(self, place: int) -> bool:
        """Whether a sentence or a line begins at a place, markup aside."""
        while place > 0 and (
            self.at(place - 1) in OPENERS or self.at(place - 1) in QUOTES or self.at(place - 1) == "-"
        ):
            place -= 1
        return place == 0 or self.at(place - 1) in _ENDS

    def after(self, place: int, words: Sequence[str]) -> int:
        """Return where words end that stand at a place, brackets and delimiters aside; the place if they do not."""
        start = place
        for _ in range(3):
            if self.at(start) in DELIMITERS or self.at(start) in OPENERS or self.at(start) in QUOTES:
                start += 1
        num_words = min(len(words), _NEAR)
        stands = bool(words) and self.lower[start : start + num_words] == list(words[:num_words])
        return start + num_words if stands else place

    def joins(self, end: int, start: int) -> bool:
        """Whether nothing but "and", "or", commas, brackets and the word "option" stands between two words."""
        between = set(self.lower[end:start])
        if not between <= _CONNECTORS | QUOTES | OPENERS | CLOSERS | _BETWEEN or not 0 <= start - end <= 6:
            return False
        return bool(between & _CONNECTORS) or not between & _BETWEEN

    def said(self, start: int, end: int) -> Said:
        """Tell what the text says of the words from ``start`` up to ``end``."""
        after = self._said_after(end)
        if after is not Said.NOTHING:
            return after
        return self._said_before(start, end)

    def _said_before(self, start: int, end: int) -> Said:
        copula = colon = mentioned = turn = False
        place = start
        for place in range(start - 1, max(-1, start - 1 - _NEAR), -1):
            word = self.at(place)
            if word in _DENIALS or word.endswith("n't"):
                return Said.DENIED
            if (word == "but" and self.at(place - 1) in _ALL_BUT) or (
                word == "no" and self.at(place + 1) in _AFTER_NO
            ):
                return Said.DENIED
            if self._unspaced(place):
                return self._said_in_unspaced(place)
            if word in _ANSWERS or word in _POINTING or (word in _POINTERS and copula):
                denied = any(
                    self._denies(place - back) for back in (1, 2) if self.at(place - back) not in DELIMITERS
                )
                return Said.DENIED if denied else Said.STATED
            if word in _OPTIONS:
                if copula or colon:
                    return Said.STATED
                mentioned = True
            elif word in _COPULAS:
                copula = True
            elif word in ("must", "should") and copula and self.at(place - 1) in _ENDS:
                return Said.STATED
            elif word in _TURNS:
                turn = True
            elif word in ":=":
                colon = True
            elif not (
                word in _FILLERS
                or (word == "a" and self.at(place - 1) == "é")
                or word in QUOTES
                or word in OPENERS
                or word in ",-\u2013\u2014>]\u3011\n"
            ):
                break
        if copula and self._sentence_answers(place):
            return Said.STATED
        if mentioned:
            return Said.MENTIONED
        return Said.STATED if turn and self.ends_clause(end) else Said.NOTHING

    def _said_after(self, end: int) -> Said:
        place = end
        while place < end + 3 and (self.at(place) in CLOSERS or self.at(place) in QUOTES):
            place += 1
        if self._unspaced(place):
            run = self._run(place, 1)
            if _DENIED_AFTER.match(run):
                return Said.DENIED
            return Said.STATED if _STATED_AFTER.match(run) else Said.NOTHING
        word = self.at(place)
        if word.endswith("n't") or word == "cannot":
            return Said.DENIED
        if word in _HOLDS or (word == "for" and self.at(place + 1) == "sure"):
            return Said.STATED
        if word not in _STATES:
            return Said.NOTHING
        if word in ("is", "are") and self.at(place + 1) in _ENDS:
            return Said.STATED
        for later in range(place + 1, place + 6):
            word = self.at(later)
            if word in _WRONG or word.endswith("n't"):
                return Said.DENIED
            if word in _RIGHT:
                return Said.STATED
            if not self.is_word(later):
                break
        return Said.NOTHING

    def _denies(self, place: int) -> bool:
        word = self.at(place)
        return word in _DENIALS or word in ("wrong", "incorrect", "false") or word.endswith("n't")

    def _sentence_answers(self, place: int) -> bool:
        """Whether the sentence up to a place speaks of an answer: "the answer to question 3 is"."""
        for back in range(place, max(-1, place - _SENTENCE), -1):
            if self.at(back) in _ENDS:
                return False
            if self.at(back) in _ANSWERS or self.at(back) in _OPTIONS:
                return not self._denies(back - 1)
        return False

    def _said_in_unspaced(self, place: int) -> Said:
        run = self._run(place, -1)
        if run.endswith(_DENIED_BEFORE):
            return Said.DENIED
        if run.endswith(("选项", "選項")):
            return (
                Said.STATED
                if any(word in run for word in ("答案", "正确", "正確", "我选", "应选"))
                else Said.MENTIONED
            )
        if any(word in run for word in _STATED_BEFORE):
            return Said.STATED
        return Said.STATED if run.endswith(("是", "为", "為", "所以", "因此", "故")) else Said.NOTHING

    def _run(self, place: int, step: int) -> str:
        """Join the characters of an unspaced script from a place on, forwards or backwards."""
        run: list[str] = []
        while len(run) < _NEAR and self._unspaced(place):
            run.append(self.at(place))
            place += step
        return "".join(run[::step])

    def _unspaced(self, place: int) -> bool:
        return _IS_UNSPACED.match(self.at(place)) is not None
