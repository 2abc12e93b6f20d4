"""Padding and packed documents: in every layer tokens see what belongs to them, or the call is refused."""

import itertools

import pytest
import torch

from gendistill.mixers import SequenceInfo
from gendistill.models import HybridCache
from gendistill.models.cache import RecurrentLayer
from gendistill.ops import Segments
from gendistill.testing import FAMILIES, PLACEMENTS, tiny_student

LENGTHS = [10, 8, 4]
ENDS = torch.tensor([0, 10, 18, 22], dtype=torch.int32)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
IDS = torch.randint(3, 97, (1, 22), generator=torch.Generator().manual_seed(1))
ONES = torch.ones(1, 22, dtype=torch.long)
PADDED = ONES.clone()
PADDED[:, 18:] = 0
BLOCKS = torch.block_diag(*[torch.ones(n, n).tril() for n in LENGTHS]).bool()[None, None]
CASES = [(family, "mixed") for family in FAMILIES] + [("llama", name) for name in list(PLACEMENTS)[1:]]


@pytest.fixture(params=CASES, ids=lambda pair: "-".join(pair).replace(" ", "_"))
def student(request):
    return tiny_student(*request.param)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "ends", [{}, {"cu_seq_lens_q": ENDS}, {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS.clone()}]
)
@torch.no_grad()
def test_packed_documents_are_apart_in_every_layer(student, attention, ends):
    student.set_attn_implementation(attention)
    packed = student(IDS, position_ids=POSITIONS, use_cache=False, **ends).logits
    for start, end in itertools.pairwise(ENDS.tolist()):
        alone = student(IDS[:, start:end], use_cache=False).logits
        torch.testing.assert_close(packed[:, start:end], alone, rtol=0, atol=1e-4)


@torch.no_grad()
def test_documents_whose_lengths_the_caller_knows_are_apart(student):
    known = SequenceInfo(Segments(LENGTHS))
    packed = student(IDS, position_ids=POSITIONS, use_cache=False).logits
    found = student(IDS, position_ids=POSITIONS, use_cache=False, sequences=known).logits
    assert torch.equal(found, packed)
    for change, fix in (
        ({"attention_mask": ONES}, "leave out attention_mask"),
        ({"use_cache": True}, "use_cache=False"),
        ({"sequences": SequenceInfo(Segments([10, 8]))}, "must cover the 22 cells of 1 rows of 22, got 18"),
        ({"position_ids": None}, "3 documents in 1 rows need position_ids that restart"),
    ):
        settings = {"position_ids": POSITIONS, "use_cache": False, "sequences": known, **change}
        with pytest.raises(ValueError, match=fix):
            student(IDS, **settings)
    whole = SequenceInfo(Segments([22]))
    assert torch.equal(
        student(IDS, use_cache=False, sequences=whole).logits, student(IDS, use_cache=False).logits
    )


@pytest.mark.parametrize("with_ends", [True, False])
@pytest.mark.parametrize(
    ("beside", "fix"),
    [
        ({"attention_mask": ONES}, "leave out attention_mask"),
        ({"attention_mask": PADDED}, "leave out attention_mask"),
        ({"attention_mask": ONES.bool()}, "leave out attention_mask"),
        ({"attention_mask": ONES.float()}, "leave out attention_mask"),
        ({"attention_mask": BLOCKS}, "4-D attention_mask"),
        ({"use_cache": True}, "use_cache=False"),
        ({"use_cache": None}, "use_cache=False"),
        (
            {"attention_mask": {"full_attention": None, "sliding_attention": None, "linear_attention": ONES}},
            "leave out",
        ),
    ],
)
def test_what_would_mix_packed_documents_is_refused_alike_for_every_placement(
    student, beside, fix, with_ends
):
    ends = {"cu_seq_lens_q": ENDS} if with_ends else {}
    with pytest.raises(ValueError, match=fix):
        student(IDS, position_ids=POSITIONS, **ends, **{"use_cache": False, **beside})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cu_seq_lens_q": ENDS, "position_ids": None}, "position_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 9, 18, 22])}, "elsewhere"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 22])}, "2 documents where position_ids start 3"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 18])}, "rise from 0 to 22"),
        ({"cu_seq_lens_q": torch.tensor([0, 18, 10, 22])}, "rise from 0 to 22"),
        ({"cu_seq_lens_q": torch.tensor([0, 10, 99, 22])}, "rise from 0 to 22"),
        ({"cu_seq_lens_q": torch.tensor([0.0, 10, 18, 22])}, "integers"),
        ({"cu_seq_lens_q": ENDS[None]}, "integers"),
        ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": torch.tensor([0, 11, 18, 22])}, "differs"),
        ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": torch.tensor([0, 18, 22])}, "same integers"),
        ({"cu_seq_lens_k": torch.tensor([0, 18, 22])}, "2 documents"),
        ({"position_ids": POSITIONS[0]}, r"position_ids must be \[1, 22\]"),
        ({"position_ids": POSITIONS[:, :20]}, r"position_ids must be \[1, 22\]"),
        ({"position_ids": POSITIONS, "attention_mask": ONES[:, :20]}, r"attention_mask must be \[1, 22\]"),
        ({"position_ids": None, "attention_mask": ONES * 2}, "ones at tokens"),
    ],
)
def test_descriptions_that_disagree_are_refused(student, given, message):
    with pytest.raises(ValueError, match=message):
        student(IDS, use_cache=False, **{"position_ids": POSITIONS, **given})


