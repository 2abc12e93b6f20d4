"""What lands on disk is what the plan says: copies bit for bit, folds exactly, everything else untouched."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from gendistill.checkpoints.resolve import load_causal_lm, read_tensor_index, resolve_checkpoint
from gendistill.conversion.execute import apply_plan, fold_head_scale
from gendistill.conversion.plan import Origin
from gendistill.errors import OutputError

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
GEOMETRIES = [(16, 8, 128), (14, 2, 64), (9, 3, 64), (32, 8, 128), (4, 4, 16)]


def load_all(folder):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return tensors


def content(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_bit_equal_and_every_tensor_is_as_planned(save_teacher, plan_for, convert, family, dtype):
    _, folder = save_teacher(family, dtype=dtype, max_shard_size="30KB")
    before = content(folder)
    out = convert(folder, ["kda", "full", "swa", "kda"], max_shard_bytes=20_000)
    assert content(folder) == before
    assert len(list(out.glob("*.safetensors"))) > 2
    teacher, student = load_all(folder), load_all(out)
    plan = plan_for(folder, ["kda", "full", "swa", "kda"])
    assert set(student) == {step.name for step in plan.steps}
    for step in plan.steps:
        value = student[step.name]
        assert tuple(value.shape) == step.shape
        if step.origin is Origin.COPIED:
            assert torch.equal(value, teacher[step.sources[0]]), step.name
        assert value.dtype == (torch.float32 if step.name.endswith(("A_log", "dt_bias")) else dtype), (
            step.name
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_student_without_converted_layers_is_the_teacher(save_teacher, convert, family, tied):
    options = {"sliding_window": 5} if family == "mistral" else {}
    teacher, folder = save_teacher(family, tie_word_embeddings=tied, **options)
    student = load_causal_lm(convert(folder, "full"))
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(student(ids).logits, teacher(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_kept_layers_compute_what_the_teacher_computes(save_teacher, convert, family):
    teacher, folder = save_teacher(family)
    student = load_causal_lm(convert(folder, "full kda"))
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cosines_and_sines = teacher.model.rotary_emb(hidden, torch.arange(9)[None])
        outputs = [
            model.model.layers[2](hidden, position_embeddings=cosines_and_sines, attention_mask=None)
            for model in (teacher, student)
        ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16])
def test_auto_classes_load_the_student_without_holes(save_teacher, convert, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    import gendistill.models  # noqa: F401  registers the Auto classes

    _, folder = save_teacher("qwen3")
    out = convert(folder, "kda full")
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert AutoConfig.from_pretrained(out).mixers == ["kda", "full"] * 2
    stored = load_all(out)
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored[name].to(value.dtype)), name
    assert model.model.layers[0].self_attn.A_log.dtype == torch.float32
    with torch.no_grad():
        assert model(torch.arange(3, 12)[None]).logits.isfinite().all()


def cosines(queries, keys, heads, kv_heads, head_dim):
    """Loop over query heads; head h reads key head h // group."""
    scores = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        q = queries[:, head * head_dim : (head + 1) * head_dim]
        k = keys[:, shared * head_dim : (shared + 1) * head_dim]
        scores.append(q @ k.T / (q.norm(dim=1)[:, None] * k.norm(dim=1)[None]))
    return torch.stack(scores)


def project(weights, name, hidden):
    out = hidden @ weights[f"{name}.weight"].double().T
    return out + weights[f"{name}.bias"].double() if f"{name}.bias" in weights else out


def normalised_heads(values, scale, head_dim, eps):
    """RMSNorm of every head, as in Qwen3."""
    heads = values.reshape(len(values), -1, head_dim)
    rms = (heads.square().mean(-1, keepdim=True) + eps).sqrt()
    return (heads / rms * scale.double()).reshape(values.shape)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), GEOMETRIES)
