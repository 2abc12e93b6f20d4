"""Our evaluations in lm-eval's layout: lm-eval's own tools and our compare read them."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from lm_eval.utils import (
    get_file_datetime,
    get_file_task_name,
    get_results_filenames,
    get_sample_results_filenames,
    make_table,
)

from gendistill.checkpoints.resolve import load_causal_lm, load_tokenizer
from gendistill.cli.main import main
from gendistill_evals import EvalError, evaluate_model, load_task
from gendistill_evals.formats.lm_eval import find_sample_files, read_sample_file
from gendistill_evals.formats.lm_eval_write import write_lm_eval

PROTOCOLS = ["likelihood", "likelihood_per_char", "generation", "generation_letter"]


@pytest.fixture
def evaluated(student, choice_task, answer_task, tmp_path):
    def evaluated(name="some/model", **settings):
        out = tmp_path / "evals" / name.replace("/", "-")
        found = evaluate_model(
            load_causal_lm(student, dtype=torch.float32),
            load_tokenizer(student),
            tasks=["arithmetic", choice_task(), answer_task()],
            protocols=PROTOCOLS,
            out_dir=out,
            model_name=name,
            **{"limit": 6, **settings},
        )
        return out, found

    return evaluated


def test_lm_eval_s_own_tools_read_the_files(evaluated, tmp_path):
    folder, found = evaluated()
    path = write_lm_eval(folder, tmp_path / "out")
    assert path.parent == tmp_path / "out" / "some__model"
    names = [str(each) for each in path.parent.iterdir()]
    assert get_results_filenames(names) == [str(path)]
    samples = {
        get_file_task_name(name.rpartition("/")[2]): name for name in get_sample_results_filenames(names)
    }
    (date,) = {get_file_datetime(name.rpartition("/")[2]) for name in names if name.endswith("jsonl")}
    assert path.name == f"results_{date}.json"
    content = json.loads(path.read_text())
    assert set(samples) == set(content["results"])
    assert {"tiny_choice", "tiny_choice_generation", "tiny_choice_generation_letter", "tiny_answer"} <= set(
        samples
    )
    table = make_table(content)
    assert "acc_norm" in table
    entry = next(each for each in found["tasks"] if each["task"] == "tiny_choice")
    scores = content["results"]["tiny_choice"]
    assert scores["acc,none"] == entry["likelihood"]["value"]
    assert scores["acc_norm,none"] == entry["likelihood_per_char"]["value"]
    # the filter of lm-eval's own judge
    assert "exact_match,first" in content["results"]["tiny_answer"]
    for task, name in samples.items():
        rows = datasets.load_dataset("json", data_files=name, split="train")
        assert len(rows) == content["n-samples"][task]["effective"] == 6
        for metric in rows[0]["metrics"]:
            key = f"{metric},{rows[0]['filter']}"
            assert sum(rows[metric]) / 6 == content["results"][task][key]


def test_our_reader_reads_them(evaluated, tmp_path):
    folder, _ = evaluated()
    write_lm_eval(folder, tmp_path / "out")
    files = {each.task: each for each in map(read_sample_file, find_sample_files(tmp_path / "out"))}
    assert files["tiny_choice"].model == "some/model"
    assert set(files["tiny_choice"].rows[0].values) == {"acc", "acc_norm"}
    assert files["tiny_answer"].rows[0].generated
    assert not files["tiny_choice"].rows[0].generated


def test_compare_takes_two_models_of_them(evaluated, tmp_path, capsys):
    places = []
    for name in ("one", "two"):
        folder, _ = evaluated(name)
        places.append(write_lm_eval(folder, tmp_path / "out").parent)
    assert main(["compare", *map(str, places), "--out", str(tmp_path / "page")]) == 0
    said = capsys.readouterr().out
    assert "tiny_choice" in said
    assert (tmp_path / "page" / "index.html").is_file() or list((tmp_path / "page").glob("*.html"))


def test_a_model_whose_name_is_no_folder_stays_inside(evaluated, tmp_path):
    folder, _ = evaluated("../../up")
    path = write_lm_eval(folder, tmp_path / "out")
    assert path.parents[1] == tmp_path / "out"
    with pytest.raises(EvalError, match=r"missing|no such file|there is no"):
        write_lm_eval(tmp_path / "nothing", tmp_path / "out")


# ----- the command line -----


def test_the_command_line_writes_them(student, choice_task, tmp_path, capsys):
    out = tmp_path / "theirs"
    words = [
        "eval",
        str(student),
        "--tasks",
        str(choice_task()),
        "--limit",
        "3",
        "--out",
        str(tmp_path / "mine"),
    ]
    assert main([*words, "--lm-eval-out", str(out)]) == 0
    assert len(list(out.rglob("samples_*.jsonl"))) == 2
    assert str(out) in capsys.readouterr().out


def test_the_command_line_runs_python_of_a_task_where_it_is_trusted(student, choice_task, tmp_path, capsys):
    path = choice_task()
    path.with_name("code.py").write_text("def process(docs):\n    return docs.select(range(2))\n")
    path.write_text(path.read_text() + "process_docs: !function code.process\n")
    words = ["eval", str(student), "--tasks", str(path), "--out", str(tmp_path / "mine")]
    assert main(words) == 1
    assert "--trust-task-code" in capsys.readouterr().err
    assert main([*words, "--trust-task-code"]) == 0
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert results["tasks"][0]["n"] == 2


def test_names_of_lm_eval_are_found_among_its_tasks(monkeypatch, choice_task, answer_task):
    from lm_eval.tasks import TaskManager

    from gendistill_evals import lm_eval_tasks, load_tasks

    path = choice_task()
    answer_task()
    path.with_name("group.yaml").write_text("group: both\ntask:\n  - tiny_choice\n  - tiny_answer\n")
    manager = TaskManager(include_defaults=False, include_path=str(path.parent))
    monkeypatch.setattr(lm_eval_tasks, "_manager", lambda: manager)
    assert [task.name for task in load_tasks(["lm_eval:both"])] == ["tiny_choice", "tiny_answer"]
    assert load_task("lm_eval:tiny_choice").name == "tiny_choice"
    with pytest.raises(EvalError, match="is 2 tasks, and one is meant"):
        load_task("lm_eval:both")
    with pytest.raises(EvalError, match='did you mean "lm_eval:tiny_choice"'):
        load_task("lm_eval:tiny_choise")
