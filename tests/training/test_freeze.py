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


TIED = {
    "the head alone": (
        {"train": ["mixer", "head"]},
        "stages.distill.train",
        "train names head and not embed, but they are one tensor",
        "add embed to train, or remove head",
    ),
    "the embedding alone": (
        {"train": ["mixer", "embed"]},
        "stages.distill.train",
        "train names embed and not head, but they are one tensor",
        "add head to train, or remove embed",
    ),
    "two rates": (
        {"train": ["embed", "head"], "lr": {"embed": 1e-3, "head": 2e-3}},
        "stages.distill.lr",
        "they are one tensor, but lr gives embed 0.001 and head 0.002",
        "give both the same rate",
    ),
}


@pytest.mark.parametrize("what", TIED)
def test_a_tied_head_on_one_side_only_is_refused_with_the_mend(what):
    changes, where, message, hint = TIED[what]
    student = tiny_student(tie_word_embeddings=True)
    with pytest.raises(RecipeError) as caught:
        apply_freeze(student, stage(**changes), name="distill")
    assert (caught.value.where, caught.value.hint) == (where, hint)
    assert message in caught.value.message
    assert apply_freeze(tiny_student(), stage(**changes)).names, "untied, all three are fine"


def test_a_tied_head_learns_with_the_embedding_or_not_at_all():
    student = tiny_student(tie_word_embeddings=True)
    assert param_group_of("lm_head.weight", student.config) is ParamGroup.EMBED
    report = apply_freeze(student, stage(train=["embed", "head"]))
    assert report.names == ("model.embed_tokens.weight",)
    assert "learns as embed" in str(report)
    apply_freeze(student, stage())
    assert not student.lm_head.weight.requires_grad


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


def test_a_rate_that_nothing_uses_is_refused_and_a_group_that_is_emptied_is_noted():
    changes = {"train": ["mixer", "mlp"], "only": ["q_proj"]}
    with pytest.raises(RecipeError, match="lr gives a rate to mlp") as caught:
        apply_freeze(tiny_student(), stage(**changes, lr={"mixer": 1e-3, "mlp": 1e-3}), name="distill")
    assert caught.value.where == "stages.distill.lr"
    assert "remove mlp from lr and from the groups that learn, or widen only" in (caught.value.hint or "")
    assert "leave nothing of mlp to learn" in str(apply_freeze(tiny_student(), stage(**changes)))


def test_patterns_of_a_stage_that_trains_through_adapters_alone_are_none():
    report = apply_freeze(tiny_student(), stage(train=[], lora={"rank": 2, "groups": ["mlp"]}))
    assert report.names == ()
    assert "trains 0 parameters: nothing" in str(report)
