"""The linear divergence against float64, in eager torch and, interpreted, by its Triton kernels."""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest
import torch

from gendistill.ops.divergence import Term, linear_divergence
from gendistill.ops.reference.divergence import compare as compare_reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EXACT = 1e-5


@pytest.fixture(params=["reference", pytest.param("triton", marks=pytest.mark.interpret)])
def impl(request):
    """Each implementation; the kernels' programs take 64 logits, so that rows have several slices."""
    if request.param == "reference":
        yield request.param
        return
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    if not INTERPRETED:
        pytest.skip("the interpreter is off: make interpret")
    from gendistill_kernels.divergence.rows import TABLE
    from gendistill_kernels.runtime.lookup import Config, forced

    with ExitStack() as stack:
        for kernel in TABLE.kernels:
            stack.enter_context(forced(kernel, Config(64, 4)))
        yield request.param


@pytest.fixture
def divergences(divergence_cases):
    """The module ``divergence_cases``."""
    return divergence_cases


def run(problem, terms, impl, *, trained=True, chunk_size=5, teacher=None, leaves=None, places=None):
    """Return the output and the gradients, of the hidden states and, where the head is trained, of the head."""
    hidden, weight = leaves or problem.leaves()
    weight.requires_grad_(trained)
    whole = {"teacher_hidden": problem.teacher_hidden, "teacher_weight": problem.teacher_weight}
    output = linear_divergence(
        hidden,
        weight,
        problem.labels,
        terms=terms,
        chunk_size=chunk_size,
        places=places,
        impl=impl,
        **(whole if teacher is None else {"teacher_top_k": teacher}),
    )
    return output, torch.autograd.grad(output.total * 3, [hidden, weight] if trained else [hidden])


def expect(divergences, problem, terms, teacher=None):
    """Compute the total and its gradients in float64."""
    leaves = problem.double().leaves()
    if teacher is None:
        total = divergences.exact(problem.double(), terms, leaves)
    else:
        total = divergences.exact_top_k(*leaves, problem.labels, teacher, terms)
    return total, torch.autograd.grad(total * 3, leaves)


MIXES = (
    *(f"{kind} at {temperature}" for kind in ("kl", "reverse_kl", "jsd") for temperature in (1.0, 2.0, 4.0)),
    "ce",
    "kl and ce",
    "all",
)


def test_every_mix_is_tested(divergences):
    assert set(MIXES) == set(divergences.MIXES)


@pytest.mark.parametrize("name", MIXES)
def test_value_and_gradients_match_float64(divergences, impl, name):
    terms, problem = divergences.MIXES[name], divergences.draw()
    total, gradients = expect(divergences, problem, terms)
    output, found = run(problem, terms, impl)
    assert divergences.error(output.total, total) < 1e-6
    assert output.count == (problem.labels != divergences.IGNORE).sum()
    for mine, exact in zip(found, gradients, strict=True):
        assert divergences.error(mine, exact) < EXACT
    weighted = sum(term.weight * part for term, part in zip(terms, output.parts, strict=True))
    torch.testing.assert_close(weighted, output.total.detach())


@pytest.mark.parametrize("vocab", [2, 63, 64, 65, 129])
def test_any_vocabulary(divergences, impl, vocab):
    """Also one of a single slice, and one that ends within a slice."""
    terms, problem = divergences.MIXES["all"], divergences.draw(vocab, (2, 9))
    total, gradients = expect(divergences, problem, terms)
    output, found = run(problem, terms, impl)
    assert divergences.error(output.total, total) < 1e-6
    assert all(divergences.error(*pair) < EXACT for pair in zip(found, gradients, strict=True))


def test_a_frozen_head_gets_no_gradient(divergences, impl):
    terms, problem = divergences.MIXES["kl and ce"], divergences.draw()
    output, (grad,) = run(problem, terms, impl, trained=False)
    trained, (other, _) = run(problem, terms, impl)
    assert torch.equal(output.total, trained.total)
    assert torch.equal(grad, other)


