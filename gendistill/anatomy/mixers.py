"""The catalogue of mixers: one line each.

A student that is saved with its code gets a catalogue of its own kinds in the place of this module
(``models/io.py``), so nothing but the two names below may be asked of it.
"""

from __future__ import annotations

import importlib
from typing import Any

from gendistill.anatomy.full import FULL
from gendistill.anatomy.kda import KDA
from gendistill.anatomy.sink import SINK
from gendistill.anatomy.spec import MixerSpec
from gendistill.anatomy.swa import SWA

MIXERS: dict[str, MixerSpec] = {spec.kind: spec for spec in (FULL, SWA, KDA, SINK)}


def mixer_class(kind: str) -> Any:
    """Import the module of a kind that replaces attention."""
    module, _, name = str(MIXERS[kind].module).partition(":")
    return getattr(importlib.import_module(module), name)
