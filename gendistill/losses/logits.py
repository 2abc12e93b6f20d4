"""Objectives on next-token distributions: any weighted sum of divergences and cross-entropy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from gendistill.config.objectives import CEConfig, JSDConfig, KLConfig, MixConfig
from gendistill.data.batch import IGNORE, Batch
from gendistill.errors import RecipeError
from gendistill.losses.base import LossTerm
from gendistill.losses.student import StudentLike, last_hidden, output_head
from gendistill.ops.divergence import Divergence, Term, linear_divergence
from gendistill.ops.select import Impl, resolve
from gendistill.teachers.base import Needs, Teacher, TeacherFacts, TeacherSignals, check_vocabulary


class LogitObjective:
    """The distance of next-token distributions over the whole vocabulary, at the positions whose label counts.

    Attributes:
        impl: What computes it.
    """

    impl: Impl = Impl.REFERENCE

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self.needs = Needs(hidden=any(term.kind is not Divergence.CE for term in self.terms))
        seen: Counter[Divergence] = Counter()
        names = []
        for term in self.terms:
            seen[term.kind] += 1
            names.append(term.kind.value if seen[term.kind] == 1 else f"{term.kind.value}_{seen[term.kind]}")
        self.part_names = tuple(names)

    def bind(self, config: Any, teacher: TeacherFacts) -> None:
        """Check that distributions can be compared.

        Raises:
            RecipeError: The vocabularies differ in size.
        """
        check_vocabulary(teacher, config)

    def calibrate(self, teacher: Teacher, batch: Batch) -> None:
        """Do nothing: nats need no scale."""

    def reaches(self, parameter: str) -> bool:
        """Return True: the whole student is run."""
        return True

    def __call__(self, student: StudentLike, signals: TeacherSignals, batch: Batch) -> LossTerm:
        """Run the student and sum the terms in nats."""
        output = linear_divergence(
            last_hidden(student, batch),
            output_head(student),
            batch.labels,
            terms=self.terms,
            teacher_hidden=signals.hidden,
            teacher_weight=signals.head,
            num_labels=batch.num_labels if batch.places is None else None,
            places=batch.places,
            ignore_index=IGNORE,
            impl=self.impl,
        )
        return LossTerm(output.total, output.count, dict(zip(self.part_names, output.parts, strict=True)))


def choose_loss_impl(requested: str, device: torch.device) -> Impl:
    """Resolve a recipe's ``engine.loss``.

    Args:
        requested: ``auto``, ``reference`` or ``triton``.
        device: Where the stage will run.
    Raises:
        RecipeError: The requested implementation cannot run there.
    """
    try:
        return resolve(requested, op="linear_divergence", device=device)
    except ValueError as error:
        raise RecipeError(
            str(error),
            where="engine.loss",
            hint="engine.loss=auto; or gendistill doctor, which says what torch finds here",
        ) from error


def compare_logits(config: KLConfig | JSDConfig | CEConfig) -> LogitObjective:
    """Build the objective of a single term."""
    return LogitObjective([term_of(config)])


def mix_logits(config: MixConfig) -> LogitObjective:
    """Build a weighted sum."""
    return LogitObjective([term_of(term) for term in config.terms])


def term_of(config: KLConfig | JSDConfig | CEConfig) -> Term:
    """Translate one section of a recipe."""
    if isinstance(config, KLConfig):
        kind = Divergence.FORWARD_KL if config.direction == "forward" else Divergence.REVERSE_KL
        return Term(kind, weight=config.weight, temperature=config.temperature)
    if isinstance(config, JSDConfig):
        return Term(Divergence.JSD, weight=config.weight, temperature=config.temperature, beta=config.beta)
    return Term(Divergence.CE, weight=config.weight)
