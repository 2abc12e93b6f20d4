"""torch.compile and torch.export: graph breaks at most, never an error or another result."""

import itertools
import shutil

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from gendistill.mixers import KDA
from gendistill.mixers.base import MixerState
from gendistill.models import HybridCache
from gendistill.testing import FAMILIES, tiny_student

# warnings of the compiler: about reading the host, and of torch's own code
pytestmark = pytest.mark.filterwarnings("ignore")
BACKENDS = ["eager", "aot_eager"]
PLACEMENTS = [("kda", "full"), ("kda", "kda"), ("swa", "kda"), ("sink", "full"), ("sink", "sink")]


def some_slow(combinations, quick):
    """Leave all but the ``quick`` combinations to the slow tests: compiling takes seconds."""
    return [
        value if value in quick else pytest.param(*value, marks=pytest.mark.slow) for value in combinations
    ]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def ids():
    return torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(1))


def small_student(family="llama", mixers=("kda", "full"), **settings):
    return tiny_student(family, num_hidden_layers=len(mixers), mixers=list(mixers), **settings)


def same(compiled, plain):
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


def padding(ids):
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    return {"attention_mask": mask}


def documents(ids):
    ends = torch.tensor([0, 9, 20, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(9), torch.arange(11), torch.arange(20)]).reshape(2, 20)
    return {"position_ids": positions, "cu_seq_lens_q": ends, "use_cache": False}


INPUTS = {
    "plain": lambda ids: {"use_cache": False},
    "cache": lambda ids: {"use_cache": True},
    "padding": padding,
    "documents": documents,
}


@pytest.mark.parametrize(
    ("family", "inputs", "backend"),
    some_slow(
        itertools.product(FAMILIES, INPUTS, BACKENDS),
        quick=[
            ("llama", "plain", "aot_eager"),
            ("mistral", "cache", "eager"),
            ("qwen2", "padding", "eager"),
            ("qwen3", "documents", "eager"),
        ],
    ),
)
def test_a_compiled_student_says_what_the_plain_one_says(family, inputs, backend, ids):
    model, given = small_student(family), INPUTS[inputs](ids)
    compiled = torch.compile(model, backend=backend)
    logits, grads = [], []
    for function in (model.train(), compiled):
        model.zero_grad()
        output = function(ids, labels=ids, **given)
        output.loss.backward()
        logits.append(output.logits)
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    same(*logits)
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mixers", PLACEMENTS)
@torch.no_grad()
def test_compiled_generation_of_padded_rows_gives_the_same_text(mixers, ids):
    model = small_student(mixers=mixers, sliding_window=6)
    settings = {**padding(ids), "max_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **settings)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, **settings), plain)


@torch.no_grad()
def test_a_compiled_backbone_continues_a_cache(ids):
    model = small_student().model
    compiled, hidden = torch.compile(model, backend="eager"), []
    for function in (model, compiled):
        cache = HybridCache(model.config)
        function(ids[:, :12], past_key_values=cache, use_cache=True)
        hidden.append(function(ids[:, 12:], past_key_values=cache, use_cache=True).last_hidden_state)
    same(*hidden)


@torch.no_grad()
def test_batches_of_any_shape_follow_each_other(ids):
    model = small_student(mixers=["kda"])
    compiled = torch.compile(model, backend="eager")
    for part in (ids, ids[:, :17], ids[:1, :1]):
        same(compiled(part).logits, model(part).logits)


@torch.no_grad()
def test_documents_of_other_lengths_are_not_compiled_anew(ids):
    model, counter = small_student(mixers=["kda"]), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for end in (9, 4, 13, 6):
        positions = torch.cat([torch.arange(end), torch.arange(20 - end)])[None]
        given = {"position_ids": positions, "use_cache": False}
        same(compiled(ids[:1], **given).logits, model(ids[:1], **given).logits)
        if end == 9:
            number = counter.frame_count
    assert counter.frame_count == number


@pytest.mark.parametrize(
    ("mixers", "backend"),
    some_slow(itertools.product(PLACEMENTS, BACKENDS), quick=[(PLACEMENTS[0], "eager")]),
)
def test_a_student_without_padding_and_packing_compiles_whole(mixers, backend, ids):
    model = small_student(mixers=mixers, sliding_window=6)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    same(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    with torch.no_grad():
        same(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("mixers", "strict"),
    some_slow(
        itertools.product(PLACEMENTS, (True, False)), quick=[(PLACEMENTS[0], True), (PLACEMENTS[1], False)]
    ),
)
@torch.no_grad()
def test_a_student_without_padding_and_packing_is_exported(mixers, strict, ids):
    model = small_student(mixers=mixers, sliding_window=6)
    exported = torch.export.export(model, (ids,), {"use_cache": False}, strict=strict).module()
    same(exported(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_the_layer_compiles_whole(backend, length, with_state):
    torch.manual_seed(0)
    layer, x = KDA(24, 4, 2, 8), torch.randn(2, length, 24)
    state = None
    if with_state:
        with torch.no_grad():
            state = MixerState(*layer(torch.randn(2, 5, 24))[1])
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    grads = []
    for function in (layer, compiled):
        given = x.clone().requires_grad_()
        out, after = function(given, state=state)
        (out.sum() + after.recurrent.sum()).backward()
        grads.append(given.grad)
    same(*grads)
    with torch.no_grad():
        same(compiled(x, state=state)[0], layer(x, state=state)[0])


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_the_layer_is_exported(strict):
    layer, x = KDA(24, 4, 2, 8), torch.randn(2, 20, 24)
    exported = torch.export.export(layer, (x,), strict=strict).module()
    same(exported(x)[0], layer(x)[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@torch.no_grad()
def test_inductor_says_the_same(ids):
    model = small_student()
    for given in ({"use_cache": False}, padding(ids)):
        found = torch.compile(model)(ids, **given).logits
        torch.testing.assert_close(found, model(ids, **given).logits, rtol=0, atol=1e-4)
