"""The next token: greedy as torch and transformers choose it, or by noise that seed, position and token decide."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gendistill.errors import RecipeError
from gendistill.generation.sampling import Chosen, Sampling, choose, filtered, uniform

SIZES = [1, 7, 63, 100]
GREEDY = Sampling()
FILTERS = [
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 1e-9},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1.0},
    {"min_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.8},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.2},
]


def drawn(logits: torch.Tensor, sampling: Sampling, *, seed: int = 0, position: int = 0) -> Chosen:
    """Choose with one seed after another from ``seed`` on."""
    seeds = torch.arange(seed, seed + len(logits))
    return choose(logits, sampling=sampling, seeds=seeds, positions=torch.full_like(seeds, position))


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Return in how many standard deviations of itself chi-square exceeds its mean."""
    degrees = len(counts) - 1
    value = ((counts.double() - expected) ** 2 / expected).sum().item()
    return (value - degrees) / math.sqrt(2 * degrees)


def distance_from_uniform(sample: torch.Tensor) -> float:
    """Return the Kolmogorov-Smirnov distance times the root of the sample size: 1.95 is exceeded once in 1,000."""
    ordered, size = sample.flatten().double().sort().values, sample.numel()
    steps = torch.arange(size + 1, dtype=torch.float64) / size
    return math.sqrt(size) * max((steps[1:] - ordered).max().item(), (ordered - steps[:-1]).max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("V", SIZES)
def test_greedy_is_the_first_of_the_largest(V, dtype):
    torch.manual_seed(V)
    # few values, so that most rows have several largest
    logits = torch.randint(-3, 3, (50, V)).to(dtype)
    found = drawn(logits, GREEDY)
    assert found.tokens.dtype == torch.int64
    assert found.tokens.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert torch.equal(found.tokens, logits.float().argmax(-1))


def test_logits_of_double_precision_are_compared_as_generate_does_in_float32():
    logits = torch.tensor([[1.0, 1.0 + 1e-12, 0.0]], dtype=torch.float64)
    assert drawn(logits, GREEDY).tokens.tolist() == [0]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.3, top_k=3, top_p=0.9, min_p=0.01)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_probs_are_those_of_the_plain_distribution(dtype, sampling):
    torch.manual_seed(0)
    logits = (torch.randn(40, 1000) * 8).to(dtype)
    found = drawn(logits, sampling)
    exact = logits.double().log_softmax(-1)[torch.arange(40), found.tokens]
    assert found.log_probs.dtype == torch.float32
    assert (found.log_probs - exact).abs().max() < 1e-5


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=2, top_p=0.9, min_p=0.1)])
def test_rows_without_a_finite_largest_logit_are_told_and_harm_no_other(sampling):
    torch.manual_seed(0)
    good = torch.randn(3, 9)
    bad = torch.randn(3, 9)
    bad[0, 4] = math.nan
    bad[1, 2] = math.inf
    bad[2] = -math.inf
    good[1, 3:] = -math.inf
    logits = torch.stack([good, bad], 1).flatten(0, 1)
    seeds, positions = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    found = choose(logits, sampling=sampling, seeds=seeds, positions=positions)
    assert found.finite.tolist() == [True, False] * 3
    assert ((found.tokens >= 0) & (found.tokens < 9)).all()
    alone = choose(good, sampling=sampling, seeds=seeds[::2], positions=positions[::2])
    assert torch.equal(found.tokens[::2], alone.tokens)
    assert torch.equal(found.log_probs[::2], alone.log_probs)


