"""Any number of processes in either mode trains the same student, resumes the others' checkpoints, and ends alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("parallel_run.py")
CHECKPOINTS = Path("stages", "tiny", "checkpoints")
FILES = ("trained.safetensors", "optimizer.safetensors")
MODES = ("ddp_2", "ddp_4", "fsdp2_2", "fsdp2_4", "always_2", "always_4")
# gathered weights are let go at the end of a step, or after every layer
KINDS = ("2", "always")
CASES = ("mixer_output", "tied", "fused", "watched", "rewound")
MORE_CASES = (
    "bfloat16",
    "recomputed",
    "block_output",
    "bfloat16_block",
    "fused_bfloat16",
    "fused_block",
    "tied_frozen",
)


def run(folder, what):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), what, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, json.loads((folder / "codes.json").read_text()), done.stdout + done.stderr


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The folder of the script's stages, and what it found."""
    return run(tmp_path_factory.mktemp("parallel"), "main")


@pytest.fixture(scope="module")
def more_stages(tmp_path_factory):
    """The same of what takes longer."""
    return run(tmp_path_factory.mktemp("more"), "more")


def assert_same_curve(tiny, mine, theirs, *, rel=2e-6):
    mine, theirs = tiny.rows(mine), tiny.rows(theirs)
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], rel=rel)
        assert a["parts"] == pytest.approx(b["parts"], rel=rel)
        # a norm of many squares, summed in another order
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * rel)
        assert a.get("heldout", {}) == pytest.approx(b.get("heldout", {}), rel=10 * rel)
    assert any("heldout" in row for row in theirs)


def assert_same_bits(mine, theirs):
    for file in FILES:
        a, b = load_file(mine / file), load_file(theirs / file)
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)), name


@pytest.mark.parametrize("mode", MODES)
def test_every_number_of_processes_and_mode_has_the_same_curve(tiny, stages, mode):
    folder, found, _ = stages
    assert found["codes"]["one"] == found["codes"][mode] == 0
    assert_same_curve(tiny, folder / mode, folder / "one")


def check_case(tiny, stages, case, kind):
    folder, found, output = stages
    assert found["codes"][case] == found["codes"][f"{case}_{kind}"] == 0, output[-3000:]
    # of whole weights and copies, fused layers have float32 gradients; of those that are gathered for a layer, they are
    # rounded as autocast rounds them
    rel = 2e-3 if (case, kind) == ("fused_bfloat16", "always") else 2e-6
    assert_same_curve(tiny, folder / f"{case}_{kind}", folder / f"{case}_one", rel=rel)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_sharded_parameters_train_as_whole_ones(tiny, stages, case, kind):
    check_case(tiny, stages, case, kind)


def test_copies_are_gathered_and_gradients_shared_once_a_step(tiny, stages):
    folder, found, output = stages
    counts = []
    for rows in (1, 2):
        assert found["codes"][f"rows_{rows}"] == 0, output[-3000:]
        counts.append(json.loads((folder / f"rows_{rows}" / "counts.json").read_text()))
    assert counts[0] == counts[1]
    # six steps, each of one bucket; before the first one for fused layers, and for two scores on held-out text
    assert counts[0]["shared"] == 6
    assert 6 <= counts[0]["gathered"] <= 6 + 3
    assert_same_curve(tiny, folder / "rows_1", folder / "rows_2")


