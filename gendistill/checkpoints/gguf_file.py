"""Read a GGUF file's metadata and tensor table.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gendistill.errors import CheckpointError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
# far above any model's, and little enough to be read
_MAX_DIMS = 8
_MAX_ITEMS = 1 << 24
_MAX_TEXT_BYTES = 1 << 26
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file and where its values lie.

    Attributes:
        shape: Sizes in row-major order (the file stores them reversed).
        type_id: Number of the ggml type.
        start: First byte in the file.
    """

    shape: tuple[int, ...]
    type_id: int
    start: int


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF file but the values."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read metadata and tensor table of a little-endian GGUF file.

    Raises:
        CheckpointError: No GGUF file, an unknown version, or a truncated one.
    """
    try:
        with path.open("rb") as source, mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(data, path).header()
    except (struct.error, KeyError, ValueError, RecursionError) as error:
        raise _corrupt(path, f"it cannot be read ({error})") from error


def _corrupt(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is not a usable GGUF file: {reason}", where=str(path), hint="download the file again"
    )


class _Cursor:
    """A place in the header, which is read from front to back."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0

    def header(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise _corrupt(self.path, "it does not begin with GGUF")
        self.position = 4
        version = self.scalar("<I")
        if version not in (2, 3):
            raise _corrupt(self.path, f"its version is {version}; 2 and 3 (little-endian) can be read")
        num_tensors, num_entries = self.scalar("<Q"), self.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = self.string()
            self.is_new(key, metadata)
            metadata[key] = self.value(self.scalar("<I"))
        table = {}
        for _ in range(num_tensors):
            name = self.string()
            self.is_new(name, table)
            table[name] = (self.shape(name), self.scalar("<I"), self.scalar("<Q"))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _corrupt(self.path, f"its alignment must be a power of two, got {alignment!r:.40}")
        start = -(-self.position // alignment) * alignment
        tensors = {
            name: GGUFTensor(shape, kind, start + offset) for name, (shape, kind, offset) in table.items()
        }
        return GGUFHeader(self.path, metadata, tensors)

    def is_new(self, name: str, known: dict[str, Any]) -> None:
        if name in known:
            raise _corrupt(self.path, f"{name:.80} is given twice")

    def shape(self, name: str) -> tuple[int, ...]:
        count = self.scalar("<I")
        if not 0 < count <= _MAX_DIMS:
            raise _corrupt(self.path, f"{name:.80} has {count} dimensions")
        sizes = tuple(reversed([self.scalar("<Q") for _ in range(count)]))
        if not 0 < math.prod(sizes) <= 8 * len(self.data):
            raise _corrupt(
                self.path, f"{name:.80} has the shape {list(sizes)}, which the file has no room for"
            )
        return sizes

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self.data, self.position)
        self.position += struct.calcsize(layout)
        return value

    def string(self) -> str:
        length = self.scalar("<Q")
        end = self.position + length
        if end > len(self.data):
            raise _corrupt(self.path, "it ends inside its header")
        if length > _MAX_TEXT_BYTES:
            raise _corrupt(self.path, f"its header holds a text of {length:,} bytes")
        text = self.data[self.position : end].decode("utf-8")
        self.position = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind, count = self.scalar("<I"), self.scalar("<Q")
            if count > min(_MAX_ITEMS, len(self.data)):
                raise _corrupt(self.path, f"its header holds a list of {count:,} values")
            return [self.value(item_kind) for _ in range(count)]
        return self.scalar(_SCALARS[kind])
