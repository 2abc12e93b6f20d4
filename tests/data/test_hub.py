"""Hub datasets read through the real file system of huggingface_hub, from a twin of the hub on this machine."""

import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
NUM_ROWS = 2400

# HF_ENDPOINT is read when the libraries are imported
CHILD = """
import itertools, json, sys, time
import datasets
from transformers import AutoTokenizer
from gendistill.config.schema import Recipe
from gendistill.data.stream import build_stream
from gendistill.errors import DataError

time.sleep = lambda seconds: None  # the libraries wait between their retries

def refuse(*_):
    raise AssertionError("a dataset is copied while other threads use its file system")

datasets.IterableDataset.__deepcopy__ = refuse

def plain(step):
    return [batch.input_ids.tolist() for batch in step]

task = json.loads(sys.argv[1])
recipe, tokenizer = Recipe.model_validate(task["recipe"]), AutoTokenizer.from_pretrained(task["tokenizer"])
try:
    stream = build_stream(recipe, "distill", tokenizer)
    states, whole, epochs = [], [], []
    for _ in range(task["steps"]):
        states.append(json.loads(json.dumps(stream.state_dict())))
        whole.append(plain(next(stream)))
        epochs.append(stream.epochs["hub"])
    bad = []
    for cut in task.get("cuts", []):
        resumed = build_stream(recipe, "distill", tokenizer)
        resumed.load_state_dict(states[cut])
        bad += [cut] * ([plain(next(resumed)) for _ in range(3)] != whole[cut : cut + 3])
    print(json.dumps({"epochs": epochs, "bad": bad, "distinct": len({str(step) for step in whole})}))
except DataError as error:
    print(json.dumps({"error": str(error), "hint": error.hint}))
"""


def _parquet(numbers: range) -> bytes:
    out = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist([{"text": f"row {n} of a river"} for n in numbers]), out, row_group_size=100
    )
    return out.getvalue()


@functools.cache
def _files() -> dict[str, bytes]:
    half = NUM_ROWS // 2
    return {
        "README.md": b"# rows",
        "data/train-00000-of-00002.parquet": _parquet(range(half)),
        "data/train-00001-of-00002.parquet": _parquet(range(half, NUM_ROWS)),
    }


@pytest.fixture
def read_hub(tmp_path, make_recipe, make_tokenizer):
    """Read batches of a hub dataset in another process."""
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def read(twin, *, steps: int, cuts=(), **source) -> dict:
        recipe = make_recipe({"hub": {"path": twin.repo} | source}, batch_size=8, seq_len=256)
        task = {
            "recipe": recipe.model_dump(mode="json", by_alias=True),
            "tokenizer": str(tmp_path / "tokenizer"),
            "steps": steps,
            "cuts": list(cuts),
        }
        environment = {**os.environ, "HF_ENDPOINT": twin.endpoint, "HF_HOME": str(tmp_path / "hf")}
        environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        done = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps(task)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return read


def test_a_streamed_dataset_survives_its_epochs_and_resumes_in_each(hub_twin, read_hub):
    with hub_twin.HubTwin("org/rows", _files()) as twin:
        found = read_hub(twin, steps=42, cuts=[0, 1, 13, 22, 30, 38], streaming=True)
    assert found["bad"] == []
    assert found["epochs"][-1] >= 2
    assert found["distinct"] == 42


@pytest.mark.parametrize("failure", ["reset", 503])
def test_a_network_that_fails_for_good_is_a_data_error_that_says_resume(hub_twin, read_hub, failure):
    last = "data/train-00001-of-00002.parquet"
    with hub_twin.HubTwin(
        "org/rows", _files(), lambda path, start: failure if path == last else None
    ) as twin:
        found = read_hub(twin, steps=40, streaming=True)
    assert "cannot read org/rows" in found["error"]
    assert "it resumes" in found["hint"]


def test_code_of_a_dataset_is_refused(hub_twin, read_hub, tmp_path):
    touched = tmp_path / "touched"
    files = {**_files(), "rows.py": f"open({str(touched)!r}, 'w')".encode()}
    with hub_twin.HubTwin("org/rows", files) as twin:
        found = read_hub(twin, steps=1, streaming=True)
    assert "code of a dataset is never run" in found["hint"]
    assert not touched.exists()


def test_a_downloaded_dataset_is_read_as_a_streamed_one(hub_twin, read_hub):
    with hub_twin.HubTwin("org/rows", _files()) as twin:
        found = read_hub(twin, steps=30, cuts=[0, 25])
    assert found["bad"] == []
    assert found["epochs"][-1] >= 1


def test_a_dataset_that_is_not_there_is_a_data_error(hub_twin, read_hub):
    with hub_twin.HubTwin("org/rows", _files()) as twin:
        found = read_hub(twin, steps=1, streaming=True, path="org/other")
    assert "org/other" in found["error"]
