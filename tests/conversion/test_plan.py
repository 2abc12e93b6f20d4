"""The plan accounts for every tensor of teacher and student, for every family, and refuses what does not fit."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from gendistill.anatomy.family import FAMILIES
from gendistill.anatomy.placement import Placement
from gendistill.anatomy.spec import Init
from gendistill.checkpoints.resolve import read_tensor_index, resolve_checkpoint
from gendistill.checkpoints.tensors import TensorInfo
from gendistill.config.mixers import MixersConfig
from gendistill.conversion.plan import Origin, check_census, plan_conversion
from gendistill.conversion.render import format_layers, render_plan
from gendistill.errors import CheckpointError, RecipeError
from gendistill.models import HybridConfig, HybridForCausalLM

MIXED = ["kda", "full", "swa", "kda"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("placement", [MIXED, ["sink", "full", "kda", "sink"]], ids="-".join)
def test_plan_names_exactly_the_tensors_of_the_model(save_teacher, plan_for, family, tied, placement):
    """Oracle: the model that transformers builds from the planned config."""
    _, folder = save_teacher(family, tie_word_embeddings=tied, max_shard_size="20KB")
    plan = plan_for(folder, placement)
    model = HybridForCausalLM(HybridConfig.from_dict(plan.student_config))
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if tied:
        del expected["lm_head.weight"]
    assert {step.name: step.shape for step in plan.steps} == expected
    assert plan.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(plan.parameters_by_origin().values()) == plan.num_parameters


@pytest.mark.parametrize("init", ["qkvo", "vo", "random"])
@pytest.mark.parametrize("qk_norm", ["fold", "drop"])
def test_every_teacher_tensor_is_used_or_dropped_with_its_reason(save_teacher, plan_for, init, qk_norm):
    _, folder = save_teacher("qwen3", attention_bias=True)
    plan = plan_for(folder, MIXED, {"kda": {"init": init, "qk_norm": qk_norm}})
    tensors = read_tensor_index(folder)
    used = {source for step in plan.steps for source in step.sources}
    dropped = {item.name: item.reason for item in plan.dropped}
    assert used | set(dropped) == set(tensors)
    assert not used & set(dropped)
    assert all(dropped.values())
    prefix = "model.layers.0.self_attn."
    by_name = {step.name: step for step in plan.steps}
    q_weight = by_name[f"{prefix}q_proj.weight"]
    if init == "qkvo" and qk_norm == "fold":
        assert q_weight.origin is Origin.TRANSFORMED
        assert q_weight.sources == (f"{prefix}q_proj.weight", f"{prefix}q_norm.weight")
        assert by_name[f"{prefix}q_proj.bias"].origin is Origin.TRANSFORMED
        assert not dropped
    elif init == "qkvo":
        assert q_weight.origin is Origin.COPIED
        assert dropped[f"{prefix}q_norm.weight"] == "qk_norm: drop"
    else:
        assert q_weight.init == Init("normal", (0.3,))
        assert "start" in dropped[f"{prefix}q_proj.weight"]
    assert (f"{prefix}v_proj.weight" in dropped) is (init == "random")
    assert by_name["model.layers.1.self_attn.q_norm.weight"].origin is Origin.COPIED


def test_census_catches_every_kind_of_mistake(save_teacher, plan_for):
    _, folder = save_teacher("qwen3")
    plan = plan_for(folder, "kda")
    tensors = read_tensor_index(folder)
    first, *rest = plan.steps
    norm = next(step for step in plan.steps if step.name == "model.norm.weight")
    cases = {
        "neither used nor dropped": (plan, {**tensors, "extra": tensors["model.norm.weight"]}),
        "not in the checkpoint": (plan, {k: v for k, v in tensors.items() if k != "model.norm.weight"}),
        "made twice": (replace(plan, steps=(*plan.steps, norm)), tensors),
        "no single origin": (replace(plan, steps=(replace(first, init=Init("zeros")), *rest)), tensors),
        "its source has": (replace(plan, steps=(replace(first, shape=(1, 1)), *rest)), tensors),
    }
    for message, (wrong, given) in cases.items():
        with pytest.raises(CheckpointError, match=message):
            check_census(wrong, given)
    check_census(plan, tensors)


def test_superfluous_tensors_are_dropped_with_their_reason(save_teacher, plan_for):
    model, folder = save_teacher("llama", tie_word_embeddings=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(state, folder / "model.safetensors")
    dropped = {item.name: item.reason for item in plan_for(folder, "kda full").dropped}
    assert dropped == {
        "lm_head.weight": "tied to the embeddings",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "recomputed from the config",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "up_proj.weight is missing"),
        (lambda t: t.update(surprise=t["model.norm.weight"]), "surprise does not belong to a llama model"),
        (
            lambda t: t.update({"model.norm.weight": replace(t["model.norm.weight"], shape=(7,))}),
            r"shape \[7\], the config says \[32\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": replace(t["model.norm.weight"], dtype="F8_E4M3")}),
            "F8_E4M3; allowed: F32, F16, BF16",
        ),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(save_teacher, change, message):
    _, folder = save_teacher()
    tensors = read_tensor_index(folder)
    change(tensors)
    config = resolve_checkpoint(str(folder)).config
    with pytest.raises(CheckpointError, match=message):
        plan_conversion(config, tensors, Placement.parse("kda", num_layers=4), MixersConfig())


def test_other_families_are_refused_by_name(save_teacher, plan_for):
    _, folder = save_teacher("gemma")
    with pytest.raises(
        CheckpointError, match='"gemma" cannot be converted; supported: llama, mistral, qwen2, qwen3'
    ):
        plan_for(folder, "kda")


def test_student_with_all_its_attention_can_be_converted(save_teacher, plan_for, convert):
    """A fine-tuned teacher is a student that is full everywhere."""
    _, folder = save_teacher("qwen2")
    same = convert(folder, "full", name="same")
    again = plan_for(same, "kda full")
    direct = plan_for(folder, "kda full").student_config
    assert {key: again.student_config[key] for key in direct} == direct
    converted = convert(folder, "kda full", name="hybrid")
    with pytest.raises(CheckpointError, match=r"layers \[0, 2\] are converted already"):
        plan_for(converted, "kda")


def test_config_keeps_the_teacher_and_nothing_of_its_file(save_teacher, plan_for):
    _, folder = save_teacher("qwen3", head_dim=24, eos_token_id=[5, 6])
    config = plan_for(folder, MIXED).student_config
    assert config["model_type"] == "gendistill"
    assert config["architectures"] == ["GendistillForCausalLM"]
    assert config["impl"] == "auto"
    assert config["base_model_type"] == "qwen3"
    assert config["head_dim"] == 24
    assert config["eos_token_id"] == [5, 6]
    assert config["mixers"] == MIXED
    assert config["layer_types"] == [
        "linear_attention",
        "full_attention",
        "sliding_attention",
        "linear_attention",
    ]
    assert set(config["mixer_configs"]) == {"kda", "swa"}
    assert config["sliding_window"] == 512
    for key in (
        "_name_or_path",
        "transformers_version",
        "auto_map",
        "quantization_config",
        "use_sliding_window",
    ):
        assert key not in config
    json.dumps(config, allow_nan=False)


def window_of(plan):
    return plan.student_config["layer_types"], plan.student_config.get("sliding_window")


FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def test_mistral_keeps_its_window_where_attention_stays(save_teacher, plan_for):
    _, folder = save_teacher("mistral", sliding_window=64)
    assert window_of(plan_for(folder, "kda full")) == ([LINEAR, SLIDING] * 2, 64)
    assert window_of(plan_for(folder, "kda")) == ([LINEAR] * 4, None)
    _, without = save_teacher("mistral", name="without")
    assert window_of(plan_for(without, "kda full")) == ([LINEAR, FULL] * 2, None)


def test_qwen_keeps_the_window_of_its_sliding_layers_only(save_teacher, plan_for):
    _, folder = save_teacher("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=3)
    assert window_of(plan_for(folder, ["full", "kda", "full", "full"])) == ([FULL, LINEAR, FULL, SLIDING], 64)
    assert window_of(plan_for(folder, "kda full kda kda")) == ([LINEAR, FULL, LINEAR, LINEAR], None)


def test_a_model_has_one_window(save_teacher, plan_for):
    _, folder = save_teacher("mistral", sliding_window=64)
    with pytest.raises(
        RecipeError, match=r"swa\.window is 512, but the checkpoint has sliding layers of 64"
    ) as caught:
        plan_for(folder, "swa full")
    assert caught.value.where == "student.mixers.swa.window"
    assert window_of(plan_for(folder, "swa full", {"swa": {"window": 64}})) == ([SLIDING] * 4, 64)


def test_placement_of_the_wrong_length_is_refused(save_teacher):
    _, folder = save_teacher()
    config = resolve_checkpoint(str(folder)).config
    with pytest.raises(RecipeError, match="the placement has 3 layers, the checkpoint has 4"):
        plan_conversion(
            config, read_tensor_index(folder), Placement.parse("kda", num_layers=3), MixersConfig()
        )


def test_gates_stay_float32_and_the_rest_follows_the_layer(save_teacher, plan_for):
    _, folder = save_teacher(dtype=torch.bfloat16)
    for step in plan_for(folder, "kda full").steps:
        gate = step.name.endswith(("A_log", "dt_bias"))
        assert step.dtype == ("F32" if gate else "BF16"), step.name


def test_plan_is_json_and_its_tree_shows_exact_counts(save_teacher, plan_for):
    model, folder = save_teacher("qwen3")
    plan = plan_for(folder, MIXED, {"kda": {"qk_norm": "drop"}})
    content = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert len(content["tensors"]) == len(plan.steps)
    assert content["parameters"]["total"] == plan.num_parameters
    assert content["placement"] == MIXED
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(render_plan(plan))
    text = console.export_text()
    assert f"{plan.num_parameters:,} parameters" in text
    assert "layers 0, 3" in text
    assert "half_life_bounded(4, 512, -5)" in text
    assert "q_norm.weight: qk_norm: drop" in text
    assert sum(line.strip("│├└─ ").startswith("kda") for line in text.splitlines()) == 1
    embedding = sum(
        p.numel() for p in (model.lm_head.weight, model.model.embed_tokens.weight, model.model.norm.weight)
    )
    assert f"outside the layers  {embedding:,} parameters" in text


def test_layer_lists_are_short():
    assert format_layers([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert format_layers([]) == ""


def test_tensor_info_knows_its_size(tmp_path):
    assert TensorInfo((2, 3), "BF16", tmp_path).num_elements == 6
