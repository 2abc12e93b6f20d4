"""Convert a random checkpoint and print: memory before, peak memory, largest tensor, checkpoint (bytes).

Usage: measure_memory.py FOLDER small|8b
"""

import os
import resource
import sys
from pathlib import Path

from gendistill.anatomy.family import attention_shapes, block_shapes, outer_shapes
from gendistill.anatomy.geometry import read_geometry
from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.resolve import Checkpoint
from gendistill.checkpoints.tensors import NewTensor, read_tensor_index, write_shards
from gendistill.config.mixers import MixersConfig
from gendistill.conversion.execute import apply_plan
from gendistill.conversion.plan import plan_conversion

SIZES = {
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 2000,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
}


def peak():
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    folder, size = Path(sys.argv[1]) / "teacher", sys.argv[2]
    folder.mkdir()
    config = {"model_type": "qwen3", "tie_word_embeddings": False, **SIZES[size]}
    geometry = read_geometry(config)
    shapes = outer_shapes(geometry)
    for layer in range(geometry.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}": shape for name, shape in attention_shapes(geometry).items()}
        shapes |= {prefix + name: shape for name, shape in block_shapes(geometry).items()}
    entries = [NewTensor(name, shape, "BF16") for name, shape in shapes.items()]
    noise = bytes(byte & 0xBF for byte in os.urandom(1 << 20))  # without the bit that makes bfloat16 huge

    def values(tensor):
        for start in range(0, tensor.num_bytes, len(noise)):
            yield noise[: tensor.num_bytes - start]

    total = sum(entry.num_bytes for entry in entries)
    write_shards(folder, entries, values, max_shard_bytes=max(total // 5, 1), on_bytes=lambda _: None)
    checkpoint = Checkpoint("random", folder, "", config)
    placement = Placement.parse("kda kda kda full", num_layers=geometry.num_layers)
    plan = plan_conversion(config, read_tensor_index(folder), placement, MixersConfig())
    before = peak()
    apply_plan(plan, checkpoint, folder.parent / "student", seed=0)
    largest = max(step.num_parameters * 4 for step in plan.steps if step.sources[1:] or step.init)
    print(before, peak(), largest, total)


if __name__ == "__main__":
    main()
