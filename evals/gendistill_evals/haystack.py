"""Words for texts of any length: keys to ask for, and filler that holds none of them. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

# Words of keys; none of them stands in filler.
KEY_ADJECTIVES = (
    "amber", "ancient", "azure", "bashful", "blazing", "bold", "brass", "brave", "bronze", "bumpy", "candid",
    "checkered", "chilly", "clever", "copper", "coral", "cosmic", "crimson", "crooked", "curious", "dapper",
    "daring", "dazzling", "dented", "diligent", "dusty", "eager", "ebony", "elegant", "emerald", "fabled",
    "fearless", "feathered", "fiery", "fluffy", "forgotten", "frosted", "frozen", "gallant", "gentle", "giddy",
    "gilded", "glassy", "gleaming", "glossy", "golden", "graceful", "grand", "hidden", "hollow", "humble",
    "icy", "indigo", "ivory", "jagged", "jolly", "keen", "lavender", "lively", "lonely", "lucky", "lunar",
    "magenta", "marble", "mellow", "merry", "mighty", "misty", "mossy", "muddy", "noble", "nimble", "ornate",
    "painted", "patient", "pearly", "plucky", "polished", "proud", "purple", "quaint", "quirky", "radiant",
    "restless", "rosy", "royal", "rugged", "rusty", "scarlet", "secret", "shiny", "silent", "silver", "sleepy",
    "sly", "solar", "speckled", "spiral", "steady", "stormy", "striped", "sturdy", "sunken", "swift", "tangled",
    "thorny", "timid", "tiny", "turquoise", "vanilla", "velvet", "violet", "wandering", "weary", "witty",
    "woolly", "zesty",
)  # fmt: skip
KEY_NOUNS = (
    "acorn", "anchor", "anvil", "apron", "arrow", "badge", "bagel", "balloon", "banjo", "barrel", "basket",
    "beacon", "beaver", "beetle", "bell", "bicycle", "blanket", "bonnet", "bottle", "bracelet", "bridge",
    "broom", "bucket", "button", "cactus", "camera", "candle", "canoe", "carrot", "castle", "cello", "chariot",
    "chisel", "clarinet", "clock", "cobra", "comet", "compass", "cradle", "crown", "cushion", "dagger",
    "dolphin", "donkey", "dragon", "drum", "easel", "falcon", "feather", "fiddle", "flute", "fountain",
    "galleon", "garland", "goblet", "guitar", "hammer", "harbor", "harp", "hedgehog", "helmet", "igloo",
    "jacket", "jaguar", "jigsaw", "kettle", "kite", "ladder", "lantern", "lemon", "lizard", "locket", "magnet",
    "mandolin", "mallet", "medal", "mirror", "mitten", "monkey", "napkin", "necklace", "needle", "oboe",
    "orchid", "otter", "paddle", "parrot", "pebble", "pelican", "penguin", "piano", "pigeon", "pillow",
    "pirate", "pistol", "plum", "puzzle", "pyramid", "quilt", "rabbit", "raft", "ribbon", "rocket", "saddle",
    "sailor", "scarf", "shovel", "spoon", "statue", "sword", "tambourine", "teapot", "telescope", "thimble",
    "tiger", "torch", "trumpet", "tulip", "tunnel", "turtle", "umbrella", "unicorn", "violin", "wagon",
    "walrus", "whistle", "wizard", "yacht", "zebra", "zipper",
)  # fmt: skip
KEYS = len(KEY_ADJECTIVES) * len(KEY_NOUNS)

_WHO = (
    "farmer", "teacher", "baker", "doctor", "gardener", "miller", "neighbor", "student", "painter", "traveler",
    "shepherd", "carpenter",
)  # fmt: skip
_DID = (
    "walked to", "looked at", "wrote about", "asked about", "waited near", "came back from", "talked about",
    "cleaned",
)  # fmt: skip
_WHAT = (
    "field", "market", "kitchen", "library", "garden", "station", "river", "school", "meadow", "village",
    "orchard", "workshop",
)  # fmt: skip
_WHEN = (
    "in the morning", "after lunch", "before the rain began", "late in the evening", "on most days",
    "during the summer", "at the end of the week", "when the weather was good",
)  # fmt: skip
_LIKE = (
    "quiet", "warm", "busy", "old", "green", "large", "pleasant", "empty", "clean", "wide",
)  # fmt: skip
_MORE = (
    "It was nothing out of the ordinary", "Nobody said much about it", "The others did the same",
    "There was plenty of time for it", "People were used to it", "The day went on as usual",
)  # fmt: skip


def keys(index: int) -> str:
    """Return one of the ``KEYS`` keys, as in "amber acorn"."""
    return f"{KEY_ADJECTIVES[index // len(KEY_NOUNS)]} {KEY_NOUNS[index % len(KEY_NOUNS)]}"


def filler(draw: random.Random) -> Callable[[int], Sequence[str]]:
    """Return what gives the first sentences of one endless text.

    Args:
        draw: Where its seed is drawn from.
    """
    own = random.Random(draw.getrandbits(64))
    made: list[str] = []

    def sentences(count: int) -> Sequence[str]:
        while len(made) < count:
            made.append(_sentence(own))
        return made[:count]

    return sentences


def _sentence(draw: random.Random) -> str:
    form = draw.randrange(5)
    who, did, what, when = (draw.choice(words) for words in (_WHO, _DID, _WHAT, _WHEN))
    if form == 0:
        return f"The {who} {did} the {what} {when}."
    if form == 1:
        return f"{when[0].upper()}{when[1:]}, the {who} {did} the {draw.choice(_LIKE)} {what}."
    if form == 2:
        return f"The {what} near the {draw.choice(_WHAT)} was {draw.choice(_LIKE)} and {draw.choice(_LIKE)}."
    if form == 3:
        return f"{draw.choice(_MORE)}, and the {who} {did} the {what}."
    return f"A {who} and a {draw.choice(_WHO)} {did} the {what} {when}."
