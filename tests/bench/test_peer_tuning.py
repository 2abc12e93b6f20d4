"""What a peer's kernels chose goes from Triton's cache to a file and back."""

from __future__ import annotations

import json

import pytest

from gendistill.bench import peer_tuning
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
    put(first, NAMES[0], 3.0, 1.0, float("inf"))
    (first / ("C" * 52)).mkdir()
    (first / ("C" * 52) / "ours.json").write_text("{}")
    assert peer_tuning.restore(file, first, **ABOUT) == 0
    assert peer_tuning.save(file, first, **ABOUT) == 1
    assert peer_tuning.restore(file, second, **ABOUT) == 1
    ((config, times),) = json.loads((second / NAMES[0]).read_text())["configs_timings"]
    assert (config["kwargs"], times) == ({"BT": 16}, [1.0] * 3)
    assert [path.name for path in second.iterdir()] == ["A" * 52]


def test_what_a_cache_has_is_left_and_a_file_grows(tmp_path):
    first, second, file = tmp_path / "first", tmp_path / "second", tmp_path / "choices.json"
    put(first, NAMES[0], 1.0)
    put(second, NAMES[0], 2.0)
    put(second, NAMES[1], 2.0)
    peer_tuning.save(file, first, **ABOUT)
    assert peer_tuning.restore(file, second, **ABOUT) == 0
    assert "2.0" in (second / NAMES[0]).read_text()
    assert peer_tuning.save(file, second, **ABOUT) == 2
    assert peer_tuning.save(file, tmp_path / "empty", **ABOUT) == 2


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
        peer_tuning.restore(file, tmp_path / "cache", **ABOUT)
    assert message in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_it_is_for_a_peer(capsys):
    assert main(["bench", "ops", "--no-peer", "--peer-tuning", "x.json"]) == 2
    assert "--peer-tuning is for the peer that --no-peer leaves out" in capsys.readouterr().err
