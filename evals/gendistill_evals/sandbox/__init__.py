"""Run programs that a model wrote, in a process of their own behind barriers of the Linux kernel.

What is enough, and tested before the first program by one that tries to get out (``why_not`` says what is missing):

- files: Landlock, or mounts of its own in a namespace, or both;
- network: a filter of system calls (seccomp) that refuses sockets, and an own namespace where there may be one;
- processes: the same filter, which refuses new processes and threads, other programs and signals, and a namespace.

The first of these sets that holds is used: namespaces + Landlock + seccomp; Landlock + seccomp, as where containers
allow no user namespaces; namespaces + seccomp, as on kernels before 5.13. All run with no new privileges, no
capabilities, and limits on processor time, addresses, files and the clock. Anything less is refused: no program ever
runs without barriers. They protect the machine from the program, not a score from a program that sets out to forge it.
"""

from __future__ import annotations

from gendistill_evals.sandbox.outside import Barriers, Ended, Limits, Outcome, in_use, run, why_not

__all__ = ["Barriers", "Ended", "Limits", "Outcome", "in_use", "run", "why_not"]
