"""The student as a Hugging Face model: configuration, weights on disk, packing, equality with the teacher."""

import copy
import itertools
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import AutoModelForCausalLM

from gendistill.data.batch import IGNORE, Batch, model_inputs
from gendistill.models import HybridConfig, HybridForCausalLM
from gendistill.models.io import export_code, load_student, save_student
from gendistill.ops import Segments
from gendistill.testing import FAMILIES, tiny_student, tiny_teacher


def make_batch(lengths_by_row, *, seed=0):
    """Pack random documents of the given lengths into rows; rows must have equal sums."""
    width = sum(lengths_by_row[0])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (len(lengths_by_row), width), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in lengths_by_row])
    segments = Segments([n for lengths in lengths_by_row for n in lengths])
    return Batch(ids, torch.full_like(ids, IGNORE), positions, segments, num_labels=0, num_tokens=ids.numel())


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_all_kept_student_equals_its_teacher_exactly(family, tokens):
    teacher = tiny_teacher(family)
    student = tiny_student(family, mixers=["full"] * 4)
    student.load_state_dict(teacher.state_dict())
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)


@torch.no_grad()
def test_sliding_layers_of_mistral_are_kept_right(tokens):
    teacher = tiny_teacher("mistral", sliding_window=5)
    student = tiny_student(
        "mistral", mixers=["full"] * 4, layer_types=["sliding_attention"] * 4, sliding_window=5
    )
    student.load_state_dict(teacher.state_dict())
    assert torch.equal(student(tokens).logits, teacher(tokens).logits)
    student.config.sliding_window = 50
    assert not torch.equal(student(tokens).logits, teacher(tokens).logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_documents_equal_separate_ones_in_student_and_teacher(student, attention):
    batch = make_batch([[5, 1, 18], [17, 4, 3]])
    for model in (student, tiny_teacher(student.config.base_model_type)):
        model.set_attn_implementation(attention)
        packed = model.model(**model_inputs(batch)).last_hidden_state.flatten(0, 1)
        flat = batch.input_ids.flatten()
        ends = batch.cu_seqlens.tolist()
        for start, end in itertools.pairwise(ends):
            alone = model.model(flat[None, start:end], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(packed[start:end], alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_restarting_positions_alone_separate_documents(student):
    """TRL and DataCollatorWithFlattening send only position_ids."""
    batch = make_batch([[5, 1, 18], [17, 4, 3]])
    full = student.model(**model_inputs(batch)).last_hidden_state
    bare = student.model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state
    assert torch.equal(full, bare)


def test_gradients_stay_inside_documents(student):
    batch = make_batch([[5, 1, 18]])
    embeds = student.model.embed_tokens(batch.input_ids).detach().requires_grad_()
    inputs = {**model_inputs(batch), "input_ids": None, "inputs_embeds": embeds}
    student.model(**inputs).last_hidden_state[0, 6:].sum().backward()
    assert embeds.grad[0, :6].abs().max() == 0
    assert embeds.grad[0, 6:].abs().min() > 0


def test_gradient_checkpointing_changes_no_gradient(student, tokens):
    grads = []
    for checkpointing in (False, True):
        model = copy.deepcopy(student).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad is not None, f"{name} gets no gradient"
        torch.testing.assert_close(grad, grads[1][name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_saved_and_loaded_students_agree_exactly(tmp_path, tied, tokens):
    for family, shard in (("llama", "5GB"), ("qwen2", "20KB")):
        model = tiny_student(family, tie_word_embeddings=tied)
        folder = tmp_path / f"{family}"
        model.save_pretrained(folder, max_shard_size=shard)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (shard != "5GB")
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(loaded, HybridForCausalLM)
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        shared = loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
        assert shared == tied


def test_gate_parameters_stay_float32_in_half_precision(tmp_path, tokens):
    tiny_student().save_pretrained(tmp_path)
    model = load_student(tmp_path, dtype=torch.bfloat16)
    mixer = model.model.layers[0].self_attn
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert mixer.q_proj.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16
    assert torch.isfinite(model(tokens).logits).all()


@torch.no_grad()
def test_every_new_parameter_is_initialised_without_a_checkpoint():
    """Bare parameters too: from_config builds on meta and leaves them to _init_weights."""
    config = tiny_student().config
    model = AutoModelForCausalLM.from_config(config)
    mixer = model.model.layers[0].self_attn
    half_life = torch.log(torch.tensor(2.0)) / -mixer.log_decay(torch.zeros(1, 1, 32)).flatten()
    assert half_life.min() == pytest.approx(1.0, rel=1e-3)
    assert half_life.max() == pytest.approx(64.0, rel=1e-3)
    taps = mixer.q_conv1d.weight[:, 0]
    assert torch.equal(taps[:, -1], torch.ones(len(taps)))
    assert (taps[:, :-1] == 0).all()
    gate = torch.nn.functional.silu(mixer.g_b_proj(mixer.g_a_proj(torch.randn(2, 7, 32))))
    torch.testing.assert_close(gate, torch.ones_like(gate), rtol=0, atol=1e-5)


@torch.no_grad()
def test_hidden_states_are_returned_per_layer(tokens):
    output = tiny_student()(tokens, output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == 5
    torch.testing.assert_close(output.hidden_states[0], tiny_student().model.embed_tokens(tokens))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixers": ["kda", "full"]}, "mixers lists 2 layers"),
        ({"mixers": ["kda", "gdnn", "full", "full"]}, "gdnn"),
        ({"layer_types": ["full_attention"] * 4}, "layer 0"),
        ({"base_model_type": "gpt2"}, "allowed: llama"),
        ({"mixers": ["swa"] * 4, "sliding_window": None}, "sliding_window"),
    ],
)
def test_configurations_that_disagree_are_refused(change, message):
    fields = {"num_hidden_layers": 4, "mixers": ["kda", "full", "kda", "full"], **change}
    with pytest.raises(Exception, match=message):
        HybridConfig(**fields)


def test_flash_attention_with_windows_is_refused_where_the_family_drops_them(tokens):
    model = tiny_student("llama", "window")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="sdpa"):
        model(tokens)


@torch.no_grad()
def test_exported_student_loads_where_gendistill_cannot_be_imported(tmp_path, tokens):
    folders = []
    for family, placement in (("llama", "mixed"), ("qwen3", "pure"), ("qwen2", "window")):
        model = tiny_student(family, placement)
        folder = tmp_path / family
        save_student(model, folder, companions=None)
        torch.save({"ids": tokens, "logits": model(tokens).logits}, folder / "expected.pt")
        folders.append(str(folder))
    script = """
        import sys, torch
        class Forbid:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("gendistill", "gendistill_kernels", "gendistill_evals", "pydantic"):
                    raise ImportError(f"{name} is forbidden here")
        sys.meta_path.insert(0, Forbid())
        from transformers import AutoModelForCausalLM
        for folder in sys.argv[1:]:
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
            saved = torch.load(folder + "/expected.pt")
            with torch.no_grad():
                worst = (model(saved["ids"]).logits - saved["logits"]).abs().max().item()
                text = model.generate(saved["ids"], max_new_tokens=4, do_sample=False)
            assert text.shape[1] == saved["ids"].shape[1] + 4
            print(worst)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *folders],
        capture_output=True,
        text=True,
        env={
            "HF_HOME": str(tmp_path / "hf"),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            **_python_path(),
        },
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert [float(line) for line in result.stdout.split()] == [0.0, 0.0, 0.0]


def _python_path():
    return {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


def test_export_leaves_no_trace_of_the_package_path(tmp_path):
    tiny_student().save_pretrained(tmp_path)
    files = export_code(tmp_path)
    assert {"models_modeling.py", "mixers_kda.py", "ops_reference_delta_rule.py"} <= {
        path.name for path in files
    }
    for path in files:
        assert "from gendistill" not in path.read_text()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModelForCausalLM"]


@pytest.mark.parametrize("way", ["argument", "config"])
@torch.no_grad()
def test_attentions_of_kept_layers_are_returned_in_their_places(student, tokens, way):
    student.set_attn_implementation("eager")
    if way == "config":
        student.config.output_attentions = True
    given = {"output_attentions": True} if way == "argument" else {}
    output = student(tokens, output_hidden_states=True, **given)
    assert [found is None for found in output.attentions] == [
        word == "linear_attention" for word in student.config.layer_types
    ]
    for found in output.attentions:
        if found is not None:
            assert found.shape == (3, 4, 24, 24)
            torch.testing.assert_close(found.sum(-1), torch.ones(3, 4, 24))
    assert len(output.hidden_states) == 5
    assert torch.equal(output.hidden_states[-1], student.model(tokens).last_hidden_state)
    student.config.output_attentions = False
    assert student(tokens).attentions is None
    pair = student.model(tokens, use_cache=False, output_attentions=True, return_dict=False)
    assert isinstance(pair, tuple)
    assert torch.equal(pair[0], output.hidden_states[-1])


@torch.no_grad()
def test_generation_returns_attentions_or_says_why_not(tokens):
    model = tiny_student(attn_implementation="eager")
    settings = {"max_new_tokens": 3, "return_dict_in_generate": True, "do_sample": False}
    model.generation_config.output_attentions = True
    steps = model.generate(tokens, **settings).attentions
    assert len(steps) == 3
    for step in steps:
        assert [found is None for found in step] == [True, False, True, False]
    model.set_attn_implementation("sdpa")
    for given in ({}, {"output_attentions": True}):
        with pytest.raises(ValueError, match='attn_implementation="eager"'):
            model.generate(tokens, **settings, **given)
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        model(tokens, output_attentions=True)
