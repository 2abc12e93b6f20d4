"""What the catalogue says of a mixer is what its module, its cache, recipes and saved students have."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from gendistill.anatomy.cost import cache_bytes
from gendistill.anatomy.family import FAMILIES, geometry_of, layer_geometry
from gendistill.anatomy.groups import ParamGroup, param_group, undecayed
from gendistill.anatomy.mixers import MIXERS, mixer_class
from gendistill.anatomy.settings import read_settings, rules, to_plain
from gendistill.config.mixers import MixersConfig, mixer_section
from gendistill.models import HybridCache, HybridConfig
from gendistill.testing import tiny_student, tiny_teacher

OURS = [kind for kind, spec in MIXERS.items() if spec.replaces_attention]
WITH_SETTINGS = [kind for kind, spec in MIXERS.items() if spec.settings is not None]


def test_kinds_have_letters_and_colours_of_their_own():
    letters = [spec.letter for spec in MIXERS.values()]
    assert len(set(letters)) == len(letters)
    assert all(len(letter) == 1 and letter.isupper() for letter in letters)
    assert len({spec.colour[0] for spec in MIXERS.values()}) == len(MIXERS)
    assert [spec.kind for spec in MIXERS.values()] == list(MIXERS)


def luminance(colour):
    """Of ``#rrggbb``, as WCAG 2 has it."""
    parts = {"white": "#ffffff", "black": "#000000"}.get(colour, colour)[1:]
    values = [int(parts[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("kind", MIXERS)
def test_letters_can_be_read_on_their_squares(kind):
    low, high = sorted(luminance(colour) for colour in MIXERS[kind].colour)
    assert (high + 0.05) / (low + 0.05) >= 4.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OURS)
def test_a_module_has_the_parameters_of_its_table(kind, family):
    config = tiny_teacher(family, attention_bias=family in ("llama", "qwen3")).config.to_dict()
    geometry, spec = geometry_of(config), MIXERS[kind]
    settings = spec.settings() if spec.settings else None
    with torch.device("meta"):
        module = mixer_class(kind).of(geometry, settings)
    table = spec.parameters(geometry, settings)
    assert {name: tuple(one.shape) for name, one in module.named_parameters()} == {
        name: one.shape for name, one in table.items()
    }
    assert all(name.dtype is torch.float32 for name in module.parameters())
    assert spec.not_used("k_norm.weight", settings)


@pytest.mark.parametrize("impl", ["reference", "triton", None])
@pytest.mark.parametrize("kind", MIXERS)
def test_what_is_kept_grows_with_the_heads(kind, impl):
    spec = MIXERS[kind]
    settings = spec.settings() if spec.settings else None
    small, large = (
        spec.kept(layer_geometry(64, heads, 2, 16), settings, impl).num_bytes(2) for heads in (4, 8)
    )
    assert 0 < small < large


@pytest.mark.parametrize("kind", OURS)
@torch.no_grad()
def test_a_cache_holds_the_state_that_the_spec_lists(kind):
    model = tiny_student("llama", mixers=[kind] * 4, mixer_configs={})
    cache = HybridCache(model.config)
    for start in (0, 7):
        model(torch.randint(3, 97, (2, 7)), past_key_values=cache, use_cache=True)
        expected = cache_bytes(model.config.to_dict(), tokens=start + 7, bytes_per_value=4)
        assert cache.nbytes == 2 * expected


def test_a_stock_transformer_keeps_and_decays_everything():
    config = tiny_teacher().config
    assert undecayed(config.to_dict()) == frozenset()
    name = "model.layers.2.self_attn.q_proj.weight"
    kinds = ["full", "swa", "kda", "sink"]
    groups = [
        param_group(name.replace("2", str(layer)), kinds, tied_head=False) for layer in range(len(kinds))
    ]
    assert groups == [ParamGroup.ATTENTION, ParamGroup.ATTENTION, ParamGroup.MIXER, ParamGroup.MIXER]


@pytest.mark.parametrize("kind", WITH_SETTINGS)
def test_recipes_and_saved_students_read_the_same_settings(kind):
    settings = MIXERS[kind].settings
    section = mixer_section(settings)()
    assert section.settings == settings()
    assert section.model_dump(mode="json") == to_plain(settings())
    assert list(to_plain(settings())) == list(rules(settings))
    assert read_settings(settings, to_plain(settings()), where="x") == settings()
    assert MixersConfig().of(kind) == settings()


WRONG = [
    *[("kda", {name: value}) for name, value in (
        ("conv_size", 17), ("conv_size", -1), ("conv_size", 2.5), ("conv_size", True), ("conv_bias", 1), ("gate", "x"),
        ("gate_lower_bound", 0.0), ("gate_lower_bound", -21.0), ("gate_rank", 0), ("half_life", [4]),
        ("half_life", [8.0, 4.0]), ("half_life", [0.0, 4.0]), ("half_life", "x"), ("decay_init", "g6"), ("taps", 3),
        ("output_gate", None))],
    *[("swa", {name: value}) for name, value in (("window", 0), ("window", 2**31), ("window", "8"), ("sinks", 1))],
    *[("sink", {name: value}) for name, value in (("window", 0), ("sinks", -1), ("sinks", None), ("width", 8))],
]  # fmt: skip


@pytest.mark.parametrize(("kind", "given"), WRONG, ids=str)
def test_what_a_recipe_refuses_a_saved_student_refuses_too(kind, given):
    with pytest.raises(ValidationError):
        MixersConfig.model_validate_json(f"{{{kind!r}: {given!r}}}".replace("'", '"').replace("True", "true")
                                         .replace("None", "null"))  # fmt: skip
    (name,) = given
    with pytest.raises(ValueError, match=name) as caught:
        read_settings(MIXERS[kind].settings, given, where=f"mixer_configs.{kind}")
    assert str(caught.value).startswith(f"mixer_configs.{kind}")
    with pytest.raises(ValueError, match=name):
        HybridConfig(num_hidden_layers=1, mixers=["full"], mixer_configs={kind: given})


def test_a_number_may_be_whole_and_a_range_a_list():
    settings = read_settings(MIXERS["kda"].settings, {"half_life": [2, 8], "gate_lower_bound": -4}, where="x")
    assert (settings.half_life, settings.gate_lower_bound) == ((2, 8), -4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.conv_size = 3
