"""A tokenizer is loaded without code from the checkpoint, fits the embeddings, or is refused with one clear error."""

import builtins
import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from gendistill.checkpoints.resolve import check_tokenizer, load_tokenizer
from gendistill.cli.main import main
from gendistill.data.stream import pad_id
from gendistill.errors import CheckpointError
from gendistill.testing import save_tiny_checkpoint

ROWS = 259


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("saved") / "teacher", "llama", vocab_size=ROWS)


@pytest.fixture
def folder(saved, tmp_path):
    copy = tmp_path / "teacher"
    copy.mkdir()
    for path in saved.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def widen(folder, change):
    """Change the tokenizer of a folder as its author would, leaving the model as it is."""
    tokenizer = load_tokenizer(folder)
    change(tokenizer)
    tokenizer.save_pretrained(folder)


def pad_in_template(tokenizer):
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ pad_token }}"


HARMLESS = {
    "pad": lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "[PAD]"}),
    "reserved": lambda tokenizer: tokenizer.add_tokens(
        [AddedToken("[PAD]", special=True)], special_tokens=True
    ),
    "extra": lambda tokenizer: tokenizer.add_special_tokens({"extra_special_tokens": ["[PAD]"]}),
    "unknown": lambda tokenizer: tokenizer.add_special_tokens({"unk_token": "[PAD]"}),
    "several roles": lambda tokenizer: tokenizer.add_special_tokens(
        {"sep_token": "[PAD]", "cls_token": "<r1>", "mask_token": "<r2>"}
    ),
    "many": lambda tokenizer: tokenizer.add_special_tokens(
        {"pad_token": "[PAD]", "extra_special_tokens": ["<r1>", "<r2>"]}
    ),
}
WORDS = {
    "words": lambda tokenizer: tokenizer.add_tokens(["river", "stone"]),
    "words and pad": lambda tokenizer: (
        tokenizer.add_tokens(["river", "[PAD]"]) and HARMLESS["pad"](tokenizer)
    ),
    "eos": lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "</s>"}),
    "bos": lambda tokenizer: tokenizer.add_special_tokens({"bos_token": "<s>"}),
    "in the template": lambda tokenizer: (
        tokenizer.add_tokens([AddedToken("<turn>", special=True)], special_tokens=True),
        setattr(tokenizer, "chat_template", "<turn>{{ messages[0]['content'] }}"),
    ),
    "pad in the template": pad_in_template,
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_tokens_that_no_text_holds_may_lie_beyond_the_embeddings(folder, change):
    widen(folder, change)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tokenizer = load_tokenizer(folder)
    assert pad_id(tokenizer) < ROWS
    text = "a [PAD] b<r1>"
    ids = tokenizer(text).input_ids
    assert max(ids) < ROWS
    assert tokenizer.decode(ids) == text
    assert max(tokenizer.get_vocab().values()) < ROWS
    assert max(tokenizer.all_special_ids) < ROWS
    batch = tokenizer(["a", "a longer one"], padding=True).input_ids
    assert max(max(row) for row in batch) < ROWS
    assert tokenizer("<|im_start|>").input_ids == [1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("change", WORDS.values(), ids=WORDS)
def test_tokens_of_texts_beyond_the_embeddings_are_refused_with_both_sizes(folder, change):
    widen(folder, change)
    with pytest.raises(CheckpointError, match=rf"largest id is {ROWS}|largest id is {ROWS + 1}") as caught:
        load_tokenizer(folder)
    assert f"{ROWS} rows" in caught.value.message
    assert "resize_token_embeddings" in (caught.value.hint or "")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_tokenizer_is_what_its_file_says_in_every_family(family, tmp_path):
    """transformers has classes of its own for some, which add tokens and split words in their own way."""
    folder = save_tiny_checkpoint(tmp_path / "teacher", family, vocab_size=ROWS)
    text = "the river's  12345\n"
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder)(text).input_ids == written.encode(text).ids
    words = ["<|pad|>", "<|im_start|>", "<|im_end|>", "[UNK]", "the", "river", "12345"]
    backend = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer("the river 12345").input_ids == [4, 5, 6]
    assert max(tokenizer.get_vocab().values()) < ROWS


def test_a_vocabulary_beyond_the_embeddings_is_refused(folder):
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, ROWS, where="here")
    with pytest.raises(CheckpointError, match=r"2 tokens .* largest id is 258, the embeddings have 257 rows"):
        check_tokenizer(tokenizer, ROWS - 2, where="here")


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)], ids=["nothing", "settings"])
def test_a_folder_without_a_vocabulary_is_refused(family, kept, tmp_path):
    """transformers makes a tokenizer without words of the config alone: every prompt would become no tokens."""
    folder = save_tiny_checkpoint(tmp_path / "teacher", family)
    for path in folder.iterdir():
        if path.name not in ("config.json", "model.safetensors", *kept):
            path.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer") as error:
        load_tokenizer(folder)
    assert "tokenizer.json" in (error.value.hint or "")


def test_embeddings_may_have_more_rows_than_there_are_tokens(folder):
    edit(folder / "config.json", vocab_size=1024)
    assert len(load_tokenizer(folder)) == ROWS


@pytest.mark.parametrize("missing", ["pad_token", "eos_token"])
def test_rows_are_filled_without_a_pad_token_or_an_end(folder, missing):
    edit(folder / "tokenizer_config.json", **{"pad_token": None, missing: None})
    tokenizer = load_tokenizer(folder)
    assert pad_id(tokenizer) == (0 if missing == "eos_token" else 2)


