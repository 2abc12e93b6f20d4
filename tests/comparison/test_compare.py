"""Laws of a comparison: what it counts, what it refuses, and how it reads files of lm-eval."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gendistill.comparison import Comparison, compare, load_scores
from gendistill.comparison.load import load_model
from gendistill.comparison.values import ALL_TASKS, Verdict
from gendistill.errors import GendistillError
from gendistill_evals import EvalError

FIRST = [1.0] * 60 + [0.0] * 40
SECOND = [1.0] * 50 + [0.0] * 10 + [1.0] * 4 + [0.0] * 36


def run(*places: Path | str, **settings: Any) -> Comparison:
    return compare(load_scores([str(place) for place in places]), **settings)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# what is counted


def test_a_pair_counts_items(make_lm_eval):
    comparison = run(make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": SECOND}))
    assert comparison.models == ("org/a", "org/b")
    assert [pair.measure for pair in comparison.pairs] == ["acc", "acc_norm"]
    pair = comparison.pairs[0]
    assert (pair.first_score.value, pair.second_score.value, pair.gap.value) == pytest.approx((60, 54, -6))
    assert (pair.lost, pair.gained, pair.n, pair.flips) == (10, 4, 100, pytest.approx(14))
    # 2 * P(at most 4 heads of 14)
    assert pair.p == pytest.approx(2 * 1471 / 2**14)
    assert pair.gap.low < -6 < pair.gap.high
    assert pair.verdict is Verdict.UNDECIDED


def test_a_model_against_itself_is_zero_in_every_statistic(make_lm_eval):
    comparison = run(
        f"one={make_lm_eval('a', {'quiz': FIRST, 'sums': SECOND})}",
        f"two={make_lm_eval('a', {'quiz': FIRST, 'sums': SECOND})}",
    )
    assert len(comparison.pairs) == 6
    for pair in comparison.pairs:
        assert (pair.gap.value, pair.gained, pair.lost, pair.flips) == (0, 0, 0, 0)
        assert pair.gap.low < 0 < pair.gap.high
        assert pair.p in (1.0, None)
        assert pair.items_needed is None
    assert not comparison.flips


def test_swapping_the_models_turns_signs_around(make_lm_eval):
    one, two = make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": SECOND})
    there, back = run(one, two).pairs[0], run(two, one).pairs[0]
    assert (there.gap.low, there.gap.high) == pytest.approx((-back.gap.high, -back.gap.low))
    assert (there.p, there.gained) == (back.p, back.lost)


def test_order_of_lines_is_irrelevant(make_lm_eval, samples_of):
    one, two = make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": SECOND})
    before = run(one, two)
    lines = samples_of(two).read_text().splitlines()
    random.Random(1).shuffle(lines)
    samples_of(two).write_text("\n".join(lines) + "\n")
    after = run(one, two)
    assert after.pairs == before.pairs
    assert after.flips == before.flips


def test_filters_are_told_apart(make_lm_eval, written_row):
    rows = {
        name: [
            written_row(place, float(place < right), filter=filter)
            for filter, right in by_filter.items()
            for place in range(20)
        ]
        for name, by_filter in (
            ("a", {"strict-match": 10, "flexible-extract": 15}),
            ("b", {"strict-match": 2, "flexible-extract": 15}),
        )
    }
    comparison = run(*(make_lm_eval(name, {"gsm8k": found}) for name, found in rows.items()))
    gaps = {pair.measure: pair.gap.value for pair in comparison.pairs}
    assert gaps == pytest.approx({"exact_match,strict-match": -40, "exact_match,flexible-extract": 0})
    assert {pair.family for pair in comparison.pairs} == {"generation"}
    chosen = compare(
        load_scores([str(make_lm_eval(name, {"gsm8k": found})) for name, found in rows.items()]),
        measures=["exact_match,strict-match"],
    )
    assert [pair.measure for pair in chosen.pairs] == ["exact_match,strict-match"]


def test_tasks_have_a_mean_and_adjusted_p_values(make_lm_eval):
    worse = [0.0] * 20 + FIRST[20:]
    one, two = make_lm_eval("a", {"x": FIRST, "y": FIRST}), make_lm_eval("b", {"x": worse, "y": SECOND})
    x, y, mean = run(one, two, measures=["acc"]).pairs
    assert (mean.task, mean.gap.value, mean.p) == (
        ALL_TASKS,
        pytest.approx((x.gap.value + y.gap.value) / 2),
        None,
    )
    assert x.p_holm == pytest.approx(2 * x.p)
    assert y.p_holm == y.p
    assert x.verdict is Verdict.WORSE


def test_items_that_share_a_question_count_as_one(make_lm_eval):
    """Three forms of each question that flip together."""
    first = [float(place // 3 % 2) for place in range(90)]
    second = [float(place // 3 % 2 and place // 9 % 2) for place in range(90)]
    places = [str(make_lm_eval("a", {"quiz": first})), str(make_lm_eval("b", {"quiz": second}))]
    alone = compare(load_scores(places)).pairs[0]
    grouped = compare(load_scores(places, group_by="passage")).pairs[0]
    assert (alone.num_groups, grouped.num_groups) == (90, 30)
    assert grouped.gap.high - grouped.gap.low > 1.5 * (alone.gap.high - alone.gap.low)
    assert grouped.p > alone.p
    with pytest.raises(EvalError, match="no field 'author' to group by; it has: question, choices, passage"):
        load_scores(places, group_by="author")


def test_a_repeated_run_is_the_floor_of_flips(make_lm_eval):
    one, two = make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": SECOND})
    repeated = make_lm_eval("again", {"quiz": [*FIRST[:-7], *[1.0] * 7]})
    assert run(one, two).pairs[0].flips_floor is None
    assert run(one, two, again=load_model(str(repeated))).pairs[0].flips_floor == pytest.approx(7)


def test_twin_tasks_of_the_same_questions_have_a_hidden_gap(make_lm_eval, ranked_row):
    """lm-eval scores by one protocol per task; another task with the same items is the other protocol."""

    def write(row: dict[str, Any]) -> dict[str, Any]:
        row["arguments"] = {"gen_args_0": {"arg_0": "Q", "arg_1": {"until": []}}}
        row["exact_match"] = row.pop("acc")
        return {**row, "metrics": ["exact_match"], "target_hash": "of a text"}

    def both(name: str, ranked: list[float], written: list[float]) -> Path:
        rows = [write(ranked_row(place, right, metrics=["acc"])) for place, right in enumerate(written)]
        likely = [ranked_row(place, right, metrics=["acc"]) for place, right in enumerate(ranked)]
        return make_lm_eval(name, {"quiz": likely, "quiz_gen": rows})

    a, b, c = both("a", FIRST, FIRST), both("b", FIRST, [0.0] * 100), both("c", [1.0] * 100, SECOND)
    (hidden,) = run(a, b).hidden
    assert hidden.task == "quiz / quiz_gen"
    assert (hidden.by_likelihood, hidden.by_generation, hidden.hidden.value) == pytest.approx((0, -60, -60))
    assert not hidden.inverted
    inverted = run(a, c).hidden[0]
    assert inverted.inverted
    # by generation 10 lost and 4 gained is not significant, so neither is the inversion
    assert inverted.p_inverted == pytest.approx(2 * 1471 / 2**14)
    many = run(a, b, c)
    assert len(many.pairs) == 6
    assert many.agreement[0].tau is not None


# what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda row: row.update(doc_hash="other" + row["doc_hash"][5:]),
            "100 of 100 items have one id and are not the same",
        ),
        (
            lambda row: row.update(target_hash="1" * 64),
            "100 of 100 items have one id and are not the same item",
        ),
        (lambda row: row.update(prompt_hash="2" * 64), "asked differently: 100 of 100 prompts differ"),
        (lambda row: row.update(doc_id=0), "1 items stand there more than once: 0"),
        (lambda row: row.update(doc_id=row["doc_id"] + 10), "org/b lacks 10 of 100 items: 0, 1, 2"),
        (
            lambda row: row.update(acc_norm=[0.5]),
            "org/b lacks acc_norm .*acc_norm: it is \\[0.5\\], not one number",
        ),
        (lambda row: row.update(acc_norm=7), "org/b lacks acc_norm .*it is 7, outside 0 to 1"),
        (lambda row: row.update(acc_norm=float("nan")), "org/b lacks acc_norm .*not a finite number"),
        (lambda row: row.update(metrics=["acc"]), "org/b lacks acc_norm"),
    ],
    ids=["doc", "target", "prompt", "double", "missing", "list", "range", "nan", "metric"],
)
def test_samples_that_do_not_pair_are_refused(make_lm_eval, samples_of, change, message):
    one, two = make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": FIRST})
    edit(samples_of(two), change)
    with pytest.raises(GendistillError, match=message) as caught:
        run(one, two)
    assert "task quiz" in caught.value.where
    assert caught.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template_sha": "c" * 64}, "chat_template_sha None / 'cccc"),
        ({"n-shot": {"quiz": 5}}, "few_shot 0 / 5"),
        ({"system_instruction_sha": "s" * 64}, "system_instruction_sha None"),
        ({"versions": {"quiz": 2.0}}, r"version 1\.0 / 2\.0"),
    ],
)
def test_models_asked_in_other_ways_are_refused_unless_allowed(make_lm_eval, settings, message):
    one, two = make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": SECOND}, **settings)
    with pytest.raises(GendistillError, match=message) as caught:
        run(one, two)
    assert "--other-prompts" in caught.value.hint
    allowed = run(one, two, other_prompts=True)
    assert "asked differently" in allowed.notes[0]


def test_models_without_a_common_task_are_refused(make_lm_eval):
    with pytest.raises(GendistillError, match="no task in common: org/a has x; org/b has y"):
        run(make_lm_eval("a", {"x": FIRST}), make_lm_eval("b", {"y": FIRST}))
    one, two = make_lm_eval("a", {"x": FIRST, "z": FIRST}), make_lm_eval("b", {"y": FIRST, "z": FIRST})
    assert run(one, two).notes == (
        "left out, because not every model has it: x (of org/a)",
        "left out, because not every model has it: y (of org/b)",
    )
    with pytest.raises(GendistillError, match="org/b has no task x; it has y, z"):
        run(one, two, tasks=["x"])
    with pytest.raises(GendistillError, match="no task was scored under f1; there are: acc, acc_norm"):
        run(one, two, measures=["f1"])


def test_a_metric_of_which_less_is_better_is_not_compared(make_lm_eval):
    lower = {"higher_is_better": {"quiz": {"acc": True, "acc_norm": False}}}
    folders = [make_lm_eval(name, {"quiz": FIRST}, **lower) for name in "ab"]
    assert [pair.measure for pair in run(*folders).pairs] == ["acc"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no samples in the file"),
        ("not json\n", "not JSON"),
        ("[1]\n", "not a sample of lm-eval"),
        ('{"doc_id": 1}\n', "needs doc_id and doc"),
        ("\xff\xfe\n", "not JSON"),
    ],
)
def test_broken_samples_are_refused_by_file_and_line(make_lm_eval, samples_of, text, message):
    one, two = make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": FIRST})
    samples_of(two).write_bytes(text.encode("latin-1"))
    with pytest.raises(EvalError, match=message) as caught:
        run(one, two)
    assert str(samples_of(two)) in caught.value.where


def test_places_without_scores_are_refused(make_lm_eval, tmp_path):
    one = make_lm_eval("a", {"quiz": FIRST})
    (tmp_path / "empty").mkdir()
    several = tmp_path / "several"
    for name in "cd":
        shutil.move(next(make_lm_eval(name, {"quiz": FIRST}).iterdir()), several / f"org__{name}")
    for places, message in (
        ([one], "two models or more, got 1"),
        ([one, tmp_path / "empty"], "has no scores"),
        ([one, tmp_path / "nothing"], "no such file or folder"),
        ([one, one], "one name and place"),
        ([one, several], "samples of 2 models: org__c, org__d"),
    ):
        with pytest.raises((GendistillError, EvalError), match=message):
            load_scores([str(place) for place in places])


# what is read


def test_a_single_samples_file_is_one_task(make_lm_eval, samples_of):
    files = [samples_of(make_lm_eval(name, {"quiz": FIRST})) for name in "ab"]
    assert [pair.task for pair in run(*files).pairs] == ["quiz", "quiz"]


def test_the_newest_samples_of_a_task_are_read(make_lm_eval, samples_of):
    one, two = make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": SECOND})
    old = samples_of(two).with_name("samples_quiz_2025-01-01T00-00-00.000001.jsonl")
    shutil.copy(samples_of(one), old)
    assert run(one, two).pairs[0].gap.value == pytest.approx(-6)


def test_files_of_before_metrics_and_hashes_are_read(make_lm_eval, samples_of):
    """Older lines list neither metrics nor hashes, and have lists for arguments."""

    def age(row: dict[str, Any]) -> None:
        for key in ("metrics", "doc_hash", "prompt_hash", "target_hash", "filter"):
            del row[key]
        row["arguments"] = [[one["arg_0"], one["arg_1"]] for one in row["arguments"].values()]

    one, two = make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": SECOND})
    fresh = run(one, two)
    edit(samples_of(two), age)
    assert run(one, two).pairs == fresh.pairs
    assert run(one, two).flips == fresh.flips


def test_flips_show_both_answers(make_lm_eval):
    comparison = run(
        make_lm_eval("a", {"quiz": FIRST}), make_lm_eval("b", {"quiz": SECOND}), measures=["acc"]
    )
    lost = next(flip for flip in comparison.flips if not flip.gained)
    assert "Question: question" in lost.prompt
    assert (lost.first_answer, lost.second_answer) == ("option 0: yes", "option 1: no")
    assert {flip.gained for flip in comparison.flips} == {True, False}
