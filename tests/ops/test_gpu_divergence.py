"""The linear divergence on a GPU, where a row's programs wait for each other: errors, memory, repeats, graphs."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)

from gendistill.bench.measure import capture, peak_extra_mib
from gendistill.ops import Term, linear_divergence
from gendistill_kernels.divergence.dense import compare
from gendistill_kernels.divergence.layout import CE, JSD, KL, REVERSE_KL, Mix, gradient_in
from gendistill_kernels.divergence.tail import log_sum, spread

pytestmark = pytest.mark.gpu
# relative norm of a gradient's error, against float64 on the same inputs
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
MIXES = (
    *(f"{kind} at {temperature}" for kind in ("kl", "reverse_kl", "jsd") for temperature in (1.0, 2.0, 4.0)),
    "ce",
    "kl and ce",
    "all",
)
EVERYTHING = Mix((KL, REVERSE_KL, JSD, CE), (0.5, 2.0, 1.5, 0.1), (1.0, 2.0, 1.0, 1.0), (0.0, 0.0, 0.3, 0.0))


def call(problem, leaves, terms, **settings):
    """Return the output and the gradients of the leaves that have one."""
    whole = {"teacher_hidden": problem.teacher_hidden, "teacher_weight": problem.teacher_weight}
    found = linear_divergence(*leaves, problem.labels, terms=terms, impl="triton", **(settings or whole))
    return found, torch.autograd.grad(found.total, [leaf for leaf in leaves if leaf.requires_grad])


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("vocab", [5003, 151_936])
@pytest.mark.parametrize("name", MIXES)
def test_value_and_gradients_match_float64(divergence_cases, dtype, vocab, name):
    terms = divergence_cases.MIXES[name]
    problem = divergence_cases.draw(vocab, (2, 40), 256, 128, dtype=dtype, size=3.0, device="cuda")
    leaves = problem.double().leaves()
    total = divergence_cases.exact(problem.double(), terms, leaves)
    gradients = torch.autograd.grad(total, leaves)
    output, found = call(problem, problem.leaves(), terms)
    assert divergence_cases.error(output.total, total) < 1e-5
    for mine, exact in zip(found, gradients, strict=True):
        assert mine.dtype == dtype
        assert divergence_cases.error(mine, exact) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", ["kl at 1.0", "reverse_kl at 1.0", "jsd at 1.0", "ce", "all"])
def test_a_teacher_of_k_tokens_matches_float64(divergence_cases, dtype, name):
    terms = divergence_cases.AT_ONE[name]
    problem = divergence_cases.draw(32_003, (2, 40), 128, 64, dtype=dtype, size=3.0, device="cuda")
    wide = problem.double()
    teacher = divergence_cases.top_k_of(wide.teacher_hidden @ wide.teacher_weight.T, 50)
    leaves = wide.leaves()
    total = divergence_cases.exact_top_k(*leaves, problem.labels, teacher, terms)
    gradients = torch.autograd.grad(total, leaves)
    output, found = call(problem, problem.leaves(), terms, teacher_top_k=teacher)
    assert divergence_cases.error(output.total, total) < 1e-5
    assert all(divergence_cases.error(*pair) < LIMITS[dtype] for pair in zip(found, gradients, strict=True))


def test_under_autocast_gradients_are_float32(divergence_cases):
    terms = divergence_cases.MIXES["kl and ce"]
    problem = divergence_cases.draw(5003, (2, 40), 256, 128, device="cuda", size=3.0)
    rounded = problem._replace(**{name: getattr(problem, name).bfloat16() for name in problem._fields[:4]})
    teacher = {"teacher_hidden": rounded.teacher_hidden, "teacher_weight": rounded.teacher_weight}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output, found = call(problem, problem.leaves(), terms, **teacher)
    expected, gradients = call(rounded, rounded.leaves(), terms)
    assert torch.equal(output.parts, expected.parts)
    for mine, coarse in zip(found, gradients, strict=True):
        assert mine.dtype == torch.float32
        assert divergence_cases.error(mine, coarse.double()) < 3e-3


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 7), (33, 5003), (200, 12_288)])
def test_nothing_around_the_tensors_is_touched(cases, dtype, rows, vocab):
    torch.manual_seed(0)
    guards = cases.Guards()
    student, teacher = (guards.copy(3 * cases.normal(rows, vocab)) for _ in range(2))
    targets = guards.copy(torch.randint(0, vocab, (rows,), device="cuda"))
    plain = student.clone()
    expected = compare(plain, teacher.clone(), targets.clone(), EVERYTHING, grad_dtype=dtype)
    with guards.everywhere():
        values = compare(student, teacher, targets, EVERYTHING, grad_dtype=dtype)
        shares = spread(teacher, log_sum(teacher), values[0], dtype=dtype)
    assert torch.equal(values, expected)
    assert torch.equal(gradient_in(student, dtype), gradient_in(plain, dtype))
    assert torch.isfinite(shares).all()
    assert not guards.damage()


def test_every_run_gives_the_same_bits(cases, divergence_cases):
    problem = divergence_cases.draw(151_936, (2, 200), 256, 128, dtype=torch.bfloat16, device="cuda")

    def step():
        output, found = call(problem, problem.leaves(), divergence_cases.MIXES["all"])
        return [output.parts.detach(), *found]

    cases.check_repeats(step)


def test_rows_wait_for_each_other_whatever_else_runs(cases):
    """Several launches at once, whose programs share the processors with each other and with other work."""
    torch.manual_seed(0)
    student, teacher = (3 * cases.normal(500, 65_000) for _ in range(2))
    targets = torch.randint(0, 65_000, (500,), device="cuda")
    alone = student.clone()
    expected = compare(alone, teacher, targets, EVERYTHING, grad_dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in range(4)]
    copies = [student.clone() for _ in streams]
    other = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    for _ in range(3):
        found = []
        for copy, stream in zip(copies, streams, strict=True):
            with torch.cuda.stream(stream):
                copy.copy_(student)
                other @ other
                found.append(compare(copy, teacher, targets, EVERYTHING, grad_dtype=torch.bfloat16))
        torch.cuda.synchronize()
        assert all(torch.equal(values, expected) for values in found)
        gradient = gradient_in(alone, torch.bfloat16)
        assert all(torch.equal(gradient_in(copy, torch.bfloat16), gradient) for copy in copies)


@pytest.mark.parametrize("k", [None, 20])
def test_a_graph_replays_with_new_inputs(divergence_cases, k):
    terms = divergence_cases.MIXES["kl and ce"] if k is None else divergence_cases.AT_ONE["all"]

    def prepare(seed):
        drawn = divergence_cases.draw(
            20_000, (2, 64), 128, 128, dtype=torch.bfloat16, device="cuda", seed=seed
        )
        drawn = drawn._replace(labels=drawn.labels.clamp(min=0))
        teacher = {"teacher_hidden": drawn.teacher_hidden, "teacher_weight": drawn.teacher_weight}
        if k is not None:
            logits = drawn.teacher_hidden.double() @ drawn.teacher_weight.double().T
            teacher = {"teacher_top_k": divergence_cases.top_k_of(logits, k)}
        return drawn, {**teacher, "num_labels": drawn.labels.numel()}

    (first, about), (second, other) = prepare(0), prepare(1)
    leaves, kept = first.leaves(), []
    graph = capture(lambda: kept.append(call(first, leaves, terms, **about)))
    expected = call(second, second.leaves(), terms, **other)
    with torch.no_grad():
        mine = [*leaves, first.labels, *(about["teacher_top_k"] if k else first[2:4])]
        new = [*second[:2], second.labels, *(other["teacher_top_k"] if k else second[2:4])]
        for to, source in zip(mine, new, strict=True):
            to.copy_(source)
    graph.replay()
    assert torch.equal(kept[-1][0].parts, expected[0].parts)
    assert all(torch.equal(*pair) for pair in zip(kept[-1][1], expected[1], strict=True))


@pytest.mark.parametrize("k", [None, 20])
def test_a_graph_with_places_replays_with_other_labels(divergence_cases, k):
    """One graph serves batches of which more labels count, fewer, or none, and the device is never waited for."""
    terms = divergence_cases.AT_ONE["all"]
    problem = divergence_cases.draw(20_000, (2, 64), 128, 128, dtype=torch.bfloat16, device="cuda")
    teacher = {"teacher_hidden": problem.teacher_hidden, "teacher_weight": problem.teacher_weight}
    if k is not None:
        logits = problem.teacher_hidden.double() @ problem.teacher_weight.double().T
        teacher = {"teacher_top_k": divergence_cases.top_k_of(logits, k)}
    every = problem.labels.clamp(min=0)
    leaves, kept = problem.leaves(), []
    graph = capture(lambda: kept.append(call(problem, leaves, terms, **teacher, places=80)))
    torch.manual_seed(0)
    for number in (80, 40, 1, 0):
        places = torch.randperm(128, device="cuda")[:number]
        problem.labels.fill_(divergence_cases.IGNORE)
        problem.labels.view(-1)[places] = every.view(-1)[places]
        graph.replay()
        output, found = kept[-1]
        expected, gradients = call(problem, problem.leaves(), terms, **teacher, num_labels=number)
        assert output.count.item() == number
        torch.testing.assert_close(output.parts, expected.parts, rtol=1e-5, atol=0)
        for mine, theirs in zip(found, gradients, strict=True):
            assert divergence_cases.error(mine, theirs.double()) < LIMITS[torch.bfloat16]
        assert not found[0][problem.labels == divergence_cases.IGNORE].any()
        with torch.no_grad():
            torch.cuda.set_sync_debug_mode("error")
            try:
                linear_divergence(
                    *problem[:2], problem.labels, terms=terms, impl="triton", **teacher, places=80
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("trained", [True, False])
def test_memory_at_the_size_of_the_bar(divergence_cases, trained):
    """8192 tokens, 1024 channels, 151,936 logits: 2.2 GB beside the inputs, as the torch reference has it right."""
    problem = divergence_cases.draw(
        151_936, (8, 1024), 1024, dtype=torch.bfloat16, device="cuda", teacher_dim=512
    )
    problem = problem._replace(labels=problem.labels.clamp(min=0))
    leaves = problem.leaves()
    leaves[1].requires_grad_(trained)
    whole = {
        "teacher_hidden": problem.teacher_hidden,
        "teacher_weight": problem.teacher_weight,
        "num_labels": problem.labels.numel(),
    }
    terms = [Term(divergence_cases.KL)]

    def step():
        return call(problem, leaves, terms, **whole)

    assert peak_extra_mib(step) * 2**20 < 2.2e9
    output, found = step()
    reference = linear_divergence(*leaves, problem.labels, terms=terms, impl="reference", **whole)
    expected = torch.autograd.grad(reference.total, [leaf for leaf in leaves if leaf.requires_grad])
    torch.testing.assert_close(output.parts, reference.parts, rtol=1e-5, atol=0)
    assert all(
        divergence_cases.error(one, two.double()) < 4e-3 for one, two in zip(found, expected, strict=True)
    )
