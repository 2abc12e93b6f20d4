"""Programs that try to get out of the sandbox, or to use the machine up: each is contained, and the reason is said."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from gendistill_evals import EvalError
from gendistill_evals.sandbox import Barriers, Ended, Limits, in_use, outside, run, system_calls, why_not
from gendistill_evals.sandbox.folder import remove, size_of
from gendistill_evals.sandbox.system_calls import MACHINES, conditional_calls, free_calls, meaning

# Where this machine has no barriers the tests of them cannot run; that programs are refused there is tested below.
HERE = pytest.mark.skipif(why_not() is not None, reason=f"nothing can be contained here: {why_not()}")
QUICK = Limits(wall_s=0.6, cpu_s=1)


@pytest.fixture(params=outside.SETS, ids=str, scope="module")
def barriers(request) -> Barriers:
    if why_not() is not None or (reason := outside.self_check(request.param)):
        pytest.skip(f"these barriers do not hold here: {why_not() or reason}")
    return request.param


def processes_of(marker: str) -> list[int]:
    """Find processes by a word of their command line."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_bytes() if folder.name.isdigit() else b""
        except OSError:
            continue
        if marker.encode() in words and folder.name != str(os.getpid()):
            found.append(int(folder.name))
    return found


@HERE
def test_a_program_runs_to_its_end(barriers):
    source = (
        "import math, re, collections, dataclasses, typing, hashlib, itertools, json, datetime, random, statistics\n"
        "@dataclasses.dataclass\nclass A:\n    x: int\n"
        "with open('notes.txt', 'w') as file:\n    file.write('kept')\n"
        "print(A(3), math.pi, open('notes.txt').read(), 'é')"
    )
    outcome = run(source, barriers=barriers)
    assert (outcome.ended, outcome.stderr, outcome.refused) == (Ended.FINISHED, "", ())
    assert outcome.stdout == "A(x=3) 3.141592653589793 kept é\n"
    assert 0 < outcome.wall_s < 5
    assert outcome.peak_bytes > 1 << 20


@HERE
def test_an_exception_is_reported_with_its_traceback(barriers):
    outcome = run("def f():\n    assert 1 == 2, 'no'\nf()", barriers=barriers)
    assert outcome.ended is Ended.RAISED
    assert outcome.reason == "AssertionError: no"
    assert 'File "<program>", line 2, in f' in outcome.stderr


@HERE
@pytest.mark.parametrize("leave", ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_who_leaves_early_has_not_finished(leave):
    outcome = run(f"{leave}\nassert False")
    assert outcome.ended is Ended.EXITED
    assert "before its end" in outcome.reason


@HERE
@pytest.mark.skipif(sys.version_info >= (3, 14), reason="annotations are not evaluated")
def test_a_type_that_does_not_exist_is_an_error_as_in_any_program():
    """HumanEval counts such a program as wrong; the sandbox's own future imports must not reach it."""
    outcome = run("def total(values: List[int]) -> int:\n    return sum(values)")
    assert outcome.ended is Ended.RAISED
    assert outcome.reason.startswith("NameError")


@HERE
def test_who_closes_everything_has_not_finished():
    outcome = run("import os\nos.closerange(3, 64)")
    assert outcome.ended is Ended.EXITED


@HERE
def test_a_fork_bomb_starts_nothing(barriers):
    outcome = run("import os\nwhile True:\n    os.fork()", QUICK, barriers=barriers)
    assert outcome.ended is Ended.REFUSED
    assert "start a process or thread" in outcome.reason


@HERE
def test_a_stubborn_fork_bomb_starts_nothing_until_its_time_is_up(barriers):
    source = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    outcome = run(source, QUICK, barriers=barriers)
    assert outcome.ended is Ended.TIME
    assert "start a process or thread" in outcome.reason


@HERE
@pytest.mark.parametrize(
    "start",
    [
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true') == 0 or (_ for _ in ()).throw(PermissionError())",
        "import threading; threading.Thread(target=print).start()",
        "import os; os.execv('/bin/sh', ['sh'])",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
    ],
)
def test_no_process_thread_or_other_program_starts(start):
    outcome = run(start)
    assert outcome.ended is Ended.REFUSED
    assert outcome.refused


@HERE
@pytest.mark.parametrize(
    "loop",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time\nfor number in range(1, 65):\n    try:\n        signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError):\n        pass\nwhile True: time.sleep(1)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "'a' * 40 + 'b'; import re; re.match('(a+)+$', 'a' * 40 + 'b')",
        "10 ** 10 ** 10",
        "import os, select; r, w = os.pipe(); os.read(r, 1)",
    ],
    ids=["busy", "asleep", "ignores signals", "catches everything", "regex", "power", "pipe"],
)
def test_an_endless_program_is_ended(loop):
    started = time.monotonic()
    outcome = run(loop, QUICK)
    assert outcome.ended is Ended.TIME
    assert time.monotonic() - started < 5


