"""Hash the weights of a Hugging Face model and what its configuration makes of them."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gendistill_evals.errors import EvalError
from gendistill_evals.task import sha256_of

# Where a model was loaded from decides nothing.
_PLACES = frozenset({"_name_or_path", "name_or_path"})
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash a model's configuration and every byte of its parameters and stored buffers.

    Args:
        model: Any model with its weights in memory.
    Raises:
        EvalError: A weight is NaN or infinite; names its tensor.
    """
    digest = hashlib.sha256(sha256_of(_without_places(model.config.to_dict())).encode())
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        # Tied weights stand here once per name.
        if not isinstance(tensor, Tensor) or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        values = tensor.detach()
        _check_finite(name, values)
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_finite(name: str, values: Tensor) -> None:
    if values.dtype not in _FLOATS or bool(torch.isfinite(values).all()):
        return
    raise EvalError(
        f"the model's tensor {name} has {int((~torch.isfinite(values)).sum()):,} weights that are NaN or infinite",
        where=name,
        hint="score another checkpoint: one from before the training went wrong, or load it in float32",
    )


def _without_places(content: Any) -> Any:
    if isinstance(content, dict):
        return {str(key): _without_places(value) for key, value in content.items() if key not in _PLACES}
    if isinstance(content, (list, tuple)):
        return [_without_places(value) for value in content]
    return content if isinstance(content, (str, int, float, bool, type(None))) else str(content)
