"""Stages with adapters on one process and on two: a script for ``test_adapters.py``."""

import importlib.util
import json
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

CHANGES = {
    "train": ["mixer", "norm"],
    "lora": {"rank": 3, "groups": ["attention", "mlp"]},
    "save_every_steps": 2,
    "keep_checkpoints": 3,
}


def main(folder):
    """Train alone and together; the exit codes go to ``codes.json``."""
    codes = {
        "one": tiny.exit_code(tiny.in_child(folder / "one", **CHANGES)),
        "two": tiny.in_two(folder / "two", **CHANGES),
    }
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
