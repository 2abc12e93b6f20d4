"""A head that is stored beside tied embeddings is kept when it differs, and dropped when it does not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from gendistill.checkpoints.resolve import load_causal_lm, read_tensor_index
from gendistill.checkpoints.tensors import have_same_values
from gendistill.errors import CheckpointError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def store_head(folder, head, *, sharded=False):
    """Add a head to a tied checkpoint, in a shard of its own or in the only file."""
    weights = load_file(folder / "model.safetensors")
    head = head(weights[EMBEDDINGS])
    if not sharded:
        return save_file({**weights, HEAD: head}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file({HEAD: head}, folder / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    places = {name: "model-00001-of-00002.safetensors" for name in weights}
    places[HEAD] = "model-00002-of-00002.safetensors"
    return (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def last_changed(embeddings):
    head = embeddings.clone()
    head[-1, -1] += 1
    return head


def logits(model):
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_head_is_kept(save_teacher, plan_for, convert, family, sharded):
    _, folder = save_teacher(family, tie_word_embeddings=True)
    store_head(folder, last_changed, sharded=sharded)
    plan = plan_for(folder, "kda full")
    assert HEAD in [step.name for step in plan.steps]
    assert plan.dropped == ()
    assert plan.student_config["tie_word_embeddings"] is False
    teacher, student = load_causal_lm(folder), load_causal_lm(convert(folder, "full"))
    assert torch.equal(logits(student), logits(teacher))
    assert student.lm_head.weight[-1, -1] == student.model.embed_tokens.weight[-1, -1] + 1


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sharded", [False, True])
def test_an_equal_head_is_dropped_whatever_its_dtype(save_teacher, plan_for, convert, sharded, stored):
    _, folder = save_teacher(tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    weights[EMBEDDINGS] = weights[EMBEDDINGS].bfloat16().half().float()  # exact in every dtype
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    store_head(folder, lambda embeddings: embeddings.to(stored, copy=True), sharded=sharded)
    plan = plan_for(folder, "full")
    assert [item.name for item in plan.dropped] == [HEAD]
    assert plan.student_config["tie_word_embeddings"] is True
    teacher, student = load_causal_lm(folder), load_causal_lm(convert(folder, "full"))
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_a_rounded_head_is_another_one(save_teacher, convert, stored):
    _, folder = save_teacher(tie_word_embeddings=True)
    store_head(folder, lambda embeddings: embeddings.to(stored))
    teacher = load_causal_lm(folder, dtype=torch.float32)
    student = load_causal_lm(convert(folder, "full"), dtype=torch.float32)
    assert not torch.equal(teacher.lm_head.weight, teacher.model.embed_tokens.weight)
    assert torch.equal(logits(student), logits(teacher))


@pytest.mark.parametrize(
    "head", [lambda value: value[:-1].clone(), lambda value: value.int(), lambda value: value.to(torch.int8)]
)
def test_a_head_that_fits_no_model_is_named(save_teacher, plan_for, head):
    _, folder = save_teacher(tie_word_embeddings=True)
    store_head(folder, head)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        plan_for(folder, "full")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("said", [False, None])
def test_an_untied_config_needs_its_head(save_teacher, plan_for, family, said):
    _, folder = save_teacher(family, tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(
        json.dumps(config if said is None else {**config, "tie_word_embeddings": said})
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        plan_for(folder, "full")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load_causal_lm(folder)


def test_values_are_compared_to_the_last_one(tmp_path, monkeypatch):
    """Pieces of 3 numbers: a difference in the last piece must be found, in either dtype."""
    monkeypatch.setattr("gendistill.checkpoints.tensors._COMPARED_ELEMENTS", 3)
    one = torch.arange(10.0)
    other = one.clone()
    other[-1] = 5
    save_file(
        {
            "one": one,
            "same": one.half(),
            "other": other.half(),
            "also": one.clone(),
            "flat": one.reshape(2, 5).clone(),
        },
        tmp_path / "model.safetensors",
    )
    tensors = read_tensor_index(tmp_path)
    assert {name: have_same_values(tensors["one"], tensors[name]) for name in tensors} == {
        "one": True, "same": True, "other": False, "also": True, "flat": False,
    }  # fmt: skip
