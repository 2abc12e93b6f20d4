"""What all ways to train on several processes have in common: numbers, words and files from process to process."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from gendistill.errors import CheckpointError, GendistillError
from gendistill.paths import writing
from gendistill.training.parallel.peers import Peers, Situation
from gendistill_evals.errors import EvalError

T = TypeVar("T")

_PIECE_BYTES = 2**26
# a folder that another machine has written appears late on some network file systems
_APPEARS_S = 3.0


class Group:
    """This process among several.

    Args:
        accelerator: Of more than one process; its process group is used.
        patience_s: How long another process may be silent before it counts as lost.
    """

    def __init__(self, accelerator: Accelerator, *, patience_s: float) -> None:
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.peers = _peers(self.rank, self.world, patience_s)
        self.leads_machine: bool = bool(accelerator.is_local_main_process)
        self._received: Path | None = None

    @property
    def machines(self) -> int:
        """Number of machines."""
        return int(self.sum(torch.tensor(self.leads_machine, dtype=torch.int64, device=self.device)))

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return self.rank == 0

    def together(self, situation: Callable[[], Situation]) -> AbstractContextManager[None]:
        """Notice inside that another process is gone."""
        return self.peers.watching(situation)

    def sum(self, value: Tensor) -> Tensor:
        """Add up the processes' tensors."""
        total = value.clone()
        dist.all_reduce(total)
        return total

    def largest(self, value: float) -> float:
        """Return the largest of the processes' numbers, as float32."""
        found = torch.tensor(value, dtype=torch.float32, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return found.item()

    def on_main(self, work: Callable[[], T]) -> T:
        """Do something on the first process; return its result, or raise its error, on every process."""
        call = self.peers.next_call()
        if self.is_main:
            outcome = _attempt(work)
            self.peers.tell(call, outcome)
        else:
            outcome = self.peers.hear(call)
        self.peers.everybody(call)
        return _result(outcome)

    def on_each(self, work: Callable[[], T]) -> T:
        """Do something on every process; the error of one is raised on all."""
        call = self.peers.next_call()
        mine = _attempt(work)
        self.peers.tell(f"{call}/{self.rank}", mine[1])
        errors = [self.peers.hear(f"{call}/{rank}") for rank in range(self.world)]
        self.peers.everybody(call)
        for error in errors:
            if error is not None:
                raise error
        return _result(mine)

    def in_turns(self, work: Callable[[], T]) -> T:
        """Do something on every process, on the first of each machine before the others of that machine."""
        call = self.peers.next_call()
        leader = self.rank - int(os.environ.get("LOCAL_RANK") or self.accelerator.local_process_index)
        if not self.leads_machine:
            self.peers.hear(f"{call}/{leader}")
        outcome = _attempt(work)
        if self.leads_machine:
            self.peers.tell(f"{call}/{leader}", None)
        return self.on_each(lambda: _result(outcome))

    def folder(self, path: Path) -> Path:
        """Return where this process finds a folder that the first process has filled.

        Machines that do not see it get a copy of it, in a temporary folder that the next call or ``close`` removes.
        """
        self._drop_received()
        mark = self.on_main(lambda: _mark(path))
        seen = self.is_main or _appears(path / mark)
        missing = int(self.sum(torch.tensor(not seen, dtype=torch.int64, device=self.device)))
        self.on_main(lambda: (path / mark).unlink(missing_ok=True))
        if not missing:
            return path
        target = Path(tempfile.gettempdir()) / f"gendistill-{mark.removeprefix('.seen-')}"
        if not seen:
            self._received = target
        self._send(path, None if seen else target)
        return path if seen else target

    def _send(self, path: Path, target: Path | None) -> None:
        """Send the files of the first process's folder to the machines whose processes name a target."""
        files = self.on_main(
            lambda: [
                (file.relative_to(path).as_posix(), file.stat().st_size)
                for file in sorted(path.rglob("*"))
                if file.is_file()
            ]
        )
        writes = target is not None and self.leads_machine
        failed: list[OSError] = []
        sums: dict[str, int] = {}
        for name, size in files:
            sums[name] = 0
            source = (path / name).open("rb") if self.is_main else None
            place = target / name if writes and target is not None else None
            try:
                if place is not None:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.touch()
            except OSError as error:
                failed.append(error)
            for start in range(0, size, _PIECE_BYTES):
                piece = torch.empty(min(_PIECE_BYTES, size - start), dtype=torch.uint8)
                if source is not None:
                    piece = torch.frombuffer(bytearray(source.read(len(piece))), dtype=torch.uint8)
                sent = piece.to(self.device)
                dist.broadcast(sent, src=0)
                data = sent.cpu().numpy().tobytes()
                sums[name] = zlib.crc32(data, sums[name])
                if place is not None and not failed:
                    try:
                        with place.open("ab") as sink:
                            sink.write(data)
                    except OSError as error:
                        # the others are in the middle of a conversation, which has to be led to its end
                        failed.append(error)
            if source is not None:
                source.close()

        def check() -> None:
            if failed and target is not None:
                with writing(target):
                    raise failed[0]

        self.on_each(check)
        wanted = self.on_main(lambda: sums)

        def compare() -> None:
            if sums != wanted:
                raise CheckpointError(
                    "a file was damaged while it was sent between machines", where=str(path)
                )

        self.on_each(compare)

    def _drop_received(self) -> None:
        if self._received is not None and self.leads_machine:
            shutil.rmtree(self._received, ignore_errors=True)
        self._received = None

    def barrier(self) -> None:
        """Wait until every process has come here."""
        self.peers.everybody(self.peers.next_call())

    def close(self) -> None:
        """Let go of unused device memory, and of folders that were received."""
        self._drop_received()
        self.accelerator.free_memory()


# by the identity of the store, which a value keeps alive
_PEERS: dict[int, Peers] = {}


def _peers(rank: int, world: int, patience_s: float) -> Peers:
    """Return what watches the other processes: once per process group, whose store remembers every key."""
    store = dist.distributed_c10d._get_default_store()
    if id(store) not in _PEERS:
        named = dist.PrefixStore("gendistill", store)  # pyright: ignore[reportPrivateImportUsage]
        _PEERS[id(store)] = Peers(named, rank=rank, world=world, patience_s=patience_s)
    _PEERS[id(store)].patience_s = patience_s
    return _PEERS[id(store)]


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except (GendistillError, EvalError) as error:
        return None, error


def _result(outcome: tuple[T | None, Exception | None]) -> T:
    value, error = outcome
    if error is not None:
        raise error
    return value  # pyright: ignore[reportReturnType]


def _mark(path: Path) -> str:
    name = f".seen-{secrets.token_hex(8)}"
    with writing(path):
        (path / name).touch()
    return name


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _APPEARS_S
    while time.monotonic() < deadline:
        # a network file system remembers for a while what was not there; listing a folder asks again
        if path.parent.is_dir() and path in path.parent.iterdir():
            return True
        time.sleep(0.1)
    return False
