"""Our own folders: eval folders and run folders, both protocols, floors of flips, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest

from gendistill.comparison import compare, load_scores
from gendistill.errors import GendistillError
from gendistill_evals import EvalError

TEACHER = {"quiz": ([1] * 60 + [0] * 40, [1] * 80 + [0] * 20)}
STUDENT = {"quiz": ([1] * 60 + [0] * 40, [1] * 50 + [0] * 50)}


def run(*places, **settings):
    return compare(load_scores([str(place) for place in places]), **settings)


def test_both_protocols_and_what_one_of_them_hides(make_ours):
    comparison = run(make_ours("teacher", TEACHER), make_ours("student", STUDENT))
    gaps = {pair.measure: pair.gap.value for pair in comparison.pairs}
    assert gaps == pytest.approx({"likelihood": 0, "generation": -30})
    assert comparison.leads == ["generation"]
    (hidden,) = comparison.hidden
    assert hidden.hidden.value == pytest.approx(-30)
    assert hidden.hidden.high < 0
    flip = comparison.flips[0]
    assert (flip.prompt, flip.target, flip.first_answer, flip.second_answer) == (
        "question 50?",
        "yes",
        "it is yes",
        "no",
    )


def test_a_run_folder_is_its_teacher_and_student_and_beside_others_its_student(make_ours, tmp_path):
    for role, scores in (("teacher", TEACHER), ("student", STUDENT)):
        (tmp_path / "demo" / "eval").mkdir(parents=True, exist_ok=True)
        shutil.move(make_ours(role, scores), tmp_path / "demo" / "eval" / role)
    assert run(tmp_path / "demo").models == ("teacher", "student")
    shutil.copytree(tmp_path / "demo", tmp_path / "other")
    both = run(tmp_path / "demo", tmp_path / "other")
    assert both.models == ("demo", "other")
    assert both.pairs[0].gap.value == 0
    shutil.rmtree(tmp_path / "other" / "eval" / "student")
    with pytest.raises(GendistillError, match="the student of this run has no scores"):
        run(tmp_path / "demo", tmp_path / "other")


def test_a_run_without_scores_says_how_to_score_it(make_ours, tmp_path):
    demo = tmp_path / "demo"
    demo.mkdir()
    (demo / "manifest.json").write_text("{}")
    with pytest.raises(GendistillError, match="the teacher of this run has no scores") as caught:
        run(demo)
    assert f"gendistill eval {demo}" in (caught.value.hint or "")
    with pytest.raises(GendistillError, match="the student of this run has no scores"):
        run(make_ours("one", STUDENT), demo)


@pytest.mark.parametrize("name", ["results.json", "samples.jsonl"])
def test_one_file_of_an_evaluation_points_to_its_folder(make_ours, name):
    folder = make_ours("one", STUDENT)
    with pytest.raises(GendistillError, match="one file of an evaluation") as caught:
        load_scores([str(folder), str(folder / name)])
    assert str(folder) in (caught.value.hint or "")


def test_a_field_to_group_by_is_refused_where_items_name_their_group(make_ours):
    places = [str(make_ours("teacher", TEACHER)), str(make_ours("student", STUDENT))]
    with pytest.raises(GendistillError, match="ours name their group themselves"):
        load_scores(places, group_by="passage")


def test_permuted_options_give_the_floor_of_flips(make_ours):
    measured = {
        "diagnostics": {"tasks": {"quiz": {"generation": {"order": {"flips": 0.21}}, "likelihood": {}}}}
    }
    comparison = run(make_ours("teacher", TEACHER), make_ours("student", STUDENT, **measured))
    assert [pair.flips_floor for pair in comparison.pairs] == [None, pytest.approx(21)]


def test_three_models_are_ranked_under_both_protocols(make_ours):
    by_model = {"a": (90, 30), "b": (70, 60), "c": (40, 90)}
    folders = [
        make_ours(name, {"quiz": tuple([1] * right + [0] * (100 - right) for right in pair)})
        for name, pair in by_model.items()
    ]
    comparison = run(*folders)
    (agreement,) = comparison.agreement
    assert agreement.tau == pytest.approx(-1)
    assert all(each.inverted and each.p_inverted < 0.001 for each in comparison.hidden)


@pytest.mark.parametrize("field", ["items_sha256", "prompt_sha256", "metric"])
def test_other_tasks_of_one_name_are_refused(make_ours, field):
    one, two = make_ours("teacher", TEACHER), make_ours("student", STUDENT)
    content = json.loads((two / "results.json").read_text())
    content["tasks"][0][field] = "other"
    (two / "results.json").write_text(json.dumps(content))
    with pytest.raises(GendistillError, match=f"asked differently: {field}"):
        run(one, two)


def test_another_chat_template_is_refused_and_batch_size_is_not(make_ours):
    one = make_ours("teacher", TEACHER)
    free = {"max_new_tokens": 64, "chat_template_sha256": "c" * 64, "batch_size": 1}
    assert run(one, make_ours("student", STUDENT, settings=free)).pairs
    other = make_ours("student", STUDENT, settings=free | {"chat_template_sha256": "d" * 64})
    with pytest.raises(GendistillError, match="chat_template_sha256"):
        run(one, other)


def test_a_protocol_that_one_side_lacks_is_refused_with_what_both_have(make_ours):
    one, two = make_ours("teacher", TEACHER), make_ours("student", {"quiz": (STUDENT["quiz"][0], None)})
    with pytest.raises(GendistillError, match="models/student lacks generation") as caught:
        run(one, two)
    assert caught.value.hint == "--protocol likelihood compares what all models have"
    assert [pair.measure for pair in run(one, two, measures=["likelihood"]).pairs] == ["likelihood"]
    with pytest.raises(GendistillError, match="models/student has no generation on quiz; it has likelihood"):
        run(one, two, measures=["generation"])


def test_files_of_different_evaluations_are_refused(make_ours):
    one, two = make_ours("teacher", TEACHER), make_ours("student", STUDENT)
    lines = (two / "samples.jsonl").read_text().splitlines()
    (two / "samples.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(GendistillError, match=r"counts 100 items, samples\.jsonl scores 99"):
        run(one, two)
    (two / "samples.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    with pytest.raises(GendistillError, match="1 items stand there more than once: 000"):
        run(one, two)


def test_results_of_another_schema_are_refused(make_ours):
    with pytest.raises(EvalError, match="schema 99"):
        run(make_ours("teacher", TEACHER), make_ours("student", STUDENT, schema=99))
