"""A student on a GPU generates with the Triton kernels what it generates with the reference ops."""

from __future__ import annotations

import copy

import pytest
import torch

from gendistill.mixers import KDA
from gendistill.testing import tiny_student

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu
NEW_TOKENS = 256


def students(placement, dtype=torch.float32, **overrides):
    """Make one random student twice: on the reference ops and on the kernels."""
    sizes = {"hidden_size": 128, "head_dim": 64, "intermediate_size": 192, **overrides}
    reference = tiny_student("llama", placement, **sizes).to("cuda", dtype).eval()
    student = copy.deepcopy(reference)
    for model, impl in ((reference, "reference"), (student, "triton")):
        for module in model.modules():
            if isinstance(module, KDA):
                module.requested_impl = impl
    return reference, student


def prompt(batch=3, length=150):
    torch.manual_seed(1)
    ids = torch.randint(3, 97, (batch, length), device="cuda")
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 37 * row] = 0
    return ids * mask, mask


def generate(model, ids, mask, **settings):
    with torch.no_grad():
        return model.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **settings
        )


@pytest.mark.parametrize("placement", ["mixed", "pure"])
def test_auto_is_triton_here(placement):
    model = tiny_student("llama", placement).to("cuda")
    assert {module.impl for module in model.modules() if isinstance(module, KDA)} == {"triton"}


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("placement", ["mixed", "pure"])
def test_float32_generation_is_the_reference_s_token_by_token(placement, settings):
    reference, student = students(placement)
    ids, mask = prompt()
    expected = generate(reference, ids, mask, **settings)
    assert torch.equal(generate(student, ids, mask, **settings), expected)


def test_float32_logits_after_prefill_and_decoding_are_close():
    reference, student = students("mixed")
    ids, mask = prompt()
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask).logits[mask.bool()]
        found = student(ids, attention_mask=mask).logits[mask.bool()]
        assert ((found - expected).norm() / expected.norm()).item() < 3e-3
        cut = student(ids[:1, :140], use_cache=True)
        rest = [cut.logits]
        for place in range(140, 150):
            step = student(ids[:1, place : place + 1], past_key_values=cut.past_key_values)
            rest.append(step.logits)
        whole = student(ids[:1]).logits
    assert ((torch.cat(rest, 1) - whole).norm() / whole.norm()).item() < 3e-3


def test_bfloat16_differs_from_the_reference_no_more_than_the_reference_from_float32():
    exact, _ = students("mixed")
    reference, student = students("mixed", torch.bfloat16)
    ids, mask = prompt()
    with torch.no_grad():
        logits = [
            model(ids, attention_mask=mask).logits[mask.bool()].float()
            for model in (exact, reference, student)
        ]
    ours, theirs = ((part - logits[0]).norm().item() for part in (logits[2], logits[1]))
    assert ours < 1.2 * theirs


def test_a_layer_compiles_whole():
    _, student = students("pure")
    layer = next(module for module in student.modules() if isinstance(module, KDA))
    x = torch.randn(2, 100, 128, device="cuda", requires_grad=True)

    def step(given):
        return KDA.forward(layer, given)[0]

    results = []
    for function in (step, torch.compile(step, fullgraph=True)):
        out = function(x)
        results.append((out.detach(), torch.autograd.grad(out.square().sum(), x)[0]))
    for eager, compiled in zip(*results, strict=True):
        assert ((compiled - eager).norm() / eager.norm()).item() < 3e-3
