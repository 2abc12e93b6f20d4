from __future__ import annotations

import copy
import json

import pytest
import torch
from tokenizers import AddedToken

from gendistill_evals import EvalError, evaluate_model, load_task, questions_identity, task_identity
from gendistill_evals.fingerprint import tokenizer_fingerprint
from gendistill_evals.results import read_samples, read_transcripts
from gendistill_evals.weights import weights_fingerprint

ALL = {("colors", "likelihood"), ("colors", "generation")}


@pytest.fixture
def evaluate(chat_tokenizer, tmp_path, colors):
    """Score, and return what was computed anew."""

    def run(model, folder="out", tokenizer=chat_tokenizer, **settings):
        seen = set()
        settings = {"tasks": [colors], "batch_size": 2, **settings}
        evaluate_model(
            model,
            tokenizer,
            out_dir=tmp_path / folder,
            model_name="demo",
            progress=lambda *report: seen.add(report[:2]),
            **settings,
        )
        return seen

    return run


def parts(tmp_path, folder="out/parts"):
    return sorted((tmp_path / folder).iterdir())


@pytest.mark.parametrize(
    "change", ["limit", "task", "weights", "one weight", "buffer", "config", "tokenizer"]
)
def test_what_a_score_depends_on_is_scored_anew(evaluate, tiny_llama, chat_tokenizer, write_task, change):
    tiny_llama.register_buffer("scale", torch.ones(3))
    assert evaluate(tiny_llama) == ALL
    settings = {}
    if change == "limit":
        settings = {"limit": 3}
    elif change == "task":
        rows = [{"question": "Blue?", "options": ["no", "yes"], "gold": "no"}]
        settings = {"tasks": [write_task(rows, stem="colors", kind="multiple_choice")]}
    elif change == "weights":
        tiny_llama.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)
    elif change == "one weight":
        # Beyond any regular sample of a thousand values.
        tiny_llama.model.embed_tokens.weight.data[301, 17] += 1
    elif change == "buffer":
        tiny_llama.scale[1] = 2
    elif change == "config":
        tiny_llama.config.rms_norm_eps = 1e-3
    elif change == "tokenizer":
        settings = {"tokenizer": copy.deepcopy(chat_tokenizer)}
        settings["tokenizer"].add_tokens([AddedToken("banana")])
        tiny_llama.resize_token_embeddings(len(settings["tokenizer"]))
    assert evaluate(tiny_llama, **settings) == ALL


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"limit": 4}, {"limit": 10**9}, {"role": "teacher"}], ids=str
)
def test_what_no_score_depends_on_is_not(evaluate, tiny_llama, change):
    evaluate(tiny_llama)
    assert evaluate(tiny_llama, **change) == set()


def test_where_a_model_was_loaded_from_decides_nothing(evaluate, tiny_llama):
    evaluate(tiny_llama)
    tiny_llama.config._name_or_path = tiny_llama.name_or_path = "elsewhere"
    assert evaluate(tiny_llama) == set()


def test_end_tokens_and_templates_decide_what_they_act_on(evaluate, tiny_llama, chat_tokenizer):
    evaluate(tiny_llama)
    tiny_llama.generation_config.eos_token_id = [0, 7]
    assert evaluate(tiny_llama) == {("colors", "generation")}
    other = copy.deepcopy(chat_tokenizer)
    other.chat_template = "Hi. " + other.chat_template
    assert evaluate(tiny_llama, tokenizer=other) == ALL


def test_going_back_to_earlier_settings_finds_their_scores(evaluate, tiny_llama, tmp_path):
    evaluate(tiny_llama)
    evaluate(tiny_llama, limit=2)
    assert evaluate(tiny_llama) == set()
    assert [path.name.rpartition("-")[0] for path in parts(tmp_path)] == [
        "colors.generation", "colors.generation", "colors.likelihood", "colors.likelihood"
    ]  # fmt: skip