def test_without_gradients_values_are_the_same(divergences, impl):
    terms, problem = divergences.MIXES["all"], divergences.draw()
    with torch.no_grad():
        plain = linear_divergence(
            *problem[:2],
            problem.labels,
            terms=terms,
            teacher_hidden=problem.teacher_hidden,
            teacher_weight=problem.teacher_weight,
            chunk_size=5,
            impl=impl,
        )
    assert not plain.total.requires_grad
    assert torch.equal(plain.parts, run(problem, terms, impl)[0].parts)


@pytest.mark.parametrize("name", ["kl at 2.0", "all"])
def test_the_size_of_chunks_changes_nothing_but_rounding(divergences, impl, name):
    terms, problem = divergences.MIXES[name], divergences.draw()
    whole, expected = run(problem, terms, impl, chunk_size=1000)
    for size in (1, 4):
        output, found = run(problem, terms, impl, chunk_size=size)
        torch.testing.assert_close(output.parts, whole.parts, rtol=1e-6, atol=0)
        assert all(divergences.error(*pair) < 1e-6 for pair in zip(found, expected, strict=True))


def test_the_same_input_gives_the_same_bits(divergences, impl):
    terms, problem = divergences.MIXES["all"], divergences.draw()
    first, second = (run(problem, terms, impl) for _ in range(2))
    assert torch.equal(first[0].parts, second[0].parts)
    assert all(torch.equal(*pair) for pair in zip(first[1], second[1], strict=True))


def test_no_counted_position_gives_zero_and_zero_gradients(divergences, impl):
    problem = divergences.draw()
    problem = problem._replace(labels=torch.full_like(problem.labels, divergences.IGNORE))
    output, found = run(problem, divergences.MIXES["all"], impl)
    assert (output.total.item(), output.count.item()) == (0.0, 0)
    assert not any(grad.any() for grad in found)


def test_a_teacher_against_itself_is_exactly_zero(divergences, impl):
    problem = divergences.draw()
    problem = problem._replace(teacher_hidden=problem.hidden, teacher_weight=problem.weight)
    kinds = (divergences.KL, divergences.REVERSE, divergences.JSD)
    output, _ = run(problem, [Term(kind, temperature=2.0) for kind in kinds], impl)
    assert output.parts.tolist() == [0.0, 0.0, 0.0]


def test_gradients_are_finite_differences(divergences, impl):
    """Of the op itself, along a random direction of both leaves."""
    terms, problem = divergences.MIXES["all"], divergences.draw(64, (1, 9), size=1.0)
    problem = problem._replace(labels=problem.labels.clamp(min=0))
    _, found = run(problem, terms, impl)
    torch.manual_seed(0)
    directions = [torch.randn_like(grad) for grad in found]
    slope = sum((grad * way).sum() for grad, way in zip(found, directions, strict=True))
    values = []
    for step in (1e-2, -1e-2):
        moved = [part + step * way for part, way in zip(problem[:2], directions, strict=True)]
        values.append(run(problem._replace(hidden=moved[0], weight=moved[1]), terms, impl)[0].total * 3)
    assert ((values[0] - values[1]) / 2e-2).item() == pytest.approx(slope.item(), rel=5e-3)


def check_places(divergences, problem, terms, impl, *, teacher=None, trained=True, limit=1e-6):
    """Compare with the call without places: as many as count, all positions, and, not interpreted, further numbers."""
    counted = problem.labels != divergences.IGNORE
    number = int(counted.sum())
    expected, gradients = run(problem, terms, impl, trained=trained, teacher=teacher)
    further = (number + 3, counted.numel() + 4) if impl == "reference" else ()
    for places in (number, counted.numel(), *further):
        output, found = run(problem, terms, impl, trained=trained, teacher=teacher, places=places)
        assert (output.count.item(), output.count.dtype) == (number, torch.int64)
        torch.testing.assert_close(output.total, expected.total, rtol=limit, atol=0)
        torch.testing.assert_close(output.parts, expected.parts, rtol=limit, atol=0)
        assert len(found) == 1 + trained
        for mine, theirs in zip(found, gradients, strict=True):
            assert mine.dtype == theirs.dtype
            assert divergences.error(mine, theirs) < limit
        assert not found[0][~counted].any()


