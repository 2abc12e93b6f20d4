"""Token mixers as plain modules, usable in any model."""

from gendistill.mixers.attention import FullAttention, SlidingWindowAttention
from gendistill.mixers.base import MixerState, SequenceInfo
from gendistill.mixers.kda import KDA

MIXERS = {"full": FullAttention, "swa": SlidingWindowAttention, "kda": KDA}

__all__ = ["KDA", "MIXERS", "FullAttention", "MixerState", "SequenceInfo", "SlidingWindowAttention"]
