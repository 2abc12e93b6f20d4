"""What a peer's kernels chose goes from Triton's cache to a file and back."""

from __future__ import annotations

import json

import pytest

from gendistill.bench.peer_tuning import PeerTuning
from gendistill.cli.main import main
from gendistill.errors import GendistillError

ABOUT = {"peer": "fla-core 0.6.0", "device": "a GPU"}
NAMES = [f"{letter * 52}/some_kernel.autotune.json" for letter in "AB"]


def put(cache, name, *times):
    (cache / name).parent.mkdir(parents=True)
    timings = [
        [{"kwargs": {"BT": 16 * number}, "num_warps": 4}, [time] * 3] for number, time in enumerate(times)
    ]
    (cache / name).write_text(json.dumps({"key": [128], "configs_timings": timings}))


def test_the_fastest_choices_come_back(tmp_path):
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "choices.json"
    tuning = PeerTuning(file, first, **ABOUT)
    put(first, NAMES[0], 3.0, 1.0, float("inf"))
    (first / ("C" * 52)).mkdir()
    (first / ("C" * 52) / "ours.json").write_text("{}")
    tuning.save()
    assert PeerTuning(file, second, **ABOUT).restored == 1
    ((config, times),) = json.loads((second / NAMES[0]).read_text())["configs_timings"]
    assert (config["kwargs"], times) == ({"BT": 16}, [1.0] * 3)
    assert [path.name for path in second.iterdir()] == ["A" * 52]


def test_a_file_grows_by_what_is_chosen_since_and_nothing_else(tmp_path):
    cache, file = tmp_path / "cache", tmp_path / "choices.json"
    put(cache, NAMES[0], 1.0)
    tuning = PeerTuning(file, cache, **ABOUT)
    put(cache, NAMES[1], 2.0)
    tuning.save()
    assert [*json.loads(file.read_text())["choices"]] == [NAMES[1]]
    # what is there is left as it is, and what the file had stays in it
    (cache / NAMES[1]).write_text("mine")
    again = PeerTuning(file, cache, **ABOUT)
    again.save()
    assert again.restored == 0
    assert (cache / NAMES[1]).read_text() == "mine"
    assert [*json.loads(file.read_text())["choices"]] == [NAMES[1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "another"}, 'the device "another", here it is "a GPU"'),
        ({"choices": {"../../x": {}}}, "outside of Triton's cache: ../../x"),
        ({"schema": 2}, '"schema": 1'),
        ({"choices": None}, '"choices"'),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    file = tmp_path / "choices.json"
    file.write_text(json.dumps({"schema": 1, **ABOUT, "choices": {}} | change))
    with pytest.raises(GendistillError, match=r"choices\.json") as caught:
        PeerTuning(file, tmp_path / "cache", **ABOUT)
    assert message in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_it_is_for_a_peer(capsys):
    assert main(["bench", "ops", "--no-peer", "--peer-tuning", "x.json"]) == 2
    assert "--peer-tuning is for the peer that --no-peer leaves out" in capsys.readouterr().err
