"""The training stream: exact resume, the same documents for any number of ranks, held-out rows never seen."""

import itertools
import json
import random
import threading

import pytest
import torch

from gendistill.data import stream as stream_module
from gendistill.data.ahead import Ahead
from gendistill.data.batch import IGNORE, Batch
from gendistill.data.stream import build_stream, heldout_batches, pad_id
from gendistill.errors import DataError, RecipeError


@pytest.fixture
def mixed(text_rows, chat_rows, make_recipe):
    """Build recipes over a mixture of text and chat; under mask completion over chat and pairs."""
    pairs = text_rows.with_name("pairs.jsonl")
    rng = random.Random(5)
    pairs.write_text(
        "".join(
            json.dumps({"prompt": f"q{n} ", "completion": "a" * rng.randint(1, 40)}) + "\n" for n in range(30)
        )
    )

    def make(mask="all", **settings):
        other = (
            {"path": str(text_rows)} if mask == "all" else {"path": str(pairs), "format": "prompt_completion"}
        )
        data = {
            "both": {"mix": {"chat": 0.6, "other": 0.4}},
            "chat": {"path": str(chat_rows), "format": "messages"},
            "other": other,
        }
        return make_recipe(data, heldout={"data": "other"}, mask=mask, **settings)

    return make


def _steps(stream, count: int) -> list[list[dict]]:
    """Bring steps into a form that compares by value."""
    return [[_plain(batch) for batch in step] for step in itertools.islice(stream, count)]


def _plain(batch: Batch) -> dict:
    names = ("input_ids", "labels", "position_ids", "cu_seqlens")
    return {name: getattr(batch, name).tolist() for name in names} | {
        "counts": (batch.num_labels, batch.num_tokens),
        "documents": batch.document_ids,
    }


def _rows(step: list[dict]) -> list[tuple]:
    return [
        (tuple(ids), tuple(labels), tuple(positions))
        for batch in step
        for ids, labels, positions in zip(
            batch["input_ids"], batch["labels"], batch["position_ids"], strict=True
        )
    ]


@pytest.mark.parametrize("mask", ["all", "completion"])
@pytest.mark.parametrize("chunk_rows", [3, 64])
def test_resumed_stream_equals_uninterrupted_at_every_step(
    mixed, make_tokenizer, mask, chunk_rows, monkeypatch
):
    monkeypatch.setattr(stream_module, "CHUNK_ROWS", chunk_rows)
    tokenizer, recipe = make_tokenizer(), mixed(mask, batch_size=10, seq_len=64)
    whole = build_stream(recipe, "distill", tokenizer)
    states, steps = [whole.state_dict()], []
    for _ in range(9):
        steps += _steps(whole, 1)
        states.append(json.loads(json.dumps(whole.state_dict())))
    used = build_stream(recipe, "distill", tokenizer)
    for cut in range(7):
        # a fresh stream, and one that has run elsewhere and has a step prepared
        for resumed in (build_stream(recipe, "distill", tokenizer), used):
            resumed.load_state_dict(states[cut])
            assert resumed.state_dict() == states[cut]
            assert _steps(resumed, 2) == steps[cut : cut + 2]
            assert resumed.state_dict() == states[cut + 2]
    assert whole.epochs["chat"] >= 1


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 3), (1, 12), (2, 2), (3, 4), (4, 2), (12, 1)])
def test_documents_of_a_step_do_not_depend_on_ranks_or_micro_batches(mixed, make_tokenizer, world, micro):
    tokenizer = make_tokenizer()
    settings = {"batch_size": 12}
    alone = _steps(build_stream(mixed(micro_batch_size=12, **settings), "distill", tokenizer), 4)
    # the recipe wants a micro-batch that divides the batch; a rank's last one may still be smaller
    recipe = mixed(micro_batch_size=micro, **settings)
    ranks = [build_stream(recipe, "distill", tokenizer, rank=rank, world=world) for rank in range(world)]
    for step in range(4):
        shares = [_steps(rank, 1)[0] for rank in ranks]
        assert [row for share in shares for row in _rows(share)] == _rows(alone[step])
        assert len({len(share) for share in shares}) == 1
        assert all(len(batch["input_ids"]) <= micro for share in shares for batch in share)
        totals = [sum(batch["counts"][which] for share in shares for batch in share) for which in (0, 1)]
        assert totals == list(alone[step][0]["counts"])
    assert all(rank.state_dict() == ranks[0].state_dict() for rank in ranks)


def test_state_may_be_resumed_with_another_number_of_ranks(mixed, make_tokenizer):
    tokenizer = make_tokenizer()
    alone = build_stream(mixed(), "distill", tokenizer)
    next(alone)
    state = alone.state_dict()
    (expected,) = _steps(alone, 1)
    found = []
    for rank in range(2):
        stream = build_stream(mixed(micro_batch_size=1), "distill", tokenizer, rank=rank, world=2)
        stream.load_state_dict(state)
        found += _rows(_steps(stream, 1)[0])
    assert found == _rows(expected)


