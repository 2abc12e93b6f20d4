"""The command: files, gates and exit codes; and what lm-eval itself writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from gendistill.cli.main import main
from gendistill.errors import RecipeError
from gendistill.gates import Gate, GateError, check_gate, parse_gate

FIRST = [1.0] * 60 + [0.0] * 40
SECOND = [1.0] * 50 + [0.0] * 10 + [1.0] * 4 + [0.0] * 36


@pytest.fixture
def places(make_lm_eval):
    return [str(make_lm_eval("a", {"quiz": FIRST})), str(make_lm_eval("b", {"quiz": SECOND}))]


def test_the_command_writes_every_file(places, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["compare", *places, "--out", str(out)]) == 0
    assert {path.name for path in out.iterdir()} == {
        *("index.html", "compare.json", "table.md", "table.csv", "table.tex", "forest.svg", "forest.pdf")
    }
    shown = capsys.readouterr().out
    assert "org/b against org/a, acc" in shown
    assert "The data do not tell org/b from org/a" in shown
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert main(["compare", *places, "--out", str(out)]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_json_is_all_that_is_printed(places, tmp_path, capsys):
    assert main(["compare", *places, "--out", str(tmp_path / "out"), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["pairs"][0]["gap"]["value"] == pytest.approx(-6)
    assert content["headline"].startswith("The data do not tell")


@pytest.mark.parametrize(
    ("gate", "code", "said"),
    [
        ("gap<=7", 0, "gap<=7 is met: gap is 6"),
        ("gap<=3", 3, "gap<=3: gap is 6"),
        ("quiz.gap <= 3", 3, "quiz.gap<=3: gap is 6"),
        ("gap_high<=7", 3, "gap_high is 14.17"),
        ("accuracy>=50", 0, "accuracy is 54"),
        ("mcnemar_p<0.05", 3, "mcnemar_p is 0.1796"),
        ("flips<20", 0, "flips is 14"),
        ("hidden_gap<=1", 3, "hidden_gap is not measured"),
        ("sums.gap<=1", 3, "gap is not measured"),
        ("generation_gap<=1", 3, "generation_gap is not measured"),
        ("likelihood_gap<=6.5", 0, "likelihood_gap is 6"),
        ("gasp<=1", 2, 'did you mean "gap"'),
        ("gap", 2, "a gate is a name"),
        ("gap<=x", 2, "a gate is a name"),
    ],
)
def test_gates(places, tmp_path, capsys, gate, code, said):
    assert main(["compare", *places, "--out", str(tmp_path / "out"), "--gate", gate]) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
    if code == 3:
        assert (tmp_path / "out" / "index.html").is_file()
        assert "gate not met" in (tmp_path / "out" / "index.html").read_text()


def test_a_gate_holds_for_the_worst_of_many_models(make_lm_eval, tmp_path, capsys):
    models = [
        str(make_lm_eval(name, {"quiz": [1.0] * right + [0.0] * (100 - right)}))
        for name, right in (("a", 60), ("b", 59), ("c", 40))
    ]
    assert main(["compare", *models, "--out", str(tmp_path / "out"), "--gate", "gap<=2"]) == 3
    assert "gap is 20" in capsys.readouterr().err
    assert main(["compare", *models, "--out", str(tmp_path / "out"), "--gate", "accuracy>=50"]) == 3
    assert "accuracy is 40" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("gap<=3", Gate("gap", "<=", 3.0)),
        (" hidden_gap < 0.5 ", Gate("hidden_gap", "<", 0.5)),
        ("mmlu.gap>=-1", Gate("gap", ">=", -1.0, "mmlu")),
        ("a.b c.gap>2", Gate("gap", ">", 2.0, "a.b c")),
    ],
)
def test_a_gate_is_a_name_a_comparison_and_a_number(text, gate):
    assert parse_gate(text) == gate
    assert parse_gate(str(gate)) == gate


@pytest.mark.parametrize(
    "text", ["", "gap=3", "gap<=", "<=3", "gap<=nan", "gap<=3 and", "gap!=3", "gap<=1e999"]
)
def test_what_is_no_gate_is_refused(text):
    with pytest.raises(RecipeError, match="a gate is a name"):
        parse_gate(text)


def test_a_met_gate_is_one_word_and_a_gap_of_nothing_has_no_sign(places, tmp_path, capsys):
    assert check_gate(Gate("gap", "<=", 3.0, None), -0.0, of="b") == "gate gap<=3 is met: gap is 0 (b)"
    assert main(["compare", *places, "--out", str(tmp_path / "out"), "--gate", "gap<=7"]) == 0
    assert "\ngate     gap<=7 is met" in capsys.readouterr().out


def test_nothing_measured_meets_no_gate():
    gate = parse_gate("gap<=3")
    assert "gap is 2" in check_gate(gate, 2.0, of="x")
    for value in (None, float("nan"), 3.5):
        with pytest.raises(GateError):
            check_gate(gate, value, of="x")
    assert GateError.exit_code == 3


@pytest.mark.parametrize("margin", ["0", "-1", "100", "nan", "many"])
def test_a_margin_that_is_none_is_refused(places, margin, capsys):
    assert main(["compare", *places, f"--margin={margin}"]) == 2
    assert "not a number of points" in capsys.readouterr().err


def test_a_refusal_is_an_error_with_a_next_step(places, tmp_path, capsys):
    assert main(["compare", places[0], str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert "no such file or folder" in error
    assert "next: " in error


def test_ten_thousand_items_end_in_a_page(make_lm_eval, tmp_path):
    models = [str(make_lm_eval(name, {"x": FIRST * 50, "y": SECOND * 50})) for name in "ab"]
    assert main(["compare", *models, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/index.html").stat().st_size > 10_000


TASK = """\
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
doc_to_text: "{{question}}"
"""
TASKS = {
    "ranked": "output_type: multiple_choice\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: 0\n"
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    "written": "output_type: generate_until\ndoc_to_target: lol\ngeneration_kwargs: {until: ['.']}\n"
    "metric_list: [{metric: exact_match}]\nfilter_list:\n  - {name: first, filter: [{function: take_first}]}\n"
    "  - {name: searched, filter: [{function: regex, regex_pattern: '(xyz)'}, {function: take_first}]}\n",
}


def test_what_lm_eval_itself_writes_is_read(tmp_path):
    """lm-eval's own command with its random model; beside it a copy whose ranked items are all wrong."""
    pytest.importorskip("lm_eval")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"question": f"question {place}?"}) + "\n" for place in range(30)))
    (tmp_path / "tasks").mkdir()
    for name, rest in TASKS.items():
        task = TASK.replace("NAME", name).replace("DATA", str(data)) + rest
        (tmp_path / "tasks" / f"{name}.yaml").write_text(task)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "dummy", "--tasks", ",".join(TASKS)]
    command += [
        "--include_path",
        str(tmp_path / "tasks"),
        "--output_path",
        str(tmp_path / "a"),
        "--log_samples",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (samples,) = (tmp_path / "b").glob("*/samples_ranked_*")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    right = sum(row["acc"] for row in rows)
    samples.write_text("".join(json.dumps(row | {"acc": 0.0}) + "\n" for row in rows))
    out = tmp_path / "out"
    assert (
        main(["compare", f"one={tmp_path / 'a'}", f"two={tmp_path / 'b'}", "--out", str(out), "--json"]) == 0
    )
    pairs = json.loads((out / "compare.json").read_text())["pairs"]
    assert [(pair["task"], pair["measure"], pair["family"]) for pair in pairs] == [
        ("ranked", "acc", "likelihood"),
        ("ranked", "acc_norm", "likelihood"),
        ("written", "exact_match,first", "generation"),
        ("written", "exact_match,searched", "generation"),
    ]
    assert all(pair["n"] == 30 for pair in pairs)
    assert [pair["lost"] for pair in pairs] == [right, 0, 0, 0]
    assert [pair["first_score"]["value"] for pair in pairs][2:] == [100, 0]