@pytest.mark.parametrize(
    "words", [["run"], ["convert"], ["distill"], ["data"], ["eval"]], ids=lambda words: words[0]
)
def test_every_command_refuses_words_beyond_the_embeddings(folder, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    widen(folder, WORDS["words"])
    (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "{i}: the river"}}\n' for i in range(9)))
    stage = {
        **{"objective": {"kind": "kl"}, "data": "d", "train": ["mixer"], "steps": 1, "seq_len": 16},
        **{"batch_size": 1, "micro_batch_size": 1, "lr": 1e-3},
    }
    recipe = {
        **{"schema": 1, "name": "words", "output": str(tmp_path / "runs")},
        "teacher": {"model": str(folder), "dtype": "float32"},
        "student": {"placement": "full", "impl": "reference"},
        "data": {"d": {"path": "data.jsonl", "format": "text"}},
        "heldout": {"data": "d", "rows": 2, "seq_len": 16},
        "stages": {"s": stage},
        "eval": {"tasks": []},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [*words, "recipe.yaml"]
    if words == ["data"]:
        command = ["data", "recipe.yaml", "--stage", "s"]
    if words == ["eval"]:
        command = ["eval", str(folder), "--tasks", "copy"]
    code = main(command)
    said = capsys.readouterr().err
    assert code == 1, said
    assert "largest id is 260, the embeddings have 259 rows" in said
    assert "next: " in said
    assert not (tmp_path / "runs/words/student-init").exists()


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "OwnTokenizer", None])
@pytest.mark.parametrize("place", ["tokenizer_config.json", "config.json"])
def test_code_of_a_checkpoint_never_runs_and_nobody_is_asked(
    folder, tmp_path, monkeypatch, tokenizer_class, place
):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w')\nclass T: pass\nclass C: pass\n"
    for name in ("tok.py", "own.py", "tokenization_own.py"):
        (folder / name).write_text(code)
    edit(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    edit(folder / place, auto_map={"AutoTokenizer": ["tok.T", None], "AutoConfig": "own.C"})
    try:
        assert load_tokenizer(folder)("a").input_ids
    except CheckpointError as error:
        assert error.hint  # noqa: PT017
    assert not marker.exists()


@pytest.mark.parametrize(
    "entry", ["tokenizer_file", "vocab_file", "merges_file", "gguf_file", "fast_tokenizer_files"]
)
def test_files_outside_the_folder_are_not_read(folder, tmp_path, entry):
    (tmp_path / "other.json").write_text((folder / "tokenizer.json").read_text())
    path = str(tmp_path / "other.json")
    edit(folder / "tokenizer_config.json", **{entry: [path] if entry.endswith("files") else path})
    with pytest.raises(CheckpointError, match=entry):
        load_tokenizer(folder)
    if entry != "fast_tokenizer_files":
        edit(folder / "tokenizer_config.json", **{entry: None})
        load_tokenizer(folder)


BROKEN = [
    "",
    "{",
    "[]",
    "null",
    '"x"',
    '{"a": NaN}',
    "\x80\x04",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_broken_files_are_named(folder, name, content):
    (folder / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(folder)
    assert name in str(caught.value.where)
    assert caught.value.hint


TEMPLATE_PIECE = {"SpecialToken": {"id": "nope", "type_id": 0}}
PARTS = [
    {"model": None},
    {"model": {"type": "Nope"}},
    {"model": {"type": "BPE", "vocab": [1], "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x"]}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["q z"]}},
    {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["a", 0.0]], "byte_fallback": False}},
    {"model": {"type": "WordLevel", "unk_token": "u", "vocab": {"a": 0}}},
    {"pre_tokenizer": {"type": "Nope"}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [TEMPLATE_PIECE],
            "pair": [],
            "special_tokens": {},
        }
    },
    {"added_tokens": [5]},
    {"added_tokens": [{"id": 2**40, "content": "x"}]},
]


@pytest.mark.parametrize("change", PARTS, ids=range(len(PARTS)))
def test_parts_that_tokenizers_cannot_use_are_a_clear_error(folder, change):
    edit(folder / "tokenizer.json", **change)
    with pytest.raises(CheckpointError, match="no tokenizer can be loaded from") as caught:
        load_tokenizer(folder)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("tokenizer_class", value) for value in (5, [5], {"a": 5}, True)),
        *(("auto_map", value) for value in (5, "x", [5], [], {"AutoTokenizer": 5})),
        *(("added_tokens_decoder", value) for value in (5, [5], {"a": 5}, {"0": 5}, None)),
        *(("chat_template", value) for value in (5, [5], {"a": 5}, True)),
        *(("model_max_length", value) for value in ("x", [5])),
        *(
            (token, value)
            for token in ("bos_token", "eos_token", "pad_token")
            for value in (5, [5], {"a": 5})
        ),
        *(("padding_side", value) for value in (5, "up")),
        *((key, {"a": 5}) for key in ("cls", "model_input_names", "split_special_tokens", "backend")),
    ],
)
def test_settings_of_another_type_are_a_clear_error_or_ignored(folder, entry, value):
    edit(folder / "tokenizer_config.json", **{entry: value})
    try:
        assert load_tokenizer(folder)("a").input_ids
    except CheckpointError as error:
        assert error.hint  # noqa: PT017
