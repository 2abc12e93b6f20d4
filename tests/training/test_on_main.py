"""What the main process finds out, every process hears: results, and errors of either package."""

from types import SimpleNamespace

import pytest

from gendistill.errors import DataError
from gendistill.training import processes
from gendistill_evals.errors import EvalError


@pytest.mark.parametrize(
    "error", [DataError("no rows", where="data.text"), EvalError("no items", where="a.yaml")]
)
def test_an_error_of_the_main_process_reaches_the_others(monkeypatch, error):
    sent = []
    monkeypatch.setattr(processes, "broadcast_object_list", lambda outcome: sent.append(list(outcome)))

    def fail():
        raise error

    with pytest.raises(type(error)):
        processes.on_main(SimpleNamespace(num_processes=2, is_main_process=True), fail)

    def receive(outcome):
        outcome[:] = sent[0]

    monkeypatch.setattr(processes, "broadcast_object_list", receive)
    with pytest.raises(type(error)) as caught:
        processes.on_main(SimpleNamespace(num_processes=2, is_main_process=False), fail)
    assert caught.value.where == error.where
