"""Loss curves of a stage under several ways to compute it: ``python tests/training/curve_visit.py FOLDER --json OUT``.

The same steps through ``train_stage`` on one process, once more on one, on two in both modes, and from a checkpoint in
the middle, on one process and in the other mode. Written as rows of a results file: the largest relative difference of
a step's loss from that of the first run. On a machine with one GPU the runs of two are left out; ``--cpu --shape tiny``
tries it in a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from gendistill.bench.pair import make_student, make_teacher
from gendistill.bench.shapes import SHAPES
from gendistill.bench.step import StepBench
from gendistill.bench.step_parts import device_name
from gendistill.config.engine import EngineConfig
from gendistill.config.schema import ScheduleConfig
from gendistill.results.table import ResultRow, write_results_json
from gendistill.teachers.live import LiveTeacher
from gendistill.training.console import TrainingConsole
from gendistill.training.job import StageJob
from gendistill.training.stage import train_stage

ONE, FSDP = {"parallel": "ddp"}, {"parallel": "fsdp2"}
FIRST = "one process"


class Run(NamedTuple):
    """A run: its processes, its engine, the run it goes on from, and its bar."""

    world: int
    engine: dict[str, Any]
    source: str | None = None
    bar: float = 1e-3


RUNS = {
    FIRST: Run(1, ONE),
    "one process again": Run(1, ONE, bar=1e-4),
    "two processes, ddp": Run(2, ONE),
    "two processes, fsdp2": Run(2, FSDP),
    "two processes, fsdp2, gathered for a layer": Run(2, {**FSDP, "reshard": "always"}),
    "resumed on one process": Run(1, ONE, source=FIRST, bar=1e-4),
    "resumed on two processes, fsdp2, from one": Run(2, FSDP, source=FIRST),
    "resumed on one process, from two, fsdp2": Run(1, ONE, source="two processes, fsdp2"),
}


def train(arguments: argparse.Namespace) -> None:
    """Train one run, as a process of the launcher or alone."""
    shape = dataclasses.replace(
        SHAPES[arguments.shape], rows=arguments.rows, micro_batch=arguments.micro_batch
    )
    # sharper logits than those of weights just drawn
    shape = dataclasses.replace(shape, sizes={**shape.sizes, "initializer_range": arguments.spread})
    engine = EngineConfig(**json.loads(arguments.engine))
    bench = StepBench(shape=shape, engines={"run": engine}, cpu=arguments.cpu)
    stage = bench.stage_config().model_copy(
        update={
            "steps": arguments.steps,
            "lr": arguments.lr,
            "log_every_steps": 1,
            "save_every_steps": arguments.steps // 2,
            "keep_checkpoints": 2,
            "schedule": ScheduleConfig(kind="cosine", warmup=0.1),
        }
    )
    teacher = make_teacher(shape, device=bench.device, dtype=bench.teacher_dtype, seed=0)
    student = make_student(teacher, shape)
    heldout = bench.batch(rows=1, seq_len=min(shape.seq_len, 256))
    job = StageJob(
        name="distill", config=stage, folder=arguments.folder, seed=0, heldout=[heldout], engine=engine
    )
    stream = bench.stream(engine)
    console = TrainingConsole(main=bench.parallel.is_main, console=bench.console)
    try:
        train_stage(
            job,
            student=student,
            teacher=LiveTeacher(teacher),
            stream=stream,
            parallel=bench.parallel,
            console=console,
        )
    finally:
        stream.close()
        bench.parallel.close()


def losses(folder: Path) -> list[float]:
    """Read the loss of every step."""
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def compare(arguments: argparse.Namespace, words: list[str]) -> int:
    """Train all runs, one after the other, and compare their losses."""
    rows, curves = [], {}
    gpus = None if arguments.cpu else torch.cuda.device_count()
    runs = {name: run for name, run in RUNS.items() if gpus is None or run.world <= gpus}
    for name in (name for name in RUNS if name not in runs):
        print(f"{name}: left out, this machine has {gpus} GPU", flush=True)
    for name, (world, engine, source, bar) in runs.items():
        folder = arguments.folder / name.replace(" ", "-").replace(",", "")
        if not {FIRST, source} - {name, None} <= curves.keys():
            print(f"{name}: left out, what it is compared with failed", flush=True)
            continue
        if source is not None:
            shutil.copytree(arguments.folder / source.replace(" ", "-").replace(",", ""), folder)
            for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:
                shutil.rmtree(path)
            (folder / "result.json").unlink()
        start = [sys.executable]
        if world > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        run = [__file__, str(folder), *words, "--train", "--engine", json.dumps(engine)]
        done = subprocess.run([*start, *run], env=os.environ, capture_output=True, text=True)
        if done.returncode:
            print(
                f"{name}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}",
                flush=True,
            )
            continue
        found = curves[name] = losses(folder)
        if name == FIRST:
            continue
        exact = curves[FIRST]
        apart = [abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True)]
        worst = max(range(len(apart)), key=apart.__getitem__)
        note = f"at step {worst + 1} of {len(exact)}; the loss falls from {exact[0]:.4g} to {exact[-1]:.4g}"
        print(f"{name}: {apart[worst]:.2e} {note}; mean {sum(apart) / len(apart):.2e}", flush=True)
        rows.append(
            ResultRow(
                name=f"loss curve, {arguments.shape}, {name}: largest relative difference",
                value=apart[worst],
                unit="relative",
                better="lower",
                bar=bar,
                n=len(exact),
                note=note,
            )
        )
    if arguments.json:
        device = device_name(torch.device("cpu" if arguments.cpu else "cuda"))
        command = " ".join(["python", "tests/training/curve_visit.py", "FOLDER", *words]).partition(
            " --json"
        )[0]
        write_results_json(arguments.json, command=command, device=device, rows=rows, commit=arguments.commit)
        arguments.json.with_suffix(".curves").write_text(json.dumps(curves))
    return 0 if len(curves) == len(runs) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=16, help="of a step")
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument(
        "--spread", type=float, default=0.05, help="standard deviation of the teacher's weights"
    )
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--engine", default="{}", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        train(arguments)
        return 0
    words = sys.argv[2:]
    return compare(arguments, words)


if __name__ == "__main__":
    sys.exit(main())
