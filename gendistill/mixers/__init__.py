"""Token mixers as plain modules, usable in any model."""

from gendistill.mixers.attention import FullAttention, SlidingWindowAttention
from gendistill.mixers.base import Mixer, MixerState, SequenceInfo
from gendistill.mixers.kda import KDA
from gendistill.mixers.sink import SinkAttention, SinkState

__all__ = [
    "KDA",
    "FullAttention",
    "Mixer",
    "MixerState",
    "SequenceInfo",
    "SinkAttention",
    "SinkState",
    "SlidingWindowAttention",
]
