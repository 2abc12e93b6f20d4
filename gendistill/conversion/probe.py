"""Probe a converted student before any training: does it still predict, and which layers carry the damage?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from gendistill.anatomy.mixers import MIXERS
from gendistill.data.batch import Batch
from gendistill.errors import CheckpointError
from gendistill.models import HybridForCausalLM
from gendistill.teachers.base import Teacher
from gendistill.training.heldout import evaluating, measure_heldout
from gendistill.training.layers import compare_layers, quantiles

_QUANTILES = (5, 25, 50, 75, 95)


def probe_student(student: HybridForCausalLM, teacher: Teacher, batches: Sequence[Batch]) -> dict[str, Any]:
    """Compare a student with its teacher on held-out text.

    Args:
        student: Converted student.
        teacher: Its teacher. Layers are compared when both have the same geometry.
        batches: Held-out text; positions with a label count.
    Returns:
        What ``score_heldout`` returns, with ``by_position`` (the same by range of positions), ``layers`` (cosine and
        relative error of each linear mixer's output, on the teacher's own inputs, against the attention output it
        replaces, over the first 2,048 positions or so), ``half_life`` (quantiles in tokens, at zero input and on the
        text) and ``impl`` (what the mixers ran on).
    """
    measured = measure_heldout(student, teacher, batches)
    result: dict[str, Any] = {**measured.scores, "by_position": measured.by_position}
    sums = compare_layers(student, teacher, batches)
    with torch.no_grad(), evaluating(student):
        zero_input = torch.zeros(1, 1, student.config.hidden_size, dtype=student.dtype, device=student.device)
        at_zero = [_half_lives_of(student.model.layers[layer].self_attn, zero_input) for layer in sums]
    kinds = student.config.mixers or []
    result["layers"] = [
        {
            "layer": layer,
            "kind": kinds[layer],
            "cosine": total.mean_cosine,
            "relative_error": total.relative_error,
        }
        for layer, total in sums.items()
        if total.num_positions
    ]
    real = [values for total in sums.values() for values in total.half_lives]
    zero = [found for found in at_zero if found is not None]
    result["half_life"] = {
        "quantiles": quantiles(zero, _QUANTILES),
        "on_text": quantiles(real, _QUANTILES),
    }
    result["impl"] = _describe_impl(student)
    return result


def _describe_impl(student: HybridForCausalLM) -> str:
    mixers = [student.model.layers[layer].self_attn for layer in student.config.converted_layers]
    return ", ".join(sorted({f"{mixer.kind}={mixer.impl}" for mixer in mixers})) or "no linear layers"


def _half_lives_of(mixer: Any, hidden_states: Tensor) -> Tensor | None:
    found = mixer.diagnostics(hidden_states).get("half_life")
    return None if found is None else found.flatten()


def check_probe(result: dict[str, Any]) -> str | None:
    """Judge an untrained student.

    Returns: A warning if it predicts no better than guessing while the teacher does, else None.
    Raises:
        CheckpointError: A number is not finite.
    """
    student_ce, ln_vocab = result["student_ce"], result["ln_vocab"]
    odd = _not_finite(result)
    if odd and ("teacher_ce" in odd or math.isfinite(student_ce)):
        raise CheckpointError(
            f"not finite on held-out text: {', '.join(odd[:5])}; weights or activations are beyond float32",
            where="teacher",
            hint="generate from the teacher with transformers, and choose a checkpoint that writes text",
        )
    if student_ce < ln_vocab or (math.isfinite(student_ce) and result["teacher_ce"] >= ln_vocab):
        return None
    worst = sorted(result["layers"], key=lambda layer: -_badness(layer["relative_error"]))[:3]
    named = ", ".join(f"{layer['layer']} (cosine {layer['cosine']:.2f})" for layer in worst)
    median = result["half_life"]["quantiles"].get("50")
    parts = [
        f"the converted student has cross-entropy {student_ce:.2f}, guessing has {ln_vocab:.2f} (ln vocab)",
        f"worst layers: {named}" if named else "no linear layers",
    ]
    if median is not None:
        parts.append(f"median half-life {median:.1f} tokens")
    message = "; ".join(parts)
    advice = {
        kind: MIXERS[kind].advice for kind in dict.fromkeys(layer["kind"] for layer in result["layers"])
    }
    ways = [f"change student.mixers.{kind}: {words}" for kind, words in advice.items() if words]
    hint = ", or ".join(["keep more layers full in student.placement", *ways])
    if not math.isfinite(student_ce):
        raise CheckpointError(message, where="student", hint=hint)
    return f"{message}. Training starts from less than nothing: align before distilling, or {hint}"


def _not_finite(result: dict[str, Any]) -> list[str]:
    """Name the numbers of a probe that are infinite or NaN."""
    numbers = {name: result[name] for name in ("teacher_ce", "student_ce", "kl", "top1_agreement")}
    for layer in result["layers"]:
        numbers |= {f"{name} of layer {layer['layer']}": layer[name] for name in ("cosine", "relative_error")}
    for place, values in result["half_life"].items():
        numbers |= {f"half_life {place} {name}": value for name, value in values.items()}
    return [name for name, value in numbers.items() if not math.isfinite(value)]


def _badness(error: float) -> float:
    return error if math.isfinite(error) else math.inf


def render_probe(result: dict[str, Any]) -> Group:
    """Lay out a probe for the terminal: scores, implementation, a table of layers, half-lives."""
    scores = (
        f"untrained student: CE {result['student_ce']:.3f} (teacher {result['teacher_ce']:.3f}, "
        f"guessing {result['ln_vocab']:.2f}), KL {result['kl']:.3f}, top-1 agreement {result['top1_agreement']:.1%}"
    )
    table = Table("layer", "mixer", "cosine to attention", "relative error")
    for layer in result["layers"]:
        cells = str(layer["layer"]), layer["kind"], f"{layer['cosine']:.3f}", f"{layer['relative_error']:.3f}"
        table.add_row(*cells)
    impl = f"impl: {result['impl']}"
    return Group(scores, impl, *([table] if result["layers"] else []), *_half_life_lines(result["half_life"]))


def _half_life_lines(half_life: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"half-lives {label}: {' / '.join(f'{value:.1f}' for value in half_life[key].values())} tokens "
        f"({'/'.join(half_life[key])}%)"
        for key, label in (("quantiles", "at zero input"), ("on_text", "on the text"))
        if half_life[key]
    ]
