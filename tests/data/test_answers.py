"""Answers that a template marks itself, and the tokens of characters that take several."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gendistill.config.schema import SourceConfig
from gendistill.data.answers import marked_spans, token_spans, with_visible_marks
from gendistill.data.first_token import note_first_tokens
from gendistill.data.render import Renderer
from gendistill.data.sources import open_list
from gendistill.errors import DataError

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
TURN = "<|im_start|>{{ m['role'] }}\n"
LOOP = "{% for m in messages %}" + TURN + "{% if m['role'] == 'assistant' %}"
REST = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
OTHER = "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
MARKINGS = {
    "content": LOOP + "{% generation %}{{ m['content'] }}{% endgeneration %}<|im_end|>\n" + OTHER + REST,
    "whole": LOOP + "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}" + OTHER + REST,
    "end": LOOP
    + "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    + OTHER
    + REST,
    "dashes": LOOP
    + "\n {%- generation -%}\n {{ m['content'] }}\n {%- endgeneration -%} <|im_end|>\n"
    + OTHER
    + REST,
    "two blocks": LOOP
    + "{% generation %}{{ m['content'][:1] }}{% endgeneration %}{% generation %}{{ m['content'][1:] }}"
    + "{% endgeneration %}<|im_end|>\n"
    + OTHER
    + REST,
    "macro": "{% macro say(t) %}{% generation %}{{ t }}{% endgeneration %}{% endmacro %}"
    + LOOP
    + "{{ say(m['content']) }}<|im_end|>\n"
    + OTHER
    + REST,
    "variable": LOOP
    + "{% set t %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endset %}{{ t }}<|im_end|>\n"
    + OTHER
    + REST,
}
AFTER = {"whole": "<|im_end|>\n"}
ANSWERS = ["good 😀", "日本", " x ", "é", "a\nb ", "😀", "x"]


def _tokenizer(template, *, kind="bytes", **settings) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "sentencepiece":
        words = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "x", "▁x", "a", "b"]
        vocabulary = {word: index for index, word in enumerate(words)}
        backend = Tokenizer(
            models.BPE(vocabulary, [("▁", "x")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
        )
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        words = [*SPECIAL, *alphabet, "Ġx", "ĠĠ", "ðŁ"]
        merges = [("Ġ", "x"), ("Ġ", "Ġ"), ("ð", "Ł")]
        backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets=kind == "trimmed")
    names = dict(bos_token="<s>", eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{**names, **settings})
    tokenizer.chat_template = template
    return tokenizer


def _renderer(tokenizer, *, format="messages", mask="completion", name="d") -> Renderer:
    config = SourceConfig(path="rows", format=format)
    columns = ("messages",) if format == "messages" else ("text",)
    return Renderer(tokenizer, config, columns=columns, mask=mask, seq_len=4096, name=name)


def _turns(*contents) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": each} for index, each in enumerate(contents)]}


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "sentencepiece"])
@pytest.mark.parametrize("marking", MARKINGS)
def test_exactly_the_marked_tokens_and_the_end_of_turn_at_once_count(kind, marking):
    tokenizer = _tokenizer(MARKINGS[marking], kind=kind)
    renderer = _renderer(tokenizer)
    for first in ANSWERS:
        for second in ANSWERS:
            ((sample,),) = renderer.render([_turns("hi 😀", first, "and é", second)])
            after = AFTER.get(marking, "<|im_end|>")
            counted = tokenizer.decode(sample.ids[sample.counted].tolist())
            assert counted == f"{first}{after}{second}{after}"


@pytest.mark.parametrize("marking", [*MARKINGS, "none"])
def test_exactly_the_answers_count_where_white_space_is_no_token(marking):
    words = [*SPECIAL, "[UNK]", "user", "assistant", "good", "a", "b", "##d"]
    backend = Tokenizer(
        models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **names)
    tokenizer.chat_template = MARKINGS.get(marking, CHATML)
    renderer = _renderer(tokenizer)
    for first in ANSWERS:
        for second in ANSWERS:
            ((sample,),) = renderer.render([_turns("good", first, "ad é", second)])
            expected = tokenizer(f"{first}<|im_end|>{second}<|im_end|>").input_ids
            assert sample.ids[sample.counted].tolist() == expected


@pytest.mark.parametrize("template", ["{% generation %}{{ messages[0]['content'] }}", "{% endgeneration %}"])
def test_marks_without_a_pair_are_refused(template):
    with pytest.raises(DataError, match="chat template") as caught:
        _renderer(_tokenizer(template))
    assert caught.value.hint


def test_marks_in_what_is_never_rendered_are_refused():
    plain = MARKINGS["content"].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(DataError, match="mark no answer"):
        _renderer(_tokenizer(plain + "{% if false %}{% generation %}x{% endgeneration %}{% endif %}"))


def test_the_next_turn_is_never_part_of_an_answer():
    template = (
        "{% for m in messages %}<|im_start|>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}<|im_end|>"
    )
    tokenizer = _tokenizer(template)
    ((sample,),) = _renderer(tokenizer).render([_turns("q", "one", "r", "two")])
    assert tokenizer.decode(sample.ids[sample.counted].tolist()) == "onetwo<|im_end|>"


def test_visible_marks_change_no_text_and_pair_up():
    assert with_visible_marks("a {%- generation -%} b {%+ endgeneration %}") == (
        "a {%- if true %}{{ '\ufdd0' }}{% endif -%} b {%+ if true %}{{ '\ufdd1' }}{% endif %}"
    )
    assert marked_spans("a\ufdd0b\ufdd1</s>", "ab</s>", "</s>") == [(1, 6)]
    assert marked_spans("a\ufdd0b</s>\ufdd1</s>", "ab</s></s>", "</s>") == [(1, 6)]
    for odd in ("a\ufdd0b", "a\ufdd1b", "\ufdd0a\ufdd0b\ufdd1\ufdd1", "\ufdd0c\ufdd1"):
        assert marked_spans(odd, "ab", None) is None


def test_a_token_belongs_to_the_span_that_it_begins_in():
    text = "ab  cd"
    offsets = [(0, 1), (1, 2), (3, 3), (4, 6)]  # one of two blanks is trimmed away with its token's offsets
    tokens = ["a", "b", "\u0120", "\u0120cd"]
    assert token_spans(tokens, offsets, text, [(0, 2), (2, 6)]) == [(0, 2), (2, 4)]
    assert token_spans(tokens, offsets, text, [(3, 6), (5, 6)]) == [(3, 4)]
    assert token_spans([], [], "", [(0, 1)]) == []
    # of a blank that no token holds
    assert token_spans(["ab", "cd"], [(0, 2), (4, 6)], text, [(4, 6)]) == [(1, 2)]
    assert token_spans(["ab", "\u2581cd"], [(0, 2), (4, 6)], text, [(4, 6)]) == []


CHATML = "{% for m in messages %}" + TURN + "{{ m['content'] }}<|im_end|>\n" + REST
REFUSING = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML


@pytest.mark.parametrize("mask", ["all", "completion"])
@pytest.mark.parametrize("as_list", [False, True])
def test_the_default_of_several_templates_is_used_and_none_is_refused(mask, as_list):
    def named(**templates):
        if as_list:
            return [{"name": name, "template": template} for name, template in templates.items()]
        return templates

    tokenizer = _tokenizer(named(default=MARKINGS["content"], rag="{{ broken"))
    ((sample,),) = _renderer(tokenizer, mask=mask).render([_turns("q", "😀")])
    assert tokenizer.decode(sample.ids[sample.counted].tolist()).endswith(
        "😀<|im_end|>" + "\n" * (mask == "all")
    )
    with pytest.raises(DataError, match="named rag, tool_use, but none named") as caught:
        _renderer(_tokenizer(named(rag=CHATML, tool_use=CHATML)), mask=mask)
    assert "tokenizer_config.json" in caught.value.hint


def test_a_template_that_needs_a_system_message_serves_the_rows_that_have_one():
    renderer = _renderer(_tokenizer(REFUSING))
    row = _turns("q", "a")
    system = {"messages": [{"role": "system", "content": "s"}, *row["messages"]]}
    rendered = renderer.render([row, system])
    assert [len(pieces) for pieces in rendered] == [0, 1]
    assert renderer.dropped == {"the chat template refuses it: system first": 1}


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('never') }}",
        "{{ messages[0]['content'] + 1 }}",
        "{{ messages[99]['content'] }}",
        "{{ 1 // 0 }}",
        "{{ none.x.y }}",
        "{{ 'x' * 10 ** 15 }}",
        "{{ unclosed",
        "{% for m in messages %}",
    ],
)
@pytest.mark.parametrize("mask", ["all", "completion"])
def test_a_template_that_fails_names_itself(template, mask):
    def render_rows():
        renderer = _renderer(_tokenizer(template), mask=mask)
        for _ in range(200):
            renderer.render([_turns("q", "a")] * 64)

    with pytest.raises(DataError, match="chat template") as caught:
        render_rows()
    assert caught.value.hint


def test_reasons_that_quote_their_rows_stay_few():
    template = "{{ raise_exception('bad ' + messages[0]['content']) }}"
    renderer = _renderer(_tokenizer(template), mask="all")
    renderer.render([_turns(f"q{index}", "a") for index in range(100)])
    assert len(renderer.dropped) == 21
    assert sum(renderer.dropped.values()) == 100


HALF = "cut \ud83d here"


@pytest.mark.parametrize("mask", ["all", "completion"])
@pytest.mark.parametrize(
    "row",
    [
        _turns(HALF, "a"),
        _turns("q", HALF),
        {"messages": [{"role": "system", "content": HALF}, *_turns("q", "a")["messages"]]},
        {
            "messages": [
                *_turns("q")["messages"],
                {"role": "assistant", "content": "a", "reasoning_content": HALF},
            ]
        },
    ],
)
def test_half_a_character_leaves_its_conversation_out(mask, row):
    renderer = _renderer(_tokenizer(CHATML), mask=mask)
    assert renderer.render([row, _turns("q", "a")])[0] == []
    assert renderer.dropped == {"half of a surrogate pair or a broken byte in its text": 1}


def test_half_a_character_that_the_template_writes_leaves_the_row_out():
    template = CHATML.replace("<|im_end|>", "{{ '\ud83d' if m['content'] == 'odd' else '' }}<|im_end|>")
    renderer = _renderer(_tokenizer(template), mask="all")
    assert [len(each) for each in renderer.render([_turns("odd", "a"), _turns("q", "a")])] == [0, 1]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": 3}, "a message is not text"),
        ({"role": "assistant", "content": {"a": 1}}, "a message is not text"),
        ({"role": "assistant", "content": None}, "a message is not text"),
        ({"role": "assistant", "content": [[["a"]]]}, "a message is not text"),
        ({"role": "assistant", "content": [{"type": "text", "text": ["a"]}]}, "a message is not text"),
        ({"role": "assistant", "content": ""}, "a message is blank"),
        ({"role": ["assistant"], "content": "a"}, "a role is not text"),
        ({"role": {"a": [[[]]]}, "content": "a"}, "a role is not text"),
        ({"role": "tool", "content": "a"}, "unknown role 'tool'"),
        ({"role": "assistant", "content": "a", "tool_calls": [{"id": 1}]}, "a message calls a tool"),
        ("hello", "a message is not an object"),
        (None, "a message is not an object"),
    ],
)
def test_messages_of_other_kinds_leave_their_conversation_out(message, reason):
    renderer = _renderer(_tokenizer(CHATML))
    row = {"messages": [*_turns("q")["messages"], message]}
    assert renderer.render([row]) == [[]]
    assert renderer.dropped == {reason: 1}


@pytest.mark.parametrize("content", ["", " \n", None, []])
def test_a_blank_system_message_costs_nothing(content):
    tokenizer = _tokenizer(CHATML)
    with_system = {"messages": [{"role": "system", "content": content}, *_turns("q", "a")["messages"]]}
    renderer = _renderer(tokenizer)
    ((blank,),) = renderer.render([with_system])
    ((plain,),) = renderer.render([_turns("q", "a")])
    assert blank.ids.tolist() == plain.ids.tolist()
    assert not renderer.dropped


def _note(tokenizer, rows, format="text"):
    config = SourceConfig(path="rows", format=format)
    return note_first_tokens(
        open_list(rows, config, name="d", seed=0), tokenizer, config, mask="all", name="d"
    )


def _with_bos(template=None):
    tokenizer = _tokenizer(template)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def test_a_first_token_that_is_missing_or_doubled_is_said():
    text = [{"text": f"a river {index}"} for index in range(5)]
    chat = [_turns("q", f"a {index}") for index in range(5)]
    assert _note(_with_bos(), text) is None
    assert _note(_tokenizer(None), text) is None
    assert _note(_tokenizer(CHATML), text) is None
    assert "5 of 5 samples looked at begin with <s> twice" in _note(
        _with_bos(), [{"text": "<s>" + row["text"]} for row in text]
    )
    assert _note(_with_bos("{{ bos_token }}" + CHATML), chat, "messages") is None
    missing = _note(_with_bos(CHATML), chat, "messages")
    assert (
        "5 of 5 samples looked at do not begin with <s>, which the teacher's tokenizer puts first" in missing
    )
    assert "the teacher's chat template" in _note(_tokenizer("{{ bos_token }}" + CHATML), text)
    # a token that begins every turn begins no document
    assert _note(_tokenizer(CHATML, bos_token="<|im_start|>"), text) is None


def test_looking_at_first_tokens_moves_no_source_on():
    config = SourceConfig(path="rows")
    rows = [{"text": f"a river {index}"} for index in range(50)]
    source = open_list(rows, config, name="d", seed=0)
    before = source.state_dict()
    note_first_tokens(source, _with_bos(), config, mask="all", name="d")
    assert source.state_dict() == before
