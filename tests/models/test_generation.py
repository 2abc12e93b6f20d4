"""The cache contract: whatever the way tokens arrive, the student says the same."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, GenerationConfig, StaticCache

from gendistill.anatomy.family import geometry_of
from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.student import mixer_settings
from gendistill.models import HybridCache
from gendistill.testing import PLACEMENTS, tiny_student

TOLERANCE = 1e-4  # of logits up to 10; a leak between rows or turns shows as 0.1 and more
GREEDY = {"do_sample": False, "num_beams": 1}


def left_pad(rows, pad):
    """Pad a list of 1-D id tensors on the left; return ids and mask."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.cat([torch.full((width - len(row),), pad), row]) for row in rows])
    mask = torch.stack(
        [torch.cat([torch.zeros(width - len(row)), torch.ones(len(row))]) for row in rows]
    ).long()
    return ids, mask


def uncached_greedy(model, ids, steps):
    """Decode by running the whole sequence every time."""
    for _ in range(steps):
        logits = model(ids, use_cache=False, logits_to_keep=1).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@torch.no_grad()
def test_greedy_decoding_equals_full_forward_for_256_tokens(placement, tokens):
    model = tiny_student("llama", placement)
    prompt = tokens[:1, :7]
    text = model.generate(prompt, max_new_tokens=256, **GREEDY)
    assert text.shape == (1, 263)
    logits = model(text, use_cache=False).logits[:, 6:-1]
    assert torch.equal(logits.argmax(-1), text[:, 7:])
    assert len(text[0, 7:].unique()) > 10  # a constant text would prove little


@torch.no_grad()
def test_cached_generation_equals_uncached(student, tokens):
    prompt = tokens[:, :9]
    assert torch.equal(
        student.generate(prompt, max_new_tokens=24, **GREEDY), uncached_greedy(student, prompt, 24)
    )


