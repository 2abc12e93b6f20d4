"""Groups of parameters: who learns, and what a recipe cannot ask."""

import pytest

from gendistill.anatomy.groups import ParamGroup
from gendistill.config.schema import StageConfig
from gendistill.errors import RecipeError
from gendistill.losses.build import build_objective
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import FAMILIES, tiny_student, tiny_teacher
from gendistill.training.freeze import apply_freeze, param_group_of


def stage(**changes):
    return StageConfig(**{"data": "d", "train": ["mixer"], "steps": 1, "lr": 1e-3, **changes})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_its_group(family):
    student = tiny_student(family)  # layers: kda, full, kda, full
    expected = {
        "model.embed_tokens.weight": ParamGroup.EMBED,
        "lm_head.weight": ParamGroup.HEAD,
        "model.norm.weight": ParamGroup.NORM,
    }
    for name, _ in student.named_parameters():
        _, _, layer, part, *_ = [*name.split("."), "", "", ""]
        if part == "self_attn":
            expected[name] = ParamGroup.MIXER if layer in "02" else ParamGroup.ATTENTION
        elif part == "mlp":
            expected[name] = ParamGroup.MLP
        elif part in ("input_layernorm", "post_attention_layernorm"):
            expected[name] = ParamGroup.NORM
    groups = {name: param_group_of(name, student.config) for name, _ in student.named_parameters()}
    assert groups == expected
    if family == "qwen3":
        assert groups["model.layers.1.self_attn.q_norm.weight"] is ParamGroup.ATTENTION


def test_an_unknown_parameter_is_an_error():
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.router\.weight"):
        param_group_of("model.layers.0.router.weight", tiny_student().config)


def test_report_counts_every_parameter_once():
    student = tiny_student()
    report = apply_freeze(student, stage(train=["mixer", "norm"]))
    assert set(report.trained) == {"mixer", "norm"}
    assert set(report.frozen) == {"attention", "mlp", "embed", "head"}
    total = sum(parameter.numel() for parameter in student.parameters())
    assert sum(report.trained.values()) + sum(report.frozen.values()) == total
    on = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert list(report.names) == on
    assert "frozen: " in str(report)


def test_a_tied_head_learns_as_the_embedding_or_not_at_all():
    student = tiny_student(tie_word_embeddings=True)
    assert param_group_of("lm_head.weight", student.config) is ParamGroup.EMBED
    with pytest.raises(RecipeError, match=r"tied to its embedding") as caught:
        apply_freeze(student, stage(train=["mixer", "head"]), name="distill")
    assert "stages.distill.train" in str(caught.value)
    report = apply_freeze(student, stage(train=["embed", "head"]))
    assert report.names == ("model.embed_tokens.weight",)
    assert "learns as embed" in str(report)


def test_only_narrows_by_name_and_must_match():
    student = tiny_student()
    report = apply_freeze(student, stage(only=[r"\.(q|k)_proj\."]))
    assert report.names == tuple(
        f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in (0, 2) for part in "qk"
    )
    with pytest.raises(RecipeError, match='"up_proj" matches none'):
        apply_freeze(student, stage(only=["q_proj", "up_proj"]))


def test_groups_that_do_not_exist_are_reported_and_refused_when_nothing_is_left():
    report = apply_freeze(tiny_student(placement="pure"), stage(train=["mixer", "attention"]))
    assert "no parameters in attention" in str(report)
    with pytest.raises(RecipeError, match="nothing would learn"):
        apply_freeze(tiny_teacher(), stage(train=["mixer"]))


def test_what_the_objective_cannot_reach_stays_frozen_or_is_refused():
    student = tiny_student()
    config = stage(objective={"kind": "block_output"}, train=["mixer", "mlp"])
    objective = build_objective(config.objective)
    objective.bind(student.config, LiveTeacher(student).facts)
    report = apply_freeze(student, config, reaches=objective.reaches)
    assert {name.split(".")[2] for name in report.names} == {"0", "2"}
    assert "6 tensors outside the converted layers stay frozen" in str(report)
    with pytest.raises(RecipeError, match="gives no gradient to embed"):
        apply_freeze(student, stage(train=["mixer", "embed"]), reaches=objective.reaches)
