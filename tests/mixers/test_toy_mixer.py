"""A mixer that somebody adds is one module and one entry of the catalogue, from recipe to export."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gendistill.anatomy.cost import cache_bytes
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.resolve import resolve_checkpoint
from gendistill.checkpoints.tensors import read_tensor_index
from gendistill.config.base import identity
from gendistill.config.load import load_recipe
from gendistill.config.mixers import MixersConfig
from gendistill.config.problems import RecipeProblems
from gendistill.conversion.execute import apply_plan
from gendistill.conversion.plan import Origin, plan_conversion
from gendistill.conversion.probe import probe_student, render_probe
from gendistill.data.batch import Batch
from gendistill.errors import OutputError
from gendistill.models import HybridCache
from gendistill.models.io import load_student, save_student
from gendistill.ops import Segments
from gendistill.report.plots import plot_placement
from gendistill.runs.memory import Device
from gendistill.runs.planning import plan_run
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import tiny_student, tiny_teacher

IDS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def leaky(monkeypatch):
    """Add the mixer of ``toy_mixer.py`` to the catalogue."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "outside")
    module = importlib.import_module("toy_mixer")
    monkeypatch.setitem(MIXERS, "leaky", module.LEAKY)
    yield module
    sys.modules.pop("toy_mixer", None)


@pytest.fixture
def teacher(tmp_path):
    tiny_teacher("llama").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def student(leaky, teacher, tmp_path):
    """A student with two leaky layers, converted and loaded."""
    checkpoint = resolve_checkpoint(str(teacher))
    tensors = read_tensor_index(checkpoint.folder)
    placement = Placement.parse("leaky full kda leaky", num_layers=4)
    mixers = MixersConfig.model_validate({"leaky": {"half_life": 3.0}})
    plan = plan_conversion(checkpoint.config, tensors, placement, mixers)
    by_name = {step.name: step for step in plan.steps}
    assert by_name["model.layers.0.self_attn.o_proj.weight"].origin is Origin.COPIED
    assert by_name["model.layers.0.self_attn.rate"].dtype == "F32"
    assert {item.reason for item in plan.dropped} == {"leaky has no such tensor"}
    apply_plan(plan, checkpoint, tmp_path / "student", seed=1)
    return load_student(tmp_path / "student")


def test_a_recipe_has_a_section_for_it(leaky, teacher):
    settings = [f"teacher.model={teacher}", "student.placement=leaky full", "stages.block=null"]
    recipe = load_recipe("tiny", [*settings, "student.mixers.leaky.half_life=3"])
    assert recipe.student.mixers.of("leaky") == leaky.LeakySettings(half_life=3.0)
    noted = load_recipe("tiny", [*settings, "student.mixers.leaky={half_life: 3, note: true}"])
    assert identity(noted) == identity(recipe)
    for wrong, message in (
        ("half_life=0", "allowed: above 0 to 1,000,000"),
        ("half_lives=3", 'did you mean "half_life"'),
        ("start=qk", "allowed: vo, random"),
        ("half_life=5000", "at most 1000"),
    ):
        broken = [
            f"student.mixers.leaky.{wrong}",
            *(["student.mixers.leaky.start=random"] * ("at most" in message)),
        ]
        with pytest.raises(RecipeProblems, match=message):
            load_recipe("tiny", [*settings, *broken])
    plan = plan_run(recipe, device=Device("cpu", "CPU", 10**10))
    assert "LFLF" in plan.render()
    assert "impl      not used" in plan.render()
    assert plan.stages[0].trained["mixer"] == 2 * (2 * 32 * 32 + 16 * 32 + 16)


def test_without_its_entry_it_is_unknown_everywhere(teacher):
    with pytest.raises(RecipeProblems, match='unknown mixer "leaky"; allowed: full, swa, kda, sink'):
        load_recipe("tiny", [f"teacher.model={teacher}", "student.placement=leaky full"])
    with pytest.raises(ValueError, match="leaky"):
        MixersConfig.model_validate({"leaky": {}})