@torch.no_grad()
def test_ends_of_rows_and_of_empty_documents_agree_with_the_positions(student):
    ids = torch.cat([IDS, IDS.flip(1)])
    plain = student(ids, use_cache=False).logits
    rows = torch.tensor([0, 22, 22, 44], dtype=torch.int32)
    torch.testing.assert_close(
        student(ids, use_cache=False, cu_seq_lens_q=rows).logits, plain, rtol=0, atol=1e-4
    )
    both = student(ids, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(
        both[:1], student(IDS, position_ids=POSITIONS, use_cache=False).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("first", [0, 1])
@torch.no_grad()
def test_positions_of_padding_are_no_restart(student, first):
    """As generate() makes them: they count tokens, with anything at padding."""
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    mask[1, 9:] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, first)
    logits = student(IDS[:, :12].expand(2, -1), attention_mask=mask, position_ids=positions).logits
    alone = student(IDS[:, 5:12]).logits
    torch.testing.assert_close(logits[:1, 5:], alone, rtol=0, atol=1e-4)


def left_padded(rows):
    width = max(map(len, rows))
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    ids = torch.stack([torch.cat([torch.full((width - len(row),), 50), row]) for row in rows])
    return ids, mask


def states(cache):
    """What mixers of ours remember, row by row."""
    return [part for layer in cache.layers if isinstance(layer, RecurrentLayer) for part in layer.tensors()]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
@torch.no_grad()
def test_masked_cells_change_no_state_whatever_the_chunk(student, size):
    rows = [IDS[0, :3], IDS[0, 4:15], IDS[0, 10:16]]
    ids, mask = left_padded(rows)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache, parts = HybridCache(student.config), []
    for start in range(0, ids.shape[1], size):
        stop = min(start + size, ids.shape[1])
        parts.append(
            student(
                ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions[:, start:stop],
                past_key_values=cache, use_cache=True,
            ).logits
        )  # fmt: skip
    logits = torch.cat(parts, 1)
    for index, row in enumerate(rows):
        own = HybridCache(student.config)
        alone = student(row[None], past_key_values=own, use_cache=True).logits[0]
        torch.testing.assert_close(logits[index, -len(row) :], alone, rtol=0, atol=1e-4)
        for found, expected in zip(states(cache), states(own), strict=True):
            torch.testing.assert_close(found[index], expected[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_chunked_prefill_of_padded_rows_says_what_single_rows_say(student, size, cache):
    if cache == "static" and set(student.config.layer_types) == {"linear_attention"}:
        pytest.skip("static caches are refused without attention layers")
    if cache == "static" and student.config.mixers[0] == "swa":
        pytest.skip("transformers sizes a static cache's masks by a linear layer when layer 0 slides")
    rows = [IDS[0, :3], IDS[0, 4:15], IDS[0, 10:16]]
    ids, mask = left_padded(rows)
    settings = {"max_new_tokens": 8, "do_sample": False}
    batched = student.generate(
        ids, attention_mask=mask, prefill_chunk_size=size, cache_implementation=cache, **settings
    )
    for index, row in enumerate(rows):
        alone = student.generate(row[None], **settings)
        assert torch.equal(batched[index, ids.shape[1] :], alone[0, len(row) :])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_single_tokens_of_a_ragged_turn_change_their_rows_only(student, side):
    """The second turn comes token by token; a row that has ended gets padding, or waits for its first token."""
    if "swa" in student.config.mixers:
        pytest.skip("transformers' windows count cells, padding included")
    first, second = IDS[:, :6].expand(2, -1), torch.stack([IDS[0, 6:11], IDS[0, 11:16]])
    turn = torch.ones(2, 5, dtype=torch.long)
    turn[1, 2:] = 0
    turn = turn.flip(1) if side == "left" else turn
    mask = torch.cat([torch.ones(2, 6, dtype=torch.long), turn], 1)
    positions = mask.cumsum(1) - 1
    cache = HybridCache(student.config)
    student(first, past_key_values=cache, use_cache=True)
    for at in range(5):
        student(
            second[:, at : at + 1], attention_mask=mask[:, : 7 + at], position_ids=positions[:, 6 + at : 7 + at],
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    own = HybridCache(student.config)
    text = torch.cat([first[1], second[1][turn[1].bool()]])
    student(text[None], past_key_values=own, use_cache=True)
    for found, expected in zip(states(cache), states(own), strict=True):
        torch.testing.assert_close(found[1], expected[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_chunk_of_padding_alone_leaves_fresh_states_empty(student):
    cache = HybridCache(student.config)
    student(IDS[:, :3], attention_mask=torch.zeros(1, 3), past_key_values=cache, use_cache=True)
    assert all(not part.any() for part in states(cache))
