"""Seeded changes to bytes and to parsed JSON or YAML, from small slips to what an attacker would write."""

from __future__ import annotations

import copy
import json
import struct
from random import Random
from typing import Any

TEXTS = [
    "",
    " ",
    "\n",
    "\0",
    "a\0b",
    "\udcff",
    "a\ud800b",
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\r\x08\x08",
    "\u202egnp.exe",
    "\ufeffbom",
    "[red]x[/red]",
    "[/]",
    "[bold",
    "<script>alert(1)</script>",
    "{{ x }}",
    "{% for",
    "{question.__class__}",
    "%s%n",
    "../..",
    "../../x",
    "~nobody",
    "~nobody-has-this-name/x",
    "/dev/zero",
    "/dev/null",
    "/proc/self/mem",
    "/proc/nothing/x",
    ".",
    "..",
    "/",
    "-",
    "--help",
    "*",
    "**/*",
    "[",
    "a" * 300,
    "x" * 70_000,
    "é→😀" * 100,
    "null",
    "true",
    "no",
    "1e400",
    "0x10",
    "1_000",
    "²",
    "\u0661",
    "NaN",
    "-inf",
    "1" * 5000,
    "2026-01-01",
    "!!python/object:os.system",
    "&a [*a]",
    "auto",
    "main",
    "pypi:",
    "pypi:../x",
    "builtin:",
    "builtin:tiny",
    "hf://x",
    "org/name",
    "a/b/c",
    "name.gguf",
    "name.json",
    "(a+)+$",
    "(?P<",
    "full@0 kda",
    "kda@-1 full",
    "kda " * 3000,
]
NUMBERS: list[Any] = [
    *(
        0,
        1,
        -1,
        2,
        3,
        7,
        8,
        64,
        255,
        1000,
        2**31 - 1,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        2**64,
        -(2**63),
        10**18,
        10**40,
    ),
    *(
        0.0,
        -0.0,
        0.5,
        1.5,
        -0.5,
        1e-300,
        1e300,
        -1e300,
        5e-324,
        1e-9,
        float("nan"),
        float("inf"),
        float("-inf"),
    ),
]
EMPTY: list[Any] = [None, True, False, [], {}, "", [[]], [None], {"": None}]


def value(random: Random, depth: int = 0) -> Any:
    """Make any value."""
    kind = random.random()
    if kind < 0.35:
        return random.choice(TEXTS)
    if kind < 0.65:
        return random.choice(NUMBERS)
    if kind < 0.85 or depth > 2:
        return copy.deepcopy(random.choice(EMPTY))
    if kind < 0.87:
        return nested(random.choice([20, 100]), random.random() < 0.5)
    if kind < 0.94:
        return [value(random, depth + 1) for _ in range(random.choice([1, 2, 5]))]
    return {random.choice(TEXTS): value(random, depth + 1) for _ in range(random.choice([1, 2, 5]))}