@torch.no_grad()
def test_the_cache_contract_holds(student):
    whole = student(IDS, use_cache=False).logits
    for size in (1, 5, 11):
        cache = HybridCache(student.config)
        parts = [student(piece, past_key_values=cache).logits for piece in IDS.split(size, dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
        attention = 2 * 4 * 2 * 8 * 12
        assert cache.nbytes == 3 * cache_bytes(student.config.to_dict(), tokens=12, bytes_per_value=4)
        assert cache.nbytes > 3 * attention
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    settings = {"max_new_tokens": 6, "do_sample": False}
    batched = student.generate(IDS, attention_mask=mask, **settings)
    assert torch.equal(batched[0, 12:], student.generate(IDS[:1, 5:], **settings)[0, 7:])
    assert torch.equal(batched[1:], student.generate(IDS[1:], **settings))
    static = student.generate(IDS, attention_mask=mask, cache_implementation="static", **settings)
    assert torch.equal(static, batched)
    beams = student.generate(IDS[:1], num_beams=2, **settings)
    assert torch.equal(beams, student.generate(IDS[:1], num_beams=2, use_cache=False, **settings))


@torch.no_grad()
def test_the_probe_and_the_plots_know_it(student, teacher):
    positions = torch.arange(12).expand(3, -1).contiguous()
    batch = Batch(IDS, IDS.roll(-1, 1), positions, Segments([12] * 3), num_labels=36, num_tokens=36)
    found = probe_student(student, LiveTeacher(tiny_teacher("llama")), [batch])
    assert [layer["kind"] for layer in found["layers"]] == ["leaky", "kda", "leaky"]
    assert found["impl"] == "kda=reference, leaky=reference"
    assert found["half_life"]["quantiles"]["5"] == pytest.approx(3.0, rel=1e-3)
    assert render_probe(found)
    assert plot_placement(Placement(("leaky", "full"))).png.startswith(b"\x89PNG")


def test_it_trains_and_its_rate_stays_float32_and_undecayed(student, tmp_path):
    from gendistill.config.schema import StageConfig
    from gendistill.training.freeze import apply_freeze
    from gendistill.training.optim import build_optimizer

    stage = StageConfig(data="d", train=("mixer",), steps=1, lr=1e-3, weight_decay=0.3)
    apply_freeze(student, stage)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decay = {
        names[id(parameter)]: group["weight_decay"]
        for group in build_optimizer(student, stage).param_groups
        for parameter in group["params"]
    }
    assert decay["model.layers.0.self_attn.rate"] == 0.0
    assert decay["model.layers.0.self_attn.query.weight"] == 0.3
    student(IDS, labels=IDS, use_cache=False).loss.backward()
    assert student.model.layers[0].self_attn.rate.grad.abs().sum() > 0
    half = load_student(tmp_path / "student", dtype=torch.bfloat16)
    assert half.model.layers[3].self_attn.rate.dtype == torch.float32
    assert half.model.layers[3].self_attn.query.weight.dtype == torch.bfloat16


def test_what_a_kind_says_of_a_tensor_holds_in_its_own_layers_alone(leaky, tmp_path, monkeypatch):
    """Also where another kind, or kept attention, has one of the same name or of one that contains it."""
    from gendistill.config.schema import StageConfig
    from gendistill.training.optim import build_optimizer

    listed = leaky.LeakySpec.parameters

    def special(self, geometry, settings):
        table = listed(self, geometry, settings)
        changed = {
            name: replace(table[name], float32=True, decays=False) for name in ("v_proj.weight", "rate")
        }
        return {**table, **changed, "v": replace(table["rate"], float32=True)}

    def build(self, geometry, settings):
        built(self, geometry, settings)
        self.v = torch.nn.Parameter(torch.zeros(self.table["v"].shape))

    built = leaky.Leaky.build
    monkeypatch.setattr(leaky.LeakySpec, "parameters", special)
    monkeypatch.setattr(leaky.Leaky, "build", build)
    student = tiny_student(mixers=["leaky", "full", "kda", "sink"], mixer_configs={})
    stage = StageConfig(data="d", train=("mixer", "attention"), steps=1, lr=1e-3, weight_decay=0.3)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decayed = {
        names[id(parameter)]
        for group in build_optimizer(student, stage).param_groups
        for parameter in group["params"]
        if group["weight_decay"]
    }
    values = [f"model.layers.{layer}.self_attn.v_proj.weight" for layer in range(4)]
    assert [name in decayed for name in values] == [False, True, True, True]
    save_student(student, tmp_path / "student", companions=None)
    loaded = dict(load_student(tmp_path / "student", dtype=torch.bfloat16).named_parameters())
    wide = {name for name, parameter in loaded.items() if parameter.dtype == torch.float32}
    own = {f"model.layers.0.self_attn.{name}" for name in ("v_proj.weight", "rate", "v")}
    assert wide == own | {f"model.layers.2.self_attn.{name}" for name in ("A_log", "dt_bias")}


LOAD = """
import sys, torch
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("gendistill", "gendistill_kernels", "toy_mixer", "toy_package", "pydantic"):
            raise ImportError(f"{name} is forbidden here")
sys.meta_path.insert(0, Forbid())
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
saved = torch.load(sys.argv[1] + "/expected.pt")
with torch.no_grad():
    print((model(saved["ids"]).logits - saved["logits"]).abs().max().item())
    print(model.generate(saved["ids"], max_new_tokens=3, do_sample=False).shape[1])
"""


@torch.no_grad()
def test_an_export_carries_its_code_and_that_of_no_other_mixer(student, tmp_path):
    folder = tmp_path / "export"
    save_student(student, folder, companions=None)
    assert (folder / "toy_mixer.py").is_file()
    assert not (folder / "mixers_sink.py").exists()
    card = " ".join((folder / "README.md").read_text().split())
    assert "2 of its 4 layers mix tokens by a leaky average, 1 of its 4 layers" in card
    check_load(student, folder, tmp_path)


def check_load(student, folder, tmp_path):
    """Load an export where neither gendistill nor the toy can be imported, and compare."""
    torch.save({"ids": IDS, "logits": student(IDS).logits}, folder / "expected.pt")
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}
    env = {"HF_HOME": str(tmp_path / "hf"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **kept}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOAD), str(folder)],
        capture_output=True, text=True, check=False, env=env,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["0.0", "15"]