def few(divergences, *, first=False):
    """Draw a small problem, for the interpreter; surplus places read its first position, which counts or does not."""
    problem = divergences.draw(65, (2, 4))
    problem.labels[0, 0] = 5 if first else divergences.IGNORE
    problem.labels[1] = torch.tensor([divergences.IGNORE, 64, 0, 7])
    return problem


@pytest.mark.parametrize("name", MIXES)
def test_surplus_places_change_nothing(divergences, impl, name):
    check_places(divergences, few(divergences, first=True), divergences.MIXES[name], impl)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", MIXES)
def test_surplus_places_change_nothing_in_both_dtypes(divergences, name, trained):
    for first in (True, False):
        problem = divergences.draw()
        problem.labels[0, 0] = 5 if first else divergences.IGNORE
        for each, limit in ((problem, 1e-6), (problem.double(), 1e-12)):
            check_places(
                divergences, each, divergences.MIXES[name], "reference", trained=trained, limit=limit
            )


@pytest.mark.parametrize("k", [1, 5, 65])
@pytest.mark.parametrize("name", ["kl at 1.0", "reverse_kl at 1.0", "jsd at 1.0", "ce", "all"])
def test_surplus_places_change_nothing_for_a_teacher_of_k_tokens(divergences, impl, k, name):
    problem = few(divergences, first=k == 5)
    teacher = divergences.top_k_of(problem.teacher_hidden @ problem.teacher_weight.T, k)
    check_places(divergences, problem, divergences.AT_ONE[name], impl, teacher=teacher)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_surplus_places_hide_what_does_not_count(divergences, impl, bad):
    """The bits of the result do not depend on it, for a whole teacher and for one of k tokens with no ids at all."""
    problem = few(divergences)
    teacher = divergences.top_k_of(problem.teacher_hidden @ problem.teacher_weight.T, 5)
    without = problem.labels == divergences.IGNORE
    assert without[0, 0]
    dirty = problem._replace(hidden=problem.hidden.clone(), teacher_hidden=problem.teacher_hidden.clone())
    other = type(teacher)(*(part.clone() for part in teacher))
    for part in (dirty.hidden, dirty.teacher_hidden, other.log_probs, other.tail):
        part[without] = bad
    other.ids[without] = -1
    for name, clean_teacher, dirty_teacher in (("all", None, None), ("kl at 1.0", teacher, other)):
        clean, expected = run(problem, divergences.MIXES[name], impl, teacher=clean_teacher, places=6)
        output, found = run(dirty, divergences.MIXES[name], impl, teacher=dirty_teacher, places=6)
        assert torch.equal(output.parts, clean.parts)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert not found[0][without].any()


def test_places_alone_give_zero_and_zero_gradients(divergences, impl):
    problem = few(divergences)
    problem = problem._replace(labels=torch.full_like(problem.labels, divergences.IGNORE))
    teacher = divergences.top_k_of(problem.teacher_hidden @ problem.teacher_weight.T, 5)
    for name, chosen in (("all", None), ("kl at 1.0", teacher)):
        for places in (0, 3, 8):
            output, found = run(problem, divergences.MIXES[name], impl, teacher=chosen, places=places)
            assert (output.total.item(), output.count.item()) == (0.0, 0)
            assert not any(grad.any() for grad in found)


def test_surplus_places_under_autocast(divergences):
    problem = divergences.draw()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, gradients = run(problem, divergences.MIXES["all"], "reference", chunk_size=1000)
        output, found = run(problem, divergences.MIXES["all"], "reference", chunk_size=1000, places=32)
    torch.testing.assert_close(output.parts, expected.parts, rtol=1e-5, atol=0)
    for mine, theirs in zip(found, gradients, strict=True):
        assert mine.dtype == theirs.dtype
        assert divergences.error(mine, theirs) < 1e-3


