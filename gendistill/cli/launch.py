"""Start the same command again on several processes, through ``accelerate launch``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import NoReturn

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


def launch_command(words: list[str], *, num_processes: int, on_gpu: bool) -> list[str]:
    """Build the ``accelerate launch`` command for a gendistill command.

    Args:
        words: What follows ``gendistill``.
        num_processes: Processes on this machine.
        on_gpu: False adds ``--cpu``.
    """
    kept, skip = [], False
    for word in with_dashes(words):
        if skip or word.startswith(f"{_FLAG}="):
            skip = False
        elif word == _FLAG:
            skip = True
        else:
            kept.append(word)
    # precision and compilation are ours to handle, so a default from the user's own config must not apply
    flags = ["--num_processes", str(num_processes), "--num_machines", "1", "--mixed_precision", "no"]
    flags += ["--dynamo_backend", "no", *([] if on_gpu else ["--cpu"])]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, "--module", "gendistill", *kept]


def launch(num_processes: int) -> NoReturn:
    """Replace this process by the launcher, after printing its command.

    Raises:
        RecipeError: More processes than GPUs.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu and num_processes > torch.cuda.device_count():
        raise RecipeError(
            f"{num_processes} processes were asked for, this machine has {torch.cuda.device_count()} GPUs",
            where=_FLAG,
            hint=f"{_FLAG} {torch.cuda.device_count()}",
        )
    command = launch_command(sys.argv[1:], num_processes=num_processes, on_gpu=on_gpu)
    print(f"launch    {shlex.join(command)}", flush=True)
    os.execv(command[0], command)
