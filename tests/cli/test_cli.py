"""The command line: exit codes, errors without tracebacks, and what each command hands to the pipeline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import gendistill.runs.pipeline as pipeline
import gendistill.runs.scoring as scoring
from gendistill.cli.arguments import with_dashes
from gendistill.cli.launch import _exit_code as exit_code_of
from gendistill.cli.launch import is_launched, launcher_flags
from gendistill.cli.main import COMMANDS
from gendistill.config.load import load_recipe, recipe_names
from gendistill.errors import CheckpointError
from gendistill.paths import RunDir
from gendistill_evals import EvalError
from gendistill_evals.prompts import ChatTemplate, Style


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """Record what the pipeline is asked to do, and do nothing."""
    recorded = []

    def recorder(name, result):
        def record(*positional, **named):
            recorded.append((name, positional, named))
            return result

        return record

    for name in ("run", "convert", "distill", "evaluate"):
        monkeypatch.setattr(pipeline, name, recorder(name, RunDir(tmp_path / "runs" / "tiny")))
    scores = {
        "tasks": [{"task": "copy", "n": 5, "limit": 5, "likelihood": None, "generation": {"value": 0.4}}]
    }
    monkeypatch.setattr(scoring, "score_checkpoint", recorder("score_checkpoint", scores))
    return recorded


def test_no_command_prints_help(cli):
    code, out, _ = cli()
    assert code == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
    code, out, _ = cli(command, "--help")
    assert code == 0
    assert out.startswith(f"usage: gendistill {command}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu", "tiny"], 'there is no command "rnu"; did you mean "run"?'),
        (["run"], "arguments are required: RECIPE\n"),
        (["run", "tiny", "--dryrun"], 'did you mean "--dry-run"?'),
        (["run", "tiny", "--dry"], 'unknown argument "--dry"'),
        (["run", "tiny", "--num-processes", "two"], "invalid int value"),
        (["run", "tiny", "seed"], '"seed" is not an override'),
        (["run", "nothing"], 'there is no recipe "nothing"'),
        (["run", "tiny", "sead=3"], 'did you mean "seed"?'),
        (["run", "tiny", "eval.tasks=[copy, everydya]"], 'did you mean "everyday"'),
        (["eval", "tiny", "eval.questions=dmo"], "demo"),
        (["distill", "tiny", "--only", "distil"], 'did you mean "distill"?'),
        (["data", "tiny", "--stage", "x"], 'has no stage "x"'),
        (["data", "tiny", "-n", "0"], "at least 1"),
        (["eval"], "no model was named"),
        (["eval", "some/model"], "nothing to score"),
        (["eval", "some/model", "seed=3", "--tasks", "copy"], "changes a recipe"),
        (["eval", "tiny", "--limit", "5"], "eval.limit=..."),
        (["eval", "some/model", "--limit", "0", "--tasks", "copy"], "not a number above 0"),
        (["recipe", "schema", "--at", "stages.x.mak"], 'did you mean "mask"?'),
        (["recipe"], "ACTION"),
    ],
)
def test_bad_usage_exits_with_2_and_says_what_to_do(cli, calls, words, message):
    code, _, err = cli(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert calls == []


@pytest.mark.parametrize(
    "words",
    [
        ["run", "tiny", "seed=3", "--output", "elsewhere", "name=x"],
        ["run", "--output=elsewhere", "tiny", "seed=3", "name=x"],
    ],
)
def test_run_hands_over_the_recipe_and_the_command(cli, calls, words):
    code, out, _ = cli(*words)
    assert code == 0
    ((name, (recipe,), named),) = calls
    assert name == "run"
    assert recipe == load_recipe("tiny", ["seed=3", "name=x", "output=elsewhere"])
    assert named["command"].startswith("gendistill run ")
    assert "index.html" in out


def test_distill_hands_over_the_chosen_stages(cli, calls):
    assert cli("distill", "tiny", "--only", "block", "--only", "distill")[0] == 0
    assert cli("distill", "tiny", "--only", "distill")[0] == 0
    assert [named["only"] for _, _, named in calls] == [("block", "distill"), ("distill",)]


def test_convert_and_eval_of_a_recipe_reach_the_pipeline(cli, calls):
    assert cli("convert", "tiny")[0] == 0
    assert cli("eval", "tiny", "eval.limit=5")[0] == 0
    assert [name for name, _, _ in calls] == ["convert", "evaluate"]
    assert calls[1][1][0].eval.limit == 5


def test_eval_scores_any_model(cli, calls):
    words = ["--tasks", "copy,everyday", "--protocols", "generation", "--limit", "5", "--batch_size", "2"]
    code, out, _ = cli("eval", "org/some.model", *words, "--questions", "demo", "--teacher", "org/big")
    assert code == 0
    ((_, positional, named),) = calls
    assert positional == ("org/some.model",)
    assert [task.name for task in named.pop("tasks")] == ["copy", "everyday"]
    assert named == {
        "protocols": ("generation",),
        "limit": 5,
        "batch_size": 2,
        "out": Path("evals/org-some.model"),
        "teacher": "org/big",
        "questions": "demo",
        "style": Style(),
        "permutations": 0,
        "allow_code": False,
    }
    assert out.splitlines()[1].split() == ["copy", "-", "40.0", "5", "LIMIT", "5"]


def test_eval_takes_protocols_and_the_style_of_prompts(cli, calls, workspace):
    rows = [{"q": f"{n}?", "options": ["red", "blue"], "gold": "red"} for n in range(4)]
    (workspace / "asked.jsonl").write_text(json.dumps(rows[0]))
    (workspace / "shown.jsonl").write_text("\n".join(map(json.dumps, rows[1:])))
    (workspace / "shots.yaml").write_text(
        'kind: multiple_choice\nitems: asked.jsonl\nexamples: shown.jsonl\nprompt: "{q}"\nmax_new_tokens: 4\n'
    )
    style = ["--chat-template", "off", "--system", "Be short.", "--few-shot", "3", "--reasoning", "on"]
    words = ["--tasks", "shots.yaml", "--protocols", "both,generation_letter", "--permutations", "2", *style]
    assert cli("eval", "org/some.model", *words)[0] == 0
    ((_, _, named),) = calls
    assert named["protocols"] == ("likelihood", "generation", "generation_letter")
    assert named["style"] == Style(ChatTemplate.OFF, "Be short.", reasoning=True, few_shot=3)
    assert named["permutations"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--protocols", "likelyhood"], '"likelyhood" is not a protocol; there are both, likelihood'),
        (["--protocols", ""], '"" is not a protocol'),
        (["--chat-template", "on"], "invalid choice"),
        (["--few-shot", "-1"], "is not a number above 0"),
        (["--permutations", "26"], "more than 25"),
        (["--system", " "], "system must be a text with words in it"),
    ],
)
def test_protocols_and_styles_that_cannot_be_are_bad_usage(cli, calls, words, message):
    code, _, err = cli("eval", "org/some.model", "--tasks", "copy", *words)
    assert code == 2
    assert message in err
    assert not calls


def test_the_style_of_a_recipe_is_its_own(cli, calls):
    code, _, err = cli("eval", "tiny", "--few-shot", "3")
    assert code == 2
    assert "eval.few_shot=..." in err
    assert cli("eval", "tiny", "eval.chat_template=off", "eval.system=Be short.")[0] == 0
    assert calls[0][1][0].eval.style == Style(ChatTemplate.OFF, "Be short.")


def test_eval_lists_tasks(cli_json):
    listed = cli_json("eval", "--list")
    assert {"name", "items", "description"} == set(listed["tasks"][0])
    assert "demo" in listed["questions"]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            CheckpointError("gone", where="here", hint="look there"),
            1,
            ["checkpoint error  here", "next: look there"],
        ),
        (EvalError("no task", where="x", hint="y", exit_code=2), 2, ["evaluation error  x", "next: y"]),
        (MemoryError("no room"), 1, ["memory error", "micro_batch_size"]),
        (
            PermissionError(13, "Permission denied", "/root/x"),
            1,
            ["system error  /root/x", "Permission denied"],
        ),
        (KeyError("secret"), 1, ["internal error  KeyError", "--debug"]),
        (KeyboardInterrupt(), 130, ["interrupted", "gendistill run tiny"]),
    ],
)
def test_failure_is_a_message_and_an_exit_code(cli, monkeypatch, error, code, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "run", fail)
    found, _, err = cli("run", "tiny")
    assert found == code
    assert all(word in err for word in words)
    assert "Traceback" not in err


def test_debug_raises_the_error_itself(cli, monkeypatch):
    def fail(*_, **__):
        raise CheckpointError("gone")

    monkeypatch.setattr(pipeline, "run", fail)
    with pytest.raises(CheckpointError):
        cli("run", "tiny", "--debug")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_reader_that_leaves_early_causes_no_traceback(unbuffered):
    command = [sys.executable, "-m", "gendistill", "recipe", "show", "tiny"]
    # an empty value is as if unset: output then waits in a buffer until the end
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""


def test_underscores_in_flags_are_dashes_and_values_stay():
    words = ["run", "--num_processes=2", "--output", "my_folder", "a_b.c=d_e", "--", "--x_y"]
    assert with_dashes(words) == [
        "run",
        "--num-processes=2",
        "--output",
        "my_folder",
        "a_b.c=d_e",
        "--",
        "--x_y",
    ]


@pytest.mark.parametrize("given", [["--num-processes", "2"], ["--num_processes=2"]])
def test_launcher_repeats_the_command_without_its_own_flag(given):
    words = ["distill", "tiny", *given, "seed=3"]
    for on_gpu in (False, True):
        flags = launcher_flags(words, num_processes=2, on_gpu=on_gpu)
        assert flags[flags.index("gendistill") :] == ["gendistill", "distill", "tiny", "seed=3"]
        assert flags[flags.index("--num_processes" if on_gpu else "--nproc_per_node") + 1] == "2"


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (None, 0),
        (ChildFailedError("gendistill", {1: ProcessFailure(1, 7, 2, "nowhere")}), 2),
        (
            ChildFailedError(
                "gendistill",
                {0: ProcessFailure(0, 7, -15, "nowhere"), 1: ProcessFailure(1, 8, 2, "nowhere")},
            ),
            2,
        ),
        (subprocess.CalledProcessError(3, "gendistill"), 3),
        (SignalException("stopped", signal.SIGTERM), 143),
    ],
    ids=["success", "rank 1 fails with 2", "and rank 0 is stopped", "process fails with 3", "terminated"],
)
def test_several_processes_end_with_the_exit_code_of_the_first_failure(
    cli, calls, monkeypatch, failure, expected
):
    started = []

    def run(arguments):
        started.append([arguments.nproc_per_node, arguments.training_script, *arguments.training_script_args])
        if failure is not None:
            raise failure

    monkeypatch.setattr(torch.distributed.run, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    code, out, err = cli("distill", "tiny", "--num-processes", "2", "seed=3")
    assert (code, err) == (expected, "")
    assert out.startswith("launch    ACCELERATE_USE_CPU=true")
    assert started == [["2", "gendistill", "distill", "tiny", "seed=3"]]
    assert calls == []


@pytest.mark.parametrize(
    "codes", [{0: -9}, {0: 1, 1: -9}, {0: -15, 1: -11}, {0: -15}], ids=["alone", "peer", "stopped", "all"]
)
def test_a_rank_that_a_signal_ended_is_named_with_the_signal(cli, calls, monkeypatch, codes):
    def run(arguments):
        raise ChildFailedError(
            "gendistill",
            {rank: ProcessFailure(rank, 70 + rank, code, "nowhere") for rank, code in codes.items()},
        )

    monkeypatch.setattr(torch.distributed.run, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    code, _, err = cli("distill", "tiny", "--num-processes", "2")
    assert code == 1
    rank = max(codes)
    assert f"rank {rank} (process {70 + rank}) was ended by {signal.Signals(-codes[rank]).name}" in err
    assert "next:" in err


def test_a_rank_that_the_launcher_had_to_kill_is_not_the_cause():
    failures = {0: ProcessFailure(0, 7, -9, "nowhere"), 1: ProcessFailure(1, 8, 3, "nowhere")}
    failures[0].timestamp += 30
    assert exit_code_of(failures) == 3


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "1025", "9" * 5000, "²", "", "1e3", "0x2"])
@pytest.mark.parametrize("command", ["run", "distill"])
def test_a_number_of_processes_outside_the_range_is_refused(cli, calls, command, number):
    for words in (["--num-processes", number], [f"--num_processes={number}"]):
        code, _, err = cli(command, "tiny", *words)
        assert code == 2
        assert "allowed: 1 to 1024" in err or "expected one argument" in err
        assert len(err) < 400
    assert calls == []


def test_processes_that_cannot_share_a_batch_start_nothing(cli, calls, monkeypatch):
    monkeypatch.setattr(torch.distributed.run, "run", None)
    for command in ("run", "distill"):
        code, _, err = cli(command, "tiny", "--num-processes", "3")
        assert code == 2
        assert "batch_size 4 cannot be shared equally by 3 processes" in err


@pytest.mark.parametrize(
    ("launcher", "ignores", "expected"),
    [("os.getppid()", False, 0), ("1", False, -signal.SIGTERM), ("1", True, 1)],
    ids=["alive", "dead", "dead, and SIGTERM is not heard"],
)
def test_a_rank_ends_when_its_launcher_is_gone(launcher, ignores, expected):
    code = f"""
