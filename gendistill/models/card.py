"""The README.md of a saved student: what it is made of, how to load it, and what it scored."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from gendistill.anatomy.mixers import MIXERS
from gendistill.errors import CheckpointError
from gendistill.models.configuration import LEAST_TRANSFORMERS
from gendistill.paths import read_file, read_json, write_text

_NAME = "README.md"
_LICENCE_KEYS = ("license", "license_name", "license_link")
# a line near the start of a licence's text, and the hub's name for it
_LICENCES = {
    "apache license": "apache-2.0",
    "mit license": "mit",
    "bsd 3-clause": "bsd-3-clause",
}
_FRONT = re.compile(r"\A---\r?\n(.*?)\r?\n---[^\S\n]*(?:\n|\Z)", re.DOTALL)
_HUB_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def inherit_card(source: Path, folder: Path) -> None:
    """Note in a student's folder what the card has to say of the checkpoint that it is made from.

    Args:
        source: The teacher's folder, or that of a student with a card of its own.
        folder: The new student's.
    """
    front = front_matter(source / _NAME)
    kept = {key: front[key] for key in _LICENCE_KEYS if isinstance(front.get(key), str)}
    if "license" not in kept:
        kept = {"license": _licence_of_text(source)}
    config = _config(source)
    base = front.get("base_model") if config.get("model_type") == "gendistill" else _hub_id(source)
    if isinstance(base, str):
        kept["base_model"] = base
    write_text(folder / _NAME, _front(kept))


def write_card(folder: Path, *, base_model: str | None = None) -> None:
    """Write the model card of a saved student.

    Args:
        folder: Of the student. Its licence, and without ``base_model`` that too, stay what :func:`inherit_card` noted.
        base_model: The teacher's name on the hub.
    """
    config = _config(folder)
    noted = front_matter(folder / _NAME)
    licence = {key: noted[key] for key in _LICENCE_KEYS if isinstance(noted.get(key), str)}
    base = base_model or noted.get("base_model")
    if "license" not in licence:
        licence = {"license": _licence_of_text(folder)}
    front: dict[str, Any] = dict(licence)
    if base:
        front["base_model"] = base
    front["library_name"] = "transformers"
    front["pipeline_tag"] = "text-generation"
    front["tags"] = [
        "gendistill",
        "hybrid",
        *(["linear-attention"] if any(MIXERS[kind].recurrent for kind in config.get("mixers") or ()) else []),
        "distillation",
        str(config["base_model_type"]),
    ]
    write_text(folder / _NAME, _front(front) + _body(config, base, licence["license"]))


@dataclass(frozen=True, slots=True)
class CardScore:
    """What a student scored on one task under one protocol, in percent.

    Attributes:
        task, protocol, metric: What was measured, and how.
        value, low, high: The score and its 95% interval.
        n: Items.
        teacher: What its teacher scored on the same items; None was not measured.
    """

    task: str
    protocol: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    teacher: float | None = None


def add_scores(folder: Path, scores: Sequence[CardScore]) -> None:
    """Write what a student scored into the front matter of its card, in place of what was there.

    Args:
        folder: Of the student, which has a card.
        scores: One per task and protocol; none takes the metadata away.
    Raises:
        CheckpointError: The card's front matter cannot be read.
    Source: The model index of the hub's model cards,
        https://github.com/huggingface/hub-docs/blob/main/modelcard.md
    """
    path = folder / _NAME
    text = read_file(path).decode("utf-8")
    front = front_matter(path)
    if not front and (block := _FRONT.match(text)) and block[1].strip() not in ("", "{}"):
        raise CheckpointError(
            "the metadata at the start of the card cannot be read as YAML, and would be lost",
            where=str(path),
            hint="mend what stands between the two lines of ---, then run the same command again",
        )
    body = _FRONT.sub("", text, count=1)
    front.pop("model-index", None)
    if scores:
        base = front.get("base_model")
        name = base.rpartition("/")[2] if isinstance(base, str) else "gendistill"
        front["model-index"] = [{"name": f"{name}-hybrid", "results": _results(scores)}]
    write_text(path, _front(front) + body)


def _results(scores: Sequence[CardScore]) -> list[dict[str, Any]]:
    """Lay out scores as a model index: an entry per task, a metric per protocol."""
    by_task: dict[str, list[dict[str, Any]]] = {}
    for score in scores:
        arguments: dict[str, Any] = {
            "protocol": score.protocol,
            "n": score.n,
            "interval_95": [round(score.low, 2), round(score.high, 2)],
        }
        if score.teacher is not None:
            arguments["teacher"] = round(score.teacher, 2)
        by_task.setdefault(score.task, []).append(
            {
                "type": score.metric,
                "name": f"{score.metric} by {score.protocol}, %",
                "value": round(score.value, 2),
                "args": arguments,
            }
        )
    return [
        {
            "task": {"type": "text-generation", "name": "Text generation"},
            "dataset": {"type": task, "name": task},
            "metrics": metrics,
        }
        for task, metrics in by_task.items()
    ]


def front_matter(path: Path) -> dict[str, Any]:
    """Read the YAML block at the start of a card; empty if there is none or it cannot be read."""
    try:
        text = read_file(path).decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    match = _FRONT.match(text)
    if match is None:
        return {}
    try:
        found = yaml.safe_load(match[1])
    except (yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _front(content: dict[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}---\n"


def read_object(path: Path, *, hint: str = "copy the file again from where it comes") -> dict[str, Any]:
    """Read a JSON file that must hold an object. Students are loaded where pydantic may not be installed.

    Raises:
        CheckpointError: It holds something else, or is not JSON.
    """
    content = read_json(path, error=CheckpointError, hint=hint)
    if not isinstance(content, dict):
        raise CheckpointError(
            f"the file must hold a JSON object, it holds {type(content).__name__}", where=str(path), hint=hint
        )
    return content


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_object(path) if path.is_file() else {}


def _licence_of_text(folder: Path) -> str:
    for path in sorted(folder.glob("LICENSE*")):
        if not path.is_file():
            continue
        start = path.read_bytes()[:500].decode("utf-8", errors="replace").lower()
        for line, name in _LICENCES.items():
            if line in start:
                return name
    return "other"


def _hub_id(folder: Path) -> str | None:
    """The checkpoint's name on the hub, if its folder is one of the hub's cache."""
    for part in folder.absolute().parts:
        match = _HUB_FOLDER.fullmatch(part)
        if match and _HUB_ID.fullmatch(f"{match[1]}/{match[2]}"):
            return f"{match[1]}/{match[2]}"
    return None


def _placement(mixers: list[str]) -> str:
    """Layers in groups: ``0-2 kda, 3 full``."""
    groups, start = [], 0
    for mixer, members in groupby(mixers):
        end = start + len(list(members)) - 1
        groups.append(f"{start} {mixer}" if start == end else f"{start}-{end} {mixer}")
        start = end + 1
    return ", ".join(groups)


def _made_of(mixers: list[str], origin: str) -> str:
    """Say in one paragraph what mixes the tokens."""
    counts = Counter(kind for kind in mixers if MIXERS[kind].replaces_attention)
    parts = [
        f"{count} of its {len(mixers)} layers mix tokens by {MIXERS[kind].about}"
        for kind, count in counts.items()
    ]
    if not parts:
        parts = ["all its layers keep softmax attention"]
    elif sum(counts.values()) < len(mixers):
        parts.append("the others keep softmax attention")
    text = f"A hybrid language model made from {origin} with gendistill: {', '.join(parts)}."
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _body(config: dict[str, Any], base: str | None, licence: str) -> str:
    mixers = list(config.get("mixers") or [])
    origin = base or f"a checkpoint of the {config['base_model_type']} family"
    name = base.rpartition("/")[2] if base else str(config["base_model_type"]).capitalize()
    return f"""
# {name}, hybrid student

{_made_of(mixers, origin)}

- Base model: {base or "not named"}
- Placement: {_placement(mixers)}
- Needs transformers {LEAST_TRANSFORMERS} or newer
- Licence: {licence}; the base model's LICENSE and NOTICE files, where it has any, lie beside this file and apply

## Load it

With gendistill installed, which brings its kernels and runs no code of this folder:

```python
import gendistill.models
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

Without gendistill, with the code in this folder; read it first:

```python
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
```
"""
