"""Whatever config.json holds, the answer is a model or one clear error, fast; nothing in it runs code."""

import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from gendistill.checkpoints.resolve import load_causal_lm, resolve_checkpoint
from gendistill.conversion.execute import apply_plan
from gendistill.errors import CheckpointError, GendistillError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
SIZES = [
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
]
NEVER = [0, -1, 10**9, 10**30, 1e9, 0.5, "12", "x", [], [4], {}, {"a": 4}, True]


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def use(folder, plan_for):
    """Do everything that a run does before its first forward pass, then one."""
    plan_for(folder, "kda full")
    model = load_causal_lm(folder)
    with torch.no_grad():
        return model(torch.tensor([[3, 4, 5]])).logits


@pytest.mark.parametrize("value", NEVER, ids=repr)
@pytest.mark.parametrize("name", [*SIZES, "num_key_value_heads"])
def test_sizes_that_no_model_has_are_refused(save_teacher, name, value):
    _, folder = save_teacher()
    edit(folder, **{name: value})
    with pytest.raises(CheckpointError) as caught:
        resolve_checkpoint(str(folder))
    assert "config.json" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("layer_types", value)
            for value in (["full_attention"] * 3, ["nope"] * 4, ["linear_attention"] * 4, "x", 5)
        ),
        *(("layer_types", value) for value in ([5] * 4, {"a": 5})),
        *(("sliding_window", value) for value in (0, -1, "12", [], 0.5, 10**30, True)),
        *(("rope_parameters", value) for value in ("x", 5, [5], {"rope_type": "nope", "rope_theta": 1e4})),
        *(("rope_theta", value) for value in (0, -1.0, "x", [])),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
        *(("quantization_config", value) for value in ("x", 5, [], {}, {"quant_method": "awq"})),
        *(("model_type", value) for value in (["llama"], 5, None, {}, "nope")),
        *(("hidden_act", value) for value in ("nope", 5, [])),
        *(("num_labels", value) for value in (10**9, 10**30, "x")),
        *(("rms_norm_eps", value) for value in ("x", [])),
        *(("tie_word_embeddings", value) for value in ("x", [], 5)),
        *(("attn_implementation", value) for value in ("owner/code", {"": "owner/code:fn"})),
        ("transformers_weights", "../other.safetensors"),
        ("return_dict", False),
        ("pad_token_id", 10**9),
    ],
    ids=repr,
)
def test_values_that_no_model_can_use_are_refused(save_teacher, plan_for, family, name, value):
    _, folder = save_teacher(family)
    edit(folder, **{name: value})
    if name == "rope_theta":
        edit(folder, rope_parameters=None)
    with pytest.raises(GendistillError) as caught:
        use(folder, plan_for)
    assert caught.value.hint
    assert caught.value.where


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b"5",
            b'"x"',
            b"\xff\xfe",
            b"\x80\x04",
            b'{"model_type": "llama", "x": NaN}',
        ),
        b'{"model_type": "llama", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model_type": "llama", "x": "' + b"y" * (1 << 24) + b'"}',
    ],
    ids=range(11),
)
def test_files_that_are_no_config_are_refused(save_teacher, content):
    _, folder = save_teacher()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json is not a model config") as caught:
        resolve_checkpoint(str(folder))
    assert caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "null", "5", "\x80", '{"a": NaN}', '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"),
        *(
            f'{{"{key}_token_id": {value}}}'
            for key in ("eos", "bos", "pad")
            for value in ('"x"', '["x"]', "{}", "0.5")
        ),
        '{"compile_config": 5}',
        '{"suppress_tokens": 5}',
        '{"cache_implementation": []}',
    ],
    ids=range(23),
)
def test_generation_settings_that_cannot_be_used_are_named(save_teacher, plan_for, content):
    _, folder = save_teacher()
    (folder / "generation_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        use(folder, plan_for)
    assert "generation_config.json" in f"{caught.value.where} {caught.value.hint}"


def test_an_adapter_is_refused(save_teacher):
    _, folder = save_teacher()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    for act in (resolve_checkpoint, load_causal_lm):
        with pytest.raises(CheckpointError, match="holds an adapter"):
            act(folder if act is load_causal_lm else str(folder))


class Mark:
    """A pickle of it writes a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("beside", ["model.safetensors", "weights.safetensors", None])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin", "adapter_model.bin", "training_args.bin"])
def test_no_pickle_is_opened(save_teacher, tmp_path, plan_for, beside, name):
    _, folder = save_teacher()
    (folder / name).write_bytes(pickle.dumps(Mark(tmp_path / "opened")))
    if beside is None:
        (folder / "model.safetensors").unlink()
    else:
        (folder / "model.safetensors").rename(folder / beside)
    if beside == "model.safetensors":
        use(folder, plan_for)
    else:
        with pytest.raises(CheckpointError) as caught:
            use(folder, plan_for)
        assert caught.value.hint
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_named(save_teacher, plan_for, tmp_path, name, value):
    _, folder = save_teacher()
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"{name} holds values that are not finite in float32"
    ) as caught:
        load_causal_lm(folder)
    assert caught.value.hint
    checkpoint = resolve_checkpoint(str(folder))
    with pytest.raises(CheckpointError, match=rf"{name} holds values that are not finite"):
        apply_plan(plan_for(checkpoint, "full"), checkpoint, tmp_path / "student", seed=0)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(("dtype", "value"), [(torch.float16, 1e5), (torch.bfloat16, 3.4e38)])
def test_weights_too_large_for_the_dtype_asked_for_are_named(save_teacher, dtype, value):
    _, folder = save_teacher()
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_causal_lm(folder, dtype=torch.float32)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight holds values that are not finite"
    ) as caught:
        load_causal_lm(folder, dtype=dtype)
    assert "float32" in (caught.value.hint or "")