def test_prefetch_changes_nothing(mixed, make_tokenizer):
    tokenizer = make_tokenizer()
    plain = build_stream(mixed(engine={"prefetch": 0}), "distill", tokenizer)
    expected = [(_steps(plain, 1), plain.state_dict()) for _ in range(6)]
    for number in (1, 2, 7):
        ahead = build_stream(mixed(engine={"prefetch": number}), "distill", tokenizer)
        assert [(_steps(ahead, 1), ahead.state_dict()) for _ in range(6)] == expected
        # what was prepared beyond is forgotten
        ahead.load_state_dict(expected[1][1])
        assert [(_steps(ahead, 1), ahead.state_dict()) for _ in range(4)] == expected[2:]


def test_state_is_small(mixed, make_tokenizer):
    stream = build_stream(mixed(), "distill", make_tokenizer())
    _steps(stream, 10)
    assert len(json.dumps(stream.state_dict())) < 8_000


@pytest.mark.parametrize("change", [{"seq_len": 32}, {"batch_size": 8}])
def test_state_of_other_settings_is_refused(mixed, make_tokenizer, change):
    state = build_stream(mixed(), "distill", make_tokenizer()).state_dict()
    stream = build_stream(mixed(**change), "distill", make_tokenizer())
    with pytest.raises(DataError, match="the data state was saved for"):
        stream.load_state_dict(state)


def test_seed_and_stage_choose_the_order(mixed, make_tokenizer):
    tokenizer = make_tokenizer()
    first = {
        (seed, stage): str(_steps(build_stream(mixed(seed=seed), stage, tokenizer), 1))
        for seed in (1, 2)
        for stage in ("distill", "instruct")
    }
    assert len(set(first.values())) == 4
    assert str(_steps(build_stream(mixed(seed=1), "distill", tokenizer), 1)) == first[1, "distill"]


def test_mask_all_counts_every_token_with_a_predecessor(mixed, make_tokenizer):
    for batch in itertools.chain.from_iterable(
        itertools.islice(build_stream(mixed(), "distill", make_tokenizer()), 5)
    ):
        # every document but its last token has a label, and padding has none
        bounds = batch.cu_seqlens.tolist()
        labels = batch.labels.reshape(-1)
        documents = [
            (start, end) for start, end in itertools.pairwise(bounds) if (labels[start:end] != IGNORE).any()
        ]
        assert batch.num_labels == batch.num_tokens - len(documents)
        for start, end in documents:
            assert torch.equal(labels[start : end - 1], batch.input_ids.reshape(-1)[start + 1 : end])


def _numbers(tokenizer, batches: list[Batch]) -> set[int]:
    """Read the numbers that begin the documents of text_rows."""
    found = set()
    for batch in batches:
        bounds, ids = batch.cu_seqlens.tolist(), batch.input_ids.reshape(-1)
        for start, end in itertools.pairwise(bounds):
            head, colon, _ = tokenizer.decode(ids[start:end].tolist()).partition(":")
            if colon and head.isdigit():
                found.add(int(head))
    return found


@pytest.mark.parametrize("names", [("text", "text"), ("text", "again")])
def test_training_never_sees_held_out_rows_under_any_name(text_rows, make_recipe, make_tokenizer, names):
    tokenizer = make_tokenizer()
    data = {name: {"path": str(text_rows)} for name in ("text", "again")}
    recipe = make_recipe(data, on=names[1], heldout={"data": names[0], "rows": 6, "seq_len": 16}, seq_len=256)
    held = heldout_batches(recipe, tokenizer)
    assert _numbers(tokenizer, held) == set(range(6))
    trained = itertools.chain.from_iterable(itertools.islice(build_stream(recipe, "distill", tokenizer), 20))
    assert _numbers(tokenizer, list(trained)) == set(range(6, 40))


def test_held_out_batches_cost_at_most_a_row_per_sample(text_rows, make_recipe, make_tokenizer):
    recipe = make_recipe({"text": {"path": str(text_rows)}}, heldout={"rows": 9, "seq_len": 24})
    batches = heldout_batches(recipe, make_tokenizer(), rows_per_batch=2)
    assert sum(len(batch.input_ids) for batch in batches) <= 9
    assert all(batch.input_ids.shape[1] == 24 for batch in batches)
    assert batches == [] or all(len(batch.input_ids) == 2 for batch in batches[:-1])
    again = heldout_batches(recipe, make_tokenizer(), rows_per_batch=2)
    assert [_plain(batch) for batch in batches] == [_plain(batch) for batch in again]


def test_unusable_rows_are_reported_by_source(mixed, make_tokenizer):
    stream = build_stream(mixed(), "distill", make_tokenizer())
    _steps(stream, 8)
    report = stream.dropped
    assert report["chat"]["does not start with a user turn"] > 0
    assert report["chat"]["rows"] > report["chat"]["does not start with a user turn"]
    assert set(report["other"]) == {"rows"}


