"""Hand tests the modules beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def load(name: str):
    """Import a module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases():
    """The module ``gpu_cases``."""
    return load("gpu_cases")


@pytest.fixture(scope="session")
def divergence_cases():
    """The module ``divergence_cases``."""
    return load("divergence_cases")


@pytest.fixture
def poisoned(cases):
    """Fill every new tensor with NaN, so that a cell that no program writes is seen."""
    with cases.every_new_tensor(cases.poison):
        yield


@pytest.fixture(scope="session")
def machine_code():
    """The module ``machine_code``."""
    module = load("machine_code")
    if not module.TOOL.exists():
        pytest.skip(f"this triton brings no {module.TOOL.name}")
    return module


@pytest.fixture(scope="session")
def config_cases():
    """The module ``config_cases``."""
    return load("config_cases")


@pytest.fixture(scope="session")
def paged_cases():
    """The module ``paged_cases``."""
    return load("paged_cases")


@pytest.fixture(scope="session")
def thin_cases():
    """The module ``thin_cases``."""
    return load("thin_cases")
