"""Scores that are all equal are still a sample: nothing that a report shows of them is known exactly."""

from __future__ import annotations

import re

import pytest

from gendistill.report.run_files import read_run
from gendistill.report.verdicts import verdict
from gendistill.report.write import gap_report


@pytest.mark.parametrize("size", [1, 24, 500])
@pytest.mark.parametrize("right", [0, 1])
def test_all_equal_scores_never_collapse_to_a_point(make_run, size, right):
    """Neither in the scores nor in the gaps, the hidden gap, what is kept, or the words."""
    scores = {"quiz": ([right] * size, [right] * size)}
    found = gap_report(read_run(make_run(teacher=scores, student=scores)))
    (quiz,) = found.tasks
    estimates = [quiz.hidden, found.mean_hidden]
    for protocol in ("likelihood", "generation"):
        estimates += [
            quiz.teacher[protocol],
            quiz.student[protocol],
            quiz.gap[protocol],
            found.mean_gap(protocol),
        ]
        if quiz.kept[protocol]:
            estimates += [quiz.kept[protocol].plain, quiz.kept[protocol].above_chance]
    for estimate in estimates:
        assert estimate.low < estimate.high
        assert estimate.low <= estimate.value <= estimate.high
    assert (quiz.gap["generation"].value, quiz.hidden.value) == (0, 0)
    assert ("no verdict" in verdict(found)) or size == 500
    assert not re.search(r"to within 0\.0 points", verdict(found))
