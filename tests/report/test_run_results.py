"""A finished run becomes a results file with the numbers of its files and nothing else."""

import json

import pytest

from gendistill.results.run_results import DEMO, main


def rows_of(run_dir, tmp_path):
    out = tmp_path / "out.json"
    assert main([str(run_dir), str(out)]) == 0
    return {row["name"]: row for row in json.loads(out.read_text())["rows"]}


def test_rows_hold_what_the_run_files_say(make_run, tmp_path, edit_json):
    run_dir = make_run("plain")
    edit_json(
        run_dir / "manifest.json", lambda content: content.update(seconds=61.5, peak_memory_bytes=2 * 10**9)
    )
    rows = rows_of(run_dir, tmp_path)
    probe = json.loads((run_dir / "convert" / "probe.json").read_text())
    assert rows["held-out KL after conversion"]["value"] == probe["kl"]
    first, last = rows["held-out KL after conversion"]["value"], rows["held-out KL at the end"]["value"]
    assert rows["share of the KL left"]["value"] == pytest.approx(last / first)
    answers = {
        role: json.loads((run_dir / "eval" / role / "transcripts.jsonl").read_text().splitlines()[0])
        for role in ("teacher", "student")
    }
    gap = answers["student"]["teacher_nll"] - answers["teacher"]["teacher_nll"]
    assert rows["worst answer"]["value"] == pytest.approx(gap)
    assert rows["most repetitive answer"]["value"] == answers["student"]["repeated_4gram_share"]
    assert (rows["wall time"]["value"], rows["peak memory"]["value"]) == (61.5, 2.0)
    ce = rows.pop("cross-entropy after conversion")
    assert (ce["value"], ce["bar"]) == (probe["student_ce"], probe["ln_vocab"])
    assert all(row["bar"] is None for row in rows.values())


def test_every_teacher_tensor_is_counted(make_run, tmp_path, edit_json):
    run_dir = make_run("plain")
    tensors = [
        {"name": "a", "origin": "copied", "sources": ["x"]},
        {"name": "b", "origin": "transformed", "sources": ["x", "y"]},
        {"name": "c", "origin": "initialised"},
    ]
    plan = {"tensors": tensors, "dropped": [{"name": "z", "reason": "unused"}]}
    (run_dir / "convert" / "plan.json").write_text(json.dumps(plan))
    for known, share in ((3, 1.0), (4, 0.75)):
        edit_json(
            run_dir / "manifest.json", lambda content, n=known: content["teacher"].update(num_tensors=n)
        )
        row = rows_of(run_dir, tmp_path)["teacher tensors accounted for"]
        assert (row["value"], row["bar"]) == (share, 1.0)
    assert row["note"] == "1 copied, 1 transformed, 1 initialised, 1 dropped"


def test_the_demo_alone_has_bars_and_what_was_not_measured_has_no_row(make_run, tmp_path):
    rows = rows_of(make_run(DEMO), tmp_path)
    assert rows["share of the KL left"]["bar"] == 0.25
    assert rows["most repetitive answer"]["bar"] == 0.2
    assert "wall time" not in rows


def test_the_commit_is_the_one_that_the_run_noted(make_run, tmp_path, edit_json):
    run_dir = make_run("plain")
    edit_json(run_dir / "manifest.json", lambda content: content.update(commit="0123abc-dirty"))
    rows_of(run_dir, tmp_path)
    assert json.loads((tmp_path / "out.json").read_text())["commit"] == "0123abc-dirty"
