"""Hand tests the modules beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cases():
    """The module ``gpu_cases``."""
    spec = importlib.util.spec_from_file_location("gpu_cases", Path(__file__).with_name("gpu_cases.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