@pytest.mark.parametrize("settings", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_filters_keep_what_transformers_keeps(temperature, settings):
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    sampling = Sampling(temperature=temperature, **settings)
    torch.manual_seed(0)
    left_out = 0
    for V in SIZES:
        smooth = torch.randn(60, V) * 3
        tied = torch.randint(-2, 3, (60, V)).float()
        same = torch.zeros(1, V)
        masked = smooth.masked_fill(torch.rand(60, V) < 0.5, -math.inf)
        masked[:, 0] = 0
        for logits in (smooth, tied, same, masked):
            expected = warpers(torch.zeros(len(logits), 1, dtype=torch.int64), logits)
            found = filtered(logits, sampling)
            # top_p may keep some of equals only; which, transformers leaves to a sort that is not stable
            assert torch.equal(found.sort().values, expected.sort().values)
            if logits is smooth or logits is masked:
                assert torch.equal(found, expected)
            assert ((found == logits / temperature) | found.isinf()).all()
            left_out += int((found.isinf() & ~logits.isinf()).sum())
    assert (left_out > 0) == (settings not in ({"top_k": 1000}, {"top_p": 1.0}, {"min_p": 0.0}))


def test_of_equals_top_p_keeps_the_last():
    found = filtered(torch.zeros(3, 40), Sampling(temperature=1.0, top_p=0.25))
    assert found.isinf().tolist() == [[True] * 30 + [False] * 10] * 3


def test_filters_leave_the_logits_alone():
    logits = torch.randn(4, 30)
    before = logits.clone()
    for settings in FILTERS:
        drawn(logits, Sampling(temperature=1.0, **settings))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("seed", [0, 1, -1, 12345, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("position", [0, 1, 131071, 2**31 - 1])
def test_noise_is_that_of_plain_integers(seed, position):
    """SplitMix64 and the 32-bit finaliser, with Python's integers and no sign."""

    def mix_64(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    step = 0x9E3779B97F4A7C15
    key = mix_64((mix_64((seed + step) % 2**64) + position * step) % 2**64)
    expected = []
    for token in range(200):
        x = (token * 0x9E3779B9 ^ key) % 2**32
        x = (x ^ (x >> 16)) * 0x21F0AAAD % 2**32 ^ key >> 32
        x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
        x = (x ^ (x >> 15)) % 2**31
        expected.append(min((x | 1) / 2**31, 1 - 2.0**-24))
    for dtype in (torch.int32, torch.int64):
        (found,) = uniform(torch.tensor([seed]), torch.tensor([position], dtype=dtype), 200)
        assert torch.equal(found, torch.tensor(expected, dtype=torch.float64).float())


@pytest.mark.parametrize("along", ["tokens", "positions", "seeds"])
def test_noise_is_uniform_and_independent(along):
    size = 100_000
    counted, one = torch.arange(size), torch.full((size,), 77)
    if along == "tokens":
        noise = uniform(torch.tensor([5]), torch.tensor([9]), size)[0]
    else:
        seeds, positions = (one, counted) if along == "positions" else (counted, one)
        noise = uniform(seeds, positions, 3)[:, 1]
    assert noise.min() > 0
    assert noise.max() < 1
    assert distance_from_uniform(noise) < 1.95
    # small ones decide: they must be as frequent as they should
    assert distance_from_uniform(noise[noise < 0.01] * 100) < 1.95
    for distance in (1, 2, 3, 64, 1024):
        cells = (noise[distance:] * 16).long() * 16 + (noise[:-distance] * 16).long()
        counts = cells.bincount(minlength=256)
        assert chi_square(counts, torch.full((256,), len(cells) / 256)) < 4


def test_noise_of_rows_shares_nothing():
    """Each token's noise in one row is independent of its noise, and of its neighbour's, in other rows."""
    noise = uniform(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]), 50_000)
    for first in range(4):
        for second in range(first):
            for shift in (0, 1):
                cells = (noise[first].roll(shift) * 16).long() * 16 + (noise[second] * 16).long()
                counts = cells.bincount(minlength=256)
                assert chi_square(counts, torch.full((256,), 50_000 / 256)) < 4


@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_of_choices_are_their_probabilities(temperature, settings):
    sampling = Sampling(temperature=temperature, **settings)
    logits = torch.tensor([[2.0, -1.0, 0.5, 1.9, 0.0, -3.0, 1.0, 0.4]])
    probabilities = filtered(logits, sampling).double().softmax(-1)[0]
    num_draws = 100_000
    counts = drawn(logits.expand(num_draws, -1), sampling, position=3).tokens.bincount(minlength=8)
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    assert chi_square(counts[kept], probabilities[kept] * num_draws) < 4


def test_noise_that_rounds_to_one_stays_below_and_leaves_a_choice():
    seed, position, token = torch.tensor([26006]), torch.tensor([0]), 883
    assert uniform(seed, position, 1000)[0, token] == 1 - 2.0**-24
    logits = torch.full((1, 1000), -math.inf)
    logits[0, token] = 0.0
    found = choose(logits, sampling=Sampling(temperature=1.0), seeds=seed, positions=position)
    assert found.tokens.tolist() == [token]


def test_choices_are_those_of_exact_arithmetic():
    """With logarithms in float64, from the same noise."""
    torch.manual_seed(0)
    logits, seeds, positions = torch.randn(256, 20_000), torch.arange(256), torch.arange(256) % 7
    found = choose(logits, sampling=Sampling(temperature=0.7), seeds=seeds, positions=positions)
    noise = uniform(seeds, positions, 20_000).double()
    assert torch.equal(found.tokens, (logits.double() / 0.7 - (-(1 - noise).log()).log()).argmax(-1))


def test_choices_among_many_equal_tokens_favour_none():
    """The largest noise of 50,000 tokens lies where numbers near 1 would no longer be told apart."""
    V, num_draws = 50_000, 1024
    tokens = torch.cat(
        [
            drawn(torch.zeros(128, V), Sampling(temperature=1.0), seed=start).tokens
            for start in range(0, num_draws, 128)
        ]
    )
    assert distance_from_uniform((tokens + 0.5) / V) < 1.95
    assert len(tokens.unique()) > 0.97 * num_draws


def test_rare_tokens_come_as_often_as_they_should():
    logits = torch.full((200_000, 2), 0.0)
    logits[:, 1] = math.log(1e-4)
    count = int(drawn(logits, Sampling(temperature=1.0)).tokens.sum())
    assert abs(count - 20) < 4 * math.sqrt(20)


def test_a_choice_depends_on_its_own_row_alone():
    torch.manual_seed(0)
    logits = torch.randn(33, 257) * 2
    seeds, positions = torch.randint(-(2**62), 2**62, (33,)), torch.randint(0, 5000, (33,))
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01)
    whole = choose(logits, sampling=sampling, seeds=seeds, positions=positions)
    order = torch.randperm(33)
    mixed = choose(logits[order], sampling=sampling, seeds=seeds[order], positions=positions[order].int())
    assert torch.equal(mixed.tokens, whole.tokens[order])
    for row in range(33):
        one = slice(row, row + 1)
        alone = choose(logits[one], sampling=sampling, seeds=seeds[one], positions=positions[one])
        assert torch.equal(alone.tokens, whole.tokens[one])
    again = choose(logits, sampling=sampling, seeds=seeds, positions=positions + 1)
    assert not torch.equal(again.tokens, whole.tokens)


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_one_kept_token_is_chosen_whatever_the_noise(settings):
    torch.manual_seed(0)
    logits = torch.randn(20_000, 50)
    found = drawn(logits, Sampling(temperature=3.0, **settings))
    assert torch.equal(found.tokens, logits.argmax(-1))


def test_the_coldest_temperature_is_greedy():
    torch.manual_seed(0)
    logits = torch.randn(1000, 50) * 100
    assert torch.equal(drawn(logits, Sampling(temperature=1e-6)).tokens, logits.argmax(-1))


def test_no_rows_are_no_choices():
    found = drawn(torch.zeros(0, 5), Sampling(temperature=1.0, top_k=2, top_p=0.5, min_p=0.1))
    assert [len(part) for part in found] == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-1, 1e-9, math.nan, math.inf, "1", True, None)),
        *(("top_k", value) for value in (0, -1, 2.0, True, "5")),
        *(("top_p", value) for value in (0, 0.0, -0.1, 1.1, math.nan, True, "0.5")),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan, False, "0.5")),
    ],
)
def test_values_out_of_range_are_refused(name, value):
    with pytest.raises(RecipeError, match=f"{name} must be .*, got {value!r}") as caught:
        Sampling(**{name: value})
    assert name in str(caught.value.hint)


