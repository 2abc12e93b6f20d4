"""Every result is kept under all that decides it and nothing else: what is asked of the model anew, and what is not."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tokenizers import AddedToken

from gendistill_evals import (
    JUDGES,
    PROTOCOLS,
    EvalError,
    HFModel,
    Judgement,
    KeepingModel,
    LanguageModel,
    Likelihood,
    evaluate_model,
    load_task,
    questions_identity,
    task_identity,
)
from gendistill_evals.decoding import greedy_decoding
from gendistill_evals.fingerprint import tokenizer_fingerprint
from gendistill_evals.model import Generated, Pair, Request
from gendistill_evals.prompts import Prompter
from gendistill_evals.results import read_results, read_samples, read_transcripts
from gendistill_evals.store import ResultStore
from gendistill_evals.task import Metric
from gendistill_evals.weights import weights_fingerprint

IDS = ("banana", "sky", "grass", "blood")
RANKED = {("log_probs", f"colors, item {name}") for name in IDS}
WRITTEN = {("generate", f"colors, item {name}") for name in IDS}


class Counting:
    """A model that notes what it is asked.

    Attributes:
        asked: What it was asked and the name of the question, in order.
    """

    def __init__(self, inner: LanguageModel) -> None:
        self.inner = inner
        self.asked: list[tuple[str, str]] = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def log_probs(self, pairs):
        self.asked += [("log_probs", pair.name) for pair in pairs]
        return self.inner.log_probs(pairs)

    def generate(self, requests, decoding):
        self.asked += [("generate", request.name) for request in requests]
        return self.inner.generate(requests, decoding)


@pytest.fixture
def evaluate(chat_tokenizer, tmp_path, colors):
    """Score, and return what the model and its teacher were asked."""

    def run(model, folder="out", tokenizer=chat_tokenizer, batch_size=2, teacher=None, **settings):
        counting = [
            Counting(HFModel(each, tokenizer, batch_size=batch_size)) for each in (model, teacher) if each
        ]
        settings = {"tasks": [colors], **settings}
        evaluate_model(
            counting[0],
            out_dir=tmp_path / folder,
            model_name="demo",
            teacher=(counting[1:] or [None])[0],
            **settings,
        )
        return {each for one in counting for each in one.asked}

    return run


def rounded(folder):
    """Read samples; who is asked beside whom decides the last digits of a real model's numbers."""
    rows = read_samples(folder)
    for row in rows:
        for name in ("scores", "scores_per_token", "scores_per_char"):
            row["likelihood"][name] = [round(value, 3) for value in row["likelihood"][name]]
    return rows


def segments(tmp_path, folder="out/parts"):
    return sorted((tmp_path / folder).iterdir())


@pytest.mark.parametrize(
    "change", ["weights", "one weight", "buffer", "dtype", "config", "tokenizer", "template"]
)
def test_what_decides_a_result_is_asked_anew(evaluate, tiny_llama, chat_tokenizer, change):
    tiny_llama.register_buffer("scale", torch.ones(3))
    assert evaluate(tiny_llama) == RANKED | WRITTEN
    tokenizer = copy.deepcopy(chat_tokenizer)
    if change == "weights":
        tiny_llama.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)
    elif change == "one weight":
        # Beyond any regular sample of a thousand values.
        tiny_llama.model.embed_tokens.weight.data[301, 17] += 1
    elif change == "buffer":
        tiny_llama.scale[1] = 2
    elif change == "dtype":
        tiny_llama.to(torch.bfloat16)
    elif change == "config":
        tiny_llama.config.rms_norm_eps = 1e-3
    elif change == "tokenizer":
        tokenizer.add_tokens([AddedToken("banana")])
        tiny_llama.resize_token_embeddings(len(tokenizer))
    elif change == "template":
        tokenizer.chat_template = "Hi. " + tokenizer.chat_template
    assert evaluate(tiny_llama, tokenizer=tokenizer) == RANKED | WRITTEN


