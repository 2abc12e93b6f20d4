"""What the main process finds out, every process hears: results, and errors of either package."""

from types import SimpleNamespace

import pytest
import torch

from gendistill.errors import DataError
from gendistill.training.parallel import DataParallel, ddp
from gendistill_evals.errors import EvalError


def process(rank):
    facts = {"process_index": rank, "num_processes": 2, "is_main_process": rank == 0}
    return DataParallel(SimpleNamespace(**facts, device=torch.device("cpu")))


@pytest.mark.parametrize(
    "error", [DataError("no rows", where="data.text"), EvalError("no items", where="a.yaml")]
)
def test_an_error_of_the_main_process_reaches_the_others(monkeypatch, error):
    sent = []
    monkeypatch.setattr(ddp, "broadcast_object_list", lambda outcome: sent.append(list(outcome)))

    def fail():
        raise error

    with pytest.raises(type(error)):
        process(0).on_main(fail)

    def receive(outcome):
        outcome[:] = sent[0]

    monkeypatch.setattr(ddp, "broadcast_object_list", receive)
    with pytest.raises(type(error)) as caught:
        process(1).on_main(fail)
    assert caught.value.where == error.where
