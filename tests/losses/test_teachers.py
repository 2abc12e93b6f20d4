"""A live teacher says what its model computes, once, in evaluation mode, and only what is needed."""

import pytest
import torch

from gendistill.data.batch import IGNORE, Batch
from gendistill.losses.student import run_mixer
from gendistill.ops import Segments
from gendistill.teachers.base import Needs
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import FAMILIES, tiny_student, tiny_teacher


def make_batch(rows=2, tokens=12):
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(tokens).repeat(rows, 1)
    return Batch(ids, torch.full_like(ids, IGNORE), positions, Segments([tokens] * rows), 0, rows * tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_signals_are_what_the_model_computes(family):
    model, batch = tiny_teacher(family), make_batch()
    signals = LiveTeacher(model).signals(batch, Needs(hidden=True, mixer_io=(1,), block_io=(0, 2)))
    states = model(batch.input_ids, output_hidden_states=True).hidden_states
    assert torch.equal(signals.hidden, states[-1])
    assert signals.head is model.lm_head.weight
    assert not signals.hidden.requires_grad
    assert sorted(signals.mixers) == [1]
    assert sorted(signals.blocks) == [0, 2]
    for layer, io in signals.blocks.items():
        assert torch.equal(io.hidden_states, states[layer])
        assert torch.equal(io.output, states[layer + 1])
    assert torch.equal(signals.mixers[1].hidden_states, model.model.layers[1].input_layernorm(states[1]))


def test_a_teacher_that_is_not_needed_is_not_run():
    model = tiny_teacher()
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    signals = LiveTeacher(model).signals(make_batch(), Needs())
    assert (signals.hidden, signals.head, dict(signals.mixers), dict(signals.blocks)) == (None, None, {}, {})


def test_layers_can_be_taken_one_by_one():
    teacher, batch, needs = LiveTeacher(tiny_teacher()), make_batch(), Needs(mixer_io=(0, 2, 3))
    taken = {}
    signals = teacher.signals(batch, needs, take=taken.__setitem__)
    assert not signals.mixers
    assert list(taken) == [0, 2, 3]
    for layer, io in teacher.signals(batch, needs).mixers.items():
        assert torch.equal(io.output, taken[layer].output)


def test_a_teacher_in_training_mode_is_run_without_dropout_and_left_so():
    model, batch = tiny_teacher(attention_dropout=0.5).train(), make_batch()
    first, second = (LiveTeacher(model).signals(batch, Needs(hidden=True)).hidden for _ in range(2))
    assert torch.equal(first, second)
    assert model.training


def test_facts_are_those_of_the_model():
    model = tiny_teacher(num_hidden_layers=3).bfloat16()
    facts = LiveTeacher(model).facts
    assert (facts.vocab_size, facts.hidden_size, facts.num_layers) == (97, 32, 3)
    assert facts.num_bytes == 2 * model.num_parameters()


def test_a_mixer_alone_runs_by_way_of_its_block():
    """What gathers sharded parameters hangs on the block: its hooks run, and nothing else of the block does."""
    student, seen = tiny_student(), []
    block = student.model.layers[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    alone = block.self_attn(hidden_states=x)[0]
    block.register_forward_pre_hook(lambda *_: seen.append("before"))
    block.register_forward_hook(lambda *_: seen.append("after"))
    block.mlp.register_forward_pre_hook(lambda *_: seen.append("mlp"))
    assert torch.equal(run_mixer(block, hidden_states=x), alone)
    assert seen == ["before", "after"]
    assert "forward" not in vars(block)
    block.forward = wrapped = block.forward
    run_mixer(block, hidden_states=x)
    assert vars(block)["forward"] is wrapped


def test_a_block_is_whole_again_after_an_error():
    block = tiny_student().model.layers[0]
    with pytest.raises(TypeError):
        run_mixer(block, nothing=1)
    assert "forward" not in vars(block)
