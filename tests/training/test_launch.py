"""What the launcher may not set, and what the words between processes carry."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType

from gendistill.config.engine import EngineConfig
from gendistill.errors import DataError, TrainingError
from gendistill.training.parallel import Single, choose_parallel, connect
from gendistill.training.parallel.choose import check_accelerator, check_environment
from gendistill.training.parallel.fsdp2 import _check_apart
from gendistill.training.parallel.group import Group
from gendistill.training.parallel.peers import Peers, Situation
from gendistill_evals.errors import EvalError

FINE = {"gradient_accumulation_steps": 1, "mixed_precision": "no", "distributed_type": DistributedType.NO}


def test_accumulation_in_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    with pytest.raises(TrainingError, match="accumulate 2 steps"):
        check_accelerator(Accelerator(cpu=True))
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    check_accelerator(Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mixed_precision": "bf16"}, "mixed precision bf16"),
        ({"mixed_precision": "fp8"}, "mixed precision fp8"),
        ({"distributed_type": DistributedType.XLA}, "CUDA or CPU"),
        ({"distributed_type": DistributedType.MULTI_NPU}, "CUDA or CPU"),
    ],
)
def test_launch_settings_that_would_change_the_loss_are_refused(changes, why):
    check_accelerator(SimpleNamespace(**FINE))
    with pytest.raises(TrainingError, match=why) as caught:
        check_accelerator(SimpleNamespace(**{**FINE, **changes}))
    assert "launch with" in caught.value.hint


@pytest.mark.parametrize(
    ("environment", "why", "instead"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed.*resume bitwise", "engine.parallel=fsdp2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron", "engine.parallel=fsdp2"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism config", "engine.parallel=fsdp2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1", "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1", "--fsdp_version 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "offload",
            "--fsdp_offload_params false",
        ),
    ],
)
def test_other_engines_are_refused_before_accelerate_looks_for_them(monkeypatch, environment, why, instead):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match=why) as caught:
        connect(EngineConfig(), cpu=True)
    assert instead in caught.value.hint


def test_compilation_by_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(TrainingError, match="--dynamo_backend no"):
        check_accelerator(SimpleNamespace(**FINE))


def test_one_process_is_one_process_whatever_the_recipe_says_of_several(monkeypatch):
    assert isinstance(choose_parallel(Accelerator(cpu=True), EngineConfig(parallel="fsdp2")), Single)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_environment()


def test_blocks_that_share_a_parameter_cannot_be_split():
    blocks = [torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)]
    _check_apart(blocks)
    blocks[1].bias = blocks[0].bias
    with pytest.raises(TrainingError, match="layers 0 and 1 share the parameter bias"):
        _check_apart(blocks)


class Words:
    """A store in memory, in which the other process has always just spoken."""

    def __init__(self):
        self.store = dist.HashStore()

    def __getattr__(self, name):
        return getattr(self.store, name)

    def clone(self):
        return self.store


def process(rank, words):
    """One of two processes, without its thread and its devices."""
    group = object.__new__(Group)
    group.rank, group.world = rank, 2
    peers = object.__new__(Peers)
    peers.rank, peers.world, peers._store, peers._calls, peers._lost = rank, 2, words, 0, None
    # the other one never waits here
    peers.everybody = lambda key: None
    group.peers = peers
    return group


@pytest.mark.parametrize(
    "error", [DataError("no rows", where="data.text"), EvalError("no items", where="a.yaml")]
)
def test_an_error_of_the_main_process_reaches_the_others(error):
    words = Words()

    def fail():
        raise error

    with pytest.raises(type(error)):
        process(0, words).on_main(fail)
    with pytest.raises(type(error)) as caught:
        process(1, words).on_main(pytest.fail)
    assert (str(caught.value), caught.value.where) == (str(error), error.where)


def test_what_the_main_process_finds_reaches_the_others():
    words = Words()
    first, second = process(0, words), process(1, words)
    for found in ({"a": 1}, None):
        assert first.on_main(lambda found=found: found) == second.on_main(pytest.fail) == found


def test_a_situation_stands_in_the_error_of_a_lost_process():
    peers = object.__new__(Peers)
    peers._situations = [lambda: Situation("stages.block", "The checkpoint x is intact", "run it again")]
    error = peers._error("rank 1 is lost")
    assert "rank 1 is lost. The checkpoint x is intact" in str(error)
    assert "next: run it again" in str(error)
