"""Run the same command on several processes: ``accelerate launch`` on GPUs, ``torchrun`` on a CPU.

``accelerate launch`` starts several CPU processes through MPI only, hence torchrun there. Both run inside this
process, so that the exit code of a failed rank is ours and no launcher's traceback follows its message. A rank whose
launcher has died ends by itself.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from gendistill.cli.arguments import with_dashes
from gendistill.errors import RecipeError, TrainingError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_FLAG = "--num-processes"
_MOST_PROCESSES = 1024
_LAUNCHER = "GENDISTILL_LAUNCHER_PID"
_WATCH_S = 0.5
_SAME_TIME_S = 5
# for a checkpoint at the next log step
_GRACE_S = 20.0


def add_num_processes(parser: argparse.ArgumentParser) -> None:
    """Add ``--num-processes``."""
    parser.add_argument(
        _FLAG, type=_num_processes, default=1, metavar="N", help="train on N processes (one per GPU)"
    )


def _num_processes(text: str) -> int:
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else 0
    if not 1 <= number <= _MOST_PROCESSES:
        shown = text if len(text) <= 40 else f"{text[:40]}..."
        raise argparse.ArgumentTypeError(f"invalid int value: '{shown}'; allowed: 1 to {_MOST_PROCESSES}")
    return number


def is_launched() -> bool:
    """Whether this process is one of several that a launcher started."""
    return "LOCAL_RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1")


def watch_launcher() -> None:
    """End this rank when its launcher dies: SIGTERM first, which saves a checkpoint while a stage trains."""
    launcher = int(os.environ.get(_LAUNCHER) or os.getppid())
    threading.Thread(target=_end_with, args=(launcher,), name="launcher watch", daemon=True).start()


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_WATCH_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


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
        TrainingError: A signal ended a process, which could not say so itself.
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
    os.environ[_LAUNCHER] = str(os.getpid())
    try:
        _on_gpus(flags) if on_gpu else _on_cpu(flags, num_processes)
    except ChildFailedError as error:
        return _exit_code(error.failures)
    except subprocess.CalledProcessError as error:
        return max(1, error.returncode)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _exit_code(failures: Mapping[int, ProcessFailure]) -> int:
    """Return the exit code of the rank that failed first; the others ended because it did."""
    # the launcher kills what does not stop within half a minute; such a rank did not cause the failure
    latest = min(failure.timestamp for failure in failures.values()) + _SAME_TIME_S
    early = [rank for rank, failure in failures.items() if failure.timestamp <= latest]
    rank = min(early, key=lambda rank: (_cause(failures[rank].exitcode), failures[rank].timestamp, rank))
    failure = failures[rank]
    if failure.exitcode > 0:
        return failure.exitcode
    name = failure.signal_name()
    memory = "; the system sends it when memory runs out" if name == "SIGKILL" else ""
    raise TrainingError(
        f"rank {rank} (process {failure.pid}) was ended by {name}{memory}; the other ranks were stopped",
        where=f"rank {rank} of {_FLAG}",
        hint="run the same command again: finished stages are kept, the others resume from their checkpoints",
    )


def _cause(exit_code: int) -> int:
    """Rank how a process ended: by a signal from outside, by itself, or stopped by the launcher."""
    if exit_code == -signal.SIGTERM:
        return 2
    return 0 if exit_code < 0 else 1


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