def test_folders_may_share_their_parts(evaluate, tiny_llama, tmp_path):
    shared = {"parts_dir": tmp_path / "shared"}
    assert evaluate(tiny_llama, "one", **shared) == ALL
    assert evaluate(tiny_llama, "two", **shared) == set()
    assert len(parts(tmp_path, "shared")) == 2
    assert not (tmp_path / "two" / "parts").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: "[]",
        lambda text: "null",
        lambda text: json.dumps({**json.loads(text), "content": "x"}),
        lambda text: text.replace('"value": ', '"value": 1'),
        lambda text: json.dumps({**json.loads(text), "key": 3}),
        lambda text: json.dumps({**json.loads(text), "content": float("nan")}),
        lambda text: b"\xff\xfe\x00",
    ],
    ids=["cut", "deep", "list", "null", "content", "value", "key", "nan", "bytes"],
)
def test_a_damaged_part_is_made_anew_and_said(evaluate, tiny_llama, tmp_path, capsys, damage):
    evaluate(tiny_llama)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    path = next(path for path in parts(tmp_path) if "likelihood" in path.name)
    damaged = damage(path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    assert evaluate(tiny_llama) == {("colors", "likelihood")}
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert str(path) in said[0]
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["tasks"][0]["likelihood"]["value"] == results["tasks"][0]["likelihood"]["value"]
    assert evaluate(tiny_llama) == set()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_refused_by_name(evaluate, tiny_llama, tmp_path, bad, dtype):
    tiny_llama.to(dtype).model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(EvalError, match=r"model.layers.1.mlp.up_proj.weight has 1 weight") as caught:
        evaluate(tiny_llama)
    assert caught.value.hint
    assert not (tmp_path / "out").exists()


def test_fingerprints_survive_use(tiny_llama, chat_tokenizer):
    before = weights_fingerprint(tiny_llama), tokenizer_fingerprint(chat_tokenizer)
    tiny_llama(torch.tensor([[4, 5]]))
    chat_tokenizer(["a", "bc"], padding=True, truncation=True, max_length=2)
    assert (weights_fingerprint(tiny_llama), tokenizer_fingerprint(chat_tokenizer)) == before


def test_a_tokenizer_without_a_backend_is_told_apart_by_its_words(tmp_path):
    from transformers import CTRLTokenizer

    def build(words):
        (tmp_path / "vocab.json").write_text(json.dumps({word: place for place, word in enumerate(words)}))
        (tmp_path / "merges.txt").write_text("#version\na b\n")
        return CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), unk_token="<unk>")

    first, same, other = build(["<unk>", "a", "b"]), build(["<unk>", "a", "b"]), build(["<unk>", "b", "a"])
    assert not first.is_fast
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(same)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(other)
    same.add_tokens(["banana"])
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(same)


def test_identities_follow_the_content_and_not_the_place(write_task, tmp_path):
    rows = [{"question": "a?", "gold": "b"}]
    path = write_task(rows, kind="exact_match", name="mine")
    task = load_task(path)
    before = task_identity(path)
    assert before == {
        "name": "mine",
        "items_sha256": task.items_sha256,
        "prompt_sha256": task.prompt_sha256,
    }
    path.parent.rename(tmp_path / "moved")
    assert task_identity(tmp_path / "moved" / path.name) == before
    write_task([*rows, {"question": "c?", "gold": "d"}], kind="exact_match", name="mine")
    assert task_identity(path)["items_sha256"] != before["items_sha256"]
    assert task_identity("copy")["name"] == "copy"

    (tmp_path / "open.jsonl").write_text('{"question": "Where?"}\n')
    (tmp_path / "moved" / "open.jsonl").write_text('{"question": "Where?"}\n')
    identity = questions_identity(tmp_path / "open.jsonl")
    assert identity == questions_identity(str(tmp_path / "moved" / "open.jsonl"))
    (tmp_path / "open.jsonl").write_text('{"question": "Who?"}\n')
    assert questions_identity(tmp_path / "open.jsonl") != identity


@pytest.mark.parametrize("said", ["\ud83d", "a \udc80 b", "\x00\x1b", "\u2028"], ids=ascii)
def test_answers_of_broken_characters_stay_readable(
    evaluate, tiny_llama, chat_tokenizer, tmp_path, monkeypatch, said
):
    """Byte-wise tokenizers may decode half of a character pair."""
    monkeypatch.setattr(type(chat_tokenizer), "decode", lambda self, *given, **settings: f"<{said}>")
    (tmp_path / "open.jsonl").write_text('{"question": "Where?"}\n')
    questions = {"questions": tmp_path / "open.jsonl", "question_tokens": 2}
    evaluate(tiny_llama, **questions)
    expected = f"<{said}>".encode("utf-8", "replace").decode()
    assert {row["generation"]["text"] for row in read_samples(tmp_path / "out")} == {expected}
    assert [row["answer"] for row in read_transcripts(tmp_path / "out")] == [expected]
    assert evaluate(tiny_llama, **questions) == set()