@pytest.mark.parametrize("name", MIXES)
def test_logits_of_ten_thousand(divergences, impl, name):
    """Probabilities are one and zero, divergences thousands of nats; nothing overflows, and nothing is lost."""
    torch.manual_seed(0)
    terms = divergences.MIXES[name]
    student, teacher = (torch.randn(6, 150) * 3e3 for _ in range(2))
    # two that compete
    student[:, 140] = student.amax(1) + torch.linspace(-2, 2, 6)
    labels = torch.randint(0, 150, (6,))
    values, grad = compare_of(impl)(student.clone(), teacher.clone(), labels, terms)
    s = student.double().requires_grad_()
    rows = torch.stack([divergences.rows_of(s, teacher.double(), labels, term) for term in terms])
    weights = torch.tensor([term.weight for term in terms], dtype=torch.float64)
    (exact,) = torch.autograd.grad((weights @ rows).sum(), s)
    assert divergences.error(values, rows) < 1e-6
    assert divergences.error(grad, exact) < EXACT


def test_large_logits_cost_the_values_no_precision(divergences, impl):
    """What both models' logits have in common cancels exactly, whatever its size."""
    compare = compare_of(impl)
    torch.manual_seed(0)
    teacher = torch.randint(-8, 8, (5, 150)).float()
    student = teacher + torch.randint(-4, 4, (5, 150)).float()
    labels = torch.zeros(5, dtype=torch.int64)
    terms = [Term(divergences.KL), Term(divergences.REVERSE), Term(divergences.JSD)]
    small, grad = compare(student.clone(), teacher.clone(), labels, terms)
    large, other = compare(student + 8192.0, teacher - 8192.0, labels, terms)
    torch.testing.assert_close(large, small, rtol=1e-6, atol=0)
    torch.testing.assert_close(other, grad, rtol=1e-6, atol=1e-9)


def compare_of(impl):
    """Return what compares logits: values of every row, and the gradient in float32."""
    if impl == "reference":
        return lambda s, t, y, terms: compare_reference(s, t, y, terms, True)
    from gendistill.ops.contracts.linear_divergence import compare

    return lambda s, t, y, terms: compare(s, t, y, terms, torch.float32)


def test_padding_of_the_vocabulary_counts_nothing(divergences, impl):
    """Columns that are minus infinity in both models: as if they were not there."""
    compare = compare_of(impl)
    torch.manual_seed(0)
    student, teacher = (torch.randn(4, 150) * 3 for _ in range(2))
    labels = torch.randint(0, 150, (4,))
    terms = divergences.MIXES["all"]
    expected, gradient = compare(student.clone(), teacher.clone(), labels, terms)
    # 150 of 260: the last slice of 64 has no token at all
    wide = [torch.cat([part, part.new_full((4, 110), -torch.inf)], 1) for part in (student, teacher)]
    values, grad = compare(*wide, labels, terms)
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad[:, :150], gradient, rtol=1e-5, atol=1e-7)
    assert not grad[:, 150:].any()


def test_what_only_the_teacher_excludes_is_a_probability_of_zero(divergences, impl):
    compare = compare_of(impl)
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 100) for _ in range(2))
    teacher[:, 70:] = -torch.inf
    labels = torch.zeros(3, dtype=torch.int64)
    terms = [Term(divergences.KL), Term(divergences.JSD), Term(divergences.CE)]
    values, grad = compare(student.clone(), teacher.clone(), labels, terms)
    s = student.double().requires_grad_()
    rows = [divergences.rows_of(s, teacher.double(), labels, term) for term in terms]
    (exact,) = torch.autograd.grad(sum(row.sum() for row in rows), s)
    assert divergences.error(values, torch.stack(rows)) < 1e-6
    assert divergences.error(grad, exact) < 1e-6


@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(divergences, impl, where, bad):
    compare = compare_of(impl)
    logits = {"student": torch.randn(2, 150), "teacher": torch.randn(2, 150)}
    logits[where][1, 100] = bad
    labels = torch.zeros(2, dtype=torch.int64)
    values, grad = compare(*logits.values(), labels, [Term(divergences.KL, temperature=2.0)])
    assert values.isnan().tolist() == [[False, True]]
    assert grad[0].isfinite().all()
    assert grad[1].isnan().any()


