"""Disasters of a stage with adapters: a script for ``test_drills.py``, which runs it where it may mount a disk."""

import ctypes
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

STAGE = {
    "train": ["mixer", "norm"],
    "lora": {"rank": 3, "groups": ["attention", "mlp"], "dropout": 0.1},
    "save_every_steps": 2,
    "keep_checkpoints": 3,
}
CHECKPOINTS = Path("stages") / "tiny" / "checkpoints"


def names(folder):
    """Name the checkpoints that are there, whole or not."""
    return sorted(path.name for path in (folder / CHECKPOINTS).iterdir())


def killed_at_the_rename(folder, number):
    """Train in a child that dies right before its checkpoint number ``number`` gets its name."""
    child = os.fork()
    if child:
        return tiny.exit_code(child)
    seen = []

    def die(event, arguments):
        if event == "os.rename" and Path(arguments[1]).name.startswith("step-"):
            seen.append(arguments[1])
            if len(seen) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    tiny.run_stage(folder, **STAGE)
    os._exit(0)


def mount(folder, kilobytes, *, again=False):
    """Put a small disk at a folder, or change its size."""
    size = f"size={kilobytes}k" + (",remount" if again else "")
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(folder)], check=True)


def main(folder, disk):
    """Play every disaster and write down what was left and how it went on."""
    found = {"whole": {"code": tiny.exit_code(tiny.in_child(folder / "whole", **STAGE))}}
    for number in (1, 2):
        name = f"killed_{number}"
        code = killed_at_the_rename(folder / name, number)
        found[name] = {"code": code, "left": names(folder / name)}
        found[name]["resumed"] = tiny.exit_code(tiny.in_child(folder / name, **STAGE))
    if disk:
        first = folder / "whole" / CHECKPOINTS / "step-000002"
        size = sum(path.stat().st_size for path in first.iterdir()) // 1024
        place = folder / "full"
        place.mkdir()
        # room for one checkpoint and a half
        mount(place, size * 3 // 2 + 40)
        code = tiny.exit_code(tiny.in_child(place, **STAGE))
        found["full"] = {"code": code, "left": names(place), "rows": tiny.rows(place)}
        mount(place, 20 * size, again=True)
        found["full"]["resumed"] = tiny.exit_code(tiny.in_child(place, **STAGE))
        found["full"]["rows_resumed"] = tiny.rows(place)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # a child of the test dies with it
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    main(Path(sys.argv[1]), disk=sys.argv[2] == "disk")
