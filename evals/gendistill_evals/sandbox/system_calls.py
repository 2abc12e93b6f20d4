"""Numbers of Linux system calls, what a contained program may call, and what the others are for. Imports no torch.

Source: the tables of Linux 6.18, ``arch/x86/entry/syscalls/syscall_64.tbl`` and ``scripts/syscall.tbl`` (arm64).
"""

from __future__ import annotations

import platform
from typing import NamedTuple


class Machine(NamedTuple):
    """One instruction set: its number in ``struct seccomp_data``, and the column of its calls in the tables here."""

    audit_arch: int
    column: int


MACHINES = {"x86_64": Machine(0xC000003E, 0), "aarch64": Machine(0xC00000B7, 1)}
# On x86-64 a bit of the number asks for another calling convention, whose numbers are not filtered.
X32_BIT = 0x4000_0000

_ABSENT = -1
# name: numbers on x86_64 and aarch64; allowed whatever the arguments are.
_FREE = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, _ABSENT), "fstat": (5, 80), "lstat": (6, _ABSENT),
    "poll": (7, _ABSENT), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, _ABSENT),
    "pipe": (22, _ABSENT), "select": (23, _ABSENT), "sched_yield": (24, 124), "mremap": (25, 216), "msync": (26, 227),
    "madvise": (28, 233), "dup": (32, 23), "dup2": (33, _ABSENT), "pause": (34, _ABSENT), "nanosleep": (35, 101),
    "getitimer": (36, 102), "alarm": (37, _ABSENT), "setitimer": (38, 103), "getpid": (39, 172), "sendfile": (40, 71),
    "exit": (60, 93), "wait4": (61, 260), "uname": (63, 160), "flock": (73, 32), "fsync": (74, 82),
    "fdatasync": (75, 83), "ftruncate": (77, 46), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "rename": (82, _ABSENT), "mkdir": (83, _ABSENT), "rmdir": (84, _ABSENT), "link": (86, _ABSENT),
    "unlink": (87, _ABSENT), "symlink": (88, _ABSENT), "readlink": (89, _ABSENT), "umask": (95, 166),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "getpgrp": (111, _ABSENT), "getgroups": (115, 158), "getresuid": (118, 148),
    "getresgid": (120, 150), "getpgid": (121, 155), "getsid": (124, 156), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "statfs": (137, 43),
    "fstatfs": (138, 44), "arch_prctl": (158, _ABSENT), "gettid": (186, 178), "time": (201, _ABSENT),
    "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61), "set_tid_address": (218, 96),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "epoll_wait": (232, _ABSENT), "epoll_ctl": (233, 21),
    "waitid": (247, 95), "mkdirat": (258, 34), "newfstatat": (262, 79), "unlinkat": (263, 35),
    "renameat": (264, 38), "linkat": (265, 37), "symlinkat": (266, 36), "readlinkat": (267, 78),
    "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73), "set_robust_list": (273, 99),
    "epoll_pwait": (281, 22), "eventfd2": (290, 19), "epoll_create1": (291, 20), "dup3": (292, 24),
    "pipe2": (293, 59), "getcpu": (309, 168), "renameat2": (316, 276), "getrandom": (318, 278),
    "membarrier": (324, 283), "copy_file_range": (326, 285), "statx": (332, 291), "rseq": (334, 293),
    "close_range": (436, 436), "faccessat2": (439, 439),
}  # fmt: skip
# Allowed with some arguments; ``seccomp.build_filter`` says which.
_CONDITIONAL = {
    "open": (2, _ABSENT), "ioctl": (16, 29), "sendmsg": (46, 211), "kill": (62, 129), "fcntl": (72, 25),
    "tgkill": (234, 131), "openat": (257, 56), "prlimit64": (302, 261),
}  # fmt: skip
# Never allowed, with what a program does by them: for reports alone, since all that is not named above is refused.
_REFUSED = {
    "start a process or thread": {
        "clone": (56, 220), "fork": (57, _ABSENT), "vfork": (58, _ABSENT), "clone3": (435, 435),
    },
    "run another program": {"execve": (59, 221), "execveat": (322, 281)},
    "open a socket": {
        "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "sendto": (44, 206), "recvfrom": (45, 207),
        "recvmsg": (47, 212), "bind": (49, 200), "listen": (50, 201), "socketpair": (53, 199), "accept4": (288, 242),
    },
    "signal another process": {
        "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
        "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    },
    "look into another process": {
        "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
        "pidfd_getfd": (438, 438),
    },
    "leave its group of processes": {"setpgid": (109, 154), "setsid": (112, 157)},
    "mount or enter namespaces": {
        "pivot_root": (155, 41), "chroot": (161, 51), "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97),
        "setns": (308, 268), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    },
    "change owners, modes, times or lengths by name": {
        "truncate": (76, 45), "chmod": (90, _ABSENT), "fchmod": (91, 52), "chown": (92, _ABSENT), "fchown": (93, 55),
        "lchown": (94, _ABSENT), "utime": (132, _ABSENT), "mknod": (133, _ABSENT), "setxattr": (188, 5),
        "utimes": (235, _ABSENT), "mknodat": (259, 33), "fchownat": (260, 54), "fchmodat": (268, 53),
        "utimensat": (280, 88), "fchmodat2": (452, 452),
    },
    "change its rights or limits": {
        "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setresuid": (117, 147),
        "capset": (126, 91), "prctl": (157, 167), "setrlimit": (160, 164), "seccomp": (317, 277),
    },
    "share memory beyond its limits": {
        "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
        "memfd_create": (319, 279), "memfd_secret": (447, 447),
    },
    "reach into the kernel": {
        "init_module": (175, 105), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
        "perf_event_open": (298, 241), "open_by_handle_at": (304, 265), "finit_module": (313, 273), "bpf": (321, 280),
        "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    },
}  # fmt: skip
_CONDITIONAL_MEANING = {
    "kill": "signal another process",
    "tgkill": "signal another process",
    "prlimit64": "change its rights or limits",
    "sendmsg": "open a socket",
    "open": "open a file in a mode that changes what it only reads",
    "openat": "open a file in a mode that changes what it only reads",
}


def this_machine() -> Machine | None:
    """Return the instruction set that this process runs on; None if its calls are not known here."""
    return MACHINES.get(platform.machine())


def free_calls(machine: Machine) -> list[int]:
    """List the numbers of the calls that are allowed whatever their arguments are."""
    numbers = [numbers[machine.column] for numbers in _FREE.values()]
    return [number for number in numbers if number != _ABSENT]


def conditional_calls(machine: Machine) -> dict[str, int]:
    """Map the names of the calls that are allowed with some arguments to their numbers."""
    numbers = {name: numbers[machine.column] for name, numbers in _CONDITIONAL.items()}
    return {name: number for name, number in numbers.items() if number != _ABSENT}


def meaning(number: int, machine: Machine) -> str:
    """Say what a refused call would have done: "open a socket (connect)"."""
    for what, calls in _REFUSED.items():
        for name, numbers in calls.items():
            if numbers[machine.column] == number:
                return f"{what} ({name})"
    for name, numbers in _CONDITIONAL.items():
        if numbers[machine.column] == number:
            return f"{_CONDITIONAL_MEANING.get(name, 'call the kernel')} ({name})"
    return f"call the kernel (system call {number})"
