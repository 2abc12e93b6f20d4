"""Write an evaluation of ours in lm-eval's layout, for whatever reads that. Imports no torch and no lm-eval.

``FOLDER/<model>/results_<date>.json`` holds the scores, ``samples_<task>_<date>.jsonl`` a line per item. lm-eval asks a
task in one way; ours are asked in several, so each way is a task of its own there: ranked by likelihood under the
task's name, and under ``<task>_<protocol>`` otherwise. A task that nothing ranks is generated under its own name.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gendistill_evals.formats.lm_eval import NO_FILTER
from gendistill_evals.results import read_results, read_samples, write_json, write_lines

# Protocols that ask alike and only rank otherwise, by the name that lm-eval has for it.
_RANKED = {
    "likelihood_raw": "acc",
    "likelihood_per_char": "acc_norm",
    "likelihood_per_token": "acc_per_token",
}
_BY_METRIC = {"accuracy": "acc", "accuracy_per_char": "acc_norm", "accuracy_per_token": "acc_per_token"}
_LEAD_LIKELIHOOD, _LEAD_GENERATION = "likelihood", "generation"
_WRITTEN = "exact_match"
# How judges that are lm-eval's own filters are called: lm_eval:<task>:<filter>:<mark>.
_THEIR_JUDGE = re.compile(r"lm_eval:.*:([^:]+):[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class _Way:
    """One way in which a task was asked: a task of lm-eval's.

    Attributes:
        name: In lm-eval's files.
        filter: What was done with answers before they were judged.
        metrics: Name of each metric, by the protocol that gives it.
    """

    name: str
    filter: str
    metrics: Mapping[str, str]


def write_lm_eval(folder: Path, out: Path) -> Path:
    """Write the files of an evaluation once more, as lm-eval calls and lays them out.

    Args:
        folder: With ``results.json`` and ``samples.jsonl``.
        out: Where the folder of the model is made.
    Returns: The results file.
    Raises:
        EvalError: The evaluation cannot be read, or the folder cannot be written.
    """
    results, rows = read_results(folder), read_samples(folder)
    now = datetime.now(UTC).replace(tzinfo=None)
    date = now.isoformat().replace(":", "-")
    model = str(results["model"])
    place = out / re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model).strip(".") if model.strip(".") else out / "model"
    settings = results.get("settings", {})
    content: dict[str, Any] = {
        **{name: {} for name in ("results", "group_subtasks", "configs", "versions", "n-shot")},
        **{name: {} for name in ("higher_is_better", "n-samples", "task_hashes")},
        "config": {
            "model": "gendistill",
            "model_args": {"pretrained": model},
            "model_dtype": results.get("dtype"),
            "device": results.get("device"),
            "batch_size": settings.get("batch_size"),
        },
        "date": now.timestamp(),
        "transformers_version": results.get("versions", {}).get("transformers"),
        **_asked(settings),
        "model_source": "gendistill",
        "model_name": model,
        "model_name_sanitized": place.name,
    }
    for entry in results["tasks"]:
        asked = [row for row in rows if row["task"] == entry["task"]]
        for way in _ways(entry):
            samples = [_sample(row, number, way) for number, row in enumerate(asked)]
            _describe(content, entry, way, samples, settings)
            # A task that is called as a path is would be written elsewhere.
            name = re.sub(r"[/\\]", "__", way.name)
            write_lines(place / f"samples_{name}_{date}.jsonl", samples)
    # Last, as lm-eval does not: it says that the others are whole.
    return write_json(place / f"results_{date}.json", content)


def _asked(settings: Mapping[str, Any]) -> dict[str, Any]:
    style = settings.get("style") or {}
    system = style.get("system")
    return {
        "system_instruction": system,
        "system_instruction_sha": _sha256(system) if system else None,
        "fewshot_as_multiturn": bool(style.get("few_shot")),
        # The text of the template is not kept, its hash is.
        "chat_template": None,
        "chat_template_sha": settings.get("chat_template_sha256"),
    }


def _ways(entry: Mapping[str, Any]) -> list[_Way]:
    """List the ways in which a task was asked, those first that lm-eval has too."""
    scored = [name for name, value in entry.items() if isinstance(value, Mapping) and "value" in value]
    ranked = {name: _RANKED[name] for name in scored if name in _RANKED}
    if _LEAD_LIKELIHOOD in scored:
        lead = _BY_METRIC.get(str(entry.get("metric")), "acc")
        # One that was asked for by the metric's own name says the same.
        ranked = {name: metric for name, metric in ranked.items() if metric != lead}
        ranked = {_LEAD_LIKELIHOOD: lead, **ranked}
    task = str(entry["task"])
    ways = [_Way(task, NO_FILTER, ranked)] if ranked else []
    found = _THEIR_JUDGE.fullmatch(str(entry.get("judge")))
    for name in scored:
        if name in ranked or name in _RANKED or name == _LEAD_LIKELIHOOD:
            continue
        alone = not ranked and name == _LEAD_GENERATION
        used = found[1] if found and name.startswith(_LEAD_GENERATION) else NO_FILTER
        metric = "acc" if name.startswith(_LEAD_LIKELIHOOD) else _WRITTEN
        ways.append(_Way(task if alone else f"{task}_{name}", used, {name: metric}))
    return ways


def _sample(row: Mapping[str, Any], number: int, way: _Way) -> dict[str, Any]:
    entries = {name: row[name] for name in way.metrics}
    entry = next(iter(entries.values()))
    prompt = _text(row.get("prompt"))
    doc = {key: row[key] for key in ("id", "group", "subject", "prompt", "options", "gold") if key in row}
    if "scores" in entry:
        options = row.get("options") or [str(place) for place in range(len(entry["scores"]))]
        if len(options) != len(entry["scores"]):
            options = [str(place) for place in range(len(entry["scores"]))]
        arguments = [[prompt, option] for option in options]
        # Whether an option is what greedy decoding gives is not kept.
        answers: list[Any] = [[str(score), "None"] for score in entry["scores"]]
        kept: list[Any] = answers
    else:
        arguments = [[prompt, {"do_sample": False}]]
        answers = [entry.get("text", "")]
        extracted = entry.get("extracted")
        kept = ["[invalid]" if extracted is None else extracted]
    target = str(row.get("gold"))
    return {
        "doc_id": number,
        "doc": doc,
        "target": target,
        "arguments": {
            f"gen_args_{place}": {f"arg_{index}": part for index, part in enumerate(each)}
            for place, each in enumerate(arguments)
        },
        "resps": [[answer] for answer in answers],
        "filtered_resps": kept,
        "filter": way.filter,
        "metrics": list(way.metrics.values()),
        "doc_hash": _sha256(json.dumps(doc, indent=2, ensure_ascii=False)),
        # Of the prompt's tokens, which say more than its text: a chat template is part of them.
        "prompt_hash": entry.get("prompt_sha256") or _sha256(prompt),
        "target_hash": _sha256(target),
        **{way.metrics[name]: float(each["correct"]) for name, each in entries.items()},
    }


def _describe(
    content: dict[str, Any],
    entry: Mapping[str, Any],
    way: _Way,
    samples: Sequence[Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> None:
    """Put a task into every section of the results."""
    name, count, shots = way.name, len(samples), (settings.get("style") or {}).get("few_shot", 0)
    scores: dict[str, Any] = {"name": name, "alias": name, "sample_len": count}
    for metric in way.metrics.values():
        values = [sample[metric] for sample in samples]
        mean = sum(values) / count if count else math.nan
        spread = sum((value - mean) ** 2 for value in values)
        scores[f"{metric},{way.filter}"] = mean
        scores[f"{metric}_stderr,{way.filter}"] = (
            math.sqrt(spread / (count - 1) / count) if count > 1 else "N/A"
        )
    version = f"{str(entry.get('items_sha256'))[:8]}.{str(entry.get('prompt_sha256'))[:8]}"
    ranks = "resps" in samples[0] and len(samples[0]["arguments"]) > 1 if samples else False
    content["results"][name] = scores
    content["group_subtasks"][name] = []
    content["configs"][name] = {
        "task": name,
        "output_type": "multiple_choice" if ranks else "generate_until",
        "num_fewshot": shots,
        "metadata": {"version": version, "judge": entry.get("judge"), "protocols": list(way.metrics)},
    }
    content["versions"][name] = version
    content["n-shot"][name] = shots
    content["higher_is_better"][name] = dict.fromkeys(way.metrics.values(), True)
    # How many there would have been is not kept where a limit left some out.
    content["n-samples"][name] = {"original": None if entry.get("limit") else count, "effective": count}
    hashes = "".join(sample[key] for sample in samples for key in ("doc_hash", "prompt_hash", "target_hash"))
    content["task_hashes"][name] = _sha256(hashes)


def _text(prompt: Any) -> str:
    """Write a prompt as one text; turns by the name of who speaks."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt or ())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
