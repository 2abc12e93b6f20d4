"""What people see, and how a signal becomes a request."""

import errno
import signal
from io import StringIO

import pytest
from rich.console import Console

from gendistill.errors import OutputError, TrainingError
from gendistill.text import printable
from gendistill.training.console import TrainingConsole, duration
from gendistill.training.interrupt import stop_on_signal
from gendistill.training.log import MetricLog, read_metrics


def row(step, **more):
    return {
        "step": step,
        "tokens": 1000 * step,
        "loss": 0.5,
        "parts": {"kl": 0.25},
        "lr": {"mixer": 6e-4, "mlp": 2e-4, "norm": 2e-4},
        "grad_norm": 0.42,
        "tokens_per_second": 41_234.0,
        "seconds": 10.0 * step,
        **more,
    }


def shown(rows, **options):
    out = StringIO()
    console = TrainingConsole(console=Console(file=out, width=200, **options.pop("rich", {})), **options)
    with console.stage("kd", num_steps=1240, step=0) as view:
        for each in rows:
            view.show(each)
    return out.getvalue()


def test_a_pipe_gets_one_line_per_row():
    lines = shown([row(1), row(2), row(620, memory_gib=31.2)]).splitlines()
    assert lines[1] == (
        "kd  2/1,240    0%  loss 0.5000  kl 0.2500  lr 6.0e-04/2.0e-04  gnorm 0.42  41,234 tok/s  eta 3h26m"
    )
    assert "620/1,240   50%" in lines[2]
    assert "31.2 GiB" in lines[2]
    assert len(lines) == 3


def test_a_terminal_gets_a_bar_with_the_same_numbers():
    text = shown([row(620)], rich={"force_terminal": True})
    assert "620/1240" in text
    assert "kl 0.2500" in text


def test_other_processes_say_nothing():
    assert shown([row(1)], main=False) == ""


@pytest.mark.parametrize(("seconds", "text"), [(42, "42s"), (725, "12m05s"), (14_280, "3h58m")])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


def test_metrics_are_cut_at_the_checkpoint_and_at_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path, up_to=0)
    for step in (1, 2, 3):
        log.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [each["step"] for each in read_metrics(path)] == [1, 2, 3]
    MetricLog(path, up_to=2).write({"step": 3, "again": True})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_the_first_signal_asks_and_the_second_acts():
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as stop:
        assert not stop
        signal.raise_signal(signal.SIGINT)
        assert stop
        assert stop.signal_number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", ["[red]x[/red]", "[/]", "\x1b[31mx", ":smile:", "{task}", "a\\"])
def test_names_are_shown_as_they_are(name, terminal):
    out = StringIO()
    console = TrainingConsole(
        console=Console(file=out, width=200, force_terminal=terminal, color_system=None)
    )
    console.say(f"said {name}")
    console.warn(f"warned {name}")
    with console.stage(name, num_steps=10, step=0) as view:
        view.show(row(1))
    for shown in (f"said {printable(name)}", f"warning: warned {printable(name)}"):
        assert shown in out.getvalue()
    assert out.getvalue().count(printable(name)) >= 3
    assert "\x1b[31m" not in out.getvalue()


def test_lines_that_cannot_be_read_are_kept_aside_and_said(tmp_path):
    path = tmp_path / "metrics.jsonl"
    broken = [b"\xff\xfe\x00", b'{"step": "2"}', b"[1]", b'{"step": 3, "loss": NaN}', b"{}", b"[" * 100_000]
    path.write_bytes(b'{"step": 1}\n' + b"\n".join(broken) + b'\n\n{"step": 2, "loss": 0.5}\n{"step": 3')
    said = []
    log = MetricLog(path, up_to=5, warn=said.append)
    assert log.rows == [{"step": 1}, {"step": 2, "loss": 0.5}]
    log.write({"step": 3})
    assert [each["step"] for each in read_metrics(path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.broken").read_bytes() == b"\n".join(broken) + b"\n"
    assert len(said) == 1
    assert "6 lines cannot be read, moved to metrics.jsonl.broken" in said[0]
    MetricLog(path, up_to=5, warn=said.append)
    assert len(said) == 1


def test_a_metrics_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError) as caught:
        MetricLog(tmp_path / "metrics.jsonl", up_to=0)
    assert caught.value.where == str(tmp_path / "metrics.jsonl")


def test_a_figure_that_is_not_finite_is_an_error_and_is_not_written(tmp_path):
    log = MetricLog(tmp_path / "metrics.jsonl", up_to=0)
    with pytest.raises(TrainingError, match="step 3 is not finite"):
        log.write({"step": 3, "heldout": {"kl": float("nan")}})
    assert log.path.read_text() == ""


def test_a_full_disk_stops_the_metrics_with_a_next_step(tmp_path, monkeypatch):
    log = MetricLog(tmp_path / "metrics.jsonl", up_to=0)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(log.path), "open", full)
    with pytest.raises(OutputError, match="disk is full"):
        log.write({"step": 1})