@HERE
def test_processor_time_is_limited_apart_from_the_clock():
    outcome = run(
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass", Limits(cpu_s=1)
    )
    assert outcome.ended is Ended.TIME
    assert "1 s of processor time" in outcome.reason


# Runs each act and says which of them the kernel let through.
EACH = """
import os, resource, signal
for act in {acts!r}:
    try:
        exec(act)
    except OSError:
        continue
    print("could:", act)
print("all tried")
"""


def could(barriers: Barriers, acts: list[str], setup: str = "") -> str:
    outcome = run(setup + EACH.format(acts=acts), barriers=barriers)
    assert outcome.ended is Ended.FINISHED, outcome.reason
    return outcome.stdout


@HERE
@pytest.mark.parametrize("name", ["new", "there", "sub/new", "link"])
def test_a_file_written_outside_is_refused_and_reported(tmp_path, name):
    (tmp_path / "there").write_text("as it was")
    target = tmp_path / name
    source = f"open({str(target)!r}, 'w').write('changed')"
    if name == "link":
        source = (
            f"import os\nos.symlink({str(tmp_path / 'there')!r}, 'link')\nopen('link', 'w').write('changed')"
        )
    outcome = run(source)
    assert outcome.ended is Ended.REFUSED
    assert "the file is outside" in outcome.reason
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "as it was"


CHANGES = [
    "open(there, 'w').write('changed')",
    "open(there, 'a').write('changed')",
    "open(there, 'r+').write('changed')",
    "open(there + '-new', 'w').write('new')",
    "open('link', 'w').write('changed')",
    "os.remove(there)",
    "os.rename(there, 'mine')",
    "os.rename('own', there)",
    "os.link(there, 'mine')",
    "os.truncate(there, 0)",
    "os.close(os.open(there, os.O_RDONLY | os.O_TRUNC))",
    "os.close(os.open(there, 3 | os.O_TRUNC))",
    "os.chmod(there, 0)",
    "os.chown(there, 1, 1)",
    "os.utime(there, (0, 0))",
    "os.setxattr(there, 'user.a', b'1')",
    "os.mkdir(there + '-folder')",
    "os.mkfifo(there + '-pipe')",
    "os.mknod(there + '-node')",
    "os.symlink('/', there + '-link')",
    "os.rmdir(os.path.dirname(there))",
    "open(os.path.join('up', 'beside'), 'w')",
    "os.chdir(os.path.dirname(there)); open('beside', 'w')",
]


@HERE
def test_nothing_outside_is_changed(barriers, tmp_path):
    there = tmp_path / "there"
    there.write_text("as it was")
    before = there.stat()
    setup = (
        f"import os\nthere = {str(there)!r}\nopen('own', 'w').close()\nos.symlink({str(tmp_path)!r}, 'up')\n"
        f"os.symlink(there, 'link')\n"
    )
    assert could(barriers, CHANGES, setup) == "all tried\n"
    assert list(tmp_path.iterdir()) == [there]
    assert there.read_text() == "as it was"
    after = there.stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns, after.st_nlink) == (
        *(before.st_mode, before.st_uid, before.st_mtime_ns, before.st_nlink),
    )


def test_the_changes_that_are_refused_inside_work_outside(tmp_path):
    """Without a barrier nearly all of them go through, so that refusing them means something."""
    failed, here = 0, Path.cwd()
    for number, act in enumerate(CHANGES):
        folder = tmp_path / str(number)
        (folder / "work").mkdir(parents=True)
        there = folder / "there"
        there.write_text("as it was")
        source = (
            f"import os\nos.chdir({str(folder / 'work')!r})\nthere = {str(there)!r}\nopen('own', 'w').close()\n"
            f"os.symlink({str(folder)!r}, 'up')\nos.symlink(there, 'link')\n{act}"
        )
        try:
            exec(source, {})
        except OSError:
            failed += 1
        finally:
            os.chdir(here)
    # The folder is not empty; as another user than root also chown, and extended attributes on some file systems.
    assert failed <= 3