import os, signal, threading
from gendistill.cli import launch

launch._WATCH_S, launch._GRACE_S = 0.01, 0.1
os.environ["GENDISTILL_LAUNCHER_PID"] = str({launcher})
if {ignores}:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
launch.watch_launcher()
threading.Event().wait({0.1 if expected == 0 else 60})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == expected


@pytest.mark.parametrize("size", ["", "0", "1"])
def test_one_process_is_not_launched(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert not is_launched()


def test_more_processes_than_gpus_is_refused(cli, calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    code, _, err = cli("distill", "tiny", "--num-processes", "2")
    assert code == 2
    assert "this machine has 1 GPUs" in err


def test_rank_that_loses_its_peer_does_not_claim_a_bug(cli, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:37529")

    monkeypatch.setattr(pipeline, "distill", fail)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    code, _, err = cli("distill", "tiny")
    assert code == 1
    assert err == "rank 1 stopped, because another process did\n"


def test_a_launched_process_does_not_launch_again(cli, calls, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "1")
    code, out, _ = cli("distill", "tiny", "--num-processes", "2")
    assert (code, out) == (0, "")
    assert [name for name, _, _ in calls] == ["distill"]


@pytest.mark.parametrize("command", ["run", "convert", "distill"])
def test_dry_run_prints_the_plan_and_runs_nothing(cli, calls, workspace, teacher_folder, command):
    code, out, err = cli(command, "tiny", f"teacher.model={teacher_folder}", "--dry-run")
    assert code == 0, err
    assert "KFKF (2 kda, 2 full)" in out
    assert "self_attn.A_log" in out
    assert ("block_output" in out) == (command != "convert")
    assert ("predicted peak" in out) == (command != "convert")
    assert out.splitlines()[-1].startswith("ok        nothing was run")
    assert calls == []
    assert not (workspace / "runs").exists()


def test_dry_run_as_json_says_the_same(cli_json, workspace, teacher_folder):
    plan = cli_json("run", "tiny", f"teacher.model={teacher_folder}", "--dry-run")
    assert [stage["name"] for stage in plan["stages"]] == ["block", "distill"]
    assert plan["student"]["placement"] == ["kda", "full", "kda", "full"]


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (["teacher.model=./nowhere"], 1, "does not exist"),
        (["student.placement=[kda, full]"], 2, "lists 2 layers, the teacher has 4"),
        (["student.placement=kda mamba"], 2, 'unknown mixer "mamba"'),
        (["student.placement=full@9 kda"], 2, "layers are 0 to 3"),
        (["stages.distill.batch_size=3"], 2, "not a multiple of micro_batch_size"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    cli, workspace, teacher_folder, overrides, code, message
):
    found, _, err = cli("run", "tiny", f"teacher.model={teacher_folder}", *overrides, "--dry-run")
    assert found == code
    assert message in err
    assert "Traceback" not in err


def test_recipe_ls_names_every_recipe(cli, cli_json):
    assert [row["name"] for row in cli_json("recipe", "ls")] == recipe_names()
    assert all(row["about"] for row in cli_json("recipe", "ls"))
    assert cli("recipe", "ls")[0] == 0


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_passes_check(cli, name):
    code, out, err = cli("recipe", "check", name)
    assert code == 0, err
    assert out.startswith(f"ok        {name}")


def test_recipe_show_prints_origins_and_loads_back(cli, workspace):
    code, out, _ = cli("recipe", "show", "smollm2-135m-kda", "seed=7")
    assert code == 0
    (seed,) = [line for line in out.splitlines() if line.startswith("seed:")]
    assert seed.split("#")[1].strip() == "command line"
    assert "base/paper.yaml:" in out
    assert "# default" in out
    (workspace / "shown.yaml").write_text(out)
    assert load_recipe("shown.yaml") == load_recipe("smollm2-135m-kda", ["seed=7"])


def test_recipe_cp_makes_an_independent_recipe(cli, workspace):
    assert cli("recipe", "cp", "smollm2-135m-kda", "mine.yaml")[0] == 0
    assert load_recipe("mine.yaml").name == "mine"
    assert load_recipe("mine.yaml").stages == load_recipe("smollm2-135m-kda").stages
    code, _, err = cli("recipe", "cp", "tiny", "mine.yaml")
    assert code == 2
    assert "--force" in err
    assert cli("recipe", "cp", "tiny", "mine.yaml", "--force")[0] == 0


def test_recipe_schema_describes_a_section_and_validates_recipes(cli, cli_json):
    code, out, _ = cli("recipe", "schema", "--at", "stages.distill.objective")
    assert code == 0
    assert "temperature" in out
    assert "KLConfig" in out
    schema = cli_json("recipe", "schema")
    assert schema["properties"]["schema"]["const"] == 1
    assert "from" in schema["$defs"]["StudentConfig"]["properties"]


def test_recipe_diff_prints_what_differs(cli, cli_json, workspace):
    cli("recipe", "cp", "tiny", "mine.yaml")
    rows = cli_json("recipe", "diff", "tiny", "mine.yaml")
    assert rows == [{"setting": "name", "first": "tiny", "second": "mine", "affects": "nothing"}]
    assert cli("recipe", "diff", "tiny", "tiny")[1] == "the two recipes are equal\n"


def test_broken_recipe_prints_every_problem_and_exits_with_2(cli, workspace):
    cli("recipe", "cp", "tiny", "mine.yaml")
    path = workspace / "mine.yaml"
    path.write_text(path.read_text().replace("seed: 42", "sead: 42").replace("kind: kl}", "kind: kll}"))
    code, out, err = cli("recipe", "check", "mine.yaml")
    assert (code, out) == (2, "")
    assert "recipe error  mine.yaml:" in err
    assert 'did you mean "seed"?' in err
    assert 'did you mean "kl"?' in err
    assert "2 problems; nothing was run" in err


def test_report_of_a_folder_without_results_is_an_error(cli, workspace):
    code, _, err = cli("report", "nowhere")
    assert code != 0
    assert "Traceback" not in err
    assert "nowhere" in err


def test_report_as_json_is_the_gap_file(cli_json, monkeypatch, tmp_path):
    import gendistill.report as report

    gap = tmp_path / "gap.json"
    gap.write_text(json.dumps({"tasks": []}))
    monkeypatch.setattr(
        report, "write_report", lambda folder, **_: type("Paths", (), {"gap": gap, "page": folder})()
    )
    assert cli_json("report", "runs/x") == {"tasks": []}