def nested(depth: int, lists: bool) -> Any:
    """Make lists or objects within each other."""
    found: Any = 1
    for _ in range(depth):
        found = [found] if lists else {"a": found}
    return found


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of everything in parsed JSON, the whole included."""
    found = [path]
    if isinstance(content, dict):
        for key, child in content.items():
            found += places(child, (*path, key))
    elif isinstance(content, list):
        for index, child in enumerate(content[:50]):
            found += places(child, (*path, index))
    return found


def structure(random: Random, content: Any, changes: int = 1) -> Any:
    """Return parsed JSON with some of its parts changed."""
    content = copy.deepcopy(content)
    # small slips pass the first checks and reach the next ones
    kinds = SLIPS if random.random() < 0.4 else KINDS
    for _ in range(changes):
        content = _changed(random, content, random.choice(kinds))
    return content


SLIPS = ["near", "near", "near", "delete", "swap"]
KINDS = ["value", "value", "value", "near", "near", "delete", "double", "rename", "swap", "wrap"]


def _changed(random: Random, content: Any, kind: str) -> Any:
    path = random.choice(places(content)[1:] or [()])
    if not path:
        return value(random)
    holder = content
    for step in path[:-1]:
        holder = holder[step]
    old, key = holder[path[-1]], path[-1]
    if kind == "near":
        holder[key] = near(random, old)
    elif kind == "delete":
        del holder[key]
    elif kind == "double":
        if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(old))
        else:
            holder[f"{key}{random.choice(['2', '_', ' '])}"] = copy.deepcopy(old)
    elif kind == "rename" and isinstance(holder, dict):
        holder[random.choice([*TEXTS, key.upper() if isinstance(key, str) else "x"])] = holder.pop(key)
    elif kind == "swap":
        other = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key], holder[other] = holder[other], holder[key]
    elif kind == "wrap":
        holder[key] = random.choice([[old], {"value": old}, str(old)[:10_000], [old, old]])
    else:
        holder[key] = value(random)
    return content


def near(random: Random, old: Any) -> Any:
    """Return a value of the same type that is a little different."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return random.choice([old + 1, old - 1, 2, 3, -old, old * 2, old * 1000, float(old), str(old), 0])
    if isinstance(old, float):
        return random.choice([-old, old * 10, old / 1e6, int(old) if abs(old) < 1e9 else 0, str(old)])
    if isinstance(old, str):
        at = random.randrange(len(old) + 1)
        word = random.choice([random.choice(TEXTS), random.choice("aA0 .,:/\\\"'[]{}%@\t\n\x00\x7f\u2028é")])
        return random.choice(
            [old[:at] + word + old[at:], old[:at], old[at:], old.upper(), old + old, old[::-1]]
        )
    if isinstance(old, list):
        return random.choice(
            [old[:1], old[1:], old[::-1], old + old, old * 50, dict(enumerate(map(str, old[:9])))]
        )
    if isinstance(old, dict):
        return random.choice([list(old), list(old.values()), {}, dict(list(old.items())[:1])])
    return random.choice(["", 0, [], {}])


def text_of(content: Any, *, newlines: bool = False) -> bytes:
    """Write JSON as bytes; halves of character pairs stay escapes."""
    try:
        return json.dumps(content, indent=1 if newlines else None).encode()
    except (TypeError, ValueError, RecursionError):
        return json.dumps(str(content)[:1000]).encode()


def flipped(random: Random, content: bytes, changes: int = 1) -> bytes:
    """Return bytes with a few flipped, cut out, repeated, put in or put elsewhere."""
    for _ in range(changes):
        at = random.randrange(len(content) + 1)
        until = min(len(content), at + random.choice([1, 1, 2, 8, 50, len(content) // 3 + 1]))
        piece = content[at:until]
        kind = random.randrange(9)
        if kind == 0 and piece:
            content = content[:at] + bytes([piece[0] ^ (1 << random.randrange(8))]) + content[at + 1 :]
        elif kind == 1:
            content = content[:at] + content[until:]
        elif kind == 2:
            content = content[:at] + piece * random.choice([2, 3, 100]) + content[until:]
        elif kind == 3:
            content = content[:at] + random.randbytes(until - at) + content[until:]
        elif kind == 4:
            content = content[:at]
        elif kind == 5:
            word = random.choice(TEXTS).encode("utf-8", "surrogatepass")[:5000]
            content = content[:at] + word + content[at:]
        elif kind == 6:
            goal = random.randrange(len(content) + 1)
            content = content[:goal] + piece + content[goal:]
        elif kind == 7:
            number = random.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1, 255])
            content = content[:at] + struct.pack("<Q", number) + content[at + 8 :]
        else:
            content = (
                random.choice(
                    [
                        b"",
                        b"[" * 3000,
                        b'{"a":' * 3000,
                        b"\n",
                        b"\xff\xfe",
                        b"\xef\xbb\xbf",
                        b"\x1f\x8b",
                        b"PK\x03\x04",
                        b"[",
                    ]
                )
                + content
            )
    return content


def changes(random: Random) -> int:
    """Draw how many changes to make: mostly one."""
    return random.choice([1, 1, 1, 2, 3, 6])
