"""Tokenizers of every kind of decoder, with tokens that end inside characters and words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<pad>"]
SPACE = "\u2581"
# what tokens say: words, parts of words, spaces, line ends, characters of several bytes, stop texts and parts of them
WORDS = [
    "a",
    "b",
    "ab",
    " a",
    " ",
    "  ",
    "\n",
    "\n\n",
    ".\n",
    "END",
    "EN",
    "D",
    " END",
    "é",
    "日本",
    "本",
    "😀",
    " 😀",
    "##b",
]
# parts of characters, and bytes that no text holds
BROKEN = [
    b"\xc3",
    b"\xa9",
    b"\xe6\x97",
    b"\xa5",
    b" \xf0\x9f",
    b"\x98\x80",
    b"\x80\xe6",
    b"\xff",
    b"a\xc3",
    b"\xa9b",
]


def spelled(data: bytes) -> str:
    """Spell bytes as byte-level vocabularies do, in printable characters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte if byte in plain else 256 + others.index(byte)) for byte in data)


def _byte_level() -> Tokenizer:
    tokens = [spelled(word.encode()) for word in WORDS] + [spelled(data) for data in BROKEN] + ["\ufffd"]
    backend = Tokenizer(models.BPE({token: place for place, token in enumerate(dict.fromkeys(tokens))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("d 日", special=False)])
    return backend


def _pieces(decoder: decoders.Decoder | None, *, bytes_too: bool) -> Tokenizer:
    tokens = [word.replace(" ", SPACE) for word in WORDS]
    tokens += (
        [f"<0x{byte:02X}>" for byte in b"\n aEND\xc3\xa9\xe6\x97\xa5\xf0\x9f\x98\x80\xff"]
        if bytes_too
        else []
    )
    backend = Tokenizer(
        models.WordLevel({token: place for place, token in enumerate(dict.fromkeys(tokens))}, "a")
    )
    if decoder is not None:
        backend.decoder = decoder
    backend.add_tokens([AddedToken("<tool>", special=False)])
    return backend


def _sentencepiece(*, strips: int) -> Tokenizer:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(" ", strips, 0)] if strips else []
    return _pieces(decoders.Sequence(steps), bytes_too=True)


class Reversed:
    """A decoder in Python, whose text is not the sum of what tokens add."""

    def decode_chain(self, tokens: list[str]) -> list[str]:
        return tokens[::-1]


# those whose text is the sum of what tokens add, but for its beginning and runs of bytes
SUMS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": _byte_level,
    "sentencepiece": lambda: _sentencepiece(strips=1),
    "sentencepiece that strips nothing": lambda: _sentencepiece(strips=0),
    "sentencepiece that strips every token": lambda: _pieces(
        decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]),
        bytes_too=True,
    ),
    "metaspace": lambda: _pieces(decoders.Metaspace(), bytes_too=False),
    "metaspace that keeps the first": lambda: _pieces(
        decoders.Metaspace(prepend_scheme="never"), bytes_too=False
    ),
    "word pieces": lambda: _pieces(decoders.WordPiece(), bytes_too=False),
    "words": lambda: _pieces(None, bytes_too=False),
}
OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "sentencepiece that strips two": lambda: _sentencepiece(strips=2),
    "joined before bytes": lambda: _pieces(
        decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]), bytes_too=True
    ),
    "suffix": lambda: _pieces(decoders.BPEDecoder(suffix="b"), bytes_too=False),
    "ctc": lambda: _pieces(decoders.CTC(pad_token="b"), bytes_too=False),
    "python": lambda: _pieces(None, bytes_too=False),
}


def _build(kind: str) -> PreTrainedTokenizerFast:
    bos, eos, pad = SPECIAL
    backend = {**SUMS, **OTHERS}[kind]()
    built = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad)
    if kind == "python":
        # set here, because it cannot be copied
        built.backend_tokenizer.decoder = decoders.Decoder.custom(Reversed())
    return built


# characters and line ends by the tokens that they may be made of
RUNS = [
    *([data] for data in BROKEN),
    [b"\xc3", b"\xa9"],
    [b"\xe6\x97", b"\xa5"],
    [b" \xf0\x9f", b"\x98\x80"],
    *(
        [bytes([byte]) for byte in text.encode()]
        for text in ("é", "日", "😀", "\n日", "日\n", "a\n", "END", " a", "日日")
    ),
]


@pytest.fixture(scope="session")
def runs_of() -> Callable[[PreTrainedTokenizerFast], list[list[int]]]:
    """List runs of a tokenizer's tokens that are texts together."""

    def runs_of(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
        known = tokenizer.get_vocab()
        named = [[spelled(data) for data in run] for run in RUNS]
        named += [
            [f"<0x{data[0]:02X}>" for data in run] for run in RUNS if all(len(data) == 1 for data in run)
        ]
        return [[known[name] for name in run] for run in named if all(name in known for name in run)]

    return runs_of


@pytest.fixture(scope="session")
def spell() -> Callable[[bytes], str]:
    """Spell bytes as byte-level vocabularies do."""
    return spelled


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Build a tokenizer by its kind."""
    return _build


@pytest.fixture(scope="session", params=SUMS)
def sums(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Give a tokenizer whose text is the sum of what tokens add."""
    return _build(request.param)


@pytest.fixture(scope="session", params=OTHERS)
def other(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Give a tokenizer whose text is not the sum of what tokens add."""
    return _build(request.param)


@pytest.fixture(scope="session", params=[*SUMS, *OTHERS])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Give a tokenizer of any kind."""
    return _build(request.param)
