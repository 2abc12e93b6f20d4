"""A mixer from outside: everything that gendistill needs to know of one, in one file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gendistill.anatomy.family import Geometry
from gendistill.anatomy.settings import setting
from gendistill.anatomy.spec import Init, Kept, MixerSpec, ParameterSpec, StateSpec
from gendistill.mixers.base import Mixer


@dataclass(frozen=True, slots=True)
class LeakySettings:
    """A leaky average of values, gated by queries."""

    half_life: float = setting(8.0, "tokens at the start", gt=0, le=1e6)
    start: Literal["vo", "random"] = setting("vo", "what starts from attention", conversion_only=True)
    note: bool = setting(False, "of no consequence", affects="nothing")

    def __post_init__(self) -> None:
        if self.start == "random" and self.half_life > 1000:
            raise ValueError("half_life must be at most 1000 with start: random")


class LeakySpec(MixerSpec):
    """A leaky average per value channel."""

    kind = "leaky"
    letter = "L"
    colour = ("#56b4e9", "black")
    about = "a leaky average"
    settings = LeakySettings
    module = "toy_mixer:Leaky"
    recurrent = True

    def parameters(self, geometry: Geometry, settings: LeakySettings) -> dict[str, ParameterSpec]:
        q, kv = geometry.num_heads * geometry.head_dim, geometry.num_kv_heads * geometry.head_dim
        new, moved = Init("normal", (geometry.initializer_range,)), settings.start == "vo"
        rate = 2.0 ** (-1 / settings.half_life)
        return {
            "query.weight": ParameterSpec((q, geometry.hidden_size), new),
            "v_proj.weight": ParameterSpec(
                (kv, geometry.hidden_size), new, "v_proj.weight" if moved else None
            ),
            "rate": ParameterSpec(
                (1, kv),
                Init("constant", (math.log(rate / (1 - rate)),)),
                float32=True,
                decays=False,
            ),
            "o_proj.weight": ParameterSpec(
                (geometry.hidden_size, q), new, "o_proj.weight" if moved else None
            ),
        }

    def state(self, geometry: Geometry, settings: LeakySettings) -> dict[str, StateSpec]:
        return {
            "average": StateSpec((geometry.num_kv_heads * geometry.head_dim,), "float32"),
            "seen": StateSpec((), "int64"),
        }

    def kept(self, geometry: Geometry, settings: LeakySettings, impl: str | None) -> Kept:
        return Kept(2 * geometry.hidden_size, 4 * geometry.num_kv_heads * geometry.head_dim)


LEAKY = LeakySpec()


class LeakyState(NamedTuple):
    average: Tensor
    seen: Tensor
    owned: bool = False


class Leaky(Mixer):
    """``average = rate * average + (1 - rate) * v``; the output is ``q * average``."""

    spec = LEAKY
    state_type = LeakyState

    def build(self, geometry, settings):
        for name, spec in self.table.items():
            owner, _, leaf = name.rpartition(".")
            if owner:
                self.add_module(owner, nn.Linear(spec.shape[1], spec.shape[0], bias=False))
            else:
                self.register_parameter(leaf, nn.Parameter(torch.empty(spec.shape)))

    def forward(self, hidden_states, *, sequences=None, state=None, position_embeddings=None):
        batch, length = hidden_states.shape[:2]
        x = hidden_states if sequences is None else sequences.gather(hidden_states)
        q, v, rate = self.query(x), self.v_proj(x).float(), torch.sigmoid(self.rate[0])
        rows = v.unbind(0) if sequences is None else v[0].split(sequences.segments.lengths)
        outs, lasts = [], []
        for number, row in enumerate(rows):
            average, steps = torch.zeros_like(rate) if state is None else state.average[number], []
            for step in row:
                average = rate * average + (1 - rate) * step
                steps.append(average)
            outs.append(torch.stack(steps) if steps else row)
            lasts.append(average)
        averages = torch.stack(outs) if sequences is None else torch.cat(outs)[None]
        groups = self.num_heads // self.num_kv_heads
        wide = averages.unflatten(-1, (-1, self.head_dim)).repeat_interleave(groups, dim=-2).flatten(-2)
        y = self.o_proj(q * wide.to(q.dtype))
        count = torch.tensor([len(row) for row in rows], device=x.device)
        after = LeakyState(torch.stack(lasts), count if state is None else state.seen + count)
        return y if sequences is None else sequences.scatter(y, batch, length), after

    def diagnostics(self, hidden_states):
        half_life = -1 / torch.log2(torch.sigmoid(self.rate))
        return {"half_life": half_life.expand(*hidden_states.shape[:2], -1)}