READS = [
    "open('/etc/shadow').read()",
    "open('/etc/passwd').read()",
    "open(secret).read()",
    "os.open(secret, os.O_RDONLY)",
    "os.listdir(os.path.dirname(secret))",
    "os.listdir('/home')",
    "os.symlink('/etc/shadow', 'a'); open('a').read()",
    "os.symlink('/etc', 'b'); open('b/shadow').read()",
    "os.symlink(secret, 'c'); open('c').read()",
    "open('../../../../../etc/shadow').read()",
    "open('/proc/1/environ').read()",
    "open('/proc/self/environ').read()",
    "open('/proc/self/root/etc/shadow').read()",
    "open('/proc/{parent}/mem', 'rb').read(1)",
    "open('/sys/kernel/notes', 'rb').read()",
    "open('/dev/mem', 'rb').read(1)",
    "open('/dev/tty')",
]


@HERE
def test_nothing_private_is_read(barriers, tmp_path):
    (tmp_path / "secret").write_text("a word that must not leave")
    setup = f"secret = {str(tmp_path / 'secret')!r}\n"
    acts = [act.format(parent=os.getpid()) for act in READS]
    assert could(barriers, acts, setup) == "all tried\n"


@HERE
@pytest.mark.parametrize(
    "read", ["open('/etc/shadow')", "__import__('os').listdir('/home')", "open('../../a')"]
)
def test_a_file_read_outside_is_reported(read):
    outcome = run(read)
    assert outcome.ended is Ended.REFUSED
    assert "the file is outside" in outcome.reason


@HERE
def test_folders_above_show_nothing_of_others(barriers):
    source = "import os\ntry:\n    print(os.listdir('..'), os.listdir('../..'))\nexcept OSError:\n    print('refused')"
    shown = run(source, barriers=barriers).stdout
    assert shown == "refused\n" or ("['work']" in shown and shown.count("gendistill-program-") == 1)


@HERE
@pytest.mark.parametrize("place", ["/dev/shm", "/tmp", "/var/tmp"])
def test_shared_places_are_not_written(place):
    name = f"{place}/gendistill-test-{os.getpid()}"
    outcome = run(f"open({name!r}, 'w').write('x')")
    assert outcome.ended is Ended.REFUSED
    assert not Path(name).exists()


@HERE
def test_no_message_reaches_a_server(barriers):
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.2)
    with server:
        outcome = run(
            f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), timeout=2)",
            barriers=barriers,
        )
        assert outcome.ended is Ended.REFUSED
        assert "open a socket (socket)" in outcome.reason
        with pytest.raises(TimeoutError):
            server.accept()


@HERE
@pytest.mark.parametrize(
    "call",
    [
        "import urllib.request; urllib.request.urlopen('http://192.0.2.1/', timeout=2)",
        "import socket; socket.socket(socket.AF_UNIX)",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.1', 53))",
        "import socket; socket.socket(16, socket.SOCK_RAW)",
        "import socket; socket.socketpair()",
        "import asyncio; asyncio.run(asyncio.sleep(0))",
    ],
)
def test_no_socket_is_opened(call):
    outcome = run(call)
    assert outcome.ended is Ended.REFUSED
    assert "open a socket" in outcome.reason


@HERE
@pytest.mark.parametrize(
    "hog",
    [
        "x = bytearray(8 << 30)",
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        "x = 'a'\nwhile True: x += x",
        "x = [0]\nwhile True: x *= 2",
        "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(100)]",
    ],
)
def test_a_memory_hog_is_ended(hog):
    outcome = run(hog, Limits(memory_bytes=256 << 20))
    assert outcome.ended in (Ended.MEMORY, Ended.RAISED)
    assert "MemoryError" in outcome.reason or "Cannot allocate memory" in outcome.reason
    assert outcome.peak_bytes <= 300 << 20


@HERE
@pytest.mark.parametrize("call", ["os.memfd_create('x')", "mp.SharedMemory(create=True, size=1 << 20)"])
def test_no_memory_is_had_elsewhere(call):
    outcome = run(f"import os, multiprocessing.shared_memory as mp\n{call}")
    assert outcome.ended is Ended.REFUSED


@HERE
def test_a_large_file_is_refused():
    outcome = run("open('big', 'wb').write(b'x' * (1 << 22))", Limits(file_bytes=1 << 20))
    assert outcome.ended is Ended.DISK
    assert "1,048,576 bytes" in outcome.reason


