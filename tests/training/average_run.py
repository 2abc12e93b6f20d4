"""Stages that average held gradients, as beside CUDA graphs: a script for ``test_average.py``."""

import importlib.util
import json
import os
import sys
from pathlib import Path

from accelerate import Accelerator

from gendistill.config.engine import EngineConfig
from gendistill.training import capture, stage
from gendistill.training.parallel import choose_parallel

_SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

CASES = {
    "two micro-batches each": {},
    "one micro-batch each": {
        "objective": {"kind": "mixer_output"},
        "train": ["mixer"],
        "micro_batch_size": 4,
    },
    "fused bfloat16": {"engine": {"blocks": "fused"}, "compute_dtype": "bfloat16"},
    "adapters": {
        **{"engine": {"blocks": "fused"}, "compute_dtype": "bfloat16", "train": ["mixer", "norm"]},
        "lora": {"rank": 2, "groups": ["attention", "mlp"]},
    },
    "tied": {"tied": True, "train": ["mixer", "embed", "head"]},
    # the rows of the first process alone
    "rewound": {"bad_steps": (3, 4, 5), "save_every_steps": 2},
    # of steps as short as these, lines and scores would take most of the time
    "minutes": {"steps": None, "minutes": 0.03, "log_every_steps": 50, "heldout_every": None},
}
FSDP2 = {"parallel": "fsdp2", "reshard": "step"}
SCORED = {"heldout_every": 3}


class Eager(capture.CapturedPasses):
    """What captured passes are once capturing has failed."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.given_up = True
        if os.environ.get("RANK") == "1":
            self.failed("what only this process has met")


def train(folder, *, tied=False, bad_steps=(), **changes):
    """Train on one process, or in torch's own wrapper."""
    models = tiny.special_models(tied=tied, bad_steps=bad_steps)
    tiny.run_stage(folder, **models, **{**SCORED, **changes})


def held(folder, **changes):
    """Train as beside CUDA graphs."""
    stage.why_not_captured = lambda *_, fused, apart, **__: None if apart else "split"
    stage.is_fused = lambda model: True
    sys.modules["gendistill.training.step"].CapturedPasses = Eager
    sys.modules["gendistill.training.step"].refreshed = lambda model: model
    averaged(folder, **changes)


def averaged(folder, **changes):
    """Train on whole models without a wrapper, and without graphs."""
    EngineConfig.may_capture = lambda *_: True
    engine = EngineConfig(**changes.get("engine", {}))
    parallel = choose_parallel(Accelerator(cpu=True), engine)
    assert parallel.averages == (engine.parallel == "ddp")
    train(folder, parallel=parallel, **changes)


def main(folder, wanted):
    """Train alone and together, every case as often as wanted; the codes go to ``codes.json``."""
    codes = {}
    for name, kinds in wanted.items():
        for kind in kinds:
            place, changes = folder / name / kind, dict(CASES[name])
            if kind.startswith("one"):
                work = held if kind == "one held" else train
                codes[f"{name}, {kind}"] = tiny.exit_code(tiny.in_child(place, work=work, **changes))
                continue
            changes["engine"] = {**changes.get("engine", {}), **(FSDP2 if kind == "fsdp2" else {})}
            work = averaged if kind == "averaged" else held
            codes[f"{name}, {kind}"] = tiny.together(place, 2, work=work, **changes)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
