"""The ``engine:`` section of a recipe: how stages are computed, never what they compute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gendistill.config.base import Affects, Section

# of a device's memory, for the gathered weights of one model
_SMALL_SHARE = 1 / 20


class EngineConfig(Section):
    """How stages are computed. Every setting is a switch for speed or memory; results stay the same up to rounding."""

    parallel: Annotated[Literal["ddp", "fsdp2"], Affects.NOTHING] = Field(
        default="ddp",
        description="several processes: a whole student on each (ddp), or student and teacher sharded (fsdp2)",
    )
    gather: Annotated[Literal["auto", "float32"], Affects.NOTHING] = Field(
        default="auto",
        description="fsdp2: dtype in which the matrices of a layer travel between processes; auto: that of the "
        "arithmetic, which autocast would take them to anyway",
    )
    reshard: Annotated[Literal["auto", "always", "step"], Affects.NOTHING] = Field(
        default="auto",
        description="fsdp2: when weights that are gathered are let go: after every layer (always), or at the end of a "
        "step, with a frozen teacher whole on every process (step), which is faster and takes more memory; auto: step "
        "for each of the two models whose weights take less than a twentieth of the device's memory",
    )
    patience_s: Annotated[float, Affects.NOTHING] = Field(
        default=60.0,
        ge=1.0,
        le=3600.0,
        description="several processes: seconds without a sign of life after which a process counts as lost and the "
        "others end",
    )
    loss: Annotated[Literal["auto", "reference", "triton"], Affects.NOTHING] = Field(
        default="auto", description="of the losses on logits: eager torch, or our kernels where they run"
    )
    prefetch: Annotated[int, Affects.NOTHING] = Field(
        default=2,
        ge=0,
        le=64,
        description="steps that are read, tokenized and packed ahead in a thread; 0: each when it is needed",
    )
    blocks: Annotated[Literal["auto", "family", "fused"], Affects.NOTHING] = Field(
        default="auto",
        description="decoder layers of teacher and student: the family's own modules, or fused ones; "
        "auto: fused on GPU",
    )
    capture: Annotated[Literal["auto", "never", "always"], Affects.NOTHING] = Field(
        default="auto",
        description="forward and backward passes as CUDA graphs, which leave the host little to do; auto: where both "
        "models run fused on a GPU, whole on every process; always: an error where they cannot",
    )

    def may_capture(self, device: str) -> bool:
        """Say whether passes may become CUDA graphs, for which batches and shared gradients are made ready.

        Args:
            device: Kind of it, such as ``cuda``.
        """
        return self.capture != "never" and device == "cuda"

    def keeps_whole(self, num_bytes: float, device_bytes: float) -> bool:
        """Say whether processes that share a model by ``fsdp2`` keep its weights gathered.

        Args:
            num_bytes: Of the gathered weights.
            device_bytes: Memory of one device.
        """
        if self.reshard == "auto":
            return _SMALL_SHARE * device_bytes > num_bytes
        return self.reshard == "step"
