"""Stages on two processes that average held gradients, as beside CUDA graphs: a script for ``test_average.py``."""

import functools
import importlib.util
import json
import sys
from pathlib import Path

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
}


def main(folder):
    """Train alone and together; the codes go to ``codes.json``."""
    choose.DataParallel = functools.partial(DataParallel, overlaps=False)
    codes = {}
    for name, changes in CASES.items():
        codes[f"{name}, one"] = tiny.exit_code(tiny.in_child(folder / name / "one", **changes))
        codes[f"{name}, two"] = tiny.together(folder / name / "two", 2, **changes)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
