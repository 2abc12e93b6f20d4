"""Objectives on next-token distributions: any weighted sum of divergences and cross-entropy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from gendistill.config.objectives import CEConfig, JSDConfig, KLConfig
from gendistill.data.batch import IGNORE, Batch, model_inputs
from gendistill.losses.base import LossTerm, Signal, TeacherSignals, check_vocabulary
from gendistill.losses.signals import teacher_signals
from gendistill.ops.divergence import Divergence, Term, linear_divergence


class LogitObjective:
    """Compare next-token distributions over the whole vocabulary, at the positions whose label counts."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        uses_teacher = any(term.kind is not Divergence.CE for term in self.terms)
        self.needs = frozenset({Signal.HIDDEN} if uses_teacher else ())
        seen: Counter[Divergence] = Counter()
        names = []
        for term in self.terms:
            seen[term.kind] += 1
            names.append(term.kind.value if seen[term.kind] == 1 else f"{term.kind.value}_{seen[term.kind]}")
        self.part_names = tuple(names)

    def bind(self, config: Any, teacher_config: Any) -> None:
        """Check that distributions can be compared.

        Raises:
            RecipeError: The vocabularies differ in size.
        """
        check_vocabulary(teacher_config, config)

    def calibrate(self, teacher: nn.Module, batch: Batch) -> None:
        """Do nothing: nats need no scale."""

    def reaches(self, parameter: str) -> bool:
        """Return True: the whole student is run."""
        return True

    def observe(self, teacher: nn.Module, batch: Batch) -> TeacherSignals:
        """Run the teacher up to its last hidden states, unless only the data matters."""
        return teacher_signals(teacher, batch, self.needs)

    def __call__(self, student: Any, signals: TeacherSignals, batch: Batch) -> LossTerm:
        """Run the student and sum the terms in nats."""
        hidden = student.model(**model_inputs(batch)).last_hidden_state
        output = linear_divergence(
            hidden,
            student.lm_head.weight,
            batch.labels,
            terms=self.terms,
            teacher_hidden=signals.hidden,
            teacher_weight=signals.head,
            num_labels=batch.num_labels,
            ignore_index=IGNORE,
        )
        return LossTerm(output.total, output.count, dict(zip(self.part_names, output.parts, strict=True)))


def term_of(config: KLConfig | JSDConfig | CEConfig) -> Term:
    """Translate one section of a recipe."""
    if isinstance(config, KLConfig):
        kind = Divergence.FORWARD_KL if config.direction == "forward" else Divergence.REVERSE_KL
        return Term(kind, weight=config.weight, temperature=config.temperature)
    if isinstance(config, JSDConfig):
        return Term(Divergence.JSD, weight=config.weight, temperature=config.temperature, beta=config.beta)
    return Term(Divergence.CE, weight=config.weight)
