"""The 25 instructions of IFEval whose following can be told from a text alone. Imports no torch.

Source: Zhou et al., "Instruction-Following Evaluation for Large Language Models", arXiv 2311.07911, table 1 and the
arguments in the published prompts. Written from the definitions; ``tests/evals/test_instructions_agree.py`` compares
with another implementation. Every checker takes time linear in the length of the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gendistill_evals.instructions.language import language_of
from gendistill_evals.instructions.words import count_capital_words, count_sentences, count_words

Arguments = Mapping[str, Any]
Check = Callable[[str, Arguments], bool]

LESS_THAN, AT_LEAST = "less than", "at least"
_FIXED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_FENCE = "```"
# The usual markers, which may be written with spaces.
_POSTSCRIPTS = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}


@dataclass(frozen=True, slots=True)
class Checker:
    """One kind of instruction.

    Attributes:
        check: Whether a text follows it.
        arguments: What an instruction of the kind says beside its name, and the type of each.
        needs_language: Whether it has to know which language a text is in.
    """

    check: Check
    arguments: Mapping[str, type]
    needs_language: bool = False


def _compares(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == LESS_THAN else count >= threshold


def _has_keywords(text: str, told: Arguments) -> bool:
    folded = text.lower()
    return all(word.lower() in folded for word in told["keywords"])


def _keyword_frequency(text: str, told: Arguments) -> bool:
    return _compares(text.lower().count(told["keyword"].strip().lower()), told["relation"], told["frequency"])


def _lacks_words(text: str, told: Arguments) -> bool:
    return not any(
        re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in told["forbidden_words"]
    )


def _letter_frequency(text: str, told: Arguments) -> bool:
    return _compares(text.lower().count(told["letter"].lower()), told["let_relation"], told["let_frequency"])


def _in_language(text: str, told: Arguments) -> bool:
    # A text that is in no language at all, such as digits, breaks nothing.
    return language_of(text) in (told["language"], None)


def _num_sentences(text: str, told: Arguments) -> bool:
    return _compares(count_sentences(text), told["relation"], told["num_sentences"])


def _num_words(text: str, told: Arguments) -> bool:
    return _compares(count_words(text), told["relation"], told["num_words"])


def _num_paragraphs(text: str, told: Arguments) -> bool:
    """Paragraphs stand between dividers ``***``; one may stand before the first and after the last."""
    filled = [bool(piece.strip()) for piece in text.split("***")]
    return all(filled[1:-1]) and sum(filled) == told["num_paragraphs"]


def _nth_paragraph(text: str, told: Arguments) -> bool:
    """Paragraphs stand between empty lines; the nth is counted with empty ones."""
    pieces = text.split("\n\n")
    count, nth = sum(bool(piece.strip()) for piece in pieces), told["nth_paragraph"]
    if count != told["num_paragraphs"] or not 1 <= nth <= count or not pieces[nth - 1].strip():
        return False
    first = pieces[nth - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", first)[0].lower() == told["first_word"].lower()


def _num_placeholders(text: str, told: Arguments) -> bool:
    count = 0
    for line in text.split("\n"):
        at = line.find("[")
        while at >= 0 and (end := line.find("]", at)) >= 0:
            count += 1
            at = line.find("[", end)
    return count >= told["num_placeholders"]


def _has_postscript(text: str, told: Arguments) -> bool:
    marker = told["postscript_marker"].strip()
    pattern = _POSTSCRIPTS.get(marker) or re.escape(marker.lower())
    return re.search(pattern, text.lower()) is not None


def _num_bullets(text: str, told: Arguments) -> bool:
    """A bullet is a line that begins with one ``*`` or with ``-``."""
    lines = [line.strip() for line in text.split("\n")]
    count = sum(line.startswith("-") or (line.startswith("*") and line[1:2] != "*") for line in lines)
    return count == told["num_bullets"]


def _has_fixed_answer(text: str, told: Arguments) -> bool:
    return any(answer in text for answer in _FIXED_ANSWERS)


def _num_highlights(text: str, told: Arguments) -> bool:
    """A highlight is a text in one line between ``*`` or between ``**``."""
    count = sum(
        bool(found[1].strip())
        for pattern in (r"\*([^\n*]*)\*", r"\*\*([^\n*]*)\*\*")
        for found in re.finditer(pattern, text)
    )
    return count >= told["num_highlights"]


def _num_sections(text: str, told: Arguments) -> bool:
    marker = re.escape(told["section_spliter"].strip())
    return len(re.findall(rf"{marker}\s?\d+", text)) >= told["num_sections"]


def _is_json(text: str, told: Arguments) -> bool:
    bare = text.strip()
    for opening in (f"{_FENCE}json", f"{_FENCE}Json", f"{_FENCE}JSON", _FENCE):
        bare = bare.removeprefix(opening)
    try:
        json.loads(bare.removesuffix(_FENCE).strip())
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(text: str, told: Arguments) -> bool:
    """A title is a text in one line between ``<<`` and ``>>``."""
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if start >= 0 and end >= start + 3 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(text: str, told: Arguments) -> bool:
    """Two different answers stand around ``******``."""
    pieces = [piece.strip() for piece in text.split("******")]
    answers = [piece for piece in pieces if piece]
    return all(pieces[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _repeats_prompt(text: str, told: Arguments) -> bool:
    return text.strip().lower().startswith(told["prompt_to_repeat"].strip().lower())


def _ends_with(text: str, told: Arguments) -> bool:
    return text.strip().strip('"').lower().endswith(told["end_phrase"].strip().lower())


def _is_quoted(text: str, told: Arguments) -> bool:
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


def _num_capital_words(text: str, told: Arguments) -> bool:
    return _compares(count_capital_words(text), told["capital_relation"], told["capital_frequency"])


def _english_capitals(text: str, told: Arguments) -> bool:
    return text.isupper() and language_of(text) in ("en", None)


def _english_small(text: str, told: Arguments) -> bool:
    return text.islower() and language_of(text) in ("en", None)


def _no_comma(text: str, told: Arguments) -> bool:
    return "," not in text


CHECKERS: dict[str, Checker] = {
    "keywords:existence": Checker(_has_keywords, {"keywords": list}),
    "keywords:frequency": Checker(_keyword_frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": Checker(_lacks_words, {"forbidden_words": list}),
    "keywords:letter_frequency": Checker(
        _letter_frequency, {"letter": str, "let_frequency": int, "let_relation": str}
    ),
    "language:response_language": Checker(_in_language, {"language": str}, needs_language=True),
    "length_constraints:number_sentences": Checker(_num_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:number_paragraphs": Checker(_num_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": Checker(_num_words, {"num_words": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": Checker(
        _nth_paragraph, {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}
    ),
    "detectable_content:number_placeholders": Checker(_num_placeholders, {"num_placeholders": int}),
    "detectable_content:postscript": Checker(_has_postscript, {"postscript_marker": str}),
    "detectable_format:number_bullet_lists": Checker(_num_bullets, {"num_bullets": int}),
    "detectable_format:constrained_response": Checker(_has_fixed_answer, {}),
    "detectable_format:number_highlighted_sections": Checker(_num_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": Checker(
        _num_sections, {"section_spliter": str, "num_sections": int}
    ),
    "detectable_format:json_format": Checker(_is_json, {}),
    "detectable_format:title": Checker(_has_title, {}),
    "combination:two_responses": Checker(_two_responses, {}),
    "combination:repeat_prompt": Checker(_repeats_prompt, {"prompt_to_repeat": str}),
    "startend:end_checker": Checker(_ends_with, {"end_phrase": str}),
    "startend:quotation": Checker(_is_quoted, {}),
    "change_case:capital_word_frequency": Checker(
        _num_capital_words, {"capital_frequency": int, "capital_relation": str}
    ),
    "change_case:english_capital": Checker(_english_capitals, {}, needs_language=True),
    "change_case:english_lowercase": Checker(_english_small, {}, needs_language=True),
    "punctuation:no_comma": Checker(_no_comma, {}),
}