@pytest.mark.parametrize(
    "change", [{"batch_size": 3}, {"limit": 2}, {"limit": 4}, {"limit": 10**9}, {"role": "teacher"}], ids=str
)
def test_what_decides_no_result_is_not(evaluate, tiny_llama, change):
    evaluate(tiny_llama)
    assert evaluate(tiny_llama, **change) == set()


def test_where_a_model_was_loaded_from_decides_nothing(evaluate, tiny_llama):
    evaluate(tiny_llama)
    tiny_llama.config._name_or_path = tiny_llama.name_or_path = "elsewhere"
    assert evaluate(tiny_llama) == set()


def test_only_what_is_missing_is_asked(evaluate, tiny_llama, write_task, colors):
    rows = [json.loads(line) for line in (colors.parent / "colors.jsonl").read_text().splitlines()]
    assert evaluate(tiny_llama, limit=1) == {
        (kind, "colors, item banana") for kind in ("log_probs", "generate")
    }
    first = {("log_probs", f"colors, item {name}") for name in IDS[1:3]}
    assert evaluate(tiny_llama, limit=3, protocols=["likelihood"]) == first
    assert evaluate(tiny_llama) == (RANKED | WRITTEN) - first - {
        (kind, "colors, item banana") for kind in ("log_probs", "generate")
    }
    # Another name, another order, other ids, one row less and one more.
    moved = [{**row, "id": f"n{place}"} for place, row in enumerate(reversed(rows[1:]))]
    new = {"id": "new", "question": "Ink?", "options": ["blue", "red"], "gold": "blue"}
    task = write_task([*moved, new], stem="moved", kind="multiple_choice")
    assert evaluate(tiny_llama, tasks=[task]) == {
        (kind, "moved, item new") for kind in ("log_probs", "generate")
    }
    # An option more leaves the others as they are, unless it changes where prompt and options part.
    more = [{**row, "options": [*row["options"], "purple"]} for row in rows]
    asked = evaluate(tiny_llama, tasks=[write_task(more, stem="colors", kind="multiple_choice")])
    assert asked == RANKED


def test_what_is_right_is_decided_anew_without_asking(
    evaluate, tiny_llama, write_task, colors, tmp_path, monkeypatch
):
    rows = [json.loads(line) for line in (colors.parent / "colors.jsonl").read_text().splitlines()]
    evaluate(tiny_llama)
    before = read_samples(tmp_path / "out")
    wrong = [{**row, "gold": next(each for each in row["options"] if each != row["gold"])} for row in rows]
    monkeypatch.setitem(JUDGES, "never", lambda item, text: Judgement(text, correct=False))
    task = write_task(wrong, stem="colors", kind="multiple_choice", judge="never")
    assert evaluate(tiny_llama, tasks=[task]) == set()
    after = read_samples(tmp_path / "out")
    for one, two in zip(before, after, strict=True):
        assert two["likelihood"]["scores"] == one["likelihood"]["scores"]
        assert two["generation"]["text"] == two["generation"]["extracted"] == one["generation"]["text"]
        if one["likelihood"]["correct"]:
            assert not two["likelihood"]["correct"]
    assert sum(row["likelihood"]["correct"] for row in before) > 0


def test_protocols_share_what_they_ask_alike(evaluate, tiny_llama, monkeypatch):
    per_token = Likelihood("per_token", "ll/tok", metric=Metric.ACCURACY_PER_TOKEN)
    monkeypatch.setitem(PROTOCOLS, per_token.name, per_token)
    evaluate(tiny_llama)
    assert evaluate(tiny_llama, protocols=["per_token", "likelihood"]) == set()


