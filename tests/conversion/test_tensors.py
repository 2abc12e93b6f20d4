"""Reading and writing safetensors without torch agrees with the safetensors library."""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from gendistill.conversion.tensors import NewTensor, read_tensor_index, split_into_shards, write_shards
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
    with pytest.raises(CheckpointError, match="no weight index"):
        read_tensor_index(tmp_path)


def test_pickle_only_checkpoints_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match=r"pickle weights only.*safetensors"):
        read_tensor_index(tmp_path)


def test_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no safetensors"):
        read_tensor_index(tmp_path)
