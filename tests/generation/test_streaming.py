"""What a stream hands out, put together, is the text of the answer, and nothing of it is ever taken back."""

from __future__ import annotations

import random

import pytest

from gendistill.generation.stops import Ending
from gendistill.generation.streaming import Stream

STOPS = [
    (),
    ("\n",),
    ("\n\n",),
    (" ",),
    ("END",),
    ("DEN", "END E"),
    ("aa", "a\na", "aab"),
    ("日本",),
    ("b" * 12,),
]


def sequences(tokenizer, count, *, seed):
    """Draw tokens, from few of them in most sequences so that stop texts and runs of white space come about."""
    rng = random.Random(seed)
    for _ in range(count):
        some = rng.sample(range(len(tokenizer)), rng.choice([2, 3, 5, len(tokenizer)]))
        yield rng.choices(some, k=rng.randrange(1, 40))


def answered(tokenizer, tokens, *, end_ids, stop):
    ending = Ending(tokenizer, end_ids=end_ids, stop=stop, max_new_tokens=len(tokens))
    count = next(count for count, token in enumerate(tokens, 1) if ending.add(token))
    return ending, tokens[:count]


@pytest.mark.parametrize("stop", STOPS, ids=ascii)
def test_all_that_is_handed_out_is_the_text_of_the_answer(tokenizer, stop):
    stopped = 0
    for tokens in sequences(tokenizer, 150, seed=len(stop)):
        end_ids = {tokens[0] + 1}
        ending, read = answered(tokenizer, tokens, end_ids=end_ids, stop=stop)
        stream = Stream(tokenizer, end_ids=end_ids, stop=stop)
        shown = [stream.add(token) for token in read]
        shown.append(stream.rest())
        assert "".join(shown) == ending.text, tokens
        assert stream.rest() == ""
        assert stream.add(read[0]) == ""
        stopped += ending.ended
    assert stopped > 5


def test_raw_text_keeps_the_white_space_around_it(sums):
    for tokens in sequences(sums, 100, seed=3):
        ending, read = answered(sums, tokens, end_ids=(), stop=("END",))
        stream = Stream(sums, stop=("END",), strip=False)
        text = "".join(map(stream.add, read)) + stream.rest()
        assert text.strip() == ending.text
        assert text == sums.decode(read, skip_special_tokens=True).split("END")[0]


def test_text_comes_as_soon_as_nothing_can_change_it(make_tokenizer):
    made = make_tokenizer("bytes")
    stream = Stream(made, stop=("END",))
    names = ["\n", " a", "EN", "EN", "D", "b"]
    ids = [made.convert_tokens_to_ids(name.replace("\n", "Ċ").replace(" ", "Ġ")) for name in names]
    # white space at the beginning goes, and what may become a stop text waits
    assert [stream.add(token) for token in ids] == ["", "a", "", "EN", "", ""]
    assert stream.rest() == ""


def test_an_end_token_is_not_part_of_the_text(make_tokenizer):
    made = make_tokenizer("bytes")
    a, b = made.convert_tokens_to_ids(["a", "b"])
    stream = Stream(made, end_ids={b})
    assert [stream.add(a), stream.add(b), stream.rest()] == ["a", "", ""]