@HERE
@pytest.mark.parametrize(
    "fill",
    [
        "import itertools\nfor i in itertools.count():\n    open(str(i), 'wb').write(b'x' * (1 << 20))",
        "import itertools\nfor i in itertools.count():\n    open(str(i), 'wb').close()",
        "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
        "import os, time\nos.mkdir('d', 0o300)\nwhile True: time.sleep(1)",
    ],
    ids=["bytes", "files", "depth", "hidden"],
)
def test_a_full_folder_ends_a_program(fill, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if "0o300" in fill and os.geteuid() == 0:
        fill = fill.replace("0o300", "0o700").replace(
            "while", "for i in range(2000): open(f'd/{i}', 'w')\nwhile"
        )
    outcome = run(fill, Limits(disk_bytes=8 << 20, files=500, wall_s=8))
    assert outcome.ended is Ended.DISK
    assert "its folder grew" in outcome.reason
    assert list(tmp_path.iterdir()) == []


REMOVED = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_long] * 5]
for number in range(40):
    descriptor = os.open("a", os.O_RDWR | os.O_CREAT)
    os.write(descriptor, b"x" * (1 << 20))
    {hide}
    os.unlink("a")
    time.sleep(0.02)
"""


@HERE
@pytest.mark.parametrize(
    "hide",
    ["pass", "assert libc.mmap(None, 4096, 1, 1, descriptor, 0) > 0; os.close(descriptor)"],
    ids=["open", "mapped"],
)
def test_removed_files_count_as_long_as_they_are_held(barriers, hide):
    """They take up the disk as others do, and no folder shows them."""
    limits = Limits(disk_bytes=8 << 20, file_bytes=1 << 20)
    outcome = run(REMOVED.format(hide=hide), limits, barriers=barriers)
    assert outcome.ended is Ended.DISK


@HERE
def test_removed_files_that_are_let_go_count_no_more(barriers):
    limits = Limits(disk_bytes=8 << 20, file_bytes=1 << 20)
    outcome = run(
        REMOVED.format(hide="os.close(descriptor)")
        + "import mmap\nx = [mmap.mmap(-1, 9) for _ in range(20)]",
        limits,
        barriers=barriers,
    )
    assert (outcome.ended, outcome.stderr) == (Ended.FINISHED, "")


@HERE
def test_output_is_cut_and_drained():
    limits = Limits(output_bytes=1000, wall_s=20)
    outcome = run("for i in range(300_000): print('0123456789')", limits)
    assert outcome.ended is Ended.FINISHED
    assert len(outcome.stdout) == 1000
    assert outcome.cut
    assert "cut at 1,000 bytes" in outcome.reason


@HERE
def test_endless_output_is_ended():
    outcome = run("import sys\nwhile True: sys.stderr.write('x' * 65536)", QUICK)
    assert outcome.ended is Ended.TIME
    assert len(outcome.stderr) == QUICK.output_bytes
    assert outcome.cut


@HERE
def test_output_that_is_not_utf8_is_shown():
    outcome = run("import sys; sys.stdout.buffer.write(b'\\xff\\xfe ok')")
    assert outcome.stdout.endswith(" ok")


SIGNALS = [
    "os.kill(os.getppid(), 9)",
    "os.kill({parent}, 9)",
    "os.kill({parent}, 0)",
    "os.kill(1, 9)",
    "os.kill(0, 9)",
    "os.kill(-1, 9)",
    "os.killpg(os.getpgrp(), 9)",
    "signal.pidfd_send_signal(os.pidfd_open({parent}), 9)",
    "resource.prlimit({parent}, resource.RLIMIT_CPU, (1, 1))",
    "os.setpgid(0, 0)",
    "os.setsid()",
]


@HERE
def test_no_other_process_is_signalled(barriers):
    assert could(barriers, [act.format(parent=os.getpid()) for act in SIGNALS]) == "all tried\n"


@HERE
def test_killing_the_caller_is_reported():
    outcome = run(f"import os\nos.kill({os.getpid()}, 9)")
    assert outcome.ended is Ended.REFUSED
    assert "signal another process (kill)" in outcome.reason


@HERE
def test_limits_are_not_raised():
    outcome = run("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))")
    assert outcome.ended is not Ended.FINISHED
    assert "change its rights or limits (prlimit64)" in outcome.reason


@HERE
def test_a_program_that_ends_itself_has_crashed(barriers):
    assert run("import os; os.kill(os.getpid(), 9)", barriers=barriers).reason == "it was ended by SIGKILL"
    assert run("import os; os.abort()", barriers=barriers).reason == "it was ended by SIGABRT"
    assert run("import ctypes; ctypes.string_at(0)", barriers=barriers).reason == "it was ended by SIGSEGV"


TRACE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, {parent}, 0, 0), ctypes.get_errno())
"""


