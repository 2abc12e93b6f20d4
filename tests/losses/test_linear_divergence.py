"""The chunked op against a dense float64 oracle that materialises every logit."""

import pytest
import torch
import torch.nn.functional as F

from gendistill.ops.divergence import Divergence, Term, chunks, linear_divergence

IGNORE = -100
KL, REVERSE, JSD, CE = Divergence.FORWARD_KL, Divergence.REVERSE_KL, Divergence.JSD, Divergence.CE
MIXES = {
    "kl": [Term(KL)],
    "kl_t2": [Term(KL, temperature=2.0, weight=0.7)],
    "reverse": [Term(REVERSE)],
    "reverse_t.5": [Term(REVERSE, temperature=0.5)],
    "jsd": [Term(JSD)],
    "jsd_.1_t3": [Term(JSD, beta=0.1, temperature=3.0)],
    "ce": [Term(CE)],
    "all": [Term(KL, 0.5), Term(REVERSE, 2.0), Term(JSD, 1.5, 2.0, 0.3), Term(CE, 0.1), Term(KL, 1.0, 2.0)],
}


def problem(vocab=211, tokens=(3, 21), dim=16, teacher_dim=24, dtype=torch.float32, keep=0.6):
    """Make float64 masters and their casts; some labels are ignored, one whole row among them."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, teacher_hidden = draw(*tokens, dim), draw(*tokens, teacher_dim)
    weight, teacher_weight = draw(vocab, dim) * 0.5, draw(vocab, teacher_dim) * 0.5
    labels = torch.randint(0, vocab, tokens, generator=generator)
    labels[torch.rand(tokens, generator=generator) > keep] = IGNORE
    labels[0] = IGNORE
    cast = [tensor.to(dtype) for tensor in (hidden, weight, teacher_hidden, teacher_weight)]
    return *cast, labels


def dense(hidden, weight, teacher_hidden, teacher_weight, labels, terms, dtype=torch.float64):
    """Write each divergence as its textbook sum over the vocabulary."""
    student = hidden.to(dtype) @ weight.to(dtype).T
    teacher = teacher_hidden.to(dtype) @ teacher_weight.to(dtype).T
    total = student.new_zeros(())
    for term in terms:
        for position in (labels != IGNORE).nonzero():
            s, t = student[tuple(position)], teacher[tuple(position)]
            if term.kind is CE:
                total = total + term.weight * F.cross_entropy(s[None], labels[tuple(position)][None])
                continue
            q, p = F.softmax(s / term.temperature, 0), F.softmax(t / term.temperature, 0)
            m = term.beta * p + (1 - term.beta) * q
            value = {
                KL: (p * (p / q).log()).sum(),
                REVERSE: (q * (q / p).log()).sum(),
                JSD: term.beta * (p * (p / m).log()).sum() + (1 - term.beta) * (q * (q / m).log()).sum(),
            }[term.kind]
            total = total + term.weight * term.temperature**2 * value
    return total


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("terms", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_value_and_gradients_match_dense_float64(terms, chunk_size):
    hidden, weight, teacher_hidden, teacher_weight, labels = problem()
    ours = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = linear_divergence(
        *ours,
        labels,
        terms=terms,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        chunk_size=chunk_size,
    )
    (output.total * 3).backward()
    oracle = hidden.double().requires_grad_(), weight.double().requires_grad_()
    expected = dense(*oracle, teacher_hidden, teacher_weight, labels, terms)
    (expected * 3).backward()
    eager = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    (dense(*eager, teacher_hidden, teacher_weight, labels, terms, torch.float32) * 3).backward()

    assert output.total.dtype == torch.float32
    assert output.count.item() == (labels != IGNORE).sum().item()
    assert relative_error(output.total, expected) <= 1e-6
    for mine, theirs, float32 in zip(ours, oracle, eager, strict=True):
        # float32 logits alone cost more than 1e-6 where a term subtracts nearly equal logarithms
        budget = max(1e-6, 1.5 * relative_error(float32.grad, theirs.grad))
        assert relative_error(mine.grad, theirs.grad) <= budget
        if terms in (MIXES["kl"], MIXES["ce"]):
            assert relative_error(mine.grad, theirs.grad) <= 1e-6
    weighted = sum(term.weight * part for term, part in zip(terms, output.parts, strict=True))
    assert weighted.item() == pytest.approx(output.total.item(), rel=1e-6)
    assert not output.parts.requires_grad


@pytest.mark.parametrize("terms", [MIXES["all"]], ids=["all"])
def test_gradcheck_in_float64(terms):
    hidden, weight, teacher_hidden, teacher_weight, labels = problem(
        vocab=13, tokens=(2, 4), dim=5, dtype=torch.float64
    )

    def total(hidden, weight):
        return linear_divergence(
            hidden,
            weight,
            labels,
            terms=terms,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            chunk_size=2,
        ).total

    assert torch.autograd.gradcheck(total, (hidden.requires_grad_(), weight.requires_grad_()))


def test_bfloat16_stays_within_its_rounding():
    tensors = problem(dtype=torch.bfloat16)
    hidden, weight, teacher_hidden, teacher_weight, labels = tensors
    hidden.requires_grad_(), weight.requires_grad_()
    output = linear_divergence(
        hidden,
        weight,
        labels,
        terms=MIXES["kl"],
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        chunk_size=9,
    )
    output.total.backward()
    oracle = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = dense(*oracle, teacher_hidden, teacher_weight, labels, MIXES["kl"])
    expected.backward()
    assert output.total.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert relative_error(output.total, expected) < 2e-3
    assert relative_error(hidden.grad, oracle[0].grad) < 1e-2
    assert relative_error(weight.grad, oracle[1].grad) < 1e-2


def test_autocast_computes_in_its_dtype_and_returns_float32_gradients():
    hidden, weight, teacher_hidden, teacher_weight, labels = problem()
    weight.requires_grad_()
    arguments = {"terms": MIXES["kl"], "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = linear_divergence(hidden, weight, labels, **arguments)
    cast.total.backward()
    rounded = linear_divergence(hidden.bfloat16(), weight.detach().bfloat16(), labels, **arguments)
    assert cast.total.item() == rounded.total.item()
    assert weight.grad.dtype == torch.float32


def test_teacher_against_itself_is_exactly_zero():
    hidden, weight, _, _, labels = problem()
    terms = [Term(KL), Term(REVERSE)]
    output = linear_divergence(
        hidden, weight, labels, terms=terms, teacher_hidden=hidden, teacher_weight=weight
    )
    assert output.parts.tolist() == [0.0, 0.0]


def test_ignored_positions_do_not_matter():
    """Whatever stands at positions without a label, even NaN, changes nothing and gets no gradient."""
    hidden, weight, teacher_hidden, teacher_weight, labels = problem()
    arguments = {
        "terms": MIXES["all"],
        "teacher_weight": teacher_weight,
        "num_labels": int((labels != IGNORE).sum()),
    }
    clean = linear_divergence(hidden, weight, labels, teacher_hidden=teacher_hidden, **arguments)
    dirty, dirty_teacher = hidden.clone(), teacher_hidden.clone()
    dirty[labels == IGNORE] = float("nan")
    dirty_teacher[labels == IGNORE] = float("nan")
    dirty.requires_grad_()
    output = linear_divergence(dirty, weight, labels, teacher_hidden=dirty_teacher, **arguments)
    output.total.backward()
    assert output.total.item() == clean.total.item()
    assert (dirty.grad[labels == IGNORE] == 0).all()


def test_no_counted_position_gives_zero_and_zero_gradients():
    hidden, weight, _, _, labels = problem()
    hidden.requires_grad_(), weight.requires_grad_()
    output = linear_divergence(hidden, weight, torch.full_like(labels, IGNORE), terms=MIXES["ce"])
    output.total.backward()
    assert (output.total.item(), output.count.item()) == (0.0, 0)
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_frozen_head_gets_no_gradient_and_no_grad_mode_builds_no_graph():
    hidden, weight, _, _, labels = problem()
    output = linear_divergence(hidden.requires_grad_(), weight, labels, terms=MIXES["ce"])
    output.total.backward()
    assert weight.grad is None
    assert hidden.grad is not None
    with torch.no_grad():
        assert not linear_divergence(hidden, weight, labels, terms=MIXES["ce"]).total.requires_grad


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 63, 100])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_chunks_cover_every_token_once_and_are_even(num_tokens, size):
    slices = list(chunks(num_tokens, size))
    assert [index for part in slices for index in range(num_tokens)[part]] == list(range(num_tokens))
    assert all(part.stop - part.start <= size for part in slices)


@pytest.mark.parametrize("num_tokens", [0, 1, 127, 128, 1000, 1024, 7300, 8192])
@pytest.mark.parametrize("size", [16, 128, 1104])
def test_chunks_fill_tiles(num_tokens, size):
    slices = list(chunks(num_tokens, size, multiple=128))
    assert [index for part in slices for index in range(num_tokens)[part]] == list(range(num_tokens))
    assert all(part.stop - part.start <= size for part in slices)
    if size >= 128:
        assert all((part.stop - part.start) % 128 == 0 for part in slices[:-1])


def test_extreme_logits_stay_finite():
    """A confident teacher and a student that disagrees: probabilities underflow, divergences must not."""
    hidden, weight, _, _, labels = problem()
    hidden.requires_grad_()
    output = linear_divergence(
        hidden, weight * 100, labels, terms=MIXES["all"], teacher_hidden=-hidden, teacher_weight=weight * 100
    )
    output.total.backward()
    assert torch.isfinite(output.total)
    assert torch.isfinite(hidden.grad).all()


def test_wrong_calls_are_refused():
    hidden, weight, teacher_hidden, teacher_weight, labels = problem()
    with pytest.raises(ValueError, match="at least one term"):
        linear_divergence(hidden, weight, labels, terms=[])
    with pytest.raises(ValueError, match="need teacher_hidden"):
        linear_divergence(hidden, weight, labels, terms=MIXES["kl"])
    with pytest.raises(ValueError, match=r"student 211.*teacher 210"):
        linear_divergence(
            hidden,
            weight,
            labels,
            terms=MIXES["kl"],
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight[:-1],
        )
