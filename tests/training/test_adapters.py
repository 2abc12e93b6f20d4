"""LoRA in a stage: who learns, what is kept and restored, and a plain student at the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gendistill.anatomy.adapters import is_adapter, plain_name
from gendistill.anatomy.groups import ParamGroup
from gendistill.config.schema import StageConfig
from gendistill.errors import RecipeError
from gendistill.losses.build import build_objective
from gendistill.models.io import load_student, save_student
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import FAMILIES, tiny_student
from gendistill.training import adapters
from gendistill.training.adapters import insert_adapters, merge_adapters
from gendistill.training.freeze import apply_freeze, param_group_of
from gendistill.training.optim import build_optimizer, decays

LORA = {"rank": 3, "groups": ["attention", "mlp"], "dropout": 0.2}
STAGE = {"train": ["mixer", "norm"], "lora": LORA}
CHECKPOINTS = Path("stages") / "tiny" / "checkpoints"


def stage(**changes):
    settings = {"data": "d", "train": [], "lora": LORA, "steps": 1, "lr": 1e-3, **changes}
    return StageConfig(**settings)


def adapt(student, config, **settings):
    """Freeze and adapt, as a stage begins."""
    frozen = apply_freeze(student, config, name="distill", reaches=settings.get("reaches", lambda name: True))
    return frozen, insert_adapters(student, config, name="distill", **settings)


def learn(student):
    """Give every adapter an effect."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, value in student.named_parameters():
            if is_adapter(name):
                value.normal_(std=0.3, generator=generator)


def layout(student):
    """Everything about a student but the numbers in it."""
    return (
        [(name, value.shape, value.dtype) for name, value in student.state_dict().items()],
        [(name, type(module)) for name, module in student.named_modules()],
        set(vars(student)),
    )


@torch.no_grad()
def logits(student):
    return student.eval()(torch.arange(3, 43).view(2, 20)).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_student_equals_the_adapted_one_and_is_a_plain_one(family, tied):
    student = tiny_student(family, tie_word_embeddings=tied)
    before, plain = layout(student), {name: value.clone() for name, value in student.state_dict().items()}
    start = logits(student)
    lora = {"rank": 3, "groups": ["mixer", "attention", "mlp"], "only": [r"\.([qkvo]|up|down)_proj\."]}
    _, report = adapt(student, stage(lora={**lora, "dropout": 0.5}))
    assert torch.equal(logits(student), start), "adapters begin without effect"
    learn(student)
    adapted = logits(student)
    assert (adapted - start).abs().max() > 1e-2
    merge_adapters(student)
    assert (logits(student) - adapted).abs().max() <= 1e-5 * adapted.abs().max()
    assert layout(student) == before
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, plain[name])}
    assert changed == set(report.names)
    assert student.lm_head.weight is student.model.embed_tokens.weight or not tied
    if family == "qwen2":
        assert "model.layers.1.self_attn.q_proj.bias" in plain


def test_a_saved_student_does_not_show_that_it_was_adapted(tmp_path):
    whole, adapted = tiny_student(), tiny_student()
    adapt(adapted, stage())
    learn(adapted)
    merge_adapters(adapted)
    for name, student in {"whole": whole, "adapted": adapted}.items():
        save_student(student, tmp_path / name, companions=None)
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "adapted")]
    assert files[0] == files[1]
    for file in files[0]:
        if not file.endswith(".safetensors"):
            assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "adapted" / file).read_bytes()
    assert torch.equal(logits(load_student(tmp_path / "adapted")), logits(adapted))


@pytest.mark.parametrize("kind", ["kl", "mixer_output", "block_output"])
def test_every_adapter_learns_and_nothing_else_but_what_is_trained(tiny, tmp_path, kind):
    """Also where an objective runs layers by themselves; the second step reaches the factor that reads."""
    groups = {"kl": ["attention", "mlp"], "mixer_output": ["mixer"], "block_output": ["mlp"]}[kind]
    train = {"kl": ["mixer", "norm"], "mixer_output": [], "block_output": ["mixer"]}[kind]
    lora = {"rank": 1, "groups": groups}
    student = tiny.make_student()
    plain = {name: value.clone() for name, value in student.state_dict().items()}
    result, _ = tiny.run_stage(
        tmp_path,
        student=student,
        objective={"kind": kind},
        train=train,
        lora=lora,
        lr=1e-2,
        save_every_steps=2,
    )
    assert result.tensors_changed == 1.0
    kept = load_file(tmp_path / CHECKPOINTS / "step-000006" / "trained.safetensors")
    learned = {plain_name(name) for name in kept}
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, plain[name])}
    assert changed == learned
    for name in kept:
        group = param_group_of(name, student.config)
        assert group in (groups if is_adapter(name) else train)
        if ".lora_B." in name:
            delta = 2 * kept[name] @ kept[name.replace(".lora_B.", ".lora_A.")]
            merged = student.state_dict()[plain_name(name)]
            assert torch.allclose(merged, plain[plain_name(name)] + delta, atol=1e-6)
            assert delta.abs().max() > 1e-4


