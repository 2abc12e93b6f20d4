"""What a stage minimises. Discriminated by ``kind``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from gendistill.config.base import OneSectionOf, Section


class ObjectiveConfig(Section):
    """What a stage minimises; every one has ``kind: Literal[...]``, its key in ``OBJECTIVES``."""

    if TYPE_CHECKING:

        @property
        def kind(self) -> str: ...


class KLConfig(ObjectiveConfig):
    """Kullback-Leibler divergence between teacher and student next-token distributions."""

    kind: Literal["kl"] = "kl"
    direction: Literal["forward", "reverse"] = Field(
        default="forward", description="forward: KL(teacher || student)"
    )
    temperature: float = Field(
        default=1.0, ge=1e-3, le=1e3, description="both models' logits are divided by it"
    )
    weight: float = Field(default=1.0, ge=1e-9, le=1e9, description="factor of this term")


class JSDConfig(ObjectiveConfig):
    """Generalised Jensen-Shannon divergence; ``beta`` weighs the teacher in the mixture."""

    kind: Literal["jsd"] = "jsd"
    beta: float = Field(default=0.5, gt=0, lt=1, description="share of the teacher in the mixture")
    temperature: float = Field(
        default=1.0, ge=1e-3, le=1e3, description="both models' logits are divided by it"
    )
    weight: float = Field(default=1.0, ge=1e-9, le=1e9, description="factor of this term")


class CEConfig(ObjectiveConfig):
    """Cross-entropy on the next token of the data; needs no teacher."""

    kind: Literal["ce"] = "ce"
    weight: float = Field(default=1.0, ge=1e-9, le=1e9, description="factor of this term")


LogitTerm = Annotated[KLConfig | JSDConfig | CEConfig, Field(discriminator="kind")]


class MixConfig(ObjectiveConfig):
    """A weighted sum of divergences and cross-entropy, in one pass over the vocabulary."""

    kind: Literal["mix"] = "mix"
    terms: tuple[LogitTerm, ...] = Field(min_length=1, description="sections of kind kl, jsd and ce")


class MixerOutputConfig(ObjectiveConfig):
    """Distance of each linear mixer's output from the attention output it replaces, on the teacher's own inputs."""

    kind: Literal["mixer_output"] = "mixer_output"
    norm: Literal["mse", "l2", "relative"] = Field(
        default="relative",
        description="mse: mean square; l2: token L2 norm; relative: squared error over squared target",
    )


class BlockOutputConfig(ObjectiveConfig):
    """Distance of each converted block's output from the teacher block's, on the teacher's own inputs."""

    kind: Literal["block_output"] = "block_output"
    norm: Literal["mse", "l2", "relative"] = Field(default="relative", description="as for mixer_output")


# what a recipe may ask for; ``losses.build.OBJECTIVES`` says how each is built
OBJECTIVES: dict[str, type[ObjectiveConfig]] = {
    "kl": KLConfig,
    "jsd": JSDConfig,
    "ce": CEConfig,
    "mix": MixConfig,
    "mixer_output": MixerOutputConfig,
    "block_output": BlockOutputConfig,
}
AnyObjective = Annotated[ObjectiveConfig, OneSectionOf(OBJECTIVES)]
