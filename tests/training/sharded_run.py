"""Parameters sharded over two processes by FSDP2, as a ``Parallel`` of its own: a script for ``test_sharded.py``."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_SPEC = importlib.util.spec_from_file_location("tiny_run", Path(__file__).with_name("tiny_run.py"))
assert _SPEC is not None
assert _SPEC.loader is not None
tiny = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny)

WORLD = 2
OBJECTIVES = {
    "kl": {"job": tiny.watching(every=3)},
    "mixer_output": {"objective": {"kind": "mixer_output"}, "train": ["mixer"]},
    "block_output": {"objective": {"kind": "block_output"}, "train": ["mixer", "mlp"]},
}
SAVING = {"micro_batch_size": 2, "save_every_steps": 2, "keep_checkpoints": 3, "heldout_every": 2}


class Sharded:
    """Split every block, and what lies around them, among the processes."""

    def __init__(self, rank):
        self.rank, self.world, self.device = rank, WORLD, torch.device("cpu")
        self.is_main = rank == 0
        self.mesh = init_device_mesh("cpu", (WORLD,))

    def shard(self, module):
        for block in module.student.model.layers:
            fully_shard(block, mesh=self.mesh)
        return fully_shard(module, mesh=self.mesh, reshard_after_forward=False)

    @contextlib.contextmanager
    def accumulating(self, module, *, last):
        module.set_requires_gradient_sync(last)
        yield

    def clip(self, parameters, limit):
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        assert isinstance(norm, DTensor)
        return norm.full_tensor()

    def sum(self, value):
        total = value.clone()
        dist.all_reduce(total)
        return total

    def largest(self, value):
        found = torch.tensor([value])
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def gather(self, tensors):
        for name, value in tensors.items():
            yield name, value.full_tensor() if isinstance(value, DTensor) else value

    def part(self, whole, like):
        assert isinstance(like, DTensor)
        return distribute_tensor(whole, like.device_mesh, like.placements)

    def on_main(self, work):
        outcome = [work() if self.is_main else None]
        dist.broadcast_object_list(outcome)
        return outcome[0]

    def barrier(self):
        dist.barrier()

    def close(self):
        pass


def train(folder, rank, port, changes):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    tiny.run_stage(folder, parallel=Sharded(rank), **SAVING, **changes)
    dist.destroy_process_group()


def run(folder, changes):
    """Train on two processes and return the worse exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                train(folder, rank, port, changes)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return max(tiny.exit_code(child) for child in children)


def main(folder):
    """Train with every objective, and once more from the middle."""
    codes = {}
    for name, changes in OBJECTIVES.items():
        codes[name] = run(folder / name, changes)
    again = folder / "resumed"
    shutil.copytree(folder / "kl", again)
    shutil.rmtree(again / "stages" / "tiny" / "checkpoints" / "step-000006")
    codes["resumed"] = run(again, OBJECTIVES["kl"])
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
