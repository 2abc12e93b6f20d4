"""Stages on 1, 2 and 4 processes in both modes, as a script for ``test_parallel.py``: processes start by forking."""

import importlib.util
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from gendistill.config.engine import EngineConfig
from gendistill.config.objectives import KLConfig
from gendistill.config.schema import StageConfig
from gendistill.losses import build
from gendistill.losses.logits import LogitObjective, term_of
from gendistill.teachers.live import LiveTeacher
from gendistill.training.checkpoint import (
    gather_tensors,
    load_checkpoint,
    save_checkpoint,
    trained_parameters,
)
from gendistill.training.freeze import apply_freeze
from gendistill.training.optim import build_optimizer
from gendistill.training.parallel import choose_parallel, copies
from gendistill.training.step import StepRunner

_SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)


DDP = {"parallel": "ddp"}
# gathered for a step, and for a layer
FSDP2, ALWAYS = ({"parallel": "fsdp2", "reshard": reshard} for reshard in ("step", "always"))
MODES = {
    "ddp_2": (2, DDP),
    "ddp_4": (4, DDP),
    "fsdp2_2": (2, FSDP2),
    "fsdp2_4": (4, FSDP2),
    "always_2": (2, ALWAYS),
    "always_4": (4, ALWAYS),
}
SAVING = {"save_every_steps": 2, "keep_checkpoints": 9, "heldout_every": 3}
# what differs from the plain stage; every one on one process and on two sharded ones of either kind
CASES = {
    "mixer_output": {"objective": {"kind": "mixer_output"}, "train": ["mixer"]},
    "tied": {"tied": True, "train": ["mixer", "embed", "head"]},
    "fused": {"blocks": "fused", "gradient_checkpointing": True},
    "watched": {"job": tiny.watching(every=3)},
    # the rows of the first process alone
    "rewound": {"bad_steps": (3, 4, 5)},
}
MORE_CASES = {
    "bfloat16": {"compute_dtype": "bfloat16"},
    "recomputed": {"train": ["mixer", "mlp", "norm"], "gradient_checkpointing": True},
    "block_output": {"objective": {"kind": "block_output"}, "train": ["mixer", "mlp"]},
    "bfloat16_block": {
        "compute_dtype": "bfloat16",
        "objective": {"kind": "block_output"},
        "train": ["mixer", "mlp"],
    },
    "fused_bfloat16": {"blocks": "fused", "compute_dtype": "bfloat16"},
    "fused_block": {
        "blocks": "fused",
        "objective": {"kind": "block_output"},
        "train": ["mixer", "mlp"],
    },
    "tied_frozen": {"tied": True, "train": ["mixer"]},
}
LONG = {"steps": 100, "save_every_steps": None, "heldout_every": 50}


def train(folder, *, tied=False, blocks="auto", engine=None, bad_steps=(), **changes):
    """Train, and save the student as the main process then has it."""
    engine = {**(engine or {}), "blocks": blocks}
    models = tiny.special_models(tied=tied, bad_steps=bad_steps)
    _, student = tiny.run_stage(folder, engine=engine, **models, **{**SAVING, **changes})
    weights = student.state_dict()
    if not next(iter(weights.values())).is_meta:
        # an ordinary model again, which runs without the other processes
        assert not [module for module in student.modules() if type(module).__name__.startswith("FSDP")]
        assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
        student(torch.arange(10)[None]).logits.sum().backward()
        save_file({name: value.clone().contiguous() for name, value in weights.items()}, folder / "student")


def read_outside(folder, **changes):
    """Train with an objective that reads a weight past its layer."""

    class Outside(LogitObjective):
        def __call__(self, student, signals, batch):
            term = super().__call__(student, signals, batch)
            return term._replace(total=term.total + student.model.layers[0].mlp.up_proj.weight.sum())

    build.OBJECTIVES["kl"] = lambda config: Outside([term_of(config)])
    tiny.run_stage(folder, **changes)


def count_collectives(folder, **changes):
    """Train, and note how often weights were gathered and gradients shared."""
    counts = {"gathered": 0, "shared": 0}

    def counted(name, work):
        def run(*args, **settings):
            counts[name] += 1
            return work(*args, **settings)

        return run

    copies._all_gather = counted("gathered", copies._all_gather)
    copies._reduce_scatter = counted("shared", copies._reduce_scatter)
    train(folder, **changes)
    (folder / "counts.json").write_text(json.dumps(counts))


def copy_checkpoint(folder, *, source, engine, **_):
    """Load a checkpoint and save it again without a step in between."""
    parallel = choose_parallel(Accelerator(cpu=True), EngineConfig(**engine))
    student, stage = tiny.make_student(seed=9), StageConfig(**tiny.STAGE)
    apply_freeze(student, stage)
    objective, teacher = build.build_objective(KLConfig()), LiveTeacher(tiny.make_teacher())
    StepRunner(student, objective, teacher, parallel)
    trained, optimizer = trained_parameters(student), build_optimizer(student, stage)
    state = load_checkpoint(source, trained=trained, optimizer=optimizer, parallel=parallel)
    tensors = gather_tensors(trained, optimizer, parallel)
    parallel.on_main(
        lambda: save_checkpoint(folder, step=state.pop("step"), keep=1, tensors=tensors, state=state)
    )


