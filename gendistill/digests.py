"""Hash the content of files, remembering the results: models and datasets can be large."""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path

from gendistill.paths import cache_dir, write_text

_SHA256 = re.compile(r"[0-9a-f]{64}")
# a file that changed this short a time ago may change again within one tick of a file system's clock
_SETTLED_NS = 3_000_000_000


def file_stamp(stat: os.stat_result) -> str:
    """Write down what tells one state of a file from another without reading it.

    Size and time of modification can be put back by hand or by a copy; inode and time of change cannot.
    """
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"


def file_digest(path: Path) -> str:
    """Hash a file's content with SHA-256; a file that stays as it is is read once.

    Raises:
        OSError: The file cannot be read.
    """
    before = path.stat()
    identity = f"2 {path.resolve()}\0{file_stamp(before)}"
    memo = cache_dir() / "digests" / hashlib.sha256(os.fsencode(identity)).hexdigest()
    known = memo.read_bytes().decode("ascii", errors="replace") if memo.is_file() else ""
    if _SHA256.fullmatch(known):
        return known
    with path.open("rb") as source:
        digest = hashlib.file_digest(source, "sha256").hexdigest()
    after = path.stat()
    settled = time.time_ns() - after.st_ctime_ns > _SETTLED_NS
    if settled and file_stamp(before) == file_stamp(after):
        write_text(memo, digest)
    return digest
