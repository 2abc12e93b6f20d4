"""Saved students: files, model card, old exports, and folders that are none."""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from gendistill.errors import CheckpointError
from gendistill.models import GendistillForCausalLM, HybridConfig, HybridForCausalLM
from gendistill.models.card import front_matter, inherit_card, write_card
from gendistill.models.configuration import LEAST_TRANSFORMERS
from gendistill.models.io import copy_companions, export_code, load_student, save_student
from gendistill.testing import save_tiny_checkpoint, tiny_student, tiny_teacher

ROOT = Path(__file__).parents[2]
# what earlier versions wrote into config.json
OLD = {
    "architectures": ["HybridForCausalLM"],
    "auto_map": {
        "AutoConfig": "models_configuration.HybridConfig",
        "AutoModel": "models_modeling.HybridModel",
        "AutoModelForCausalLM": "models_modeling.HybridForCausalLM",
    },
}


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def saved(folder, **settings):
    save_student(tiny_student(**settings), folder, companions=None)
    return folder


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("model", [tiny_student, tiny_teacher])
def test_every_file_of_a_saved_model_follows_the_umask(tmp_path, mask, model):
    source = save_tiny_checkpoint(tmp_path / "teacher")
    before = os.umask(mask)
    try:
        save_student(model(), tmp_path / "saved", companions=source)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "saved").rglob("*")}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~mask}, modes


def test_the_implementation_is_not_part_of_a_saved_student(tmp_path):
    model = tiny_student(impl="reference")
    save_student(model, tmp_path / "a", companions=None)
    model.config.save_pretrained(tmp_path / "b")
    model.save_pretrained(tmp_path / "c")
    for name in "abc":
        assert json.loads((tmp_path / name / "config.json").read_text())["impl"] == "auto"
    assert model.config.impl == "reference"
    assert load_student(tmp_path / "a").config.impl == "auto"
    assert load_student(tmp_path / "a", impl="reference").config.impl == "reference"


def test_the_architecture_carries_the_project_s_name(tmp_path):
    config = json.loads((saved(tmp_path / "student") / "config.json").read_text())
    assert config["architectures"] == ["GendistillForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "models_modeling.GendistillForCausalLM"
    assert HybridForCausalLM is GendistillForCausalLM


@torch.no_grad()
def test_old_exports_load(tmp_path):
    folder, ids = saved(tmp_path / "student"), torch.randint(3, 97, (1, 9))
    expected = tiny_student()(ids).logits
    edit_json(folder / "config.json", **OLD, impl="reference")
    for load in (load_student, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(load(folder)(ids).logits, expected)
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["HybridForCausalLM"]
    output = run(f"""
        import torch
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
        print(float(model(torch.tensor({ids.tolist()})).logits.double().sum()), type(model).__name__)
    """, tmp_path)  # fmt: skip
    total, name = output.split()
    # another process may use another number of threads
    assert float(total) == pytest.approx(float(expected.double().sum()), rel=1e-5)
    assert name == "GendistillForCausalLM"


def test_code_of_a_student_asks_for_the_transformers_that_it_needs(tmp_path):
    folder = saved(tmp_path / "student")
    output = run(f"""
        import transformers
        from transformers import AutoConfig
        transformers.__version__ = "5.16.2"
        try:
            AutoConfig.from_pretrained({str(folder)!r}, trust_remote_code=True)
        except ImportError as error:
            print(error)
    """, tmp_path)  # fmt: skip
    assert "needs transformers 5.17 or newer, 5.16.2 is installed" in output
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"transformers>={LEAST_TRANSFORMERS},<6" in dependencies


def run(script, home):
    """Run a script where nothing of ours can be imported."""
    forbid = """
        import sys
        class Forbid:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("gendistill", "gendistill_kernels", "gendistill_evals", "pydantic"):
                    raise ImportError(f"{name} is forbidden here")
        sys.meta_path.insert(0, Forbid())
    """
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(forbid) + textwrap.dedent(script)],
        capture_output=True, text=True, check=False,
        env={"HF_HOME": str(home / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **kept},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


APACHE = (
    "                                 Apache License\n                           Version 2.0, January 2004\n"
)


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, "other"),
        ({"LICENSE": APACHE}, "apache-2.0"),
        ({"LICENSE.md": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "our own words"}, "other"),
        ({"README.md": "---\nlicense: llama3.2\n---\n# x", "LICENSE": APACHE}, "llama3.2"),
        ({"README.md": "---\nlicense: [a, b]\n---\n", "LICENSE": APACHE}, "apache-2.0"),
        ({"README.md": "---\n{broken: [\n---\n"}, "other"),
        ({"README.md": "---\n- a list\n---\n"}, "other"),
        ({"README.md": "no front matter"}, "other"),
        ({"README.md": "---\nlicense: mit\nbase_model: not/ours\n---\n"}, "mit"),
    ],
)
def test_the_card_takes_the_licence_of_the_teacher(tmp_path, files, licence):
    source = save_tiny_checkpoint(tmp_path / "teacher")
    for name, text in files.items():
        (source / name).write_text(text)
    save_student(tiny_student(), tmp_path / "student", companions=source)
    card = front_matter(tmp_path / "student" / "README.md")
    assert card["license"] == licence
    assert card["library_name"] == "transformers"
    assert card["pipeline_tag"] == "text-generation"
    assert "gendistill" in card["tags"]
    assert "base_model" not in card
    assert (source / "README.md").exists() == ("README.md" in files)


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        (
            "sinks alone",
            "4 of its 4 layers mix tokens by softmax attention to the last and the first tokens.",
        ),
        ("mixed", "a state of fixed size, the others keep softmax attention."),
    ],
)
def test_the_card_says_what_every_layer_is(tmp_path, placement, said):
    """Of others only where there are any."""
    save_student(tiny_student(placement=placement), tmp_path / "student", companions=None)
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    assert said in " ".join(card.split())