@pytest.mark.parametrize("split", [1, 5, 16, 23])
@torch.no_grad()
def test_any_prefill_split_matches_full_forward(student, tokens, split):
    full = student(tokens, use_cache=False).logits
    cache, parts = HybridCache(student.config), []
    for piece in tokens.split(split, dim=1):
        parts.append(student(piece, past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == sum(part.shape[1] for part in parts)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("pad", [0, 50])
@torch.no_grad()
def test_left_padded_batch_equals_single_rows_whatever_the_padding(student, tokens, pad):
    rows = [tokens[0, :3], tokens[1, :11], tokens[2, :6]]
    ids, mask = left_pad(rows, pad)
    batched = student.generate(ids, attention_mask=mask, max_new_tokens=16, **GREEDY)
    for index, row in enumerate(rows):
        alone = student.generate(row[None], max_new_tokens=16, **GREEDY)
        assert torch.equal(batched[index, ids.shape[1] :], alone[0, len(row) :])


@torch.no_grad()
def test_right_padding_leaves_logits_and_row_order_unchanged(student, tokens):
    mask = torch.ones_like(tokens)
    mask[1, 10:] = 0
    logits = student(tokens, attention_mask=mask, use_cache=False).logits
    alone = student(tokens[1:2, :10], use_cache=False).logits
    torch.testing.assert_close(logits[1:2, :10], alone, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(
        logits[0], student(tokens[:1], use_cache=False).logits[0], rtol=0, atol=TOLERANCE
    )


@torch.no_grad()
def test_chunked_prefill_of_a_padded_batch(student, tokens):
    rows = [tokens[0, :13], tokens[1, :4]]
    ids, mask = left_pad(rows, 0)
    plain = student.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
    chunked = student.generate(ids, attention_mask=mask, max_new_tokens=12, prefill_chunk_size=5, **GREEDY)
    assert torch.equal(plain, chunked)


@torch.no_grad()
def test_ragged_second_turn_on_a_warm_cache(student, tokens):
    """Rows of different lengths in the second turn: padding lies in the middle of the conversation."""
    first = [tokens[0, :5], tokens[1, :8]]
    second = [tokens[0, 10:16], tokens[1, 10:12]]
    ids1, mask1 = left_pad(first, 0)
    ids2, mask2 = left_pad(second, 0)
    mask = torch.cat([mask1, mask2], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = HybridCache(student.config)
    width = ids1.shape[1]
    student(
        ids1, attention_mask=mask1, position_ids=positions[:, :width], past_key_values=cache, use_cache=True
    )
    logits = student(
        ids2, attention_mask=mask, position_ids=positions[:, width:], past_key_values=cache, use_cache=True
    ).logits
    windowed = "swa" in student.config.mixers
    for row in range(2):
        if (
            windowed
        ):  # transformers' windows count cells, padding included: rows with padding inside differ there
            continue
        alone = student(torch.cat([first[row], second[row]])[None], use_cache=False).logits
        size = len(second[row])
        torch.testing.assert_close(logits[row, -size:], alone[0, -size:], rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_continued_generation_reuses_the_cache(student, tokens):
    prompt = tokens[:1, :6]
    whole = student.generate(prompt, max_new_tokens=20, **GREEDY)
    cache = HybridCache(student.config)
    part = student.generate(prompt, max_new_tokens=8, past_key_values=cache, **GREEDY)
    rest = student.generate(part, max_new_tokens=12, past_key_values=cache, **GREEDY)
    assert torch.equal(rest, whole)


@torch.no_grad()
def test_beams_and_samples_do_not_depend_on_the_cache(student, tokens):
    ids, mask = left_pad([tokens[0, :7], tokens[1, :4]], 0)
    for settings in ({"num_beams": 3, "do_sample": False}, {"do_sample": True, "num_return_sequences": 2}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            texts.append(
                student.generate(ids, attention_mask=mask, max_new_tokens=10, use_cache=use_cache, **settings)
            )
        assert torch.equal(*texts), settings


@torch.no_grad()
def test_static_cache_gives_the_same_text(student, tokens):
    ids, mask = left_pad([tokens[0, :7], tokens[1, :4]], 0)
    arguments = {"attention_mask": mask, "max_new_tokens": 10, **GREEDY}
    if set(student.config.layer_types) == {"linear_attention"}:
        with pytest.raises(ValueError, match="cannot hold"):
            student.generate(ids, cache_implementation="static", **arguments)
        with pytest.raises(ValueError, match="HybridCache"):
            student(ids, past_key_values=StaticCache(config=student.config, max_cache_len=32), use_cache=True)
        return
    if student.config.mixers[0] == "swa" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip(
            "transformers below 5.23 sizes a static cache's masks by a linear layer when layer 0 slides"
        )
    plain = student.generate(ids, **arguments)
    cache = StaticCache(config=student.config, max_cache_len=ids.shape[1] + 10)
    assert torch.equal(student.generate(ids, past_key_values=cache, **arguments), plain)


@torch.no_grad()
def test_stock_dynamic_cache_works_when_some_attention_stays(tokens):
    model = tiny_student()
    cache = DynamicCache(config=model.config)
    part = model(tokens[:, :9], past_key_values=cache, use_cache=True).logits
    rest = model(tokens[:, 9:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(
        torch.cat([part, rest], 1), model(tokens, use_cache=False).logits, rtol=0, atol=TOLERANCE
    )
    with pytest.raises(ValueError, match="HybridCache"):
        model(tokens, past_key_values=DynamicCache(), use_cache=True)


@torch.no_grad()
def test_snapshot_and_restore_return_to_the_same_text(student, tokens):
    cache = HybridCache(student.config)
    student(tokens[:, :10], past_key_values=cache, use_cache=True)
    snapshot = cache.snapshot()
    first = student(tokens[:, 10:], past_key_values=cache, use_cache=True).logits
    assert cache.get_seq_length() == 24
    for _ in range(2):
        cache.restore(snapshot)
        assert cache.get_seq_length() == 10
        assert torch.equal(student(tokens[:, 10:], past_key_values=cache, use_cache=True).logits, first)


@torch.no_grad()
def test_batch_rows_can_be_selected_and_repeated(student, tokens):
    cache = HybridCache(student.config)
    student(tokens[:, :10], past_key_values=cache, use_cache=True)
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    order = torch.tensor([2, 2, 0, 0])
    logits = student(tokens[order, 10:], past_key_values=cache, use_cache=True).logits
    expected = student(tokens[order], use_cache=False).logits[:, 10:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_reset_cache_starts_anew(student, tokens):
    cache = HybridCache(student.config)
    student(tokens[:, :10], past_key_values=cache, use_cache=True)
    cache.reset()
    assert cache.get_seq_length() == 0
    logits = student(tokens, past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(logits, student(tokens, use_cache=False).logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("placement", "kind"), [("pure", "kda"), ("sinks alone", "sink")])
@torch.no_grad()
def test_state_bytes_do_not_grow_where_attention_is_replaced(tokens, placement, kind):
    model = tiny_student("llama", placement)
    cache, sizes = HybridCache(model.config), []
    for _ in range(3):
        model(tokens, past_key_values=cache, use_cache=True)
        sizes.append(cache.nbytes)
    plain = model.config.to_dict()
    state = MIXERS[kind].state(geometry_of(plain), mixer_settings(plain, kind))
    assert sizes == [len(tokens) * 4 * sum(part.num_bytes(4) for part in state.values())] * 3


def test_unsupported_decoding_says_so(student, tokens):
    with pytest.raises(ValueError, match="assisted decoding"):
        student.generate(tokens, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="assisted decoding"):
        student.generate(tokens, generation_config=GenerationConfig(prompt_lookup_num_tokens=3))
    with pytest.raises(ValueError, match="cannot hold"):
        student.generate(tokens, cache_implementation="quantized")
    with pytest.raises(ValueError, match="continuous batching"):
        student.generate_batch([[1, 2]])
    with pytest.raises(ValueError, match="cannot be cropped"):
        HybridCache(student.config).crop(-1)


@pytest.mark.parametrize(
    "kda",
    [
        {"conv_size": 0},
        {"conv_activation": "silu", "conv_bias": False},
        {"gate": "softplus"},
        {"output_gate": "sigmoid", "output_norm": True},
        {"output_gate": "none", "rope": True},
        {"gate_rank": 3, "output_gate_rank": 5},
    ],
    ids=lambda kda: ",".join(map(str, kda)),
)
@pytest.mark.parametrize("placement", ["mixed", "pure"])
@torch.no_grad()
def test_every_kda_variant_keeps_the_cache_contract(placement, kda, tokens):
    model = tiny_student("llama", placement, kda=kda)
    ids, mask = left_pad([tokens[0, :7], tokens[1, :4]], 0)
    batched = model.generate(ids, attention_mask=mask, max_new_tokens=12, **GREEDY)
    for index, row in enumerate([tokens[0, :7], tokens[1, :4]]):
        assert torch.equal(batched[index, 7:], uncached_greedy(model, row[None], 12)[0, len(row) :])
