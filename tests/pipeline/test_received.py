"""A student that was sent to another machine does not stay there when its stage does not begin."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from gendistill.errors import CheckpointError
from gendistill.runs import pipeline
from gendistill.training.parallel import Single


class Remote(Single):
    """A process of a machine that gets copies of folders."""

    def __init__(self, copy):
        super().__init__(torch.device("cpu"))
        self.copy = copy

    def folder(self, path):
        self.copy.mkdir()
        return self.copy

    def close(self):
        self.copy.rmdir()


def test_the_copy_of_a_student_that_cannot_be_loaded_is_removed(tmp_path, monkeypatch):
    def load_student(folder, **_):
        assert folder.is_dir()
        raise CheckpointError("damaged")

    workspace = SimpleNamespace(
        folder=lambda step: tmp_path / step, making=lambda step: contextlib.nullcontext(tmp_path)
    )
    closed = []
    stream = SimpleNamespace(close=lambda: closed.append(True))
    monkeypatch.setattr(pipeline, "build_stream", lambda *_, **__: stream)
    copy = tmp_path / "copy"
    context = SimpleNamespace(
        recipe=None, workspace=workspace, parallel=Remote(copy), tokenizer=None, load_student=load_student
    )
    with pytest.raises(CheckpointError, match="damaged"):
        pipeline._train(context, "distill", None, tmp_path)
    assert closed
    assert not copy.exists()