@HERE
def test_no_process_is_traced(barriers):
    outcome = run(TRACE.format(parent=os.getpid()), barriers=barriers)
    assert outcome.stdout == "-1 1\n"
    assert "look into another process (ptrace)" in outcome.refused


CALLS = {
    "unshare": "0x10000000", "mount": "0, b'/', 0, 4096, 0", "umount2": "b'/proc', 2", "chroot": "b'.'",
    "setns": "0, 0", "keyctl": "0, 0", "bpf": "0, 0, 0", "perf_event_open": "0, 0, 0, 0, 0", "userfaultfd": "0",
    "io_uring_setup": "1, 0", "process_vm_readv": "1, 0, 0, 0, 0, 0", "prctl": "38, 0", "clone3": "0, 0",
    "memfd_create": "b'x', 0", "shmget": "0, 4096, 512", "setuid": "0", "fsopen": "b'tmpfs', 0", "seccomp": "0, 0, 0",
}  # fmt: skip


@HERE
def test_calls_for_more_rights_are_refused_by_name():
    machine = system_calls.this_machine()
    numbers = {
        name: each[machine.column] for calls in system_calls._REFUSED.values() for name, each in calls.items()
    }
    calls = [f"libc.syscall({numbers[name]}, {arguments})" for name, arguments in CALLS.items()]
    outcome = run(f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nprint([{', '.join(calls)}])")
    assert outcome.stdout == f"{[-1] * len(CALLS)}\n"
    assert [one.partition("(")[2].strip(")") for one in outcome.refused] == list(CALLS)


@HERE
def test_calls_of_the_other_convention_are_refused():
    source = "import ctypes\nlibc = ctypes.CDLL(None)\nprint(libc.syscall(0x40000000 | 39))"
    assert run(source).stdout == "-1\n"


@HERE
def test_a_program_cannot_delete_its_folder_and_nothing_stays(barriers, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    source = (
        "import os, shutil\nhere = os.getcwd()\nopen('a', 'w').close()\nos.makedirs('b/c/d', mode=0)\n"
        "os.symlink('/etc', 'e')\nos.remove('a')\n"
        "try:\n    os.rmdir(here)\nexcept OSError:\n    print('refused')\nshutil.rmtree(here, ignore_errors=True)"
    )
    outcome = run(source, barriers=barriers)
    assert (outcome.ended, outcome.stdout) == (Ended.FINISHED, "refused\n")
    assert list(tmp_path.iterdir()) == []
    assert Path("/etc/passwd").exists()


@HERE
def test_nothing_runs_after_the_end(barriers, monkeypatch):
    word = f"of-{os.getpid()}"
    monkeypatch.setattr(outside, "_START", f"{outside._START}# {word}\n")
    source = "import os\nfor _ in range(5):\n    try:\n        os.fork()\n    except OSError:\n        pass"
    assert run(source, barriers=barriers).ended is Ended.FINISHED
    assert run("while True: pass", QUICK, barriers=barriers).ended is Ended.TIME
    deadline = time.monotonic() + 2
    while (left := processes_of(word)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []


@HERE
def test_the_environment_is_empty(barriers, monkeypatch):
    monkeypatch.setenv("A_PASSWORD", "a word that must not leave")
    outcome = run("import os, sys; print(sorted(os.environ), sys.argv, sys.stdin.read())", barriers=barriers)
    assert "A_PASSWORD" not in outcome.stdout
    assert "HOME" in outcome.stdout


DESCRIPTORS = """
import os
for descriptor in range(256):
    try:
        os.fstat(descriptor)
    except OSError:
        continue
    print(descriptor)
"""


@HERE
def test_no_descriptor_of_the_caller_is_left(barriers, tmp_path):
    with (tmp_path / "open").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        outcome = run(DESCRIPTORS, barriers=barriers)
    # Standard streams, and the pipe that says that the program came to its end.
    assert outcome.stdout.split() == ["0", "1", "2", "3"]


@HERE
def test_programs_run_side_by_side():
    outcomes = {}

    def one(number: int) -> None:
        outcomes[number] = run(f"open('x', 'w').write('{number}'); print(open('x').read())")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {number: outcome.stdout for number, outcome in outcomes.items()} == {n: f"{n}\n" for n in range(4)}


@HERE
@pytest.mark.parametrize("source", ["x = '\ud800'", "def f(:", "\0", "", "# é"])
def test_any_text_is_a_program(source):
    outcome = run(source)
    assert outcome.ended in (Ended.FINISHED, Ended.RAISED)


@HERE
def test_forged_reports_of_another_shape_are_not_believed():
    outcome = run("import os\nos.write(3, b'[[[')\nos._exit(0)")
    assert outcome.ended is Ended.EXITED


def test_without_barriers_nothing_runs(monkeypatch, tmp_path):
    outside._choose.cache_clear()
    monkeypatch.setattr(outside, "SETS", ())
    try:
        with pytest.raises(EvalError, match="cannot be contained"):
            run(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert in_use() is None
    finally:
        outside._choose.cache_clear()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("attribute", "value", "said"),
    [
        ("platform", "darwin", "no such barriers"),
        ("machine", "riscv64", "are not known, only of x86_64, aarch64"),
    ],
)
def test_other_systems_are_named(monkeypatch, attribute, value, said):
    if attribute == "platform":
        monkeypatch.setattr(sys, "platform", value)
    else:
        monkeypatch.setattr("platform.machine", lambda: value)
    outside._choose.cache_clear()
    try:
        assert said in (why_not() or "")
    finally:
        outside._choose.cache_clear()


@HERE
def test_the_self_check_sees_what_a_missing_barrier_lets_through():
    """Seccomp alone keeps files readable and writable, so it is not enough."""
    reason = outside.self_check(Barriers(namespaces=False, landlock=False))
    assert reason is not None
    for could in (
        "read a file outside",
        "write a file outside",
        "make a folder outside",
        "remove a file outside",
    ):
        assert could in reason
    assert "socket" not in reason


@HERE
def test_a_barrier_that_breaks_ends_the_run_before_the_program(monkeypatch, tmp_path):
    monkeypatch.setattr(outside, "_LIBRARIES", ())
    monkeypatch.setattr(
        outside, "_START", outside._START.replace("main(int", "import os; os.fork = os.missing\nmain(int")
    )
    # Not chosen here, which would be remembered for the tests that follow.
    with pytest.raises(EvalError, match="ended before it"):
        run("print(1)", barriers=outside.SETS[-1])


def test_a_folder_is_measured_and_removed_whatever_is_in_it(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"x" * 5000)
    (folder / "link").symlink_to("/etc")
    here = Path.cwd()
    try:
        os.chdir(folder)
        for _ in range(1200):
            Path("deep").mkdir()
            os.chdir("deep")
    finally:
        os.chdir(here)
    size, count = size_of(folder, most=100)
    assert size >= 5000
    assert count == 101
    remove(folder)
    assert list(tmp_path.iterdir()) == []
    assert Path("/etc").is_dir()


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_tables_of_calls_are_one_to_one(machine):
    free, conditional = free_calls(machine), list(conditional_calls(machine).values())
    assert len(set(free) | set(conditional)) == len(free) + len(conditional)
    refused = [n[machine.column] for calls in system_calls._REFUSED.values() for n in calls.values()]
    refused = [number for number in refused if number >= 0]
    assert len(set(refused)) == len(refused)
    assert not set(refused) & (set(free) | set(conditional))
    assert meaning(9999, machine) == "call the kernel (system call 9999)"


WITHOUT_LISTENER = """
from gendistill_evals.sandbox import inside
install = inside.install_filter
def taken(*arguments, listen, **settings):
    if listen:
        raise OSError(16, "another filter has a listener")
    return install(*arguments, listen=False, **settings)
inside.install_filter = taken
main(int"""


@HERE
def test_calls_are_refused_where_nobody_can_listen(monkeypatch, barriers):
    """As under a container's own filter with a listener: the exception says what the list of refused calls cannot."""
    monkeypatch.setattr(outside, "_START", outside._START.replace("main(int", WITHOUT_LISTENER))
    assert outside.self_check(barriers) is None
    outcome = run("import os\nos.fork()", QUICK, barriers=barriers)
    assert (outcome.ended, outcome.refused) == (Ended.REFUSED, ())
    assert "PermissionError" in outcome.reason