@pytest.mark.gpu
def test_noise_has_the_same_bits_on_a_gpu():
    torch.manual_seed(0)
    seeds, positions = torch.randint(-(2**63), 2**63 - 1, (64,)), torch.randint(0, 2**31 - 1, (64,))
    expected = uniform(seeds, positions, 50_001)
    assert torch.equal(uniform(seeds.cuda(), positions.cuda(), 50_001).cpu(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0}, *({"temperature": 0.8, **each} for each in FILTERS)], ids=str
)
def test_a_graph_chooses_what_the_cpu_chooses(settings, dtype):
    """Recorded with some logits, seeds and positions, and repeated with others."""
    sampling = Sampling(**settings)
    torch.manual_seed(0)
    given = [
        ((torch.randn(32, 4001) * 4).to(dtype), torch.randint(0, 2**62, (32,)), torch.randint(0, 9999, (32,)))
        for _ in range(3)
    ]
    logits, seeds, positions = (part.cuda() for part in given[0])
    for _ in range(2):
        choose(logits, sampling=sampling, seeds=seeds, positions=positions)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = choose(logits, sampling=sampling, seeds=seeds, positions=positions)
    for parts in given:
        for held, part in zip((logits, seeds, positions), parts, strict=True):
            held.copy_(part)
        graph.replay()
        expected = choose(parts[0], sampling=sampling, seeds=parts[1], positions=parts[2])
        # sums and logarithms are rounded otherwise, which decides a choice once in a long while
        assert (found.tokens.cpu() != expected.tokens).sum() <= (0 if sampling.greedy else 1)
        same = found.tokens.cpu() == expected.tokens
        assert torch.allclose(found.log_probs.cpu()[same], expected.log_probs[same], rtol=0, atol=1e-5)
        assert found.finite.all()


@pytest.mark.gpu
def test_greedy_on_a_gpu_is_the_first_of_the_largest():
    logits = torch.randint(-3, 3, (64, 151_937)).to(torch.bfloat16)
    seeds = torch.zeros(64, dtype=torch.int64, device="cuda")
    found = choose(logits.cuda(), sampling=GREEDY, seeds=seeds, positions=seeds)
    assert torch.equal(found.tokens.cpu(), logits.float().argmax(-1))