def test_a_checkpoint_holds_adapters_and_what_learns_whole_alone(tiny, tmp_path):
    tiny.run_stage(tmp_path, **STAGE, steps=2, save_every_steps=2)
    kept = load_file(tmp_path / CHECKPOINTS / "step-000002" / "trained.safetensors")
    assert not [name for name in kept if "base_layer" in name]
    assert {param_group_of(name, tiny.make_student().config) for name in kept if not is_adapter(name)} == {
        ParamGroup.MIXER,
        ParamGroup.NORM,
    }
    adapted = {plain_name(name) for name in kept if is_adapter(name)}
    parts = {name.split(".", 3)[3] for name in adapted}
    assert parts == {
        *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
    }


def test_an_adapted_stage_with_dropout_resumes_to_the_same_bytes(tiny, tmp_path):
    changes = {**STAGE, "save_every_steps": 2, "keep_checkpoints": 3}
    _, whole = tiny.run_stage(tmp_path / "whole", **changes)
    without, _ = tiny.run_stage(tmp_path / "without", **{**changes, "lora": {**LORA, "dropout": 0.0}})
    resumed = tmp_path / "resumed"
    tiny.run_stage(resumed, **changes)
    for step in ("step-000004", "step-000006"):
        (resumed / CHECKPOINTS / step / "state.json").unlink()
    again, student = tiny.run_stage(resumed, **changes)
    assert tiny.rows(resumed) == tiny.rows(tmp_path / "whole")
    assert again.loss_last != without.loss_last, "dropout has an effect"
    for name, value in whole.state_dict().items():
        assert torch.equal(value, student.state_dict()[name]), name


def test_the_next_stage_starts_from_the_merged_weights(tiny, tmp_path):
    _, student = tiny.run_stage(tmp_path / "first", **STAGE, steps=3, lr=1e-2)
    merged = {name: value.clone() for name, value in student.state_dict().items()}
    tiny.run_stage(tmp_path / "second", student=student, train=["norm"], steps=2)
    for name, value in student.state_dict().items():
        assert torch.equal(value, merged[name]) == ("norm" not in name), name


def test_an_interrupted_or_failed_stage_leaves_a_plain_student(tiny, tmp_path):
    student = tiny.make_student()
    before = layout(student)
    with pytest.raises(RecipeError):  # at the end of assembling
        tiny.run_stage(tmp_path, student=student, **STAGE, steps=None, minutes=1e-9)
    assert layout(student) == before


def test_adapters_begin_alike_on_every_machine_and_apart_in_every_stage():
    def first(seed=0, name="distill", dtype=torch.float32):
        student = tiny_student().to(dtype)
        torch.manual_seed(torch.seed())
        apply_freeze(student, stage())
        insert_adapters(student, stage(), name=name, seed=seed)
        found = {name: value for name, value in student.named_parameters() if is_adapter(name)}
        assert {value.dtype for value in found.values()} == {torch.float32}
        assert not any(value.any() for name, value in found.items() if ".lora_B." in name)
        return next(value for name, value in found.items() if ".lora_A." in name)

    assert torch.equal(first(), first(dtype=torch.bfloat16))
    assert first().abs().max() <= 1 / first().shape[1] ** 0.5
    assert not torch.equal(first(), first(seed=1))
    assert not torch.equal(first(), first(name="instruct"))


def test_adapters_belong_to_the_group_of_what_they_adapt():
    student = tiny_student("qwen2")
    rates = {"norm": 1e-3, "attention": 2e-3, "mlp": 3e-3, "mixer": 4e-3}
    lora = {"rank": 2, "groups": ["attention", "mlp", "mixer"], "only": ["_proj"]}
    config = stage(train=["norm"], lora=lora, lr=rates, weight_decay=0.3)
    _, report = adapt(student, config)
    optimizer = build_optimizer(student, config)
    names = {value: name for name, value in student.named_parameters()}
    for group in optimizer.param_groups:
        assert group["lr"] == rates[group["group"]]
        for value in group["params"]:
            name = names[value]
            assert param_group_of(name, student.config) is group["group"]
            assert group["group"] is param_group_of(plain_name(name), student.config)
            assert group["weight_decay"] == (0.3 if is_adapter(name) else 0.0)
    first = "model.layers.0.self_attn.f_a_proj.lora_A.default.weight"
    exempt = {"model.layers.0.self_attn.f_a_proj.weight"}
    assert not decays(first, dict(student.named_parameters())[first], ParamGroup.MIXER, exempt)
    held = {value for group in optimizer.param_groups for value in group["params"]}
    assert held == {value for value in student.parameters() if value.requires_grad}
    assert sum(report.adapters.values()) == sum(
        value.numel() for name, value in student.named_parameters() if is_adapter(name)
    )


def test_the_log_says_what_is_adapted(tiny, tmp_path, quiet):
    tiny.run_stage(tmp_path, **STAGE, steps=1, out=quiet)
    assert "adapts 10 weights by LoRA of rank 3: 2.11k parameters learn: " in quiet.getvalue()
    assert "trains 4.77k parameters: mixer 4.61k, norm 160" in quiet.getvalue()
    assert set(json.loads((tmp_path / "stages/tiny/metrics.jsonl").read_text())["lr"]) == {
        *("mixer", "norm", "attention", "mlp")
    }


