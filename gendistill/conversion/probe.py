"""Probe a converted student before any training: does it still predict, and which layers carry the damage?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from gendistill.anatomy.mixers import MIXERS
from gendistill.data.batch import IGNORE, Batch, boundaries
from gendistill.errors import CheckpointError
from gendistill.models import HybridForCausalLM
from gendistill.teachers.base import ModuleIO, Needs, Teacher
from gendistill.training.heldout import score_heldout

_QUANTILES = (5, 25, 50, 75, 95)
_SAMPLES = 65_536  # gate values kept per layer and batch
_LAYER_POSITIONS = 2_048  # enough for two digits of a mean cosine; every mixer runs once more on them


@dataclass(slots=True)
class _LayerSums:
    """How far one mixer's output is from the attention output it replaces."""

    cosine: float = 0.0
    positions: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    half_lives: list[Tensor] = field(default_factory=list)

    def add(self, got: Tensor, wanted: Tensor) -> None:
        """Count outputs ``[N, hidden_size]``."""
        got, wanted = got.float(), wanted.float()
        self.cosine += float(torch.cosine_similarity(got, wanted, dim=-1).sum())
        self.positions += got.shape[0]
        self.squared_error += float((got - wanted).square().sum())
        self.squared_norm += float(wanted.square().sum())


def probe_student(student: HybridForCausalLM, teacher: Teacher, batches: Sequence[Batch]) -> dict[str, Any]:
    """Compare a student with its teacher on held-out text.

    Args:
        student: Converted student.
        teacher: Its teacher. Layers are compared when both have the same geometry.
        batches: Held-out text; positions with a label count.
    Returns:
        What ``score_heldout`` returns, with ``layers`` (cosine and relative error of each linear mixer's output, on
        the teacher's own inputs, against the attention output it replaces, over the first 2,048 positions or so),
        ``half_life`` (quantiles in tokens, at zero input and on the text) and ``impl`` (what the mixers ran on).
    """
    result: dict[str, Any] = dict(score_heldout(student, teacher, batches))
    was_training = student.training
    student.eval()
    try:
        with torch.no_grad():
            sums = _compare_layers(student, teacher, batches)
            zero_input = torch.zeros(
                1, 1, student.config.hidden_size, dtype=student.dtype, device=student.device
            )
            at_zero = [_half_lives_of(student.model.layers[layer].self_attn, zero_input) for layer in sums]
    finally:
        student.train(was_training)
    kinds = student.config.mixers or []
    result["layers"] = [
        {
            "layer": layer,
            "kind": kinds[layer],
            "cosine": total.cosine / max(total.positions, 1),
            "relative_error": math.sqrt(total.squared_error / max(total.squared_norm, 1e-30)),
        }
        for layer, total in sums.items()
        if total.positions
    ]
    real = [values for total in sums.values() for values in total.half_lives]
    zero = [found for found in at_zero if found is not None]
    result["half_life"] = {"quantiles": _quantiles(zero), "on_text": _quantiles(real)}
    result["impl"] = _describe_impl(student)
    return result


def _describe_impl(student: HybridForCausalLM) -> str:
    mixers = [student.model.layers[layer].self_attn for layer in student.config.converted_layers]
    return ", ".join(sorted({f"{mixer.kind}={mixer.impl}" for mixer in mixers})) or "no linear layers"


def _compare_layers(
    student: HybridForCausalLM, teacher: Teacher, batches: Sequence[Batch]
) -> dict[int, _LayerSums]:
    sums = {layer: _LayerSums() for layer in student.config.converted_layers}
    facts, config = teacher.facts, student.config
    if (facts.num_layers, facts.hidden_size) != (config.num_hidden_layers, config.hidden_size):
        return sums
    needs = Needs(mixer_io=tuple(sums))
    seen = 0
    for batch in batches:
        if seen >= _LAYER_POSITIONS:
            break
        batch = batch.to(student.device)
        counts = batch.labels != IGNORE

        def compare(layer: int, io: ModuleIO, batch: Batch = batch, counts: Tensor = counts) -> None:
            # as soon as the mixer's input is known, so that no layer's activations are kept
            mixer = student.model.layers[layer].self_attn
            hidden = io.hidden_states.to(student.device, student.dtype)
            got, _unused = mixer(
                hidden_states=hidden,
                position_embeddings=tuple(part.to(hidden) for part in io.position_embeddings),
                position_ids=batch.position_ids,
                **boundaries(batch),
            )
            sums[layer].add(got[counts], io.output[counts].to(got))
            found = mixer.diagnostics(hidden).get("half_life")
            if found is not None:
                values = found[counts].flatten()
                sums[layer].half_lives.append(values[:: max(1, len(values) // _SAMPLES)].cpu())

        teacher.signals(batch, needs, take=compare)
        seen += batch.num_labels
    return sums


def _half_lives_of(mixer: Any, hidden_states: Tensor) -> Tensor | None:
    found = mixer.diagnostics(hidden_states).get("half_life")
    return None if found is None else found.flatten().cpu()


def _quantiles(values: Sequence[Tensor]) -> dict[str, float]:
    if not values:
        return {}
    merged = torch.cat(list(values)).double()
    merged = merged[:: max(1, len(merged) // 4_000_000)]  # torch.quantile has a limit
    points = torch.quantile(merged, torch.tensor([point / 100 for point in _QUANTILES], dtype=torch.float64))
    return {str(point): float(value) for point, value in zip(_QUANTILES, points, strict=True)}


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
