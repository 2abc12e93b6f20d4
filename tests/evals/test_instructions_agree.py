"""The checkers of IFEval agree with those of lm-eval on answers that follow and break every kind of instruction.

lm-eval needs ``langdetect``, ``nltk`` and nltk's punkt_tab, found through NLTK_DATA where it is not installed; without
punkt_tab the two instructions that use it are left out, and the test says so. IFEVAL_ROWS names a file of all prompts.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from gendistill_evals.instructions import CHECKERS, Instruction, followed
from gendistill_evals.instructions.words import count_capital_words, count_sentences, count_words

pytestmark = pytest.mark.slow
NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}

# Written for this test: prose with abbreviations, numbers, dots, quotes, lists, markup, and other languages.
BASES = [
    "The river runs north. It meets the sea at a small town, where boats lie in rows. Nobody hurries there!",
    'Dr. Lee met Mr. Oak at 7:30 p.m. on Jan. 5. They spoke of the U.S. economy, e.g. of prices. "Is that so?" he '
    'asked. "It is," she said... and left.',
    "1. Wash the rice.\n2. Boil 1.5 litres of water.\n3. Add salt, then wait.\n\nServe it warm. Enjoy!",
    "# Plan\n\n* First, *walk* the dog.\n* Then **feed** the cat.\n- Last, sleep.\n\n***\n\nThat is all? Yes.",
    "Hello... is anyone there? I waited for hours... Then it rained. What a day!!! Really?! Yes.",
    "no capital letters stand in this text. it is short. it goes on a little, and it ends here",
    "ALL OF THIS IS IN CAPITALS. IT'S LOUD, AND I CAN'T HELP IT. NASA AND THE U.S.A. AGREE!",
    '{"name": "Ann", "age": 3, "likes": ["tea", "rain"]}',
    '```json\n{"answer": [1, 2, 3]}\n```',
    "Sure, here it is:\n\n<<A day at sea>>\n\nThe wind was low. We left at 5 a.m. and came late.\n\nP.S. Bring bread.",
    "Section 1\nThe start of it.\nSection 2\nThe middle.\nSection 3\nThe end.\n\nP.P.S Do not forget.",
    "SECTION 1\nOne.\n\nSECTION 2\nTwo.\n\nSECTION 3\nThree.\n\nSECTION 4\nFour.",
    "Dear [name],\n\nthank you for [thing]. Please write to [address] by [date].\n\nYours,\n[sender]",
    "My answer is yes.",
    "I think so. My answer is maybe. It depends on the weather, on you and on Prof. Stone, Ph.D., who knows.",
    "******\nOne answer.\n******\nAnother answer.\n******",
    "One answer.\n******\nOne answer.",
    "First paragraph.\n***\nSecond paragraph.\n***\nThird paragraph.",
    '"A quoted answer, from its first mark to its last."',
    "El perro corre por la calle y la gente lo mira con alegr\u00eda. Nadie sabe de qui\u00e9n es.",
    "Le chat dort sur la chaise pr\u00e8s de la fen\u00eatre. Il fait froid dehors, mais il s'en moque.",
    "नदी पर एक पुराना पुल है। लोग उस पर चलते हैं।",
    "川に橋があります。人々は毎日その橋を渡ります。",
    "12345 67890 11 12 13",
    "*One* *two* *three* and **four** stand out, but * this * hardly, and ** ** not at all.",
    'A well-known STATE-OF-THE-ART method: BERT/GPT (2018), by Devlin et al. It\'s OK; the NLP crowd said "WOW".',
    "She got 3.5 points. 7 more came later. Version 2.0. is out. See p. 5 or Fig. 3. No. 7 won. So did J. Smith.",
    'What is it? A bird? A plane? It\'s a kite, said Tim (aged 6). (He was right.) "Good." The end',
]
_WORDS = [
    "river",
    "stone",
    "light",
    "paper",
    "window",
    "garden",
    "music",
    "winter",
    "bridge",
    "letter",
    "cloud",
]


def sentences(draw: random.Random, count: int) -> str:
    return " ".join(
        f"{' '.join(draw.choices(_WORDS, k=4)).capitalize()}{draw.choice('...!?')}" for _ in range(count)
    )


def obeying(kind: str, told: dict[str, Any], draw: random.Random, text: str) -> str:
    """Change a text so that it is likely to follow an instruction."""
    match kind.partition(":")[2]:
        case "existence":
            return f"{text} {' '.join(told['keywords'])}"
        case "frequency":
            return f"{text} {' '.join([told['keyword']] * draw.choice([0, told['frequency'] - 1, told['frequency']]))}"
        case "forbidden_words":
            return f"{text} {draw.choice(['', told['forbidden_words'][0] + 'x'])}"
        case "letter_frequency":
            return (
                text
                + " "
                + told["letter"] * draw.choice([0, told["let_frequency"] - 1, told["let_frequency"]])
            )
        case "response_language":
            return draw.choice(BASES[19:23])
        case "number_sentences":
            return sentences(draw, max(1, told["num_sentences"] - draw.choice([0, 1])))
        case "number_paragraphs":
            return "\n***\n".join(sentences(draw, 2) for _ in range(told["num_paragraphs"]))
        case "number_words":
            return " ".join(draw.choices(_WORDS, k=max(1, told["num_words"] - draw.choice([0, 1]))))
        case "nth_paragraph_first_word":
            pieces = [sentences(draw, 2) for _ in range(told["num_paragraphs"])]
            pieces[told["nth_paragraph"] - 1] = (
                f"{told['first_word'].capitalize()}{draw.choice([' ', ', ', '. '])}etc."
            )
            return "\n\n".join(pieces)
        case "number_placeholders":
            return text + " [here]" * told["num_placeholders"]
        case "postscript":
            return f"{text}\n\n{told['postscript_marker']} More."
        case "number_bullet_lists":
            mark = draw.choice(["* ", "- ", "  * "])
            return "Points:\n" + "\n".join(f"{mark}{draw.choice(_WORDS)}" for _ in range(told["num_bullets"]))
        case "constrained_response":
            return draw.choice(
                ["My answer is no.", " My answer is maybe. ", "Well. My answer is yes. Surely."]
            )
        case "number_highlighted_sections":
            return (
                text + draw.choice([" *this*", " **that**", " *this* and **that**"]) * told["num_highlights"]
            )
        case "multiple_sections":
            return "\n".join(f"{told['section_spliter']} {n + 1}\nText." for n in range(told["num_sections"]))
        case "json_format":
            return draw.choice(BASES[7:9])
        case "title":
            return f"<<{draw.choice(['Rain', 'a b', ' '])}>>\n{text}"
        case "two_responses":
            return f"{text}\n******\n{sentences(draw, 2)}"
        case "repeat_prompt":
            return f"{told['prompt_to_repeat']}\n\n{text}"
        case "end_checker":
            return f"{text} {told['end_phrase']}"
        case "quotation":
            return f'"{text}"'
        case "capital_word_frequency":
            return (
                text.lower()
                + " "
                + draw.choice(["RAIN ", "IT'S ", "A/B ", "*WOW* "]) * told["capital_frequency"]
            )
        case "english_capital":
            return text.upper()
        case "english_lowercase":
            return text.lower()
        case "no_comma":
            return text.replace(",", "")
    raise AssertionError(kind)


PERTURB = [
    lambda text: text,
    lambda text: f"Sure, here is the answer:\n{text}\nI hope that this helps, friend!",
    lambda text: text.replace("*", ""),
    lambda text: text.upper(),
    lambda text: text.lower(),
    lambda text: f'"{text}"',
    lambda text: f"**{text}**",
    lambda text: text.replace(". ", ".\n\n"),
    lambda text: text[: 2 * len(text) // 3],
    lambda text: f"\n\n{text}\n\n",
    lambda text: text + "\n" + text,
    lambda text: "",
]


def answers(row: dict[str, Any], draw: random.Random) -> Iterator[str]:
    told = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
    for perturb in draw.sample(PERTURB, 5):
        text = draw.choice(BASES)
        for kind, arguments in told:
            text = obeying(
                kind, {key: value for key, value in arguments.items() if value is not None}, draw, text
            )
        yield perturb(text)
    yield from draw.sample(BASES, 3)


def prompts() -> list[dict[str, Any]]:
    if named := os.environ.get("IFEVAL_ROWS"):
        return [json.loads(line) for line in Path(named).read_text().splitlines()]
    text = (resources.files("gendistill_evals") / "tasks" / "ifeval.jsonl").read_text()
    rows = []
    for line in text.splitlines():
        row = json.loads(line)
        told = json.loads(row["gold"])
        kinds = [each.pop("kind") for each in told]
        rows.append({"key": row["id"], "prompt": row["prompt"], "instruction_id_list": kinds, "kwargs": told})
    return rows


def has_punkt() -> bool:
    nltk = pytest.importorskip("nltk")
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def test_checkers_agree_with_those_of_lm_eval(record_property):
    left_out = set() if has_punkt() else NEEDS_PUNKT
    pytest.importorskip("langdetect")
    reference = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    draw = random.Random(0)
    agreed, differing, both_ways, count = Counter(), [], Counter(), 0
    rows = prompts()
    for row in rows * (1 if len(rows) > 200 else 4):
        instructions = [
            Instruction(kind, {key: value for key, value in told.items() if value is not None})
            for kind, told in zip(row["instruction_id_list"], row["kwargs"], strict=True)
        ]
        kept = [number for number, each in enumerate(instructions) if each.kind not in left_out]
        told = reference.InputExample(
            key=0,
            prompt=row["prompt"],
            instruction_id_list=[instructions[number].kind for number in kept],
            kwargs=[row["kwargs"][number] for number in kept],
        )
        for answer in answers(row, draw):
            count += 1
            ours = followed([instructions[number] for number in kept], answer)
            strict = reference.test_instruction_following_strict(told, answer).follow_instruction_list
            loose = reference.test_instruction_following_loose(told, answer).follow_instruction_list
            for place, number in enumerate(kept):
                kind = instructions[number].kind
                mine, theirs = (ours.strict[place], ours.loose[place]), (strict[place], loose[place])
                both_ways[kind, mine[0]] += 1
                agreed[kind, mine == theirs] += 1
                if mine != theirs:
                    differing.append((kind, instructions[number].arguments, mine, theirs, answer))
    shares = {
        kind: agreed[kind, True] / (agreed[kind, True] + agreed[kind, False])
        for kind in sorted(CHECKERS.keys() - left_out)
    }
    record_property("answers", count)
    for kind, share in shares.items():
        record_property(kind, share)
        print(f"{share:7.2%}  {agreed[kind, True] + agreed[kind, False]:5} {both_ways[kind, True]:5}  {kind}")
    for each in differing[: int(os.environ.get("SHOW", "0"))]:
        print(each)
    assert count >= 300
    for kind in CHECKERS.keys() - left_out:
        assert both_ways[kind, True] > 0, f"no answer follows {kind}"
        assert both_ways[kind, False] > 0, f"no answer breaks {kind}"
    assert {kind for kind, share in shares.items() if share < 1} <= NEEDS_PUNKT, differing[:3]
    assert min(shares.values()) >= 0.97


def test_sentences_and_words_in_capitals_are_counted_as_by_punkt(record_property):
    """Other texts than those above: the prompts, whose sentences nobody wrote for a splitter."""
    if not has_punkt():
        pytest.skip("nltk's punkt_tab is not installed; NLTK_DATA names its folder")
    util = pytest.importorskip("lm_eval.tasks.ifeval.instructions_util")
    texts = [row["prompt"] for row in prompts()]
    same = [count_sentences(text) == util.count_sentences(text) for text in texts]
    record_property("same number of sentences", sum(same) / len(same))
    print(f"{sum(same)} of {len(same)} texts have the same number of sentences")
    assert sum(same) / len(same) >= 0.95
    for text in texts:
        capitals = [word for word in util.nltk.word_tokenize(text) if word.isupper()]
        assert count_capital_words(text) == len(capitals), text
        assert count_words(text) == util.count_words(text)
