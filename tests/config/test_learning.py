"""What learns in a stage, and for how long: what contradicts itself is refused when the recipe is read."""

import pytest

from gendistill.config.load import load_recipe
from gendistill.errors import RecipeError

# overrides of the recipe tiny, whose stage distill trains mixer, mlp and norm: what is said, and the mend in it
REFUSED = {
    "nothing learns": (
        ["stages.distill.train=[]"],
        ["stages.distill", "nothing would learn", "name groups under train, or under lora.groups"],
    ),
    "a group learns twice": (
        ["stages.distill.lora={rank: 2, groups: [attention, mlp]}"],
        ["train and lora.groups both name mlp", "remove it from one of them"],
    ),
    "LoRA on a norm": (
        ["stages.distill.lora={rank: 2, groups: [norm]}"],
        [
            "stages.distill.lora",
            "LoRA cannot reach norm",
            "allowed: mixer, attention, mlp",
            "Move norm to train",
        ],
    ),
    "LoRA on embedding and head": (
        ["stages.distill.lora={rank: 2, groups: [attention, embed, head]}"],
        ["LoRA cannot reach embed, head", "losses read embedding and head as whole tensors"],
    ),
    "patterns for nothing": (
        [
            "stages.distill.train=[]",
            "stages.distill.lora={rank: 2, groups: [mlp]}",
            "stages.distill.only=[up_proj]",
        ],
        ["only narrows what learns under train, which is empty", "lora.only narrows what is adapted"],
    ),
    "a rate is missing": (
        [
            "stages.distill.lora={rank: 2, groups: [attention]}",
            "stages.distill.lr={mixer: 1, mlp: 1, norm: 1}",
        ],
        [
            "lr names mixer, mlp, norm; train and lora.groups name attention, mixer, mlp, norm: they must agree"
        ],
    ),
    "no rank": (
        ["stages.distill.lora={groups: [attention]}"],
        ["stages.distill.lora.rank", "required"],
    ),
    "a budget below one step": (
        ["stages.distill.tokens=100"],
        [
            "tokens 100 end before the first step",
            "batch_size 4 x seq_len 32 = 128",
            "raise tokens, or lower batch_size",
        ],
    ),
    "packed moments of sharded tensors": (
        ["stages.distill.optimizer=adamw8bit", "engine.parallel=fsdp2"],
        ["stages.distill.optimizer is adamw8bit", "use adamw, whose moments are shared among the processes"],
    ),
    "dropout before adapters of fused layers": (
        ["stages.distill.lora={rank: 2, groups: [attention], dropout: 0.1}", "engine.blocks=fused"],
        ["stages.distill.lora.dropout goes before every adapter alone", "use engine.blocks auto"],
    ),
    "an optimizer that does not exist": (
        ["stages.distill.optimizer=adam8bit"],
        ["stages.distill.optimizer", "adamw8bit"],
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_contradiction_is_refused_with_the_mend(what):
    overrides, parts = REFUSED[what]
    with pytest.raises(RecipeError) as caught:
        load_recipe("tiny", overrides)
    for part in parts:
        assert part in str(caught.value), str(caught.value)


def test_groups_may_learn_whole_and_through_adapters_side_by_side():
    recipe = load_recipe(
        "tiny",
        [
            "stages.distill.train=[mixer, norm]",
            "stages.distill.lora.rank=2",
            "stages.distill.lora.groups=[attention, mlp]",
            "stages.distill.lr={mixer: 1e-3, norm: 1e-3, attention: 1e-4, mlp: 1e-4}",
        ],
    )
    stage = recipe.stages["distill"]
    assert stage.learning == ("mixer", "norm", "attention", "mlp")
    assert load_recipe("tiny", ["stages.distill.tokens=128"]).stages["distill"].tokens == 128