REFUSED = {
    "a rank that is too large": (
        {"lora": {"rank": 16, "groups": ["attention"]}},
        "an adapter of rank 16 is at least as large as model.layers.1.self_attn.q_proj.weight, [32, 32], and as "
        "7 other weights",
        "stages.distill.lora.rank=10",
    ),
    "a rank that some weights bear": (
        {"lora": {"rank": 12, "groups": ["attention"]}},
        "an adapter of rank 12 is at least as large as model.layers.1.self_attn.k_proj.weight, [16, 32], and as "
        "3 other weights",
        r"stages.distill.lora.rank=10 or stages.distill.lora.only=['\.(q_proj|o_proj)\.']",
    ),
    "no matching weight": (
        {"lora": {"rank": 2, "groups": ["mlp"], "only": ["q_proj"]}},
        '"q_proj" matches none of the 12 weights of the adapted groups',
        'names look like "model.layers.0.mlp.gate_proj.weight"',
    ),
    "a convolution": (
        {"lora": {"rank": 2, "groups": ["mixer"], "only": ["conv1d"]}},
        '"conv1d" matches none',
        'names look like "model.layers.0.self_attn.q_proj.weight"',
    ),
    "a rate that nothing uses": (
        {
            "lora": {"rank": 2, "groups": ["mlp", "attention"], "only": ["q_proj"]},
            "lr": {"mlp": 1e-3, "attention": 1e-3},
        },
        "lr gives a rate to mlp, of which the patterns under only leave nothing to learn",
        "remove mlp from lr and from the groups that learn, or widen only",
    ),
    "a group that the objective does not reach": (
        {"objective": {"kind": "block_output"}, "lora": {"rank": 2, "groups": ["attention"]}},
        "the objective block_output gives no gradient to attention",
        "train end to end with objective: {kind: kl}",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_adapted_is_refused_with_the_mend(what):
    changes, message, hint = REFUSED[what]
    student = tiny_student()
    config = stage(**changes)
    objective = build_objective(config.objective)
    objective.bind(student.config, LiveTeacher(student).facts)
    with pytest.raises(RecipeError) as caught:
        adapt(student, config, reaches=objective.reaches)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")
    assert (caught.value.where or "").startswith("stages.distill.")


def test_a_placement_without_the_group_is_refused_or_noted():
    with pytest.raises(RecipeError, match="the student has no parameters in attention"):
        adapt(tiny_student(placement="pure"), stage(lora={"rank": 2, "groups": ["attention"]}))
    _, report = adapt(tiny_student(placement="pure"), stage(lora={"rank": 2, "groups": ["attention", "mlp"]}))
    assert "this placement has no parameters in attention" in str(report)


def test_what_is_no_linear_layer_is_refused(monkeypatch):
    student = tiny_student()
    odd = torch.nn.Bilinear(4, 4, 32)
    odd.weight = torch.nn.Parameter(torch.zeros(32, 32))
    student.model.layers[1].mlp.up_proj = odd
    with pytest.raises(RecipeError, match=r"layers\.1\.mlp\.up_proj is a Bilinear"):
        adapt(student, stage())


def test_without_peft_the_mend_is_named(monkeypatch):
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="not installed") as caught:
        adapt(tiny_student(), stage())
    assert "pip install peft" in (caught.value.hint or "")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of stages on several processes, and their exit codes."""
    folder = tmp_path_factory.mktemp("adapted")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("adapted_run.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "codes.json").read_text()), done.stdout + done.stderr


@pytest.mark.parametrize(
    "mode", ["ddp", "ddp_fused", "fsdp2", "fsdp2_fused", "always", "resumed", "resumed_always"]
)
def test_two_processes_adapt_as_one_does(tiny, shared, mode):
    folder, codes, output = shared
    assert codes[mode] == codes["one"] == 0, output[-3000:]
    one, two = tiny.rows(folder / "one"), tiny.rows(folder / mode)
    assert len(one) == len(two) == 6
    for mine, theirs in zip(two, one, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    kept = [
        load_file(folder / name / CHECKPOINTS / "step-000006" / "trained.safetensors")
        for name in ("one", mode)
    ]
    # whole and merged on the main process, in whichever mode
    students = [load_file(folder / name / "student") for name in ("one", mode)]
    for mine, theirs in (kept, students):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert torch.allclose(value, theirs[name], atol=2e-4), name
    assert not [name for name in students[1] if is_adapter(name) or "base_layer" in name]


def test_sharded_adapters_beside_fused_layers_are_refused_with_the_reason(shared):
    _, codes, output = shared
    assert codes["always_fused"] == RecipeError("", where="", hint="").exit_code
    assert "the student cannot run fused: its adapters are split among processes" in output


def test_sharded_adapters_are_left_alone_when_a_stage_is_stopped(shared):
    """To merge them, all processes would have to wait for one another once more."""
    folder, codes, output = shared
    assert codes["stopped"] == 128 + signal.SIGTERM, output[-3000:]
    assert list((folder / "stopped" / CHECKPOINTS).glob("step-*"))