@pytest.mark.parametrize("k", [1, 5, 211])
@pytest.mark.parametrize("name", ["kl at 1.0", "reverse_kl at 1.0", "jsd at 1.0", "ce", "all"])
def test_a_teacher_of_k_tokens_matches_float64(divergences, impl, k, name):
    terms, problem = divergences.AT_ONE[name], divergences.draw()
    teacher = divergences.top_k_of(problem.teacher_hidden @ problem.teacher_weight.T, k)
    total, gradients = expect(divergences, problem, terms, teacher)
    output, found = run(problem, terms, impl, teacher=teacher)
    assert divergences.error(output.total, total) < 1e-6
    assert all(divergences.error(*pair) < EXACT for pair in zip(found, gradients, strict=True))


def test_a_teacher_of_all_tokens_is_the_whole_teacher(divergences, impl):
    terms, problem = divergences.AT_ONE["all"], divergences.draw()
    teacher = divergences.top_k_of(problem.teacher_hidden @ problem.teacher_weight.T, 211)
    output, found = run(problem, terms, impl, teacher=teacher)
    whole, expected = run(problem, terms, impl)
    torch.testing.assert_close(output.parts, whole.parts, rtol=1e-6, atol=0)
    assert all(divergences.error(*pair) < EXACT for pair in zip(found, expected, strict=True))


def test_a_confident_student_keeps_the_tail(divergences, impl):
    """One less the probability of the k tokens would be zero: the tail's own logits are summed up."""
    problem = divergences.draw(100, (1, 4), 8)
    problem = problem._replace(hidden=problem.hidden * 30, labels=problem.labels.clamp(min=0))
    student = (problem.hidden @ problem.weight.T).double()
    teacher = divergences.top_k_of(torch.zeros_like(student), 3)
    teacher = teacher._replace(ids=student.topk(3, -1).indices)
    terms = [Term(divergences.KL), Term(divergences.CE)]
    total, gradients = expect(divergences, problem, terms, teacher)
    output, found = run(problem, terms, impl, teacher=teacher)
    assert divergences.error(output.total, total) < 1e-6
    assert all(divergences.error(*pair) < 1e-4 for pair in zip(found, gradients, strict=True))


def test_a_teacher_of_k_tokens_with_gradcheck(divergences):
    problem = divergences.draw(13, (1, 4), 5).double()
    problem = problem._replace(labels=problem.labels.clamp(min=0))
    teacher = divergences.top_k_of(problem.teacher_hidden @ problem.teacher_weight.T, 3)

    def total(hidden, weight):
        return linear_divergence(
            hidden, weight, problem.labels, terms=divergences.AT_ONE["all"], teacher_top_k=teacher
        ).total

    assert torch.autograd.gradcheck(total, problem.leaves())


def test_the_remainder_of_a_product_is_not_lost(divergences):
    """Products of sixteen bits come as they are summed up, on every device."""
    problem = divergences.draw(4001, (1, 90), 256, dtype=torch.bfloat16, size=5.0)
    from gendistill.ops.divergence import accumulate, unrounded

    x, head = problem.hidden[0], problem.weight
    exact = x.double() @ head.double().T
    assert divergences.error(x @ head.T, exact) > 1e-3
    assert divergences.error(unrounded(x, head.T), exact) < 1e-5
    total = torch.empty(4001, 256)
    gradient = torch.randn(90, 4001).bfloat16()
    accumulate(total, gradient[:50].T, x[:50], first=True)
    accumulate(total, gradient[50:].T, x[50:], first=False)
    assert divergences.error(total, gradient.double().T @ x.double()) < 1e-6


def test_an_infinite_product_stays_one():
    from gendistill.ops.divergence import unrounded

    x, head = torch.ones(2, 3).bfloat16(), torch.ones(4, 3).bfloat16()
    head[1, 0], head[2, 0] = -torch.inf, torch.nan
    found = unrounded(x, head.T)
    assert found[:, 1].tolist() == [-torch.inf] * 2
    assert found[:, 2].isnan().all()
    assert found[:, 0].tolist() == [3.0] * 2