def test_dataset_without_a_usable_row_is_an_error_not_an_endless_loop(chat_rows, make_recipe, make_tokenizer):
    rows = [{"messages": [{"role": "assistant", "content": "x"}]}] * 9
    path = chat_rows.with_name("bad.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = make_recipe({"chat": {"path": str(path), "format": "messages"}})
    with pytest.raises(DataError, match=r"can be used: .* x does not start with a user turn"):
        next(build_stream(recipe, "distill", make_tokenizer()))
    with pytest.raises(DataError, match=r"(?s)none of 5 held-out rows .*set a larger heldout\.rows"):
        heldout_batches(recipe, make_tokenizer())


def test_error_in_the_background_reaches_the_caller(text_rows, make_recipe, make_tokenizer):
    recipe = make_recipe({"text": {"path": str(text_rows), "shuffle": False}}, batch_size=2)
    stream = build_stream(recipe, "distill", make_tokenizer())
    next(stream)
    with text_rows.open("a") as file:
        file.write("more\n")
    with pytest.raises(DataError, match=r"rows\.jsonl|text\.jsonl has changed since it was opened"):
        _steps(stream, 50)


def test_rows_that_cannot_be_used_are_left_out_and_counted_also_after_a_resume(
    text_rows, make_recipe, make_tokenizer
):
    odd = [
        "broken",
        '{"text": "cut \\ud83d here"}',
        '{"te\\ud83dxt": 1}',
        '{"text": ["a"]}',
        "[1]",
        '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"text": "a", "n": ' + "1" * 5000 + "}",
        '{"text": "a", "n": 1e999}',
    ]
    lines = text_rows.read_text().splitlines()
    text_rows.write_text("\n".join([*lines[:10], *odd, *lines[10:]]) + "\n")
    recipe = make_recipe({"text": {"path": str(text_rows), "shuffle": False}}, batch_size=2)
    stream = build_stream(recipe, "distill", make_tokenizer())
    whole = _steps(stream, 30)
    counts = stream.dropped["text"]
    reasons = {reason: count for reason, count in counts.items() if reason != "rows"}
    assert set(reasons) == {
        "a row is not JSON",
        "half of a surrogate pair or a broken byte in its text",
        'no column "text"',
        "a column is not text",
        "a row is a list, expected an object of columns",
        "a row is nested too deeply to be read",
        "a row cannot be read",
    }
    assert sum(reasons.values()) * (len(lines) + 8) == pytest.approx(7 * counts["rows"], rel=0.5)
    resumed = build_stream(recipe, "distill", make_tokenizer())
    first = build_stream(recipe, "distill", make_tokenizer())
    _steps(first, 7)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert _steps(resumed, 23) == whole[7:]


@pytest.mark.parametrize(
    "damage",
    [
        {"mixture": None},
        {"chunks": [{"from": {}, "left": [0]}]},
        {"chunks": 3},
        {"rendered": {}},
    ],
)
def test_state_that_is_damaged_is_a_data_error(text_rows, make_recipe, make_tokenizer, damage):
    recipe = make_recipe({"text": {"path": str(text_rows)}}, batch_size=2)
    stream = build_stream(recipe, "distill", make_tokenizer())
    next(stream)
    state = {**stream.state_dict(), **damage}
    with pytest.raises(DataError, match="state"):
        stream.load_state_dict(state)


def test_batch_that_ranks_cannot_share_is_refused(mixed, make_tokenizer):
    with pytest.raises(RecipeError, match="batch_size 4 cannot be shared equally by 3 processes") as caught:
        build_stream(mixed(), "distill", make_tokenizer(), rank=0, world=3)
    assert caught.value.where == "stages.distill.batch_size"


def test_rows_are_filled_with_the_pad_token_else_with_eos(make_tokenizer):
    plain, padded = make_tokenizer(), make_tokenizer(pad_token="</s>")
    assert (pad_id(plain), pad_id(padded)) == (plain.eos_token_id, padded.pad_token_id)
    assert padded.pad_token_id != padded.eos_token_id


def test_a_source_that_hangs_past_the_close_does_not_run_on_beside_a_restored_state(
    mixed, make_tokenizer, monkeypatch
):
    tokenizer = make_tokenizer()
    plain = build_stream(mixed(engine={"prefetch": 0}), "distill", tokenizer)
    expected = [(_steps(plain, 1), plain.state_dict()) for _ in range(6)]
    stream = build_stream(mixed(engine={"prefetch": 1}), "distill", tokenizer)
    read, hung, goes_on = stream._read_chunk, threading.Event(), threading.Event()

    def hangs():
        if threading.current_thread() is not threading.main_thread() and not goes_on.is_set():
            hung.set()
            goes_on.wait(20)
        return read()

    monkeypatch.setattr(stream, "_read_chunk", hangs)
    monkeypatch.setattr(stream_module, "PATIENCE", 0.05)
    stream._ahead = Ahead(stream._make_step, 1)
    assert hung.wait(20)
    stream.close()
    threading.Timer(0.3, goes_on.set).start()
    stream.load_state_dict(expected[1][1])
    assert [(_steps(stream, 1), stream.state_dict()) for _ in range(4)] == expected[2:]
    stream.close()