@pytest.mark.parametrize("change", [{"max_new_tokens": 9}, {"stop": ["a"]}], ids=str)
def test_how_an_answer_ends_decides_generation_alone(evaluate, tiny_llama, write_task, colors, change):
    rows = [json.loads(line) for line in (colors.parent / "colors.jsonl").read_text().splitlines()]
    evaluate(tiny_llama)
    task = write_task(rows, stem="colors", kind="multiple_choice", **change)
    assert evaluate(tiny_llama, tasks=[task]) == WRITTEN
    assert evaluate(tiny_llama, tasks=[task]) == set()


def test_end_tokens_and_templates_decide_what_they_act_on(evaluate, tiny_llama):
    evaluate(tiny_llama)
    tiny_llama.generation_config.eos_token_id = [0, 7]
    assert evaluate(tiny_llama) == WRITTEN
    tiny_llama.generation_config.eos_token_id = 0
    assert evaluate(tiny_llama) == set()


def test_equal_items_are_asked_once(speaker, right_answer, chat_tokenizer, write_task, tmp_path):
    row = {"question": "What color is the sky?", "options": ["red", "blue"], "gold": "blue"}
    other = {**row, "question": "Blood?", "gold": "red"}
    task = write_task([row, other, row, row], stem="sky", kind="multiple_choice")
    model = Counting(HFModel(speaker(right_answer, prefers=right_answer), chat_tokenizer))
    seen = []
    results = evaluate_model(
        model,
        tasks=[task],
        out_dir=tmp_path / "out",
        model_name="demo",
        progress=lambda *report: seen.append(report[1:]),
    )
    assert model.asked.count(("generate", "sky, item 0")) == 1
    assert {name for _, name in model.asked} == {"sky, item 0", "sky, item 1"}
    assert results["tasks"][0]["generation"]["value"] == results["tasks"][0]["likelihood"]["value"] == 1.0
    assert seen[-1] == ("generation", 4, 4)


def test_open_answers_and_their_scores_are_kept_one_by_one(evaluate, tiny_llama, speaker, tmp_path):
    path = tmp_path / "open.jsonl"
    asked = {"tasks": [], "questions": path, "question_tokens": 4}
    path.write_text('{"id": "a", "question": "Where?"}\n')
    model = speaker(lambda prompt: "blue" if "Where" in prompt else "red")
    first = f"{path}, question a"
    assert evaluate(model, teacher=tiny_llama, **asked) == {
        ("generate", first),
        ("log_probs", f"{first}, scored by the teacher"),
    }
    (before,) = read_transcripts(tmp_path / "out")
    path.write_text('{"id": "b", "question": "Who?"}\n{"id": "a", "question": "Where?"}\n')
    second = f"{path}, question b"
    assert evaluate(model, teacher=tiny_llama, **asked) == {
        ("generate", second),
        ("log_probs", f"{second}, scored by the teacher"),
    }
    assert read_transcripts(tmp_path / "out")[1] == before
    tiny_llama.lm_head.weight.data.mul_(1.01)
    scores = {("log_probs", f"{name}, scored by the teacher") for name in (first, second)}
    assert evaluate(model, teacher=tiny_llama, **asked) == scores
    assert evaluate(model, **asked) == set()
    assert evaluate(model, **{**asked, "question_tokens": 5}) == {("generate", first), ("generate", second)}


def test_folders_may_share_what_they_keep(evaluate, tiny_llama, tmp_path):
    shared = {"parts_dir": tmp_path / "shared"}
    assert evaluate(tiny_llama, "one", **shared) == RANKED | WRITTEN
    assert evaluate(tiny_llama, "two", **shared) == set()
    assert len(segments(tmp_path, "shared")) == 2
    assert not (tmp_path / "two" / "parts").exists()


def test_what_a_rerun_writes_is_equal_but_for_the_date(evaluate, tiny_llama, tmp_path):
    (tmp_path / "open.jsonl").write_text('{"question": "Where?"}\n')
    questions = {"questions": tmp_path / "open.jsonl", "teacher": tiny_llama}
    evaluate(tiny_llama, **questions)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.json*")}
    results = read_results(tmp_path / "out")
    assert (
        min(
            entry["seconds"] for entry in (results["tasks"][0][name] for name in ("likelihood", "generation"))
        )
        > 0
    )
    evaluate(tiny_llama, **questions)
    again = read_results(tmp_path / "out")
    assert again | {"date": results["date"]} == results
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before["samples.jsonl"]
    assert (tmp_path / "out" / "transcripts.jsonl").read_bytes() == before["transcripts.jsonl"]


