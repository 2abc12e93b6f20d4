"""From how a command was launched to how its stages are shared, and what is refused."""

from __future__ import annotations

import datetime
import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs

from gendistill.config.engine import EngineConfig
from gendistill.errors import TrainingError
from gendistill.training.parallel.base import Parallel
from gendistill.training.parallel.ddp import DataParallel
from gendistill.training.parallel.fsdp2 import FullySharded
from gendistill.training.parallel.single import Single

# A device that hangs while its process lives is noticed only by the collective that it does not finish. What
# processes legitimately wait for longer goes through the store, not through a collective.
_COLLECTIVE_PATIENCE = datetime.timedelta(minutes=30)

_LAUNCH = "accelerate launch --multi_gpu --mixed_precision no --module gendistill ..."
# variable of Accelerate's launcher: what it stands for, why it is not done, what to do instead
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": (
        "DeepSpeed",
        "its engine replaces optimizer, loss scaling and checkpoints, which have to stay the ones that resume bitwise "
        "and on any number of processes",
        "for sharded models set engine.parallel=fsdp2",
    ),
    "ACCELERATE_USE_MEGATRON_LM": (
        "Megatron-LM",
        "it brings models of its own, in which the student's mixers do not exist",
        "for sharded models set engine.parallel=fsdp2",
    ),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism config (tensor, context or sequence parallel)",
        "a stage is shared by rows or by parameters only",
        "leave --use_parallelism_config out; for sharded models set engine.parallel=fsdp2",
    ),
}
_SUPPORTED = (
    *(DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU),
    DistributedType.FSDP,
)


def connect(engine: EngineConfig, *, cpu: bool = False) -> Parallel:
    """Join the other processes of this command, if it was launched on several.

    Args:
        engine: The recipe's ``engine:`` section.
        cpu: Whether to leave GPUs alone.
    Raises:
        TrainingError: As for ``choose_parallel``.
    """
    check_environment()
    handlers: list[Any] = [InitProcessGroupKwargs(timeout=_COLLECTIVE_PATIENCE)]
    return choose_parallel(Accelerator(cpu=cpu, kwargs_handlers=handlers), engine)


def choose_parallel(accelerator: Accelerator, engine: EngineConfig | None = None) -> Parallel:
    """Choose how to train from how the process was launched and what the recipe says.

    One process is one process, whatever the recipe says of several. An FSDP plugin of Accelerate, version 2, means the
    same as ``engine.parallel: fsdp2``; its other settings are ours to make.

    Args:
        accelerator: Without mixed precision and without gradient accumulation.
        engine: The recipe's ``engine:`` section.
    Raises:
        TrainingError: Accelerate is set up in a way that would change losses or gradients.
    """
    engine = engine or EngineConfig()
    check_environment()
    check_accelerator(accelerator)
    if accelerator.num_processes == 1:
        return Single(accelerator.device)
    if engine.parallel == "fsdp2" or _has_plugin():
        return FullySharded(accelerator, engine)
    # hooks cannot look into a graph
    overlaps = not engine.may_capture(accelerator.device.type)
    return DataParallel(accelerator, patience_s=engine.patience_s, overlaps=overlaps)


def check_environment() -> None:
    """Refuse what the launcher has set and this package does not do, before Accelerate acts on it.

    Raises:
        TrainingError: DeepSpeed, Megatron, another way to split a model, or FSDP of version 1 was asked for.
    """
    for variable, (name, why, instead) in _ENGINES.items():
        if _is_set(variable):
            raise TrainingError(
                f"accelerate is set to {name}, which gendistill does not use: {why}",
                where=variable,
                hint=f"{instead}, and launch with: {_LAUNCH}",
            )
    if _has_plugin():
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise TrainingError(
                f"accelerate is set to FSDP version {version}, whose flat parameters hide which tensor is which; "
                "version 2 is supported",
                where="FSDP_VERSION",
                hint="launch with --use_fsdp --fsdp_version 2, or without FSDP and engine.parallel=fsdp2",
            )
        if _is_set("FSDP_OFFLOAD_PARAMS"):
            raise TrainingError(
                "accelerate is set to offload sharded parameters to the CPU, which is not done here",
                where="FSDP_OFFLOAD_PARAMS",
                hint="launch with --fsdp_offload_params false; more processes, a smaller micro_batch_size or "
                "gradient_checkpointing: true take less memory",
            )


def check_accelerator(accelerator: Accelerator) -> None:
    """Refuse launch settings under which the loss or its gradients would silently be others.

    Raises:
        TrainingError: Gradient accumulation, mixed precision, compilation or another engine is set outside the recipe.
    """
    if accelerator.gradient_accumulation_steps != 1:
        raise TrainingError(
            f"accelerate is set to accumulate {accelerator.gradient_accumulation_steps} steps, which would divide "
            "every gradient once more",
            where="ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            hint="unset it; the recipe's batch_size and micro_batch_size say how much is accumulated",
        )
    if accelerator.mixed_precision != "no":
        raise TrainingError(
            f"accelerate is set to mixed precision {accelerator.mixed_precision}; the loop brings its own",
            where="ACCELERATE_MIXED_PRECISION",
            hint="launch with --mixed_precision no: on GPU the stage computes in bfloat16 anyway",
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise TrainingError(
            f"accelerate is set to compile models with {backend}, anew for every length of a document",
            where="ACCELERATE_DYNAMO_BACKEND",
            hint="launch with --dynamo_backend no",
        )
    if accelerator.distributed_type not in _SUPPORTED:
        raise TrainingError(
            f"accelerate is set to {accelerator.distributed_type.value}; supported: one process, or several on CUDA "
            "or CPU, data parallel or FSDP of version 2",
            where="accelerate config",
            hint=f"launch with: {_LAUNCH}",
        )


def _has_plugin() -> bool:
    """Whether Accelerate has an FSDP plugin; it sets the variable itself when it is given one as an object."""
    return _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "on")
