"""A recipe that watches its stages: one run shows everything where people look for it."""

import json

import pytest

from gendistill.runs import pipeline

WATCH = (
    "watch.layers_every_steps=1",
    "watch.answers_every_steps=3",
    "watch.score_every_steps=3",
    "watch.answer_tokens=2",
)


@pytest.fixture(scope="module")
def watched(shared_place):
    root = shared_place.root
    return shared_place.run(
        *WATCH,
        f"watch.questions={root / 'open.jsonl'}",
        f"watch.task={root / 'colours.yaml'}",
        f"stages.block.stop_early={{every_steps: 1, patience: 1, task: {root / 'colours.yaml'}}}",
        "stages.block.steps=9",
        "eval.tasks=[]",
        "eval.questions=null",
        name="watched",
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_writes_what_it_was_asked_to_look_at(watched):
    rows = lines(watched.stage("distill") / "metrics.jsonl")
    assert {"0/cosine", "0/half_life_50"} <= rows[0]["layers"].keys()
    assert rows[2]["score"]["n"] == 3
    answers = lines(watched.stage("distill") / "answers.jsonl")
    assert [(row["step"], row["question"]) for row in answers] == [(3, "Why?"), (3, "Who?")]


def test_a_stage_of_a_recipe_ends_early(watched):
    result = json.loads((watched.stage("block") / "result.json").read_text())
    rows = lines(watched.stage("block") / "metrics.jsonl")
    assert result["steps"] == rows[-1]["step"] < 9
    assert rows[-1]["score"]["since"] == 1


def test_the_page_shows_answers_and_layers(watched):
    page = (watched.root / "report" / "index.html").read_text()
    for words in ("While it trained", "Why?", "cosine", "half-life"):
        assert words in page


def test_nothing_is_done_again_because_one_looks_elsewhere(shared_place, watched, monkeypatch, steps_of):
    monkeypatch.setattr(pipeline, "train_stage", None)
    root = shared_place.root
    again = shared_place.run(
        f"stages.block.stop_early={{every_steps: 1, patience: 1, task: {root / 'colours.yaml'}}}",
        "stages.block.steps=9",
        "eval.tasks=[]",
        "eval.questions=null",
        "watch.groups=false",
        name="watched",
    )
    assert steps_of(again) == steps_of(watched)


def test_a_task_that_the_evaluation_scores_too_is_warned_of(shared_place):
    from gendistill.runs.advice import advise

    stop = "stages.distill.stop_early={{every_steps: 1, task: {}}}"
    task = shared_place.root / "colours.yaml"
    (warning,) = advise(shared_place.recipe(stop.format(task)), None, chat_template=False)
    assert "its score will be too good" in warning
    assert not advise(shared_place.recipe(stop.format("copy")), None, chat_template=False)


def test_questions_that_cannot_be_asked_are_refused_before_conversion(place):
    from gendistill_evals.errors import EvalError

    long = json.dumps({"question": "why " * 3000})
    (place.root / "long.jsonl").write_text(long + "\n")
    with pytest.raises(EvalError, match="too long"):
        place.run("watch.answers_every_steps=1", f"watch.questions={place.root / 'long.jsonl'}")
    assert not place.root.joinpath("runs", "tiny", "student-init").exists()
