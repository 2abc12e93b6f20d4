"""Safetensors files without torch: read the headers of a checkpoint, and write shards tensor by tensor.

The writer streams. What is in memory is what the caller hands over, so that the size of a checkpoint and of its
shards does not matter.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gendistill.errors import CheckpointError, OutputError
from gendistill.paths import check_shape, read_json, write_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPE_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8},
    **{"F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8},
}
_MAX_HEADER_BYTES = 100_000_000  # as in the safetensors library
_MAX_INT = (1 << 63) - 1
_COPY_BYTES = 1 << 24
_COMPARED_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint and where it lies.

    Attributes:
        shape: Sizes.
        dtype: Safetensors name, such as ``F32`` or ``BF16``.
        file: The safetensors file.
        start: First byte of the values in that file.
        num_bytes: Length of the values.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    start: int = 0
    num_bytes: int = 0

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    def chunks(self, max_bytes: int = _COPY_BYTES) -> Iterator[bytes]:
        """Read the values piece by piece; all pieces but the last have ``max_bytes``."""
        remaining = self.num_bytes
        with self.file.open("rb") as source:
            source.seek(self.start)
            while remaining:
                chunk = source.read(min(remaining, max_bytes))
                if not chunk:
                    raise _corrupt(self.file, "it ends inside a tensor")
                remaining -= len(chunk)
                yield chunk


def have_same_values(first: TensorInfo, second: TensorInfo) -> bool:
    """Compare the values of two float tensors of a checkpoint, piece by piece; their dtypes may differ.

    Returns: False too where the shapes differ, or a dtype is not of plain floats.
    """
    if first.shape != second.shape:
        return False
    if first.dtype == second.dtype:
        return all(one == other for one, other in zip(first.chunks(), second.chunks(), strict=True))
    import torch

    dtypes = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if not {first.dtype, second.dtype} <= set(dtypes):
        return False

    def pieces(info: TensorInfo) -> Iterator[torch.Tensor]:
        for chunk in info.chunks(_COMPARED_ELEMENTS * DTYPE_BYTES[info.dtype]):
            yield torch.frombuffer(bytearray(chunk), dtype=dtypes[info.dtype]).double()

    return all(torch.equal(one, other) for one, other in zip(pieces(first), pieces(second), strict=True))


def read_tensor_index(folder: Path, *, where: str | None = None) -> dict[str, TensorInfo]:
    """List the tensors of a checkpoint folder from its safetensors headers. No values are read.

    Args:
        folder: Holds ``model.safetensors``, or shards with ``model.safetensors.index.json``.
        where: Name of the setting, for errors; defaults to the folder.
    Returns:
        Tensor name to its shape, dtype and place, in file order.
    Raises:
        CheckpointError: No safetensors, a missing shard, or a corrupt file.
    """
    where = where or str(folder)
    if (folder / INDEX_NAME).is_file():
        return _read_sharded(folder, where)
    files = [path for path in sorted(folder.glob("*.safetensors")) if path.is_file()]
    if folder / SINGLE_NAME in files:
        files = [folder / SINGLE_NAME]
    if not files:
        raise _no_safetensors(folder, where)
    if len(files) > 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} safetensors files but no {INDEX_NAME} that says which belong together",
            where=where,
            hint=f"restore {INDEX_NAME} from where the checkpoint came from",
        )
    return _read_header(files[0])


def _no_safetensors(folder: Path, where: str) -> CheckpointError:
    pickles = sorted(
        path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))
    )
    if pickles:
        return CheckpointError(
            f"{folder} holds pickle weights only ({', '.join(pickles[:3])}); a pickle can run any code when it is "
            "read, so only safetensors are accepted",
            where=where,
            hint="use a revision with safetensors, or load it yourself and save_pretrained() it again",
        )
    return CheckpointError(
        f"{folder} has no safetensors weights",
        where=where,
        hint="a checkpoint folder needs config.json and model.safetensors (or shards with their index)",
    )


def _read_sharded(folder: Path, where: str) -> dict[str, TensorInfo]:
    path = folder / INDEX_NAME
    hint = "download the file again"
    try:
        content = read_json(path, shape=dict[str, Any], error=CheckpointError, hint=hint)
        weight_map = check_shape(
            content.get("weight_map"), dict[str, str], error=CheckpointError, where="weight_map", hint=hint
        )
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} is not a weight index: {error.message}", where=where, hint=hint
        ) from error
    shards = sorted(set(weight_map.values()))
    outside = [name for name in shards if not _is_plain(name)]
    if outside or not shards:
        reason = f"it names {outside[0]!r:.80}" if outside else "it does not name a file"
        raise CheckpointError(
            f"{path} is not a weight index: {reason}; shards are .safetensors files in the same folder",
            where=where,
            hint=hint,
        )
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(shards)} shards are missing in {folder}: {', '.join(missing[:3])}",
            where=where,
            hint="download the checkpoint again; finished shards are kept",
        )
    headers = {shard: _read_header(folder / shard) for shard in shards}
    absent = [name for name, shard in weight_map.items() if name not in headers[shard]]
    if absent:
        raise CheckpointError(
            f"{INDEX_NAME} lists {len(absent)} tensors that the shards do not hold, such as {absent[0]}",
            where=where,
            hint="index and shards come from different versions: download the checkpoint again",
        )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _is_plain(name: str) -> bool:
    """Whether a name from an index is one of a file in the same folder."""
    return name.isprintable() and name.endswith(".safetensors") and not {"/", "\\"} & set(name)


def _corrupt(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path.name} is corrupt: {reason}", where=str(path), hint="delete the file and download it again"
    )


def _read_header(path: Path) -> dict[str, TensorInfo]:
    size = path.stat().st_size
    try:
        with path.open("rb") as source:
            head = source.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
            if length > size - 8:
                raise _corrupt(path, f"its header would be longer than the file ({size:,} bytes)")
            if length > _MAX_HEADER_BYTES:
                raise _corrupt(path, f"its header would have {length:,} bytes")
            text = source.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror}", where=str(path), hint="check the file's permissions"
        ) from error
    try:
        header = json.loads(text, object_pairs_hook=_without_repetition)
        check_shape(
            header.pop("__metadata__", {}), dict[str, str], error=CheckpointError, where=str(path), hint=""
        )
        tensors = {name: _tensor_info(entry, path, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, CheckpointError) as error:
        raise _corrupt(path, f"its header cannot be read ({error})") from error
    expected = max((info.start + info.num_bytes for info in tensors.values()), default=8 + length)
    if expected != size:
        raise _corrupt(path, f"its header describes {expected:,} bytes, the file has {size:,}")
    end = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != end:
            raise _corrupt(path, f"the values of {name} do not begin where those before them end")
        end += info.num_bytes
    return tensors


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is given twice")
    return content


def _tensor_info(entry: dict[str, Any], path: Path, data_start: int) -> TensorInfo:
    (begin, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    if not all(type(number) is int and 0 <= number <= _MAX_INT for number in (begin, end, *shape)):
        raise ValueError("sizes and offsets must be whole numbers from 0")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown dtype {dtype!r:.40}")
    if math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise ValueError(f"a {dtype} tensor of shape {shape} cannot have {end - begin} bytes")
    return TensorInfo(shape, dtype, path, data_start + begin, end - begin)


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Length of its values in the file."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def split_into_shards(tensors: Sequence[NewTensor], max_shard_bytes: int) -> list[list[NewTensor]]:
    """Cut a list of tensors into shards, in order. A tensor above the limit has a shard to itself."""
    shards: list[list[NewTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def write_shards(
    folder: Path,
    tensors: Sequence[NewTensor],
    values: Callable[[NewTensor], Iterable[bytes]],
    *,
    max_shard_bytes: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Write a checkpoint's weights, and its index when there is more than one shard.

    Args:
        folder: Existing folder.
        tensors: What to write, in order.
        values: Gives the bytes of one tensor, little-endian and row-major, in pieces.
        max_shard_bytes: Upper size of one file's values.
        on_bytes: Called with the length of every piece written.
    """
    shards = split_into_shards(tensors, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # widest dtype first keeps every tensor aligned, whatever the sizes
        ordered = sorted(shard, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
        with (folder / name).open("wb") as sink:
            sink.write(_encode_header(ordered))
            for tensor in ordered:
                _write_values(sink, tensor, values(tensor), on_bytes)
        weight_map.update((tensor.name, name) for tensor in shard)
    if len(shards) > 1:
        total = sum(tensor.num_bytes for tensor in tensors)
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _encode_header(tensors: Sequence[NewTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_values(
    sink: BinaryIO, tensor: NewTensor, pieces: Iterable[bytes], on_bytes: Callable[[int], None]
) -> None:
    written = 0
    for piece in pieces:
        sink.write(piece)
        written += len(piece)
        on_bytes(len(piece))
    if written != tensor.num_bytes:
        raise OutputError(
            f"{tensor.name} has {written:,} bytes of values, its shape needs {tensor.num_bytes:,}",
            where=tensor.name,
        )
