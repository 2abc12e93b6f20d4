"""The manifest: finished steps by fingerprint, and cache sizes that equal a real cache's."""

import pytest
import torch

from gendistill.manifest import Manifest, cache_bytes, fingerprint
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


def test_a_step_is_done_only_with_the_same_inputs(tmp_path):
    path = tmp_path / "manifest.json"
    mark = fingerprint({"seed": 1}, "teacher")
    Manifest(path).finish("convert", mark)
    assert Manifest(path).is_done("convert", mark)
    assert not Manifest(path).is_done("convert", fingerprint({"seed": 2}, "teacher"))
    again = Manifest(path)
    again.begin("convert")
    assert not Manifest(path).is_done("convert", mark)
