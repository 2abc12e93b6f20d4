"""What a student scored, in its card as the hub reads it."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from gendistill.errors import CheckpointError
from gendistill.models.card import CardScore, add_scores, front_matter
from gendistill.models.io import save_student
from gendistill.testing import tiny_student

SCORES = [
    CardScore("quiz", "likelihood", "acc", 60.0, 50.126, 69.0, 100, teacher=61.0),
    CardScore("quiz", "generation", "acc", 41.0, 31.0, 51.0, 100, teacher=60.5),
    CardScore("sums: 1, {2}", "generation", "exact_match", 1 / 3, 0.0, 9.0, 24),
]


@pytest.fixture
def folder(tmp_path):
    save_student(tiny_student(), tmp_path / "student", companions=None)
    return tmp_path / "student"


def test_the_hub_reads_both_protocols_with_items_and_intervals(folder):
    add_scores(folder, SCORES)
    card = ModelCard.load(folder / "README.md")
    found = {(each.dataset_name, each.metric_args["protocol"]): each for each in card.data.eval_results or []}
    assert found.keys() == {(score.task, score.protocol) for score in SCORES}
    ranked = found["quiz", "likelihood"]
    assert (ranked.metric_type, ranked.metric_value, ranked.task_type) == ("acc", 60.0, "text-generation")
    assert ranked.metric_args == {
        "protocol": "likelihood",
        "n": 100,
        "interval_95": [50.13, 69.0],
        "teacher": 61.0,
    }
    assert found["quiz", "generation"].metric_value == 41.0
    assert "teacher" not in found["sums: 1, {2}", "generation"].metric_args
    # what the hub's own writer makes of it can be read again
    assert len(ModelCard(str(card)).data.eval_results or []) == 3


def test_new_scores_replace_the_old_and_nothing_else_changes(folder):
    before = (folder / "README.md").read_text()
    add_scores(folder, SCORES)
    add_scores(folder, SCORES[:1])
    (entry,) = front_matter(folder / "README.md")["model-index"][0]["results"]
    assert len(entry["metrics"]) == 1
    add_scores(folder, [])
    assert (folder / "README.md").read_text() == before


def test_metadata_that_cannot_be_read_is_not_thrown_away(tmp_path):
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: [mit\nmine: kept\n---\n# a card\n")
    before = card.read_bytes()
    with pytest.raises(CheckpointError, match="cannot be read as YAML"):
        add_scores(tmp_path, [])
    assert card.read_bytes() == before
