"""Predicted memory and time beside what one H200 measured in `gendistill bench step`."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from gendistill.anatomy.cost import step_flops
from gendistill.anatomy.family import geometry_of
from gendistill.anatomy.placement import Placement
from gendistill.bench.documents import Drawer
from gendistill.bench.shapes import SHAPES, stage_config
from gendistill.config.engine import EngineConfig
from gendistill.config.load import load_recipe
from gendistill.config.lora import LoRAConfig
from gendistill.config.mixers import MixersConfig
from gendistill.conversion.plan import plan_conversion
from gendistill.runs.learning import find_learning
from gendistill.runs.memory import Device, predict_memory
from gendistill.runs.planning import ModelFacts, expected_tensors, plan_run
from gendistill.runs.timing import predict_time, stage_flops, utilisation

H200 = Device("cuda", "NVIDIA H200", 141 * 10**9)


class Case:
    """A stage of a shape on an H200, with everything on our kernels."""

    def __init__(self, shape, stage, micro_batch=None, **changes):
        self.shape = SHAPES[shape]
        micro_batch = micro_batch or self.shape.micro_batch
        self.config = AutoConfig.for_model(self.shape.family, **self.shape.sizes).to_dict()
        self.teacher = ModelFacts(shape, self.config, expected_tensors(self.config, where=shape))
        self.placement = Placement.parse(self.shape.placement, num_layers=self.config["num_hidden_layers"])
        self.conversion = plan_conversion(self.config, self.teacher.tensors, self.placement, MixersConfig())
        self.stage = stage_config(
            stage,
            seq_len=self.shape.seq_len,
            rows=self.shape.rows,
            micro_batch=micro_batch,
            checkpointing=False,
        ).model_copy(update=changes)
        self.learning = find_learning(
            stage, self.stage, self.conversion, self.teacher.as_teacher("bfloat16"), tied_head=True
        )

    def memory(self, **engine):
        return predict_memory(
            self.stage,
            geometry=geometry_of(self.config),
            placement=self.placement,
            mixers=MixersConfig(),
            impl="triton",
            num_teacher=self.teacher.num_parameters,
            num_student=self.conversion.num_parameters,
            learning=self.learning,
            teacher_bytes=2,
            device=H200,
            loss="triton",
            fused=True,
            engine=EngineConfig(**engine),
        )

    def time(self, **changes):
        settings = {
            "steps": 3600,
            "student": self.conversion.student_config,
            "teacher": self.config,
            "learning": self.learning,
            "device": H200,
            "compute_dtype": "bfloat16",
            "kernels": True,
        }
        return predict_time(self.stage, **{**settings, **changes})


@pytest.mark.parametrize(
    ("shape", "stage", "micro_batch", "gigabytes"),
    [
        ("qwen3-0.6b", "distill", 4, 47.5),
        ("qwen3-0.6b", "distill", 2, 29.4),
        ("qwen3-0.6b", "block", 4, 38.8),
        ("qwen3-0.6b", "block", 2, 22.6),
        ("qwen2.5-0.5b", "distill", 8, 30.1),
        ("smollm2-135m", "distill", 32, 31.1),
    ],
)
def test_predicted_memory_is_within_a_fifth_of_the_measured_peak(shape, stage, micro_batch, gigabytes):
    memory = Case(shape, stage, micro_batch).memory(capture="never")
    assert memory.total == pytest.approx(gigabytes * 1e9, rel=0.2)
    parts = memory.to_json()
    assert parts.pop("total") == sum(parts.values())


RESULTS = Path(__file__).parents[2] / "docs" / "results"
MEASURED = [
    ("qwen3-0.6b", "distill"),
    ("qwen3-0.6b", "block"),
    ("qwen2.5-0.5b", "distill"),
    ("smollm2-135m", "distill"),
]


@pytest.fixture(scope="module")
def measured():
    """Return what was measured on an H200 with the default engine, by name."""
    file = json.loads((RESULTS / "training-h200.json").read_text())
    return {row["name"]: row["value"] for row in file["rows"]}


@pytest.mark.parametrize(("shape", "stage"), MEASURED)
def test_memory_with_graphs_is_within_a_twentieth_of_the_measured_peak(shape, stage, measured):
    peak = measured[f"{stage} stage, {shape}: peak memory"] * 1e9
    assert Case(shape, stage).memory().total == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize(("shape", "stage"), MEASURED)
def test_predicted_time_is_within_a_fifth_of_the_measured_one(shape, stage, measured):
    rows, case = measured, Case(shape, stage)
    seconds = case.stage.batch_size * case.stage.seq_len / rows[f"{stage} stage, {shape}: tokens/s"]
    mfu = rows[f"{stage} stage, {shape}: MFU"]
    # 3600 steps take as many hours as one takes seconds
    assert case.time().hours == pytest.approx(seconds, rel=0.2), (
        f"measured again? the MFU in gendistill/runs/timing.py is to be {mfu:.2f}"
    )


def test_an_optimizer_cannot_work_in_the_memory_of_graphs():
    case = Case("qwen3-0.6b", "distill", optimizer="adamw8bit")
    graphs, without = case.memory(), case.memory(capture="never")
    assert case.learning.work > 100e6
    assert graphs.optimizer - without.optimizer == case.learning.work
    # which is as large without them, and more with them
    plain = Case("qwen3-0.6b", "distill")
    assert plain.memory().optimizer == plain.memory(capture="never").optimizer


@pytest.mark.parametrize(("shape", "stage"), MEASURED)
def test_documents_of_one_length_stand_for_those_of_web_text(shape, stage):
    """The bench counts the documents that it draws; a plan knows no document."""
    case = Case(shape, stage)
    sizes = {"seq_len": case.shape.seq_len, "mean_tokens": case.shape.mean_tokens, "seed": 0}
    drawer = Drawer(vocab_size=9, **sizes)
    documents = Counter(len(drawer.draw(number)) for number in range(4000))
    tokens = sum(length * count for length, count in documents.items())
    drawn = step_flops(
        case.conversion.student_config,
        case.config,
        documents=documents,
        num_labels=tokens,
        trained=case.learning.names,
        reaches=case.learning.objective.reaches,
        apart=stage == "block",
        compares_logits=stage == "distill",
    ).total
    planned = stage_flops(
        case.stage, student=case.conversion.student_config, teacher=case.config, learning=case.learning
    )
    assert planned / (case.stage.batch_size * case.stage.seq_len) == pytest.approx(drawn / tokens, rel=0.05)


def test_time_is_shared_by_processes_and_grows_with_what_is_computed_again():
    case = Case("qwen3-0.6b", "distill")
    hours = case.time().hours
    assert case.time(num_processes=4).hours == pytest.approx(hours / 4)
    assert case.time(steps=7200).hours == pytest.approx(2 * hours)
    again = Case("qwen3-0.6b", "distill", gradient_checkpointing=True).time().hours
    assert 1.1 < again / hours < 1.4
    some = Case("qwen3-0.6b", "distill", gradient_checkpointing=7).time().hours
    assert some - hours == pytest.approx((again - hours) / 4)
    lora = Case("qwen3-0.6b", "distill", train=(), lora=LoRAConfig(rank=8, groups=("mlp",)))
    assert 0.5 < lora.time().hours / hours < 1
    block, once = (Case("qwen3-0.6b", "block", gradient_checkpointing=each).time() for each in (True, False))
    assert block == once


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": Device("cpu", "CPU with 2 cores", 10**9)}, "on a CPU"),
        (
            {"device": Device("cuda", "NVIDIA H200 MIG 1g.18gb", 10**9)},
            "the peak of NVIDIA H200 MIG 1g.18gb is not",
        ),
        ({"device": Device("cuda", "some GPU", 10**9)}, "the peak of some GPU is not known"),
        ({"compute_dtype": "float32"}, "not in float32"),
        ({"kernels": False}, "with our kernels"),
    ],
)
def test_what_has_not_been_measured_is_not_predicted(changes, reason):
    found = Case("smollm2-135m", "distill").time(**changes)
    assert found.hours is None
    assert reason in found.reason


def test_minutes_are_a_time_everywhere():
    case = Case("smollm2-135m", "distill", minutes=90.0)
    assert case.time(steps=None, device=Device("cpu", "CPU", 10**9)).hours == 1.5


def test_the_nearest_measured_width_counts():
    end_to_end, block = (Case("qwen3-0.6b", stage).stage for stage in ("distill", "block"))
    assert [utilisation(end_to_end, width) for width in (64, 700, 896, 4096)] == [0.28, 0.28, 0.40, 0.38]
    assert {utilisation(block, width) for width in (64, 4096)} == {0.32}


@pytest.fixture
def planned(monkeypatch):
    """Return a function that plans the recipe of Qwen3-0.6B on a device, of which torch sees it if it is a GPU."""

    def plan(*overrides, device=H200, **settings):
        case = Case("qwen3-0.6b", "distill")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device.kind == "cuda")
        monkeypatch.setattr("gendistill.ops.select.obstacle", lambda op, device: None)
        monkeypatch.setattr("gendistill.ops.select.contract", lambda op: None)
        monkeypatch.setattr("gendistill.runs.planning.read_model", lambda *_, **__: case.teacher)
        recipe = load_recipe("qwen3-0.6b-kda", [f"student.placement={case.shape.placement}", *overrides])
        return plan_run(recipe, device=device, **settings)

    return plan


def test_the_plan_says_hours_by_stage_and_in_all(planned):
    found = planned()
    plain = found.to_json()
    hours = [stage["time"]["hours"] for stage in plain["stages"]]
    assert all(each > 0 for each in hours)
    assert plain["hours"] == found.hours == pytest.approx(sum(hours))
    (line,) = [line for line in found.render().splitlines() if line.startswith("time ")]
    for stage in found.stages:
        assert f"{stage.name} {stage.time.hours:.3g} h" in line
    assert line.endswith("(steps alone, by the utilisation measured on one H200)")
    assert "without what processes send" in planned(num_processes=2).render()


@pytest.mark.parametrize(
    ("steps", "said"), [(1, "distill 0.000469 h"), (10**6, "distill 469 h"), (10**7, " 4,690 h")]
)
def test_hours_are_readable_whatever_their_size(planned, steps, said):
    found = planned("stages.distill.tokens=null", f"stages.distill.steps={steps}").render()
    assert said in found, [line for line in found.splitlines() if line.startswith("time")]


def test_a_stage_without_fused_layers_is_not_predicted_and_neither_is_the_sum(planned):
    found = planned("engine.blocks=family")
    assert found.hours is None
    assert "distill unknown" in found.render()
    assert "unknown in all (utilisation has been measured with our kernels and fused layers" in found.render()
    on_cpu = planned(device=Device("cpu", "CPU", 10**11))
    assert on_cpu.to_json()["hours"] is None
    assert "unknown in all (no utilisation has been measured on a CPU)" in on_cpu.render()


def test_float32_on_a_gpu_takes_twice_the_activations_and_no_copies(planned):
    half, full = (
        planned("engine.blocks=family", f"stages.distill.compute_dtype={dtype}")
        for dtype in ("auto", "float32")
    )
    half, full = (
        next(each for each in found.stages if each.name == "distill").memory for found in (half, full)
    )
    assert full.activations > 1.5 * half.activations
    assert full.student * 6 == half.student * 4
    assert math.isclose(full.teacher, half.teacher)


def parts_of(found, name):
    (stage,) = [stage for stage in found.stages if stage.name == name]
    return stage.memory, sum(stage.trained.values())


@pytest.mark.parametrize("num_processes", [2, 8])
def test_processes_hold_what_the_table_of_their_mode_says(planned, num_processes):
    """The table of docs/parallel.md: P, T and Q parameters, E of an embedding that is the head, L of a layer."""
    found = planned("engine.parallel=fsdp2", "engine.reshard=always", num_processes=num_processes)
    memory, trained = parts_of(found, "distill")
    student, teacher, embedding = (
        found.conversion.num_parameters,
        found.teacher.num_parameters,
        151_936 * 1024,
    )
    layer, theirs = (student - embedding - 1024) // 28, (teacher - embedding - 1024) // 28
    assert memory.student == pytest.approx(
        4 * student / num_processes + 2 * 2 * layer + 4 * embedding, rel=1e-3
    )
    assert memory.optimizer == 12 * trained // num_processes
    assert memory.teacher == pytest.approx(2 * (teacher / num_processes + embedding + 2 * theirs), rel=1e-3)
    blocks, _ = parts_of(found, "block")
    assert blocks.student - memory.student == pytest.approx(2 * (21 - 2) * layer, rel=1e-2)
    whole, _ = parts_of(planned("engine.parallel=ddp", num_processes=num_processes), "distill")
    assert whole.student == 6 * student
    # what is shared beside graphs is shared where it lies
    assert whole.optimizer == 12 * trained
    words = ("engine.parallel=ddp", "engine.capture=never")
    overlapping, _ = parts_of(planned(*words, num_processes=num_processes), "distill")
    assert overlapping.optimizer == (12 + 4) * trained
    assert overlapping.activations == memory.activations < whole.activations


@pytest.mark.parametrize("num_processes", [2, 8])
def test_processes_that_keep_gathered_weights_hold_what_the_table_says(planned, num_processes):
    settings = ("engine.parallel=fsdp2", "engine.reshard=step")
    found = planned(*settings, num_processes=num_processes)
    student, teacher = found.conversion.num_parameters, found.teacher.num_parameters
    embedding = 151_936 * 1024
    for name in ("distill", "block"):
        memory, trained = parts_of(found, name)
        copies = 2 * (student - embedding) + 4 * embedding
        assert memory.student == pytest.approx(4 * student / num_processes + copies + 4 * trained, rel=1e-3)
        assert memory.optimizer == 12 * trained // num_processes
        assert memory.teacher == 2 * teacher
    always = planned(settings[0], "engine.reshard=always", num_processes=num_processes)
    eager = planned(*settings, "engine.capture=never", num_processes=num_processes)
    assert parts_of(eager, "distill")[0].activations == parts_of(always, "distill")[0].activations


def test_gathered_weights_are_kept_where_each_model_takes_less_than_a_twentieth_of_the_device(planned):
    def memory(device, reshard):
        words = ("engine.parallel=fsdp2", f"engine.reshard={reshard}")
        return parts_of(planned(*words, num_processes=2, device=device), "distill")[0]

    for gigabytes, kept in ((141, "step"), (20, "always")):
        device = Device("cuda", "a GPU", gigabytes * 10**9)
        assert memory(device, "auto") == memory(device, kept)
        assert memory(device, "step").total > memory(device, "always").total
    # the teacher takes 1.2 GB, the student 1.5 GB
    between = Device("cuda", "a GPU", 27 * 10**9)
    assert memory(between, "auto").teacher == memory(between, "step").teacher
    assert memory(between, "auto").student == memory(between, "always").student


def test_weights_that_are_gathered_in_float32_are_cast_beside_it(planned):
    def student(*words, gather, **settings):
        words = ("engine.parallel=fsdp2", f"engine.gather={gather}", *words)
        found = planned(*words, num_processes=2, **settings)
        return parts_of(found, "distill")[0].student, found.conversion.num_parameters - 151_936 * 1024

    half, blocks = student("engine.reshard=step", gather="auto")
    full, _ = student("engine.reshard=step", gather="float32")
    assert full - half == pytest.approx(4 * blocks, rel=1e-3)
    half, _ = student("engine.reshard=always", gather="auto")
    full, _ = student("engine.reshard=always", gather="float32")
    assert full - half == pytest.approx(4 * 2 * blocks / 28, rel=1e-3)
    # copies of 1.5 GB are kept on this device, those of 2.5 GB are not
    device = Device("cuda", "a GPU", 40 * 10**9)
    for gather, kept in (("auto", "step"), ("float32", "always")):
        assert student(gather=gather, device=device) == student(
            f"engine.reshard={kept}", gather=gather, device=device
        )


def test_fused_layers_pack_their_weights_in_float32_too(planned):
    words = ("stages.distill.compute_dtype=float32", "student.impl=reference")
    cpu = Device("cpu", "CPU", 10**12)
    plain, fused = (
        parts_of(planned(*words, f"engine.blocks={blocks}", device=cpu), "distill")[0].student
        for blocks in ("family", "fused")
    )
    assert fused == 2 * plain


def test_adapters_beside_fused_layers_need_whole_copies(planned):
    words = ("engine.parallel=fsdp2", "stages.distill.lora.rank=8", "stages.distill.lora.groups=[attention]")
    step, always = (
        parts_of(planned(*words, f"engine.reshard={reshard}", num_processes=2), "distill")[0]
        for reshard in ("step", "always")
    )
    assert step.activations < always.activations
