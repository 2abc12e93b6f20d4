"""Any named tuple of tensors is a state, with or without inputs of a convolution, and tensors may be missing."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gendistill.mixers.base import MixerState
from gendistill.models import HybridCache
from gendistill.models.cache import read_state, write_state
from gendistill.testing import tiny_student


class Memory(NamedTuple):
    """A state with a tensor that a layer may do without."""

    extra: Tensor | None
    total: Tensor
    owned: bool = False


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("extra", [None, torch.arange(6).view(2, 3)])
def test_states_come_back_and_follow_their_rows(stock, extra):
    config = tiny_student(placement="mixed").config
    cache = DynamicCache(config=config) if stock else HybridCache(config)
    assert read_state(cache, 2, Memory) is None
    for step in (1, 2):
        given = Memory(extra, torch.full((2, 4), float(step)))
        write_state(cache, 2, given, 5)
    found = read_state(cache, 2, Memory)
    assert found is not None
    assert found.owned
    assert (found.extra is None) == (extra is None)
    assert extra is None or torch.equal(found.extra, extra)
    assert torch.equal(found.total, given.total)
    cache.layers[2].reorder_cache(torch.tensor([1, 1]))
    found = read_state(cache, 2, Memory)
    assert extra is None or torch.equal(found.extra, extra[[1, 1]])


@pytest.mark.parametrize("stock", [False, True])
def test_which_rows_live_is_not_kept(stock):
    config = tiny_student(placement="mixed").config
    cache = DynamicCache(config=config) if stock else HybridCache(config)
    given = MixerState(torch.randn(2, 6, 3), torch.randn(2, 1, 4, 4), lives=torch.tensor([True, False]))
    write_state(cache, 2, given, 1)
    assert len(cache.layers[2].recurrent_states) == 1
    found = read_state(cache, 2, MixerState)
    assert found is not None
    assert found.lives is None
    assert torch.equal(found.recurrent, given.recurrent)
    assert found.conv is not None
    assert torch.equal(found.conv, given.conv)