def resume(folder, source, step, world, engine, **changes):
    """Go on from one checkpoint of another stage."""
    shutil.copytree(source, folder)
    for path in (folder / "stages" / "tiny" / "checkpoints").glob("step-*"):
        if path.name != f"step-{step:06d}":
            shutil.rmtree(path)
    return tiny.together(folder, world, work=train, engine=engine, **changes)


def lose(folder, world, rank, number, **changes):
    """Send a process a signal after the second step; the others' codes, and how long they took."""
    ranks = tiny.start(folder, world, steps=100_000, **SAVING, **changes)
    while len(tiny.rows(folder)) < 3:
        time.sleep(0.01)
    tiny.os.kill(ranks[rank], number)
    began = time.monotonic()
    codes = [tiny.exit_code(child) for other, child in enumerate(ranks) if other != rank]
    seconds = time.monotonic() - began
    if number == signal.SIGSTOP:
        tiny.os.kill(ranks[rank], signal.SIGKILL)
    tiny.exit_code(ranks[rank])
    return {"codes": codes, "seconds": seconds}


def pairs(folder, codes, cases):
    """Train on one process and on two sharded ones."""
    for name, changes in cases.items():
        codes[name] = tiny.exit_code(
            tiny.in_child(folder / f"{name}_one", work=train, micro_batch_size=2, **changes)
        )
        for suffix, engine in (("2", FSDP2), ("always", ALWAYS)):
            codes[f"{name}_{suffix}"] = tiny.together(
                folder / f"{name}_{suffix}", 2, work=train, engine=engine, **changes
            )


def main(folder):
    """Run what every suite asks of several processes."""
    codes, one = {}, folder / "one"
    codes["one"] = tiny.exit_code(tiny.in_child(one, work=train, micro_batch_size=2))
    for name, (world, engine) in MODES.items():
        codes[name] = tiny.together(folder / name, world, work=train, engine=engine)
    pairs(folder, codes, CASES)
    codes["rewound_ddp"] = tiny.together(
        folder / "rewound_ddp", 2, work=train, engine=DDP, **CASES["rewound"]
    )
    # 2 sharded -> 4 whole -> 1
    codes["to_4"] = resume(folder / "to_4", folder / "fsdp2_2", 2, 4, DDP)
    codes["to_always"] = resume(folder / "to_always", folder / "fsdp2_2", 2, 2, ALWAYS)
    codes["to_1"] = resume(folder / "to_1", folder / "to_4", 4, 1, FSDP2)
    source = folder / "fsdp2_4" / "stages" / "tiny" / "checkpoints" / "step-000004"
    for name in ("ddp_2", "fsdp2_2", "always_2"):
        world, engine = MODES[name]
        codes[f"copy_{name}"] = tiny.together(
            folder / "copies" / name, world, work=copy_checkpoint, source=source, engine=engine
        )
    for name, engine in (("minutes", FSDP2), ("minutes_ddp", DDP)):
        codes[name] = tiny.together(folder / name, 2, engine=engine, steps=None, minutes=0.05)
    for rows in (1, 2):
        codes[f"rows_{rows}"] = tiny.together(
            folder / f"rows_{rows}", 2, work=count_collectives, engine=FSDP2, micro_batch_size=rows
        )
    codes["bad"] = tiny.together(folder / "bad", 2, engine=FSDP2, lr=1e30)
    patient = {"patience_s": 2}
    lost = {
        "killed_ddp": lose(folder / "killed_ddp", 4, 1, signal.SIGKILL, engine=DDP),
        "killed_fsdp2": lose(folder / "killed_fsdp2", 2, 0, signal.SIGKILL, engine={**FSDP2, **patient}),
        "killed_always": lose(folder / "killed_always", 2, 1, signal.SIGKILL, engine={**ALWAYS, **patient}),
        "stopped": lose(folder / "stopped", 2, 1, signal.SIGSTOP, engine={**DDP, **patient}),
    }
    (folder / "codes.json").write_text(json.dumps({"codes": codes, "lost": lost}))


def more(folder):
    """Run what takes longer: more objectives, and a hundred steps of each mode."""
    codes = {}
    pairs(folder, codes, MORE_CASES)
    for suffix, engine in (("2", FSDP2), ("always", ALWAYS)):
        codes[f"bfloat16_cast_{suffix}"] = tiny.together(
            folder / f"bfloat16_cast_{suffix}",
            2,
            work=train,
            engine={**engine, "gather": "float32"},
            **MORE_CASES["bfloat16"],
        )
    codes["outside"] = tiny.together(folder / "outside", 2, work=read_outside, engine=ALWAYS)
    codes["outside_2"] = tiny.together(folder / "outside_2", 2, work=read_outside, engine=FSDP2)
    codes["one"] = tiny.exit_code(tiny.in_child(folder / "one", work=train, micro_batch_size=2, **LONG))
    for name, (world, engine) in MODES.items():
        codes[name] = tiny.together(folder / name, world, work=train, engine=engine, **LONG)
    (folder / "codes.json").write_text(json.dumps({"codes": codes}))


if __name__ == "__main__":
    {"main": main, "more": more}[sys.argv[1]](Path(sys.argv[2]))
