"""Students of every family and placement."""

import pytest
import torch

from gendistill.testing import FAMILIES, PLACEMENTS, tiny_student

CASES = [(family, "mixed") for family in FAMILIES] + [("llama", name) for name in list(PLACEMENTS)[1:]]


@pytest.fixture(params=CASES, ids=lambda pair: "-".join(pair).replace(" ", "_"))
def student(request):
    """A student of each family with a mixed placement, and of each other placement."""
    return tiny_student(*request.param)


@pytest.fixture
def tokens():
    """``[3, 24]`` token ids without specials."""
    return torch.randint(3, 97, (3, 24), generator=torch.Generator().manual_seed(1))
