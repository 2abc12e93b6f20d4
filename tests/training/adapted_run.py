"""Stages with adapters on one process and on two, in both modes: a script for ``test_adapters.py``."""

import importlib.util
import json
import signal
import sys
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location("parallel_run", Path(__file__).with_name("parallel_run.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)

CHANGES = {
    "train": ["mixer", "norm"],
    "lora": {"rank": 3, "groups": ["attention", "mlp"]},
    "micro_batch_size": 2,
}


def main(folder):
    """Train alone, together, and over again from a checkpoint of the other mode; the codes go to ``codes.json``."""
    tiny = script.tiny
    codes = {"one": tiny.exit_code(tiny.in_child(folder / "one", work=script.train, **CHANGES))}
    for mode, engine in (("ddp", script.DDP), ("fsdp2", script.FSDP2), ("always", script.ALWAYS)):
        codes[mode] = tiny.together(folder / mode, 2, work=script.train, engine=engine, **CHANGES)
    fused = {"work": script.train, "blocks": "fused", **CHANGES}
    codes["ddp_fused"] = tiny.together(folder / "ddp_fused", 2, engine=script.DDP, **fused)
    codes["fsdp2_fused"] = tiny.together(folder / "fsdp2_fused", 2, engine=script.FSDP2, **fused)
    codes["always_fused"] = tiny.together(folder / "always_fused", 2, engine=script.ALWAYS, **fused)
    codes["resumed_always"] = script.resume(
        folder / "resumed_always", folder / "ddp", 4, 2, script.ALWAYS, **CHANGES
    )
    codes["resumed"] = script.resume(folder / "resumed", folder / "ddp", 4, 2, script.FSDP2, **CHANGES)
    ranks = tiny.start(
        folder / "stopped", 2, work=script.train, engine=script.FSDP2, **{**CHANGES, "steps": 100_000}
    )
    while len(tiny.rows(folder / "stopped")) < 2:
        script.time.sleep(0.01)
    for rank in ranks:
        tiny.os.kill(rank, signal.SIGTERM)
    codes["stopped"] = max(tiny.exit_code(rank) for rank in ranks)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