PACKAGE = {
    "__init__.py": "from .layers import Leaky",
    "layers/__init__.py": "from .leaky import LEAKY, Leaky",
    "layers/leaky.py": (Path(__file__).parents[1] / "outside" / "toy_mixer.py")
    .read_text(encoding="utf-8")
    .replace("toy_mixer:Leaky", "toy_package:Leaky"),
}


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Return what writes a package with the toy, and adds its mixer to the catalogue."""

    def write(**changed):
        for name, text in {**PACKAGE, **changed}.items():
            path = tmp_path / "path" / "toy_package" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path / "path")
        monkeypatch.setitem(MIXERS, "leaky", importlib.import_module("toy_package.layers").LEAKY)
        return tiny_student(mixers=["leaky", "full", "full", "full"], mixer_configs={})

    yield write
    for name in [name for name in sys.modules if name.startswith("toy_package")]:
        del sys.modules[name]


@torch.no_grad()
def test_an_export_carries_a_package_with_relative_imports(package, tmp_path):
    student = package()
    save_student(student, tmp_path / "export", companions=None)
    check_load(student, tmp_path / "export", tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"__init__.py": "from toy_package import layers\nLeaky = layers.Leaky"},
        {
            "layers/__init__.py": "from toy_package.layers import leaky\nLEAKY, Leaky = leaky.LEAKY, leaky.Leaky"
        },
    ],
    ids=["a package", "a module"],
)
def test_a_module_imported_as_a_name_is_refused(package, tmp_path, changed):
    """In the export it would be a file of its own, which that name does not lead to."""
    student = package(**changed)
    with pytest.raises(OutputError, match="imports whole modules"):
        save_student(student, tmp_path / "export", companions=None)
