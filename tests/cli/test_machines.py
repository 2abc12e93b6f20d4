"""Two machines through Accelerate's own launcher, each with a file system of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gendistill.paths import RunDir

PATIENCE_S = 120
ACCELERATE = Path(sys.executable).with_name("accelerate")
# addresses kept for documents and tests
ADDRESSES = ("192.0.2.1", "192.0.2.2")


class Machine:
    """A folder that stands for a machine's disk, and what a command on it must be started with."""

    def __init__(self, disk: Path, prefix: tuple[str, ...] = ()) -> None:
        self.disk, self.prefix = disk, prefix
        disk.mkdir()
        self.run = RunDir(disk / "runs" / "tiny")

    @property
    def log(self) -> str:
        return (self.disk / "log").read_text()

    @property
    def rows(self) -> list[dict]:
        path = self.run.stage("distill") / "metrics.jsonl"
        if not path.is_file():
            return []
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]

    def start(self, rank: int, address: str, port: int, *words: str, machines: int = 2) -> subprocess.Popen:
        """Start the command on this machine, with one process."""
        launcher = (
            *(str(ACCELERATE), "launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2"),
            *("--machine_rank", str(rank), "--main_process_ip", address, "--main_process_port", str(port)),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--module"),
        )
        command = (*self.prefix, *(launcher if machines == 2 else (sys.executable, "-m")))
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "GENDISTILL_CACHE": str(self.disk / "cache"),
            "TMPDIR": str(self.disk),
        }
        with (self.disk / "log").open("a") as log:
            return subprocess.Popen(
                [*command, "gendistill", "distill", "tiny", *words],
                cwd=self.disk,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def ending(*processes: subprocess.Popen):
    """End what the test has started, with everything that it started."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_on_both(machines, address, port, *words) -> list[int]:
    started = [machine.start(rank, address, port, *words) for rank, machine in enumerate(machines)]
    with ending(*started):
        return [process.wait(PATIENCE_S) for process in started]


def check_both(machines, address, port) -> None:
    first, second = machines
    codes = run_on_both(machines, address, port, "engine.parallel=fsdp2")
    assert codes == [0, 0], first.log + second.log
    assert "2 processes, each with a part of student and teacher" in first.log
    assert (first.run.student / "model.safetensors").is_file()
    # the first machine writes, the other one only reads; what was sent to it is gone
    assert not (second.disk / "runs").exists()
    assert not list(second.disk.glob("gendistill-*"))
    assert "distill" not in second.log


def test_two_launchers_on_one_machine_train_with_separate_run_folders(tmp_path):
    machines = Machine(tmp_path / "first"), Machine(tmp_path / "second")
    check_both(machines, "127.0.0.1", free_port())


@pytest.mark.slow
def test_machines_with_other_data_are_refused(tmp_path):
    machines = Machine(tmp_path / "first"), Machine(tmp_path / "second")
    for machine, text in zip(machines, ("one", "two"), strict=True):
        rows = [json.dumps({"text": f"{text} {number} " * 9}) for number in range(64)]
        (machine.disk / "rows.jsonl").write_text("\n".join(rows) + "\n")
    words = ("data.text.path=./rows.jsonl",)
    codes = run_on_both(machines, "127.0.0.1", free_port(), *words)
    assert all(codes)
    for machine in machines:
        assert "reads something else than the first machine: data." in machine.log
        assert "copy data and teacher to the same paths" in machine.log
        assert not machine.rows


@pytest.fixture
def namespaces():
    """Two network namespaces with a cable between them; the prefixes of commands in them, and how to pull the cable."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip is not installed")
    names = [f"gendistill-{os.getpid()}-{side}" for side in "ab"]
    ends = [f"gd{os.getpid() % 10**6}{side}" for side in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(
                f"this machine allows no network namespaces: ip {' '.join(words)}: {done.stderr.strip()}"
            )

    try:
        for name in names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            ends[0],
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            ends[1],
            "netns",
            names[1],
        )
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        prefixes = [
            ("ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={end}")
            for name, end in zip(names, ends, strict=True)
        ]
        yield prefixes, lambda: ip("-n", names[1], "link", "set", ends[1], "down")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
def test_two_network_namespaces_train_with_separate_run_folders(tmp_path, namespaces):
    prefixes, _ = namespaces
    machines = Machine(tmp_path / "first", prefixes[0]), Machine(tmp_path / "second", prefixes[1])
    check_both(machines, ADDRESSES[0], 29500)
    alone = Machine(tmp_path / "alone")
    process = alone.start(0, "", 0, machines=1)
    with ending(process):
        assert process.wait(PATIENCE_S) == 0
    losses = [[row["loss"] for row in machine.rows] for machine in (machines[0], alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_pulled_cable_ends_both_machines_and_the_first_one_resumes(tmp_path, namespaces):
    prefixes, pull = namespaces
    machines = Machine(tmp_path / "first", prefixes[0]), Machine(tmp_path / "second", prefixes[1])
    words = (
        *("engine.patience_s=3", "stages.block=null"),
        *(
            "stages.distill.steps=100000",
            "stages.distill.save_every_steps=2",
            "stages.distill.log_every_steps=1",
        ),
    )
    started = [machine.start(rank, ADDRESSES[0], 29500, *words) for rank, machine in enumerate(machines)]
    with ending(*started):
        deadline = time.monotonic() + PATIENCE_S
        while len(machines[0].rows) < 5:
            assert time.monotonic() < deadline, machines[0].log + machines[1].log
            time.sleep(0.1)
        pull()
        pulled = time.monotonic()
        assert [process.wait(PATIENCE_S) != 0 for process in started] == [True, True]
        # patience, the time to end by itself, and half a minute of the launcher
        assert time.monotonic() - pulled < 60
    assert "rank 1 (process " in machines[0].log
    assert "is lost: nothing was heard of it for 3 s. The checkpoint " in machines[0].log
    assert "cannot be reached: no answer for 3 s" in machines[1].log
    assert "the stage resumes from there" in machines[0].log
    process = machines[0].start(0, "", 0, *words, machines=1)
    with ending(process):
        while "resuming from" not in machines[0].log:
            assert process.poll() is None, machines[0].log
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM
    steps = [row["step"] for row in machines[0].rows]
    assert steps == list(range(1, len(steps) + 1))
