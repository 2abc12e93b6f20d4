"""The end of an answer is that of decoding everything after every token, and so is text while it grows."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import weakref
from collections.abc import Sequence

import pytest
from tokenizers import decoders
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from gendistill.errors import RecipeError
from gendistill.generation import stops
from gendistill.generation.stops import Ending, Text
from gendistill_evals.answering import _decode, _finish
from gendistill_evals.model import Decoding, Generated

STOPS = [
    ("\n",),
    ("\n\n",),
    (" ",),
    ("END",),
    ("日",),
    ("b日", "aa日"),
    ("DEN", "END E"),
    ("a b", "b a"),
    ("aa", "a\na", "aab"),
    ("é",),
    ("日本", "本日"),
    ("a😀", "😀 "),
    ("\n日",),
    ("END\n\na", "ENEND"),
    ("a a",),
    ("<tool>", "l>a"),
    ("d 日",),
    ("\ufffd",),
    ("a\ufffd", "\ufffd\ufffd\ufffd"),
    ("b" * 12, "a" * 9 + "D"),
    ("never in it, and so long that all of the answer may have to be decoded",),
]


def plainly(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Sequence[int],
    ends: tuple[int, ...],
    stop: tuple[str, ...],
    limit: int,
) -> tuple[Generated, int]:
    """Answer as ``gendistill_evals`` does, and say how many tokens that took."""
    decoding = Decoding(fields={}, eos_token_ids=ends, pad_token_id=0, overrode={})
    row, stopped_at = [], None
    for token in tokens:
        row.append(token)
        if any(words in _decode(tokenizer, row) for words in stop):
            stopped_at = len(row)
        if token in ends or stopped_at is not None or len(row) == limit:
            break
    return _finish(tokenizer, row, decoding, stop, stopped_at), len(row)


def sequences(
    tokenizer: PreTrainedTokenizerBase, runs: Sequence[list[int]], count: int, *, seed: int
) -> list[list[int]]:
    """Draw tokens and runs of them, from few in most sequences so that stop texts come about; some ids name none."""
    rng = random.Random(seed)
    units = [[token] for token in range(len(tokenizer) + 2)]
    drawn = []
    for _ in range(count):
        some = rng.sample(units, rng.choice([1, 2, 4, len(units)])) + rng.choices(
            runs or units, k=rng.choice([1, 2, 4])
        )
        drawn.append([token for unit in rng.choices(some, k=rng.randrange(1, 40)) for token in unit])
    return drawn


@pytest.mark.parametrize("stop", STOPS, ids=ascii)
def test_answers_end_as_when_all_is_decoded_after_every_token(tokenizer, runs_of, stop):
    ends = (tokenizer.eos_token_id,)
    outcomes = set()
    for tokens in sequences(tokenizer, runs_of(tokenizer), 60, seed=len(stop[0])):
        limit = len(tokens)
        expected, taken = plainly(tokenizer, tokens, ends, stop, limit)
        ending = Ending(tokenizer, end_ids=frozenset(ends), stop=stop, max_new_tokens=limit)
        for count, token in enumerate(tokens, 1):
            over = ending.add(token)
            assert over == (count == taken), f"{tokens} at {count} instead of {taken}"
            if over:
                break
        assert Generated(ending.token_ids, ending.text, ending.ended) == expected
        outcomes.add((expected.ended, taken > 1))
    assert len(outcomes) > 1 or stop[0].startswith("never")


def test_tokens_that_spell_a_stop_text_together_end_the_answer(sums):
    """Every division of a text into tokens, with a special token between any two."""
    words = {sums.decode([token, token])[len(sums.decode([token])) :]: token for token in range(len(sums))}
    parts = [token for text, token in words.items() if text and set(text) <= set("END ")]
    found = 0
    for first in parts:
        for second in parts:
            for third in parts:
                tokens = [first, sums.pad_token_id, second, sums.pad_token_id, third]
                stop = ("END",)
                expected, taken = plainly(sums, tokens, (), stop, len(tokens))
                ending = Ending(sums, end_ids=(), stop=stop, max_new_tokens=len(tokens))
                assert [ending.add(token) for token in tokens[:taken]] == [False] * (taken - 1) + [True]
                assert (ending.text, ending.ended) == (expected.text, expected.ended)
                found += expected.ended
    assert found


def test_bytes_count_for_less_text_than_there_are_of_them(make_tokenizer):
    made = make_tokenizer("sentencepiece")
    tokens = made.convert_tokens_to_ids(["b", "a", "a", "<0xE6>", "<0x97>", "<0xA5>"])
    ending = Ending(made, end_ids=(), stop=("aa日",), max_new_tokens=9)
    assert [ending.add(token) for token in tokens] == [False] * 5 + [True]
    assert ending.text == "b"


def test_without_stop_texts_an_answer_ends_by_end_token_or_limit(tokenizer, runs_of):
    ends = (1, tokenizer.eos_token_id)
    for tokens in sequences(tokenizer, runs_of(tokenizer), 50, seed=3):
        expected, taken = plainly(tokenizer, tokens, ends, (), 20)
        ending = Ending(tokenizer, end_ids=ends, stop=(), max_new_tokens=20)
        overs = [ending.add(token) for token in tokens[:taken]]
        assert overs == [False] * (taken - 1) + [expected.ended or taken == 20]
        assert Generated(ending.token_ids, ending.text, ending.ended) == expected


def test_an_end_token_counts_before_a_stop_text_that_it_spells(tokenizer):
    token = tokenizer.convert_tokens_to_ids("END")
    ending = Ending(tokenizer, end_ids={token}, stop=("END",), max_new_tokens=5)
    assert ending.add(token)
    assert (ending.token_ids, ending.text, ending.ended) == ((), "", True)


def test_a_stop_text_that_is_a_special_token_ends_the_answer(tokenizer):
    """Decoding leaves it out, so that no text would ever hold it."""
    special = tokenizer.eos_token
    a = tokenizer.convert_tokens_to_ids("END")
    ending = Ending(tokenizer, end_ids=(), stop=(special,), max_new_tokens=5)
    assert [ending.add(a), ending.add(tokenizer.eos_token_id)] == [False, True]
    assert (ending.token_ids, ending.ended) == ((a,), True)


def test_only_ends_of_answers_that_could_stop_are_decoded(sums, monkeypatch):
    decoded = []
    decode = stops._Vocabulary.decode
    monkeypatch.setattr(
        stops._Vocabulary, "decode", lambda self, ids: decoded.append(len(ids)) or decode(self, ids)
    )
    token = {text: sums.convert_tokens_to_ids(text) for text in ("a", "b", "D", "END", "EN")}
    assert sums.unk_token_id not in token.values()
    ending = Ending(sums, end_ids=(), stop=("ENDa", "aDEND"), max_new_tokens=10_000)
    for text in token:
        ending.add(token[text])
    decoded.clear()
    for _ in range(300):
        assert not ending.add(token["b"])
        assert not ending.add(token["EN"])
    assert decoded == []
    for _ in range(300):
        assert not ending.add(token["END"])
    assert len(decoded) == 300
    assert max(decoded) <= 6


def test_text_that_is_a_sum_is_told_from_others(sums, other):
    assert stops._vocabulary_of(sums) is not None
    assert stops._vocabulary_of(other) is None


def test_a_decoder_that_strips_ends_makes_no_sum(make_tokenizer):
    made = make_tokenizer("words")
    made.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)])
    assert stops._vocabulary_of(made) is None


def test_a_tokenizer_with_a_way_of_its_own_makes_no_sum(make_tokenizer):
    class Own(PreTrainedTokenizerFast):
        def _decode(self, *args, **kwargs):
            return super()._decode(*args, **kwargs)[::-1]

    made = Own(tokenizer_object=make_tokenizer("bytes").backend_tokenizer)
    ending = Ending(made, end_ids=(), stop=("ba",), max_new_tokens=5)
    a, b = made.convert_tokens_to_ids(["a", "b"])
    assert [ending.add(a), ending.add(b)] == [False, True]


def test_what_is_known_of_a_tokenizer_goes_with_it(make_tokenizer):
    made = make_tokenizer("bytes")
    Ending(made, end_ids=(), stop=("END",), max_new_tokens=3).add(0)
    known = weakref.ref(stops._VOCABULARIES[made])
    del made
    gc.collect()
    assert known() is None


def test_sets_of_stop_texts_are_not_remembered_without_end(make_tokenizer):
    made = make_tokenizer("bytes")
    kept = Ending(made, end_ids=(), stop=("a",), max_new_tokens=3)
    for number in range(300):
        Ending(made, end_ids=(), stop=(f"x{number}",), max_new_tokens=3).add(0)
    assert len(stops._VOCABULARIES[made]._completing) <= 64
    assert kept.add(made.convert_tokens_to_ids("a"))


@pytest.mark.parametrize(("stop", "limit"), [(("a", ""), 5), (("",), 5), ((), 0), (("a",), -1)])
def test_what_can_never_end_or_never_begin_is_refused(make_tokenizer, stop, limit):
    with pytest.raises(RecipeError, match=r"stop text|max_new_tokens"):
        Ending(make_tokenizer("bytes"), end_ids=(), stop=stop, max_new_tokens=limit)


def test_text_handed_out_piece_by_piece_is_the_whole(tokenizer, runs_of):
    for tokens in sequences(tokenizer, runs_of(tokenizer), 400, seed=7):
        text = Text(tokenizer)
        shown = [text.add(token) for token in tokens]
        assert "".join(shown) + text.rest() == _decode(tokenizer, tokens), tokens
        assert text.rest() == ""


def test_text_comes_at_once_where_nothing_can_change_it(sums, runs_of):
    """After every token but one that is a byte, all is out except bytes that are not a character, or not yet."""
    late = 0
    for tokens in sequences(sums, runs_of(sums), 200, seed=8):
        text, shown = Text(sums), ""
        for count, token in enumerate(tokens, 1):
            shown += text.add(token)
            so_far = _decode(sums, tokens[:count])
            name = sums.convert_ids_to_tokens(token) or ""
            # a token without text changes nothing, and ends no run of bytes either
            if name.startswith("<0x") or sums.decode([token, token], skip_special_tokens=True) == "":
                late += shown != so_far.rstrip("\ufffd")
                assert so_far.startswith(shown) or "\ufffd" in so_far
            else:
                assert shown == so_far.rstrip("\ufffd")
    assert bool(late) == ("<0x0A>" in sums.get_vocab())


def test_no_half_of_a_character_is_shown(make_tokenizer, spell):
    made = make_tokenizer("bytes")
    tokens = [
        made.convert_tokens_to_ids(spell(data))
        for data in (b" ", b"\xe6\x97", b"\xa5", b" \xf0\x9f", b"\x98\x80", b"a")
    ]
    text = Text(made)
    assert [text.add(token) for token in tokens] == [" ", "", "日", " ", "😀", "a"]


def test_a_line_end_among_bytes_waits_for_what_comes_next(make_tokenizer):
    """Bytes beside each other are a text only if all of them are, so the next could still undo it."""
    made = make_tokenizer("sentencepiece")
    a, line, broken = made.convert_tokens_to_ids(["a", "<0x0A>", "<0xC3>"])
    text = Text(made)
    assert [text.add(token) for token in (a, line, a, line, broken, a)] == [
        "a",
        "",
        "\na",
        "",
        "",
        "\ufffd\ufffda",
    ]


def test_text_of_other_tokenizers_is_held_back_to_the_end(make_tokenizer):
    made = make_tokenizer("python")
    text = Text(made)
    a, b = made.convert_tokens_to_ids(["a", "b"])
    assert [text.add(token) for token in (a, b, b)] == ["", "", ""]
    assert text.rest() == "bba"


def test_importing_it_imports_no_torch():
    code = "import sys, gendistill.generation.stops; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
