"""Run the same command on several processes: ``accelerate launch`` on GPUs, ``torchrun`` on a CPU.

``accelerate launch`` starts several CPU processes through MPI only, hence torchrun there. Both run inside this
process, so that the exit code of a failed rank is ours and no launcher's traceback follows its message.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence

from gendistill.cli.arguments import with_dashes
from gendistill.errors import RecipeError

_FLAG = "--num-processes"


def add_num_processes(parser: argparse.ArgumentParser) -> None:
    """Add ``--num-processes``."""
    parser.add_argument(_FLAG, type=int, default=1, metavar="N", help="train on N processes (one per GPU)")


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def say(line: str) -> None:
    """Print a line once, however many processes run the command."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def launcher_flags(words: Sequence[str], *, num_processes: int, on_gpu: bool) -> list[str]:
    """Build what follows ``accelerate launch`` (GPU) or ``torchrun`` (CPU) for a gendistill command.

    Args:
        words: What follows ``gendistill``.
        num_processes: Processes on this machine.
        on_gpu: Which of the two launchers.
    """
    kept, skip = [], False
    for word in with_dashes(words):
        if skip or word.startswith(f"{_FLAG}="):
            skip = False
        elif word == _FLAG:
            skip = True
        else:
            kept.append(word)
    if not on_gpu:
        return ["--standalone", "--nproc_per_node", str(num_processes), "-m", "gendistill", *kept]
    # precision and compilation are ours to handle, so a default from the user's own config must not apply
    flags = ["--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no"]
    return [*flags, "--dynamo_backend", "no", "--module", "gendistill", *kept]


def launch(num_processes: int) -> int:
    """Run this command on several processes, after printing the launcher's command.

    Returns: The exit code of the first process that failed, else 0.
    Raises:
        RecipeError: More processes than GPUs.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    on_gpu = torch.cuda.is_available()
    if on_gpu and num_processes > torch.cuda.device_count():
        raise RecipeError(
            f"{num_processes} processes were asked for, this machine has {torch.cuda.device_count()} GPUs",
            where=_FLAG,
            hint=f"{_FLAG} {torch.cuda.device_count()}",
        )
    flags = launcher_flags(sys.argv[1:], num_processes=num_processes, on_gpu=on_gpu)
    # the failed process has said what is wrong
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        _on_gpus(flags) if on_gpu else _on_cpu(flags, num_processes)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except subprocess.CalledProcessError as error:
        return max(1, error.returncode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _on_gpus(flags: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser

    print(f"launch    accelerate launch {shlex.join(flags)}", flush=True)
    launch_command(launch_command_parser().parse_args(flags))


def _on_cpu(flags: list[str], num_processes: int) -> None:
    from torch.distributed import run

    threads = max(1, len(os.sched_getaffinity(0)) // num_processes) if hasattr(os, "sched_getaffinity") else 1
    chosen = {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    os.environ.update(chosen)
    variables = " ".join(f"{name}={value}" for name, value in chosen.items())
    print(f"launch    {variables} torchrun {shlex.join(flags)}", flush=True)
    run.run(run.parse_args(flags))