def test_the_card_names_the_base_model_through_all_stages(tmp_path):
    source = save_tiny_checkpoint(tmp_path / "models--Some--Model-1B" / "snapshots" / "abc")
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: special\nlicense_link: LICENSE\n---\n"
    )
    save_student(tiny_student(), tmp_path / "first", companions=source)
    save_student(tiny_student(), tmp_path / "second", companions=tmp_path / "first")
    text = (tmp_path / "second" / "README.md").read_text()
    card = yaml.safe_load(text.split("---\n")[1])
    assert card["base_model"] == "Some/Model-1B"
    assert (card["license"], card["license_name"]) == ("other", "special")
    for part in (
        "# Model-1B",
        "0 kda, 1 full, 2 kda, 3 full",
        "trust_remote_code=True",
        "import gendistill",
        "5.17",
    ):
        assert part in text
    assert not [line for line in text.splitlines() if "accuracy" in line.lower() or "%" in line]


def test_a_name_that_is_given_wins(tmp_path):
    folder = saved(tmp_path / "student")
    export_code(folder, base_model="Given/Name")
    assert front_matter(folder / "README.md")["base_model"] == "Given/Name"
    write_card(folder)
    assert front_matter(folder / "README.md")["base_model"] == "Given/Name"
    inherit_card(folder, tmp_path)
    assert front_matter(tmp_path / "README.md")["base_model"] == "Given/Name"


@pytest.mark.parametrize(
    ("stored", "expected"), [(None, 2048), (int(1e30), 2048), (1e30, 2048), (512, 512), (4096, 4096)]
)
def test_a_tokenizer_without_a_longest_text_gets_the_model_s(tmp_path, stored, expected):
    source = save_tiny_checkpoint(tmp_path / "teacher")
    path = source / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content.pop("model_max_length", None)
    if stored is not None:
        content["model_max_length"] = stored
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    (tmp_path / "copy").mkdir()
    copy_companions(source, tmp_path / "copy")
    copied = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert copied.pop("model_max_length") == expected
    content.pop("model_max_length", None)
    assert copied == content
    assert path.read_bytes() == before


