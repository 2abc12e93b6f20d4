"""Predicted cache sizes equal a real cache's."""

import pytest
import torch

from gendistill.anatomy.cost import cache_bytes
from gendistill.models import HybridCache
from gendistill.testing import PLACEMENTS, tiny_student


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize("length", [3, 24])
@torch.no_grad()
def test_predicted_cache_bytes_are_those_of_a_cache(placement, length):
    model = tiny_student("llama", placement)
    cache = HybridCache(model.config)
    model(torch.randint(3, 97, (1, length)), past_key_values=cache, use_cache=True)
    assert cache_bytes(model.config.to_dict(), tokens=length, bytes_per_value=4) == cache.nbytes
