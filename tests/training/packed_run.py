"""Stages with moments in 8 bits on one process and on two: a script for ``test_adamw8bit.py``."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

from gendistill.anatomy import moments


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script, cases = load("parallel_run"), load("test_adamw8bit")
CHANGES = {"optimizer": "adamw8bit", "lr": 1e-2}


def copy(folder, *, source, engine):
    """Load a checkpoint and save it again."""
    stage = {**script.tiny.STAGE, **CHANGES}
    script.tiny.STAGE.update(stage)
    script.copy_checkpoint(folder, source=source, engine=engine)


def main(folder):
    """Train alone and together, and go on alone from what two have saved; the codes go to ``codes.json``."""
    package = ModuleType("bitsandbytes")
    package.functional = cases.fake_functional()
    package.__spec__ = importlib.util.spec_from_loader("bitsandbytes", None)
    sys.modules["bitsandbytes"] = package
    moments._FEWEST = 256
    tiny = script.tiny
    codes = {
        "one": tiny.exit_code(
            tiny.in_child(folder / "one", work=script.train, micro_batch_size=2, **CHANGES)
        ),
        "two": tiny.together(folder / "two", 2, work=script.train, engine=script.DDP, **CHANGES),
        "sharded": tiny.together(folder / "sharded", 2, work=script.train, engine=script.FSDP2, **CHANGES),
    }
    codes["resumed"] = script.resume(folder / "resumed", folder / "two", 4, 2, script.DDP, **CHANGES)
    codes["alone"] = script.resume(folder / "alone", folder / "two", 4, 1, {}, **CHANGES)
    source = folder / "two" / "stages" / "tiny" / "checkpoints" / "step-000004"
    codes["copy"] = tiny.together(
        folder / "copy", 2, work=lambda to, **_: copy(to, source=source, engine=script.DDP)
    )
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