def broken(folder, kind):
    config, weights = folder / "config.json", folder / "model.safetensors"
    if kind == "no folder":
        return folder / "none"
    if kind == "no weights":
        weights.unlink()
    elif kind == "pickle only":
        weights.rename(folder / "pytorch_model.bin")
    elif kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "no JSON":
        config.write_text("{")
    elif kind == "a list":
        config.write_text("[]")
    elif kind == "a teacher":
        tiny_teacher().save_pretrained(folder)
    elif kind == "another placement":
        edit_json(config, mixers=["full", "kda", "kda", "full"], layer_types=None)
    elif kind == "another size":
        edit_json(config, hidden_size=64)
    elif kind == "wrong type":
        edit_json(config, mixers="kda")
    elif kind == "wrong setting":
        edit_json(config, mixer_configs={"kda": {"half_life": "long"}})
    elif kind == "a mixer to come":
        edit_json(config, mixer_configs={"kda": {"taps": 3}})
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no folder", "no config.json"),
        ("no weights", "no safetensors weights"),
        ("pickle only", "pytorch_model.bin"),
        ("cut weights", "cannot be loaded"),
        ("no JSON", "JSON"),
        ("a list", "JSON object"),
        ("a teacher", "llama"),
        ("another placement", "missing"),
        ("another size", "have other shapes than config.json says, such as"),
        ("wrong type", "mixers must be a list"),
        ("wrong setting", "half_life must be"),
        ("a mixer to come", "taps"),
    ],
)
def test_a_folder_that_is_no_student_is_refused_by_name(tmp_path, kind, message):
    folder = broken(saved(tmp_path / "student"), kind)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_student(folder)
    assert str(folder) in str(caught.value)
    assert caught.value.hint


FIELDS = {
    "num_hidden_layers": 2, "mixers": ["kda", "full"], "hidden_size": 32, "intermediate_size": 48, "vocab_size": 97,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
SIZES = ["head_dim", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size",
         "max_position_embeddings", "num_hidden_layers", "sliding_window"]  # fmt: skip
WRONG = [
    *[("mixers", value) for value in ("kda", 3, {"a": 1}, [1, 2], ["kda", None], [["kda"], "full"], True, ["kda"])],
    *[("layer_types", value) for value in ("full_attention", 3, {}, ["linear_attention", 3], ["x", "y"])],
    *[(name, value) for name in SIZES for value in (0, -1, "8", 2.5, 2.0, [1], True, 10**12)],
    *[("mixer_configs", value) for value in ([1], "x", 3, {"kda": []}, {"kda": "x"}, {"gdn": {}})],
    ("mixer_configs", {"swa": {"window": 0}}),
    *[("mixer_configs", {"kda": {name: value}}) for name, value in (
        ("nope", 1), ("half_life", "x"), ("half_life", [4]), ("half_life", [8, 4]), ("half_life", [0, 4]),
        ("half_life", ["a", "b"]), ("conv_size", "4"), ("conv_size", -1), ("conv_size", 1.5), ("conv_bias", "x"),
        ("conv_activation", "relu"), ("gate", 3), ("gate_lower_bound", "x"), ("gate_lower_bound", 5), ("gate_rank", 0),
        ("gate_rank", "x"), ("output_gate", None), ("output_norm", "yes"), ("rope", 2), ("decay_init", []),
        ("decay_init", "g6"), ("output_gate_rank", 1.5))],
    *[("rope_parameters", value) for value in ("x", 3, {"rope_type": "nope"}, {"rope_type": "yarn"})],
    ("rope_parameters", {"rope_type": "default", "rope_theta": "x"}),
    *[("impl", value) for value in ("cuda", 3, None)],
    *[("base_model_type", value) for value in (3, None, ["llama"], "gpt2")],
    ("num_key_value_heads", 3), ("head_dim", 7), ("rms_norm_eps", "x"), ("initializer_range", float("nan")),
    ("attention_dropout", "x"), ("pad_token_id", 97), ("attention_bias", "x"), ("hidden_act", 3),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_fields_of_a_configuration_are_named(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        HybridConfig(**{**FIELDS, name: value})
    assert len(str(caught.value)) < 300


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match="hidden_act"):
        GendistillForCausalLM(HybridConfig(**FIELDS, hidden_act="nope"))


def test_a_template_with_half_of_a_character_pair_is_copied(tmp_path):
    source = save_tiny_checkpoint(tmp_path / "teacher")
    path = source / "tokenizer_config.json"
    content = {**json.loads(path.read_text()), "chat_template": "\ud83d {{ messages }} \u00e4"}
    content.pop("model_max_length", None)
    path.write_text(json.dumps(content))
    (tmp_path / "copy").mkdir()
    copy_companions(source, tmp_path / "copy")
    copied = json.loads((tmp_path / "copy" / path.name).read_text())
    assert copied["chat_template"] == content["chat_template"]