def test_what_was_kept_counts_as_done_before_the_model_is_asked(
    evaluate, tiny_llama, chat_tokenizer, monkeypatch
):
    evaluate(tiny_llama, limit=3, protocols=["generation"])
    seen = []

    def generate(self, requests, decoding):
        seen.append("asked")
        return self.inner.generate(requests, decoding)

    monkeypatch.setattr(Counting, "generate", generate)
    evaluate(tiny_llama, protocols=["generation"], progress=lambda *report: seen.append(report[2:]))
    assert seen == [(1, 4), (2, 4), (3, 4), "asked", (4, 4)]


def test_what_an_earlier_version_left_is_left_alone(evaluate, tiny_llama, tmp_path, capsys):
    folder = tmp_path / "out" / "parts"
    folder.mkdir(parents=True)
    (folder / "colors.generation-0123456789abcdef.json").write_text('{"key": 3}')
    assert evaluate(tiny_llama) == RANKED | WRITTEN
    assert evaluate(tiny_llama) == set()
    assert capsys.readouterr().err == ""


DAMAGE = {
    "cut": lambda text: text[:-9],
    "deep": lambda text: "[" * 100_000,
    "list": lambda text: "[]\n" + text[text.index("\n") + 1 :],
    "empty": lambda text: "\n" + text[text.index("\n") + 1 :],
    "key": lambda text: text.replace('"key": "', '"key": 3 "', 1),
    "another key": lambda text: text.replace(text[9:13], "0123" if text[9:13] != "0123" else "4567", 1),
    "value": lambda text: text.replace('"log_probs": [-', '"log_probs": [-1', 1),
    "nan": lambda text: text.replace('"log_probs": [-', '"log_probs": [NaN, -', 1),
    "end": lambda text: text.replace("}\n", "\n", 1),
    "bytes": lambda text: b"\xff\xfe\x00" + text.encode()[3:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_anew_and_said(evaluate, tiny_llama, tmp_path, capsys, damage):
    evaluate(tiny_llama)
    before = rounded(tmp_path / "out")
    path = next(path for path in segments(tmp_path) if "log_probs" in path.name)
    damaged = DAMAGE[damage](path.read_text())
    path.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    asked = evaluate(tiny_llama)
    assert len(asked) == (4 if damage == "deep" else 1)
    assert asked <= RANKED
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert str(path) in said[0]
    assert ("line 1:" if damage not in ("cut",) else "line 11:") in said[0]
    assert rounded(tmp_path / "out") == before
    assert evaluate(tiny_llama) == set()


def test_a_wrong_result_under_a_right_checksum_is_made_anew(evaluate, tiny_llama, tmp_path, capsys):
    evaluate(tiny_llama)
    before = rounded(tmp_path / "out")
    for kind, content in (("log_probs", {"log_probs": ["x"], "seconds": 0}), ("generate", [3])):
        (path,) = (tmp_path / "out" / "parts").glob(f"{kind}-*")
        store = ResultStore(path.parent, path.name.rsplit("-", 2)[0])
        for line in path.read_text().splitlines():
            store.add(bytes.fromhex(json.loads(line)["key"]), content)
        store.close()
    assert evaluate(tiny_llama) == RANKED | WRITTEN
    assert rounded(tmp_path / "out") == before
    assert evaluate(tiny_llama) == set()


class Saying:
    """A model that answers as a test says.

    Attributes:
        answers: What ``log_probs`` and ``generate`` yield.
    """

    max_tokens = vocab_size = None
    generation_defaults = {}  # noqa: RUF012

    def __init__(self, tokenizer, answers):
        self.tokenizer, self.answers = tokenizer, answers

    def identity(self):
        return {"weights": "none"}

    def setup(self):
        raise NotImplementedError

    def log_probs(self, pairs):
        yield from self.answers

    def generate(self, requests, decoding):
        yield from self.answers


@pytest.mark.parametrize(
    ("answers", "message", "where"),
    [
        ([(0, [-1.0, -2.0]), (1, [-1.0])], "which is not a result", "b"),
        ([(0, [-1.0, -2.0]), (1, [-1.0, float("-inf")])], "which is not a result", "b"),
        ([(0, [-1.0, -2.0]), (1, [None, -1.0])], "which is not a result", "b"),
        ([(1, [-1.0, -2.0])], "no result for 1 of 2 questions", "a"),
        ([], "no result for 2 of 2 questions", "a"),
    ],
)
def test_a_model_that_answers_something_else_is_refused_by_name(
    chat_tokenizer, tmp_path, answers, message, where
):
    pairs = [Pair((3,), (4, 5), "a"), Pair((6,), (4, 5), "b")]
    model = KeepingModel(Saying(chat_tokenizer, answers), tmp_path)
    found = {}
    with pytest.raises(EvalError, match=message) as caught:
        found.update(model.log_probs(pairs))
    assert caught.value.where == where
    assert caught.value.hint
    # What came before is kept, what was refused is not.
    model = KeepingModel(
        Saying(chat_tokenizer, [(0, [-7.0, -7.0]), (1, [-7.0, -7.0])][: 2 - len(answers[:1])]), tmp_path
    )
    assert len({tuple(values) for _, values in model.log_probs(pairs)}) == (2 if answers else 1)


def test_a_keeping_model_is_a_language_model(tiny_llama, chat_tokenizer, tmp_path):
    inner = HFModel(tiny_llama, chat_tokenizer)
    model = KeepingModel(inner, tmp_path)
    assert isinstance(model, LanguageModel)
    for name in ("tokenizer", "max_tokens", "vocab_size"):
        assert getattr(model, name) == getattr(inner, name)
    assert model.identity() == inner.identity()
    assert model.setup() == inner.setup()
    assert model.generation_defaults == inner.generation_defaults


def test_pairs_are_told_apart_by_where_they_part(chat_tokenizer, tmp_path):
    pairs = [Pair((3, 4), (5,)), Pair((3,), (4, 5)), Pair((3, 4), (5,), "again"), Pair((3, 4), (6,))]
    given = [(0, [-1.0]), (1, [-2.0, -3.0]), (2, [-4.0])]
    model = KeepingModel(Saying(chat_tokenizer, given), tmp_path)
    assert dict(model.log_probs(pairs)) == {0: [-1.0], 1: [-2.0, -3.0], 2: [-1.0], 3: [-4.0]}


def test_answers_survive_as_they_are(chat_tokenizer, tmp_path):
    texts = ["", "a\nb", "\x00\x1b\u2028", "\ud83d", "\ud83d\ude00", "答案是B 😀", '"}\n{"key": "']
    answers = [Generated(tuple(range(place)), text, ended=place % 2 == 0) for place, text in enumerate(texts)]
    requests = [Request((place + 3,), 4) for place in range(len(texts))]
    saying = Saying(chat_tokenizer, list(enumerate(answers)))
    decoding = greedy_decoding(saying, Prompter(chat_tokenizer))
    first = dict(KeepingModel(saying, tmp_path).generate(requests, decoding))
    second = dict(KeepingModel(Saying(chat_tokenizer, []), tmp_path).generate(requests, decoding))
    assert first == second
    for place, answer in enumerate(answers):
        # Halves of a pair do not survive; they would not in samples.jsonl either.
        expected = answer.text.encode("utf-8", "replace").decode()
        assert first[place] == Generated(answer.token_ids, expected, answer.ended)


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
