"""Fault drills of a whole stage: full disk, cut files and SIGTERM each leave an intact checkpoint and a clear word."""

import os
import re
import signal
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from gendistill.errors import OutputError, TrainingError
from gendistill.training import checkpoint
from gendistill.training.checkpoint import find_checkpoint
from gendistill.training.interrupt import StageStopped
from gendistill.training.log import MetricLog
from gendistill.training.parallel import Single
from gendistill.training.stage import StageRun

CHECKPOINTS = Path("stages") / "tiny" / "checkpoints"
SAVING = {"steps": 6, "save_every_steps": 2, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The rows of a stage that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.run_stage(folder, **SAVING)
    return tiny.rows(folder)


def names(folder):
    return sorted(path.name for path in (folder / "stages/tiny/checkpoints").iterdir())


def tensors_on_a_full_disk(monkeypatch, calls):
    """Let the file of the second checkpoint's weights, or of its moments, be written in part."""
    real = checkpoint.save_file

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 4:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)


def state_on_a_full_disk(monkeypatch, calls):
    real = checkpoint.write_json

    def full(path, content):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(path, content)

    monkeypatch.setattr(checkpoint, "write_json", full)


def metrics_on_a_full_disk(monkeypatch, calls):
    real = Path.open

    def full(path, mode="r", *arguments, **keywords):
        if path.name == "metrics.jsonl" and mode == "a":
            calls.append(path)
            if len(calls) == 4:
                raise OSError(28, "No space left on device")
        return real(path, mode, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", full)


@pytest.mark.parametrize("fill", [tensors_on_a_full_disk, state_on_a_full_disk, metrics_on_a_full_disk])
def test_a_full_disk_names_the_place_and_keeps_the_checkpoint_before(
    tiny, tmp_path, monkeypatch, whole, fill
):
    fill(monkeypatch, [])
    with pytest.raises(OutputError, match=r"the disk is full while writing .*tiny") as caught:
        tiny.run_stage(tmp_path, **SAVING)
    assert "free space" in (caught.value.hint or "")
    assert names(tmp_path) == ["step-000002"]
    monkeypatch.undo()
    tiny.run_stage(tmp_path, **SAVING)
    assert tiny.rows(tmp_path) == whole


@pytest.mark.parametrize(
    ("file", "share"), [("trained.safetensors", 0.99), ("optimizer.safetensors", 0.0), ("state.json", 0.5)]
)
def test_a_cut_checkpoint_is_named_and_the_one_before_is_taken(tiny, tmp_path, whole, capsys, file, share):
    class Enough(Exception):
        pass

    def stop(run):
        raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageRun, "_finish", stop)
        with pytest.raises(Enough):
            tiny.run_stage(tmp_path, **SAVING)
    assert names(tmp_path) == ["step-000004", "step-000006"]
    path = tmp_path / "stages/tiny/checkpoints/step-000006" / file
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    capsys.readouterr()
    tiny.run_stage(tmp_path, **SAVING)
    said = " ".join(capsys.readouterr().out.split())
    assert f"skipping checkpoint {path.parent}: {file}" in said
    assert f"resuming from {path.parent.with_name('step-000004')}" in said
    assert tiny.rows(tmp_path) == whole


def test_sigterm_while_a_checkpoint_is_written_waits_for_it(tiny, tmp_path, monkeypatch, whole):
    real = checkpoint.save_file

    def terminated(tensors, path):
        os.kill(os.getpid(), signal.SIGTERM)
        real(tensors, path)
        monkeypatch.undo()

    monkeypatch.setattr(checkpoint, "save_file", terminated)
    with pytest.raises(
        StageStopped, match=r"SIGTERM at step 3 of 6; a checkpoint is saved in .*checkpoints"
    ) as caught:
        tiny.run_stage(tmp_path, **SAVING)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    assert names(tmp_path) == ["step-000002", "step-000003"]
    tiny.run_stage(tmp_path, **SAVING)
    assert tiny.rows(tmp_path) == whole


def test_a_metrics_file_that_was_cut_loses_no_step(tiny, tmp_path, whole):
    tiny.run_stage(tmp_path, **SAVING)
    path = tmp_path / "stages/tiny/metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    (tmp_path / "stages/tiny/checkpoints/step-000006/state.json").unlink()
    tiny.run_stage(tmp_path, **SAVING)
    assert tiny.rows(tmp_path) == whole
    assert len(MetricLog(path, up_to=6).rows) == 6


def test_what_a_process_says_is_intact_is_there_though_it_has_not_heard_of_the_next_one(tiny, tmp_path):
    class Deaf(Single):
        """A process that is lost to the others between the main process's save and the word of it."""

        def together(self, situation):
            self.situation = situation
            return super().together(situation)

        def on_main(self, work):
            found = work()
            if found == tmp_path / CHECKPOINTS / "step-000004":
                raise TrainingError("rank 1 is lost")
            return found

    deaf = Deaf(torch.device("cpu"))
    with pytest.raises(TrainingError, match="rank 1 is lost"):
        tiny.run_stage(tmp_path, parallel=deaf, save_every_steps=2, keep_checkpoints=1)
    said = re.fullmatch("The checkpoint (.*) is intact", deaf.situation().kept)
    assert said is not None
    assert find_checkpoint(tmp_path / CHECKPOINTS, pytest.fail) is not None
    assert Path(said[1]).is_dir()


@pytest.mark.parametrize("keep", [1, 2])
def test_no_more_checkpoints_stay_than_asked(tiny, tmp_path, keep):
    tiny.run_stage(tmp_path, save_every_steps=2, keep_checkpoints=keep)
    assert len(list((tmp_path / CHECKPOINTS).iterdir())) == keep
