"""What people really give: mixed folders, edited files, names that nobody has, ends of the scale."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from gendistill.cli.main import main
from gendistill.comparison import compare, load_scores
from gendistill.comparison.load import load_model
from gendistill.comparison.tables import render_latex
from gendistill.comparison.wording import headline
from gendistill.errors import GendistillError
from gendistill.report.tables import markdown_cell
from gendistill_evals.errors import EvalError
from gendistill_evals.formats.lm_eval_write import write_lm_eval


def run(*places, **settings):
    return compare(load_scores([str(place) for place in places]), **settings)


def random_scores(seed: int, n: int = 200) -> list[float]:
    generator = random.Random(seed)
    return [float(generator.random() < 0.5) for _ in range(n)]


def widths(estimate) -> float:
    return estimate.high - estimate.low


@pytest.mark.parametrize("n", [1, 2, 30])
@pytest.mark.parametrize(("first", "second"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (1.0, 1.0)])
def test_two_tasks_that_are_all_right_or_all_wrong_have_a_mean(make_lm_eval, n, first, second):
    one = make_lm_eval("a", {"x": [first] * n, "y": [first] * n})
    two = make_lm_eval("b", {"x": [second] * n, "y": [second] * n})
    mean = run(one, two, measures=["acc"]).pairs[-1]
    assert mean.gap.value == pytest.approx(100 * (second - first))
    assert 0 <= mean.not_inferior_p <= mean.equivalent_p <= 1


def test_tasks_of_the_same_items_do_not_halve_the_error_of_their_mean(make_lm_eval):
    """As of truthfulqa_mc1 and truthfulqa_mc2, whose errors are not independent."""
    first, second = random_scores(0), random_scores(1)
    one, two = make_lm_eval("a", {"x": first, "y": first}), make_lm_eval("b", {"x": second, "y": second})
    x, y, mean = run(one, two, measures=["acc"]).pairs
    assert (mean.gap.value, mean.gap.low, mean.gap.high) == pytest.approx(
        (x.gap.value, x.gap.low, x.gap.high)
    )
    assert mean.verdict is y.verdict


def test_tasks_of_other_items_add_their_errors_in_quadrature(make_lm_eval, written_row):
    def rows(scores, start):
        return [written_row(start + place, right) for place, right in enumerate(scores)]

    first, second = random_scores(0), random_scores(1)
    one, two = (
        make_lm_eval(name, {"x": rows(scores, 0), "y": rows(scores, 1000)})
        for name, scores in (("a", first), ("b", second))
    )
    x, _, mean = run(one, two).pairs
    assert widths(mean.gap) == pytest.approx(widths(x.gap) / 2**0.5)


def test_items_needed_count_items_and_not_questions(make_lm_eval):
    first = [float(place // 3 % 2) for place in range(90)]
    second = [float(place // 3 % 2 and place // 9 % 2) for place in range(90)]
    places = [str(make_lm_eval("a", {"quiz": first})), str(make_lm_eval("b", {"quiz": second}))]
    alone, grouped = (compare(load_scores(places, group_by=by)).pairs[0] for by in (None, "passage"))
    assert grouped.items_needed > 2 * alone.items_needed


def test_items_that_all_share_a_question_are_refused(make_lm_eval, ranked_row):
    rows = [ranked_row(place, float(place % 2)) for place in range(3)]
    places = [str(make_lm_eval(name, {"quiz": rows})) for name in "ab"]
    with pytest.raises(GendistillError, match="all 3 items share one question"):
        compare(load_scores(places, group_by="passage"))


@pytest.mark.parametrize("measures", [["acc", "accc"], ["accc"]])
def test_a_measure_that_nobody_has_is_refused(make_lm_eval, measures):
    folders = [make_lm_eval(name, {"quiz": [1.0] * 9}) for name in "ab"]
    with pytest.raises(GendistillError, match="no task was scored under accc; there are: acc, acc_norm"):
        run(*folders, measures=measures)


def test_a_measure_that_one_model_lacks_is_refused_and_not_left_out(make_lm_eval, ranked_row):
    one = make_lm_eval("a", {"quiz": [ranked_row(place, 1.0) for place in range(9)]})
    two = make_lm_eval("b", {"quiz": [ranked_row(place, 1.0, metrics=["acc"]) for place in range(9)]})
    with pytest.raises(GendistillError, match="org/b has no acc_norm on quiz; it has acc"):
        run(one, two, measures=["acc", "acc_norm"])


def test_tasks_that_a_measure_leaves_out_are_named(make_lm_eval, written_row):
    tasks = {"quiz": [1.0] * 9, "sums": [written_row(place, 1.0) for place in range(9)]}
    comparison = run(*(make_lm_eval(name, tasks) for name in "ab"), measures=["acc"])
    assert comparison.notes == ("left out, because not scored under acc: sums",)


def test_a_task_without_scores_of_items_is_left_out_with_its_reason(make_lm_eval, ranked_row):
    rows = [ranked_row(place, 1.0, metrics=["word_perplexity"]) for place in range(9)]
    for row in rows:
        row["word_perplexity"] = [-12.5, 7]
    folders = [make_lm_eval(name, {"quiz": [1.0] * 9, "text": rows}) for name in "ab"]
    comparison = run(*folders)
    assert {pair.task for pair in comparison.pairs} == {"quiz"}
    assert len(comparison.notes) == 1
    assert (
        "nothing of text is a score of single items (word_perplexity: less of it is better"
        in comparison.notes[0]
    )
    with pytest.raises(GendistillError, match="nothing can be compared item by item: left out"):
        run(*folders, tasks=["text"])


@pytest.mark.parametrize("metric", ["brier_score", "wer"])
def test_less_is_better_is_known_without_a_results_file(make_lm_eval, ranked_row, metric):
    rows = [ranked_row(place, 0.25, metrics=[metric, "acc"]) for place in range(9)]
    folders = [make_lm_eval(name, {"quiz": rows}) for name in "ab"]
    for folder in folders:
        next(folder.glob("*/results_*")).unlink()
    assert [pair.measure for pair in run(*folders).pairs] == ["acc"]
    with pytest.raises(GendistillError, match=rf"under {metric} \(less of it is better\)"):
        run(*folders, measures=[metric])


def test_samples_of_two_models_in_one_folder_are_refused(make_lm_eval):
    """As lm-eval writes them with --output_path FILE.json."""
    one, two = make_lm_eval("a", {"x": [1.0] * 9, "y": [1.0] * 9}), make_lm_eval("b", {"x": [0.0] * 9})
    mixed = next(one.iterdir())
    for path in next(two.iterdir()).iterdir():
        (mixed / path.name.replace("2026-01-02", "2026-01-03")).write_bytes(path.read_bytes())
    with pytest.raises(EvalError, match="holds samples of 2 models: 'org/a', 'org/b'"):
        run(one, two)


@pytest.mark.parametrize("key", ["temperature", "max_gen_toks"])
def test_answers_written_in_another_way_are_refused_unless_allowed(make_lm_eval, written_row, key):
    rows = [written_row(place, 1.0) for place in range(9)]
    one = make_lm_eval("a", {"sums": rows})
    for row in rows:
        row["arguments"]["gen_args_0"]["arg_1"][key] = 7
    two = make_lm_eval("b", {"sums": rows})
    with pytest.raises(GendistillError, match=f"asked differently: generation.{key} None / 7"):
        run(one, two)
    assert run(one, two, other_prompts=True).notes


def test_settings_are_compared_between_all_models(make_lm_eval):
    """The one in the middle does not say how it was asked."""
    one = make_lm_eval("a", {"quiz": [1.0] * 9}, chat_template_sha="x")
    two, three = make_lm_eval("b", {"quiz": [1.0] * 9}), make_lm_eval("c", {"quiz": [1.0] * 9})
    next(two.glob("*/results_*")).unlink()
    with pytest.raises(GendistillError, match="chat_template_sha 'x' / None"):
        run(one, two, three)


def test_a_model_is_no_repeated_run_of_itself(make_lm_eval):
    one, two = (make_lm_eval(name, {"quiz": [1.0] * 9}) for name in "ab")
    with pytest.raises(GendistillError, match="first model's own result"):
        run(one, two, again=load_model(str(one)))


def test_a_number_that_no_float_holds_is_not_a_score(make_lm_eval, samples_of, capsys):
    one, two = (make_lm_eval(name, {"quiz": [1.0] * 9}) for name in "ab")
    path = samples_of(one)
    path.write_text(path.read_text().replace('"acc": 1.0', '"acc": ' + "1" * 400, 1))
    assert main(["compare", str(one), str(two)]) == 1
    assert "outside 0 to 1" in capsys.readouterr().err


def edit_results(folder: Path, change) -> None:
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


ORDERS = [{"flips": "x"}, {"flips": 7}, [1], None]


@pytest.mark.parametrize(
    "change",
    [
        *({"diagnostics": found} for found in ([], {"tasks": []}, {"tasks": {"quiz": []}}, None)),
        *({"diagnostics": {"tasks": {"quiz": {"generation": {"order": order}}}}} for order in ORDERS),
        {"settings": None},
    ],
)
def test_diagnostics_of_another_shape_are_not_measured(make_ours, change):
    folders = [make_ours(name, {"quiz": ([1] * 9, [1] * 9)}) for name in "ab"]
    for folder in folders:
        edit_results(folder, change)
    assert run(*folders).pairs[1].flips_floor is None


@pytest.mark.parametrize("change", [{"settings": []}, {"model": 5}, {"tasks": [{"task": "quiz", "n": 9}]}])
def test_edited_results_are_refused_by_place(make_ours, change):
    folders = [make_ours(name, {"quiz": ([1] * 9, [1] * 9)}) for name in "ab"]
    edit_results(folders[1], change)
    with pytest.raises(GendistillError, match="something else than it should") as caught:
        run(*folders)
    assert caught.value.where == str(folders[1] / "results.json")


@pytest.mark.parametrize(
    "change",
    [
        {"options": 5},
        {"prompt": [1]},
        {"prompt": None},
        {"generation": {"correct": 7, "text": "", "extracted": None}},
        {"generation": []},
    ],
)
def test_edited_samples_are_refused_by_place(make_ours, change):
    folders = [make_ours(name, {"quiz": ([1] * 9, [1] * 9)}) for name in "ab"]
    path = folders[1] / "samples.jsonl"
    rows = [json.loads(line) | change for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(GendistillError, match="something else than it should") as caught:
        run(*folders)
    assert caught.value.where == str(path)


@pytest.fixture
def mixed(make_lm_eval, written_row):
    """Two models that write alike; on the ranked task, which has a metric of its own, the second has all wrong."""
    sums = [written_row(place, 1.0) for place in range(100)]
    one = make_lm_eval("a", {"arc": [1.0] * 100, "sums": sums})
    two = make_lm_eval("b", {"arc": [0.0] * 100, "sums": sums})
    return [str(one), str(two)]


def test_the_headline_speaks_of_tasks_of_every_metric(mixed):
    said = headline(run(*mixed))
    assert said.startswith(
        "The data do not tell org/b from org/a (sums, exact_match,strict-match, 100 items)"
    )
    assert "org/b answers 100.0 points fewer items right than org/a (arc, acc, 100 items)" in said


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        ("gap<=3", 3),
        ("generation_gap<=3", 0),
        ("likelihood_gap<=3", 3),
        ("sums.gap<=3", 0),
        ("accuracy>=50", 3),
    ],
)
def test_a_gate_passes_over_no_task(mixed, tmp_path, capsys, gate, code):
    assert main(["compare", *mixed, "--out", str(tmp_path / "out"), "--gate", gate]) == code
    if code:
        assert "all tasks, acc" in capsys.readouterr().err


def test_no_row_of_latex_begins_with_what_a_line_end_would_take(make_lm_eval):
    folders = [make_lm_eval(name, {task: [1.0] * 9 for task in ("a", "[x]", "*y")}) for name in "ab"]
    assert not re.search(r"\\\\\s*[\[*]", render_latex(run(*folders)))


@pytest.mark.parametrize(
    ("text", "written"),
    [(r"a\|b", r"a\\\|b"), ("![x](y)", r"![x]\(y)"), ("`x`", r"\`x\`"), ("[-1, 2]", "[-1, 2]")],
)
def test_a_cell_of_markdown_holds_what_it_is_given(text, written):
    assert markdown_cell(text) == written


def test_files_of_a_comparison_change_together_or_not_at_all(make_lm_eval, tmp_path):
    folders = [str(make_lm_eval(name, {"quiz": [1.0] * 9})) for name in "ab"]
    out = tmp_path / "out"
    assert main(["compare", *folders, "--out", str(out)]) == 0
    (out / "index.html").unlink()
    (out / "index.html").mkdir()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert main(["compare", *folders, "--margin", "9", "--out", str(out)]) != 0
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_a_task_that_is_called_as_a_path_is_written_inside_its_folder(make_ours, tmp_path):
    folder = make_ours("a", {"../../outside": ([1] * 9, [1] * 9)})
    written = write_lm_eval(folder, tmp_path / "out" / "deep")
    assert {path.parent for path in (tmp_path / "out").rglob("*.json*")} == {written.parent}
    assert not list(tmp_path.glob("out/**/.*.partial"))