def test_sixteen_bits_cost_the_gradients_no_more_than_their_rounding(divergences):
    terms = divergences.MIXES["all"]
    problem = divergences.draw(1009, (3, 40), 64, 48, dtype=torch.bfloat16, size=4.0)
    total, gradients = expect(divergences, problem, terms)
    output, found = run(problem, terms, "reference", chunk_size=16)
    assert divergences.error(output.total, total) < 1e-5
    assert all(divergences.error(*pair) < 5e-3 for pair in zip(found, gradients, strict=True))


def test_wrong_calls_are_refused(divergences):
    problem = divergences.draw()
    teacher = divergences.top_k_of(problem.teacher_hidden @ problem.teacher_weight.T, 4)
    with pytest.raises(ValueError, match=r"mass of the other tokens at temperature 1, and kl asks for 2;"):
        run(problem, divergences.MIXES["kl at 2.0"], "reference", teacher=teacher)
    with pytest.raises(ValueError, match="one teacher: teacher_hidden or teacher_top_k"):
        linear_divergence(
            *problem[:2],
            problem.labels,
            terms=divergences.MIXES["kl at 1.0"],
            teacher_hidden=problem.teacher_hidden,
            teacher_weight=problem.teacher_weight,
            teacher_top_k=teacher,
        )
    number = int((problem.labels != divergences.IGNORE).sum())
    with pytest.raises(ValueError, match=rf"{number} labels count, more than places={number - 1};"):
        run(problem, divergences.MIXES["ce"], "reference", places=number - 1)
    with pytest.raises(ValueError, match="num_labels or places"):
        linear_divergence(
            *problem[:2],
            problem.labels,
            terms=divergences.MIXES["ce"],
            num_labels=number,
            places=number,
        )


@pytest.mark.interpret
def test_the_kernels_refuse_what_they_would_round(divergences):
    if not INTERPRETED:
        pytest.skip("the interpreter is off: make interpret")
    with pytest.raises(ValueError, match=r"logits must be float32 and contiguous, got torch.float64"):
        run(divergences.draw().double(), divergences.MIXES["kl at 1.0"], "triton")


@pytest.mark.interpret
def test_kernels_keep_torch_s_contracts(divergences):
    if not INTERPRETED:
        pytest.skip("the interpreter is off: make interpret")
    from gendistill.ops.contracts import linear_divergence as contracts

    checks = ("test_schema", "test_faketensor")
    student, teacher, labels = torch.randn(3, 70), torch.randn(3, 70), torch.tensor([0, 5, 69])
    mix = [0, 3], [1.0, 0.5], [2.0, 1.0], [0.0, 0.0]
    for dtype in (None, torch.float32, torch.bfloat16):
        torch.library.opcheck(
            contracts.divergence_compare, (student, teacher, labels, *mix, dtype), test_utils=checks
        )
    alone = [3], [1.0], [1.0], [0.0]
    torch.library.opcheck(
        contracts.divergence_compare, (student, None, labels, *alone, None), test_utils=checks
    )
    torch.library.opcheck(contracts.divergence_log_sum, (student,), test_utils=checks)
    factors = torch.randn(3)
    torch.library.opcheck(
        contracts.divergence_spread, (student, factors, factors, torch.bfloat16), test_utils=checks
    )


def test_a_row_has_no_more_programs_than_a_gpu_has_processors(monkeypatch):
    """Programs wait for each other: all of a row must be there at the same time, also on a part of a GPU."""
    pytest.importorskip("triton", reason="the Triton kernels need triton")
    from types import SimpleNamespace

    from gendistill_kernels.divergence.dense import _block

    for processors, vocab, block in ((132, 151_936, 4096), (132, 1_000_000, 8192), (16, 151_936, 16_384)):
        found = SimpleNamespace(multi_processor_count=processors)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=found: found)
        assert _block(4096, vocab, torch.device("cuda")) == block
    with pytest.raises(
        ValueError, match=r"300,000 logits are too many for 16 processors .*use the reference"
    ):
        _block(4096, 300_000, torch.device("cuda"))
