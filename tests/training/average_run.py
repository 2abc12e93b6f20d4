"""Stages that average held gradients, as beside CUDA graphs: a script for ``test_average.py``."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

from gendistill.training import capture, stage
from gendistill.training.parallel import choose
from gendistill.training.parallel.ddp import DataParallel

_SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

CASES = {
    "end to end": {},
    "layer by layer": {"objective": {"kind": "mixer_output"}, "train": ["mixer"]},
    "two micro-batches each": {"micro_batch_size": 2},
    "fused bfloat16": {"engine": {"blocks": "fused"}, "compute_dtype": "bfloat16"},
    "minutes": {"steps": None, "minutes": 0.05},
}
FSDP2 = {"parallel": "fsdp2", "reshard": "step"}
SAVING = {"save_every_steps": 2, "keep_checkpoints": 9, "heldout_every": 3}


class Eager(capture.CapturedPasses):
    """What captured passes are once capturing has failed."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.given_up = True


def held(folder, **changes):
    """Train as beside CUDA graphs."""
    stage.why_not_captured = lambda *_, fused, apart, **__: None if apart else "split"
    stage.is_fused = lambda model: True
    sys.modules["gendistill.training.step"].CapturedPasses = Eager
    sys.modules["gendistill.training.step"].refreshed = lambda model: model
    choose.DataParallel = functools.partial(DataParallel, overlaps=False)
    tiny.run_stage(folder, **{**SAVING, **changes})


def averaged(folder, **changes):
    """Train on whole models without a wrapper, and without graphs."""
    choose.DataParallel = functools.partial(DataParallel, overlaps=False)
    tiny.run_stage(folder, **{**SAVING, **changes})


def main(folder):
    """Train alone and together; the codes go to ``codes.json``."""
    codes = {}
    for name, changes in CASES.items():
        place, engine = folder / name, changes.get("engine", {})
        codes[f"{name}, one"] = tiny.exit_code(tiny.in_child(place / "one", **{**SAVING, **changes}))
        codes[f"{name}, held"] = tiny.exit_code(tiny.in_child(place / "held", work=held, **changes))
        for kind, work, more in (("ddp", held, {}), ("fsdp2", held, FSDP2), ("averaged", averaged, {})):
            both = {**changes, "engine": {**engine, **more}}
            codes[f"{name}, {kind}"] = tiny.together(place / kind, 2, work=work, **both)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
