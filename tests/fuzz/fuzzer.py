"""Give gendistill thousands of broken inputs: ``python tests/fuzz/fuzzer.py --seed 0 --count 2000 [--area recipe]``.

Every input follows from (seed, area, index) and runs in a forked process with limits of time and memory, so that no
input hurts the next one. ``--only INDEX --keep FOLDER`` repeats one input and keeps its files. Needs Linux. Exits with
1 if an input failed.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import hashlib
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
# as the command sets them before it imports these libraries; here they are imported once, for all inputs
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DATASETS_VERBOSITY", "critical")

import areas
import base as making

from gendistill.runs import preview

CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 20, 90, 4 << 30
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.rename": (0, 1),
    "os.remove": (0,),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
}


@dataclass
class Result:
    """What became of one input."""

    commands: list[list[str]] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    output: str = ""
    seconds: float = 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000, help="inputs, over all areas")
    parser.add_argument(
        "--area", choices=areas.AREAS, action="append", help="this area alone; may be repeated"
    )
    parser.add_argument("--only", type=int, help="index of one input of the area")
    parser.add_argument("--runs", type=int, help="of run_files, whose inputs take seconds, so many at most")
    parser.add_argument("--start", type=int, default=0, help="index of the first input of each area")
    parser.add_argument(
        "--keep", type=Path, help="keep the files of inputs that fail, or of the only one, here"
    )
    asked = parser.parse_args()
    wanted = asked.area or list(areas.AREAS)
    if asked.only is not None:
        inputs = [(area, asked.only) for area in wanted]
    else:
        inputs = [(wanted[i % len(wanted)], asked.start + i // len(wanted)) for i in range(asked.count)]
    if asked.runs is not None:
        inputs = [
            (area, index) for area, index in inputs if area != "run_files" or index < asked.start + asked.runs
        ]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        given = making.make(Path(work) / "base", run_child)
        before = contents(given.root)
        table, spent = {area: Counter() for area in wanted}, Counter()
        for number, (area, index) in enumerate(inputs):
            if number % 100 == 0:
                print(f"{number:,} of {len(inputs):,}", file=sys.stderr, flush=True)
            result = one(Path(work), given, asked.seed, area, index)
            table[area].update(map(str, result.codes) if not result.problems else ["failed"])
            table[area]["inputs"] += 1
            spent[area] += result.seconds
            if result.problems or asked.only is not None:
                show(result, asked.seed, area, index)
            if asked.keep and (result.problems or asked.only is not None):
                target = asked.keep / f"{asked.seed}-{area}-{index}"
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(Path(work) / "box", target, symlinks=True, ignore=_no_pipes)
            shutil.rmtree(Path(work) / "box")
        if contents(given.root) != before:
            print("FAILED: what the inputs share was changed")
            return 1
    print(f"{'area':14}{'inputs':>8}{'exit 0':>8}{'exit 1':>8}{'exit 2':>8}{'failed':>8}{'seconds':>9}")
    for area, counts in table.items():
        print(
            f"{area:14}" + "".join(f"{counts[key]:8,}" for key in ("inputs", "0", "1", "2", "failed")),
            f"{spent[area]:8,.1f}",
        )
    return 1 if any(counts["failed"] for counts in table.values()) else 0


def show(result: Result, seed: int, area: str, index: int) -> None:
    again = f"--seed {seed} --area {area} --only {index}"
    print(
        f"{'FAILED' if result.problems else 'ok'} {again}: {'; '.join(result.problems)}  ({result.seconds:.1f} s)"
    )
    for command, code in zip(result.commands, [*result.codes, *[None] * len(result.commands)], strict=False):
        print(f"  {code}  gendistill {ascii(shlex.join(command))[1:-1]:.600}")
    text = (
        result.output
        if len(result.output) < 6000
        else f"{result.output[:2000]}\n[...]\n{result.output[-4000:]}"
    )
    print("  | " + ascii(text)[1:-1].replace("\\n", "\n  | "), flush=True)


def _no_pipes(folder: str, names: list[str]) -> list[str]:
    paths = {name: Path(folder) / name for name in names}
    return [
        name for name, path in paths.items() if not (path.is_symlink() or path.is_file() or path.is_dir())
    ]


def one(work: Path, given: areas.Base, seed: int, area: str, index: int) -> Result:
    """Run one input in a process of its own and judge it."""
    box = areas.Box(work / "box", given)
    box.cwd.mkdir(parents=True)
    box.given.mkdir()
    record = work / "box" / "record.json"
    started = time.perf_counter()
    status = run_child(lambda: _child(box, seed, area, index, record), box.root)
    result = Result(seconds=time.perf_counter() - started)
    if record.is_file():
        content = json.loads(record.read_text())
        result.commands, result.codes, result.problems = (
            content["commands"],
            content["codes"],
            content["problems"],
        )
    parts = []
    for name in ("out", "err"):
        content = (box.root / name).read_bytes()
        try:
            parts.append(content.decode("utf-8"))
        except UnicodeDecodeError as error:
            result.problems.append(f"{name} is not UTF-8: {error}")
            parts.append(content.decode("utf-8", "replace"))
    result.output = "".join(parts)
    result.problems += _judge(result, status)
    return result


def _judge(result: Result, status: int) -> list[str]:
    problems = []
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        problems.append(f"died of {signal.Signals(number).name}")
    elif os.WEXITSTATUS(status):
        problems.append(f"the process ended with {os.WEXITSTATUS(status)}")
    text = result.output
    problems += [
        f'"{sign}"' for sign in ("internal error", "Traceback", "memory error", "MemoryError") if sign in text
    ]
    odd = sorted(
        {
            c
            for c in text
            if (ord(c) < 32 and c not in "\n\t\r") or 126 < ord(c) < 160 or 0xD800 <= ord(c) < 0xE000
        }
    )
    if odd:
        problems.append(f"control characters in the output: {odd!a}")
    return problems


def _child(box: areas.Box, seed: int, area: str, index: int, record: Path) -> None:
    """Make the input, run its commands, and write what happened."""
    _set_environment(box)
    chance = random.Random(f"{seed}/{area}/{index}")
    commands = areas.AREAS[area](chance, box)
    os.environ["COLUMNS"] = chance.choice(["80", "80", "20", "200"])
    found: dict[str, Any] = {"commands": commands, "codes": [], "problems": []}
    record.write_text(json.dumps(found))
    before = contents(box.given)
    guard = _Guard(box)
    _limit()
    for words in commands:
        start = (box.root / "err").stat().st_size + (box.root / "out").stat().st_size
        code = _command(words, encoding=chance.choice(["utf-8", "utf-8", "utf-8", "ascii"]))
        said = (box.root / "out").read_bytes() + (box.root / "err").read_bytes()
        found["codes"].append(code)
        if code not in (0, 1, 2):
            found["problems"].append(f"exit code {code}")
        if code and not any(sign in said for sign in (b"next:", b"allowed", b"did you mean", b"fix:")):
            found["problems"].append("no next step")
        if code and len(said) == start:
            found["problems"].append("failed in silence")
    guard.on = False
    if contents(box.given) != before:
        found["problems"].append("an input was changed")
    found["problems"] += guard.found
    record.write_text(json.dumps(found))


def _command(words: list[str], *, encoding: str) -> int:
    """Run one command line as the program would."""
    from gendistill.cli.main import main as gendistill

    sys.argv = ["gendistill", *words]
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding=encoding, write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding=encoding, write_through=True)
    return gendistill()


def _set_environment(box: areas.Box) -> None:
    for name in ("home", "tmp", "cache"):
        (box.root / name).mkdir()
    os.environ.update(
        HOME=str(box.root / "home"),
        TMPDIR=str(box.root / "tmp"),
        GENDISTILL_CACHE=str(box.root / "cache"),
        HF_HOME=str(box.root / "home" / "hf"),
        PIP_NO_INDEX="1",
    )
    tempfile.tempdir = None
    # the speed that ``gendistill data`` shows is measured for a second
    preview._TIMED_SECONDS = 0.05
    os.chdir(box.cwd)

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = unreachable


def _limit() -> None:
    size = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmSize")
    )
    memory = int(size.split()[1]) * 1024 + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # says where it hangs, then lets the signal end the process
    faulthandler.register(signal.SIGXCPU, file=2, chain=True)
    faulthandler.register(signal.SIGALRM, file=2, chain=True)
    faulthandler.enable(file=2)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)


class _Guard:
    """Changes of the file system outside a box: prevented and noted, as on a file system that is read-only."""

    def __init__(self, box: areas.Box) -> None:
        self.found: list[str] = []
        self.on = True
        self._room = str(box.root)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            paths = [path] if isinstance(flags, int) and flags & _WRITES else []
        else:
            paths = [arguments[i] for i in _CHANGES.get(event, ())]
        folder = next(
            (each for each in arguments[1:] if event in ("os.remove", "os.rmdir") and each != -1), None
        )
        for path in paths:
            if isinstance(path, int) or path is None:
                continue
            where = os.path.join("" if folder is None else f"/proc/self/fd/{folder}", os.fsdecode(path))  # noqa: PTH118
            parent, name = os.path.split(where if folder is not None else os.path.join(Path.cwd(), where))  # noqa: PTH118
            real = os.path.join(os.path.realpath(parent), name)  # noqa: PTH118
            if not f"{real}/".startswith(f"{self._room}/") and not real.startswith(("/dev/null", "/dev/tty")):
                # what a system refuses to write anyway is no harm
                if os.access(os.path.realpath(parent), os.F_OK):
                    self.found.append(f"{event} outside the input's folder: {real:.200}")
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), where)


def contents(folder: Path) -> dict[str, str]:
    """Describe every file under a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"  # noqa: PTH115
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = oct(path.stat().st_mode)
    return found


def run_child(work: Any, folder: Path) -> int:
    """Run in a forked process that writes to ``folder/out`` and ``folder/err``; return the status of waitpid."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            os.setpgid(0, 0)
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            work()
            code = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode("utf-8", "backslashreplace"))
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status


if __name__ == "__main__":
    sys.exit(main())
