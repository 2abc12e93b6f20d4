"""Reading and writing safetensors without torch agrees with the safetensors library."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gendistill.checkpoints.tensors import NewTensor, read_tensor_index, split_into_shards, write_shards
from gendistill.errors import CheckpointError, OutputError


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return {
        "odd": generator.standard_normal(7).astype(np.float16),
        "wide": generator.standard_normal((3, 5)).astype(np.float32),
        "scalar": generator.standard_normal(()).astype(np.float32),
        "half": generator.standard_normal((4, 2, 3)).astype(np.float16),
    }


def entries(arrays):
    names = {"float16": "F16", "float32": "F32"}
    return [NewTensor(name, value.shape, names[value.dtype.name]) for name, value in arrays.items()]


def write(folder, arrays, *, max_shard_bytes=1 << 30, seen=lambda count: None):
    folder.mkdir(exist_ok=True)
    values = {name: [value.tobytes()[:3], value.tobytes()[3:]] for name, value in arrays.items()}
    write_shards(
        folder,
        entries(arrays),
        lambda tensor: values[tensor.name],
        max_shard_bytes=max_shard_bytes,
        on_bytes=seen,
    )


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 64, 1])
def test_written_shards_load_with_safetensors_and_read_back(tmp_path, arrays, max_shard_bytes):
    counted = []
    write(tmp_path / "out", arrays, max_shard_bytes=max_shard_bytes, seen=counted.append)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    loaded = {name: value for file in files for name, value in load_file(file).items()}
    assert set(loaded) == set(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(loaded[name], value)
    assert sum(counted) == sum(value.nbytes for value in arrays.values())
    index = read_tensor_index(tmp_path / "out")
    for name, info in index.items():
        assert b"".join(info.chunks()) == arrays[name].tobytes()
        assert info.shape == arrays[name].shape
    if max_shard_bytes == 1:
        assert len(files) == len(arrays)
    with safe_open(files[0], "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_respect_their_limit_and_keep_the_order():
    tensors = [NewTensor(str(index), (size,), "F32") for index, size in enumerate([4, 4, 9, 1, 1, 1])]
    shards = split_into_shards(tensors, max_shard_bytes=32)
    assert [[tensor.name for tensor in shard] for shard in shards] == [["0", "1"], ["2"], ["3", "4", "5"]]


def test_index_of_a_library_file_matches_it(tmp_path, arrays):
    save_file(arrays, tmp_path / "model.safetensors")
    index = read_tensor_index(tmp_path)
    assert {name: info.shape for name, info in index.items()} == {
        name: value.shape for name, value in arrays.items()
    }
    assert all(b"".join(info.chunks()) == arrays[name].tobytes() for name, info in index.items())


def test_values_of_the_wrong_length_are_refused(tmp_path):
    with pytest.raises(OutputError, match="its shape needs 8"):
        write_shards(
            tmp_path,
            [NewTensor("a", (2,), "F32")],
            lambda _: [b"1234"],
            max_shard_bytes=99,
            on_bytes=lambda _: None,
        )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) - 5], "describes"),
        (lambda data: data[:4], "header would be longer"),
        (lambda data: b"\xff" * 8 + data[8:], "header would be longer"),
        (lambda data: data[:8] + b"x" + data[9:], "header cannot be read"),
        (lambda data: data.replace(b'"shape":[3,5]', b'"shape":[3,4]'), "cannot have"),
        (lambda data: b"", "header would be longer"),
    ],
)
def test_corrupt_safetensors_say_which_file_and_what_to_do(tmp_path, arrays, damage, message):
    write(tmp_path, arrays)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensor_index(tmp_path)
    assert str(path) == caught.value.where
    assert "download it again" in str(caught.value)


def test_missing_shards_are_named(tmp_path, arrays):
    write(tmp_path, arrays, max_shard_bytes=1)
    (tmp_path / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 4 shards are missing.*model-00002-of-00004"):
        read_tensor_index(tmp_path)


def test_index_that_does_not_fit_its_shards_is_refused(tmp_path, arrays):
    write(tmp_path, arrays, max_shard_bytes=1)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["ghost"] = "model-00001-of-00004.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="such as ghost"):
        read_tensor_index(tmp_path)
    path.write_text("[1, 2]")
    with pytest.raises(CheckpointError, match="not a weight index"):
        read_tensor_index(tmp_path)


def test_pickle_only_checkpoints_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pickle weights only.*safetensors"):
        read_tensor_index(tmp_path)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no safetensors"):
        read_tensor_index(tmp_path)


def header_of(data):
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, values):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def changed(**entry):
    """Change entries of the tensor "wide", whose 60 values lie first."""

    def change(header):
        header["wide"].update(entry)
        return header

    return change


HEADERS = {
    "list": lambda header: [header],
    "text": lambda header: "x",
    "number": lambda header: 5,
    "nested": lambda header: b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "entry is a list": lambda header: {**header, "wide": [1]},
    "entry is null": lambda header: {**header, "wide": None},
    "twice": lambda header: json.dumps(header).replace('"odd"', '"half"').encode(),
    "metadata is a list": lambda header: {**header, "__metadata__": [1]},
    "metadata holds numbers": lambda header: {**header, "__metadata__": {"a": 5}},
    "negative length": changed(shape=[-3, -5]),
    "float length": changed(shape=[3.0, 5]),
    "huge length": changed(shape=[2**62, 2**62]),
    "huge empty": changed(shape=[0, 2**70], data_offsets=[0, 0]),
    "text length": changed(shape=["3", 5]),
    "bool length": changed(shape=[True, 15]),
    "shape is a number": changed(shape=15),
    "shape is a text": changed(shape="35"),
    "no shape": changed(shape=None),
    "dtype unknown": changed(dtype="Q5"),
    "dtype is a list": changed(dtype=["F32"]),
    "dtype is missing": changed(dtype=None),
    "one offset": changed(data_offsets=[0]),
    "three offsets": changed(data_offsets=[0, 60, 60]),
    "offsets reversed": changed(data_offsets=[60, 0]),
    "offsets negative": changed(data_offsets=[-60, 0]),
    "offsets float": changed(data_offsets=[0.0, 60.0]),
    "offsets text": changed(data_offsets="ab"),
    "offsets overlap": changed(data_offsets=[4, 64]),
    "offsets beyond": changed(data_offsets=[10**9, 10**9 + 60]),
    "offsets huge": changed(data_offsets=[2**63, 2**63 + 60]),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie_are_refused(tmp_path, arrays, change):
    write(tmp_path, arrays)
    path = tmp_path / "model.safetensors"
    header, values = header_of(path.read_bytes())
    assert header["wide"]["data_offsets"] == [0, 60]
    path.write_bytes(with_header(change(header), values))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is corrupt") as caught:
        read_tensor_index(tmp_path)
    assert str(path) == caught.value.where
    assert "download it again" in str(caught.value)


def test_gaps_between_values_are_refused(tmp_path):
    header = {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    header["b"] = {"dtype": "U8", "shape": [1], "data_offsets": [2, 3]}
    (tmp_path / "model.safetensors").write_bytes(with_header(header, b"123"))
    with pytest.raises(CheckpointError, match="the values of b do not begin"):
        read_tensor_index(tmp_path)


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_header_lengths_are_bounded(tmp_path, length):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as sink:
        sink.write(struct.pack("<Q", length))
        sink.truncate(200_000_000)
    with pytest.raises(CheckpointError, match="header would"):
        read_tensor_index(tmp_path)


NAMES = [
    *("../other.safetensors", "/tmp/other.safetensors", "sub/other.safetensors", "./model.safetensors"),
    *(
        "",
        ".",
        "..",
        "pytorch_model.bin",
        "model.safetensors\0",
        "a\nb.safetensors",
        "..\\o.safetensors",
        "\ud800",
    ),
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_an_index_names_files_of_its_folder_only(tmp_path, arrays, name):
    folder = tmp_path / "checkpoint"
    write(folder, arrays)
    for place in (
        tmp_path / "other.safetensors",
        folder / "sub/other.safetensors",
        folder / "pytorch_model.bin",
    ):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"odd": name}})
    )
    with pytest.raises(CheckpointError, match="not a weight index: it names") as caught:
        read_tensor_index(folder)
    assert caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[1]", "null", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": "x"}'),
        *('{"weight_map": {"odd": 5}}', '{"weight_map": {"odd": null}}', '{"weight_map": {"odd": ["a"]}}'),
        *('{"weight_map": NaN}', '{"weight_map": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    ],
    ids=range(13),
)
def test_files_that_are_no_index_are_refused(tmp_path, arrays, content):
    write(tmp_path, arrays)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a weight index") as caught:
        read_tensor_index(tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("sharded", [False, True])
def test_links_to_weights_are_followed(tmp_path, arrays, sharded):
    write(tmp_path / "other", arrays, max_shard_bytes=1 if sharded else 1 << 30)
    (tmp_path / "linked").mkdir()
    for path in (tmp_path / "other").iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    assert set(read_tensor_index(tmp_path / "linked")) == set(arrays)


def test_what_is_no_file_is_no_checkpoint(tmp_path, arrays, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.mkdir()
    with pytest.raises(CheckpointError):
        read_tensor_index(tmp_path)
    path.rmdir()
    os.mkfifo(path)
    with pytest.raises(CheckpointError):
        read_tensor_index(tmp_path)
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(CheckpointError):
        read_tensor_index(tmp_path)
    path.unlink()
    write(tmp_path, arrays)
    monkeypatch.setattr(
        Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied") as caught:
        read_tensor_index(tmp_path)
    assert caught.value.hint