def test_processes_go_back_together(tiny, stages):
    folder, found, output = stages
    assert found["codes"]["rewound_ddp"] == 0, output[-3000:]
    assert_same_curve(tiny, folder / "rewound_ddp", folder / "rewound_one")
    for name in ("rewound_one", "rewound_2", "rewound_always", "rewound_ddp"):
        result = json.loads((folder / name / "stages/tiny/result.json").read_text())
        assert result["rewinds"] == [{"step": 5, "to": 2, "skipped_to": 5}]
        assert result["steps"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_student_is_watched_as_a_whole_one(tiny, stages, kind):
    folder, *_ = stages
    one, two = (tiny.rows(folder / name) for name in ("watched_one", f"watched_{kind}"))
    for mine, theirs in zip(two, one, strict=True):
        for watched in ("layers", "score"):
            assert mine.get(watched, {}) == pytest.approx(theirs.get(watched, {}), rel=1e-4)
        assert mine["groups"].keys() == theirs["groups"].keys()
        norms = [name for name in mine["groups"] if name.endswith("/grad_norm")]
        assert len(norms) == 6
        for name in norms:
            assert mine["groups"][name] == pytest.approx(theirs["groups"][name], rel=1e-4)
        assert mine["groups"]["mlp/moved"] > 0.9
    answers = [
        (folder / name / "stages/tiny/answers.jsonl").read_text()
        for name in ("watched_one", f"watched_{kind}")
    ]
    assert answers[0] == answers[1]
    assert len(answers[0].splitlines()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MORE_CASES)
def test_sharded_parameters_train_as_whole_ones_with_other_objectives(tiny, more_stages, case, kind):
    check_case(tiny, more_stages, case, kind)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_hundred_steps_stay_together(tiny, more_stages, mode):
    folder, found, _ = more_stages
    assert found["codes"]["one"] == found["codes"][mode] == 0
    assert len(tiny.rows(folder / mode)) == 100
    assert_same_curve(tiny, folder / mode, folder / "one", rel=2e-5)


@pytest.mark.slow
def test_an_objective_that_reads_past_a_layer_is_told_so(more_stages):
    _, found, output = more_stages
    assert found["codes"]["outside"] == 1
    assert "reads a parameter outside of the layer" in output
    assert "set engine.parallel=ddp" in output
    # copies are whole for the length of a step
    assert found["codes"]["outside_2"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_travels_in_bfloat16_is_what_autocast_makes_of_float32(tiny, more_stages, kind):
    folder, found, _ = more_stages
    assert found["codes"][f"bfloat16_{kind}"] == found["codes"][f"bfloat16_cast_{kind}"] == 0
    first, *_ = tiny.rows(folder / f"bfloat16_{kind}")
    cast, *_ = tiny.rows(folder / f"bfloat16_cast_{kind}")
    assert first["loss"] == cast["loss"]
    assert_same_curve(tiny, folder / f"bfloat16_cast_{kind}", folder / f"bfloat16_{kind}")


@pytest.mark.parametrize("mode", [*MODES, *(f"{case}_{kind}" for case in CASES for kind in KINDS)])
def test_the_main_process_ends_with_the_whole_student_that_was_checkpointed(stages, mode):
    folder, *_ = stages
    weights = load_file(folder / mode / "student")
    trained = load_file(folder / mode / CHECKPOINTS / "step-000006" / "trained.safetensors")
    assert trained
    assert all(torch.equal(weights[name], value) for name, value in trained.items())


@pytest.mark.parametrize("copy", ["ddp_2", "fsdp2_2", "always_2"])
def test_a_checkpoint_is_the_same_bits_whoever_loads_and_saves_it(stages, copy):
    folder, found, output = stages
    assert found["codes"][f"copy_{copy}"] == 0, output[-3000:]
    assert_same_bits(
        folder / "copies" / copy / "step-000004", folder / "fsdp2_4" / CHECKPOINTS / "step-000004"
    )


@pytest.mark.parametrize("resumed", ["to_4", "to_always", "to_1"])
def test_a_stage_resumes_on_another_number_of_processes_and_in_the_other_mode(tiny, stages, resumed):
    folder, found, _ = stages
    assert found["codes"][resumed] == 0
    assert_same_curve(tiny, folder / resumed, folder / "one")


@pytest.mark.parametrize("name", ["minutes", "minutes_ddp"])
def test_a_budget_in_minutes_is_timed_alike_on_all_processes(stages, name):
    folder, found, _ = stages
    assert found["codes"][name] == 0
    assert json.loads((folder / name / "stages" / "tiny" / "plan.json").read_text())["seconds_per_step"] > 0


def test_sharded_processes_name_one_place_where_numbers_stop_being_finite(stages):
    _, found, output = stages
    assert found["codes"]["bad"] == 1
    # stages that go back name places, too
    errors = [line for line in output.splitlines() if "No checkpoint had been saved yet" in line]
    places = {line.split("; first seen in ")[1] for line in errors if "; first seen in " in line}
    assert len(places) == 1
    assert "model.layers.0" in places.pop()


@pytest.mark.parametrize(
    ("name", "rank", "why"),
    [
        ("killed_ddp", 1, "it has ended"),
        ("killed_fsdp2", 0, "it has ended"),
        ("killed_always", 1, "it has ended"),
        ("stopped", 1, "nothing was heard of it for 2 s"),
    ],
)
def test_the_others_end_and_name_the_lost_process(tiny, stages, name, rank, why):
    folder, found, output = stages
    lost = found["lost"][name]
    assert set(lost["codes"]) == {1}
    # silence, then the time that a process may take to end by itself; a loaded machine takes its own
    assert lost["seconds"] < 30
    lines = {line for line in output.splitlines() if "is lost" in line and f"/{name}/" in line}
    kept = folder / name / CHECKPOINTS
    # one may have heard of a checkpoint that was being saved, another not
    assert 1 <= len(lines) <= 2, output[-3000:]
    for said in lines:
        assert f"rank {rank} (process " in said
        assert why in said
        assert f"The checkpoint {kept}/step-" in said
    assert tiny.find_checkpoint(kept, pytest.fail) is not None