def test_scores_point_where_the_teachers_do(save_teacher, convert, family, heads, kv_heads, head_dim):
    """Cosines between queries and keys, head by head, without positions."""
    sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    hidden_size = 4 * heads  # never heads * head_dim
    _, folder = save_teacher(family, hidden_size=hidden_size, num_hidden_layers=2, **sizes)
    prefix = "model.layers.0.self_attn."
    teacher, student = (
        {
            name.removeprefix(prefix): value
            for name, value in load_all(path).items()
            if name.startswith(prefix)
        }
        for path in (folder, convert(folder, "kda full"))
    )
    hidden = torch.randn(7, hidden_size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [project(teacher, name, hidden) for name in ("q_proj", "k_proj")]
    if family == "qwen3":
        scales = (teacher["q_norm.weight"], teacher["k_norm.weight"])
        wanted = [
            normalised_heads(value, scale, head_dim, 1e-6)
            for value, scale in zip(wanted, scales, strict=True)
        ]
    got = [project(student, name, hidden) for name in ("q_proj", "k_proj")]
    torch.testing.assert_close(
        cosines(*got, heads, kv_heads, head_dim),
        cosines(*wanted, heads, kv_heads, head_dim),
        rtol=1e-5,
        atol=1e-7,
    )


def test_folding_multiplies_the_rows_of_every_head():
    weight, scale = torch.randn(6, 5), torch.tensor([1.0, -2.0, 3.0])
    rows = torch.stack([weight[row] * scale[row % 3] for row in range(6)])
    assert torch.equal(fold_head_scale(weight, scale), rows)
    assert torch.equal(fold_head_scale(weight[:, 0], scale), rows[:, 0])


def test_new_tensors_depend_on_seed_and_name_alone(save_teacher, convert):
    _, folder = save_teacher()
    few = load_all(convert(folder, "full kda", name="few"))
    many = load_all(convert(folder, "kda", name="many", max_shard_bytes=1000))
    other = load_all(convert(folder, "full kda", name="other", seed=8))
    name = "model.layers.1.self_attn.f_b_proj.weight"
    assert torch.equal(few[name], many[name])
    assert not torch.equal(few[name], other[name])
    assert not torch.equal(many[name], many[name.replace("layers.1", "layers.2")])
    assert not torch.equal(
        few[name.replace("f_b_proj.weight", "dt_bias")], other["model.layers.3.self_attn.dt_bias"]
    )


def test_tokenizer_and_generation_settings_go_along(save_teacher, convert):
    _, folder = save_teacher()
    files = [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE.txt",
    ]
    for name in files:
        (folder / name).write_text('{"model_max_length": 512}')
    (folder / "pytorch_model.bin").write_text("no")
    (folder / "optimizer.pt").write_text("no")
    out = convert(folder, "kda")
    for name in files:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    written = ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files, *written])


@pytest.mark.parametrize("where", ["", "inside", ".."])
def test_source_and_output_must_be_apart(save_teacher, plan_for, where):
    _, folder = save_teacher()
    before = content(folder)
    with pytest.raises(OutputError, match="overlaps its source"):
        apply_plan(plan_for(folder, "kda"), resolve_checkpoint(str(folder)), folder / where, seed=0)
    assert content(folder) == before


def test_symbolic_link_to_the_source_is_no_way_around(save_teacher, plan_for, tmp_path):
    _, folder = save_teacher()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(OutputError, match="overlaps its source"):
        apply_plan(plan_for(folder, "kda"), resolve_checkpoint(str(folder)), tmp_path / "link", seed=0)


def test_too_little_space_is_noticed_before_writing(save_teacher, convert, monkeypatch, tmp_path):
    _, folder = save_teacher()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match=r"needs 0\.00 GB"):
        convert(folder, "kda", name="a/b/student")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError, "disk is full"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_failure_half_way_leaves_the_old_student_and_no_debris(
    save_teacher, convert, monkeypatch, tmp_path, error, expected, message
):
    _, folder = save_teacher()
    old = content(convert(folder, "kda"))
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return b""

    monkeypatch.setattr("gendistill.checkpoints.tensors._write_values", fail)
    with pytest.raises(expected, match=message):
        convert(folder, "full kda")
    assert content(tmp_path / "student") == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def measure_memory(tmp_path, *arguments):
    script = Path(__file__).parent / "measure_memory.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), *arguments]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return dict(zip(("before", "after", "largest", "total"), map(int, output.split()), strict=True))


def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    """A 180 MB checkpoint converts in the space of two of its largest tensors, the read buffer and torch's code."""
    used = measure_memory(tmp_path, "small")
    assert used["total"] > 180e6
    assert used["after"] - used["before"] < 2 * used["largest"] + 64 * 2**20


@pytest.mark.slow
def test_8b_sharded_checkpoint_converts_under_6_gb(tmp_path):
    """The shapes of Qwen3-8B in bfloat16; needs 34 GB of disk."""
    used = measure_memory(tmp_path, "8b")
    assert used["total"] > 16e9
    assert used["after"] < 6e9


def test_plan_and_folder_agree_on_bytes(save_teacher, plan_for, convert):
    _, folder = save_teacher("qwen2")
    index = read_tensor_index(convert(folder, "kda full"))
    assert sum(info.num_bytes for info in index.values()) == plan_for(folder, "kda full").num_bytes


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_with_sinks_is_the_teacher_s_until_the_window_slides(save_teacher, convert, family):
    teacher, folder = save_teacher(family, attention_bias=family == "qwen3")
    out = convert(folder, "sink full", mixers={"sink": {"window": 6, "sinks": 2}})
    student = load_causal_lm(out)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(1))
    found, expected = student(ids).logits, teacher(ids).logits
    # a token at position 7 sees 2 to 7, and the sinks 0 and 1
    torch.testing.assert_close(found[:, :8], expected[:, :8], rtol=0, atol=1e-4)
    assert not torch.allclose(found[:, 8:], expected[:, 8:], rtol=0, atol=1e-3)
