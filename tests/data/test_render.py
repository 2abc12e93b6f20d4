"""Rendering: which tokens count, for every template, proved against spans written down by hand."""

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from gendistill.config.schema import SourceConfig
from gendistill.data import render
from gendistill.data.chat import RowDropped, read_conversation
from gendistill.data.render import Renderer, TokenizedSample
from gendistill.errors import DataError

BY_HAND = ["chatml", "llama3", "qwen3", "thinking_prompt", "reasoner", "mistral", "marked"]


def _renderer(tokenizer, format="messages", mask="completion", seq_len=100_000, **settings) -> Renderer:
    columns = {"messages": ["messages"], "text": ["text"], "prompt_completion": ["prompt", "completion"]}[
        format
    ]
    config = SourceConfig.model_validate({"path": "rows.jsonl", "format": format, **settings})
    return Renderer(tokenizer, config, columns=columns, mask=mask, seq_len=seq_len, name="chat")


def _one(renderer: Renderer, row: dict) -> TokenizedSample:
    ((sample,),) = renderer.render([row])
    return sample


def _decode(tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def _counted_texts(tokenizer, sample: TokenizedSample) -> list[str]:
    """Decode every run of counted tokens."""
    groups = itertools.groupby(
        zip(sample.ids.tolist(), sample.counted.tolist(), strict=True), key=lambda pair: pair[1]
    )
    return [_decode(tokenizer, [token for token, _ in pairs]) for counted, pairs in groups if counted]


def _expected(template: str, messages: list[dict]) -> tuple[str, list[str]]:
    """Write the rendered conversation and its answers out by hand."""
    text, answers = "", []
    if template in ("llama3", "mistral", "reasoner"):
        text = "<|bos|>"
    if template == "chatml" and messages[0]["role"] != "system":
        text = "<|im_start|>system\nBe kind.<|im_end|>\n"
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        before, body, after = {
            "chatml": (f"<|im_start|>{role}\n", content + "<|im_end|>", "\n"),
            "marked": (f"<|im_start|>{role}\n", content + "<|im_end|>", "\n"),
            "llama3": (f"<|start_header_id|>{role}<|end_header_id|>\n\n", content.strip() + "<|eot_id|>", ""),
            "qwen3": (f"<|im_start|>{role}\n", content + "<|im_end|>", "\n"),
            "thinking_prompt": (f"<|im_start|>{role}\n", content + "<|im_end|>", "\n"),
            "reasoner": ("", content, ""),
            "mistral": ("", f"[INST] {content} [/INST]" if role == "user" else f" {content}</s>", ""),
        }[template]
        if template in ("qwen3", "thinking_prompt") and role == "assistant":
            thought, _, answer = content.rpartition("</think>")
            thought, answer = thought.removeprefix("<think>").strip("\n"), answer.lstrip("\n") + "<|im_end|>"
            if index < len(messages) - 1:
                body = answer
            elif template == "qwen3":
                body = f"<think>\n{thought}\n</think>\n\n{answer}"
            else:
                before, body = before + "<think>\n", f"{thought}\n</think>\n\n{answer}"
        if template == "reasoner" and role == "assistant":
            before, body = "<|im_start|>", content.rpartition("</think>")[2] + "</s>"
        text += before + body + after
        if role == "assistant":
            answers.append(body)
    return text, answers


def _conversation(rng: random.Random, make_text, *, system: bool, thinking: float) -> list[dict]:
    messages = [{"role": "system", "content": make_text(rng)}] if system and rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        messages.append({"role": "user", "content": make_text(rng)})
        answer = make_text(rng)
        if rng.random() < thinking:
            # the thought contains the answer, so that looking for the answer alone would find the wrong place
            answer = f"<think>\n{make_text(rng)} {answer} {make_text(rng)}\n</think>\n\n{answer}"
        messages.append({"role": "assistant", "content": answer})
    return messages


@pytest.mark.parametrize("newline_runs", [False, True])
@pytest.mark.parametrize("template", BY_HAND)
def test_masks_cover_exactly_the_answers_of_random_conversations(
    make_tokenizer, make_text, template, newline_runs
):
    tokenizer = make_tokenizer(template, newline_runs=newline_runs)
    renderer = _renderer(tokenizer)
    rng = random.Random(11)
    # an empty thought would merge its line breaks with the prompt's: that has its own test
    thinking = {"qwen3": 0.5, "thinking_prompt": 1.0, "reasoner": 0.5}.get(template, 0.0)
    rows = [
        {"messages": _conversation(rng, make_text, system=template != "mistral", thinking=thinking)}
        for _ in range(200)
    ]
    for row, samples in zip(rows, renderer.render(rows), strict=True):
        (sample,) = samples
        text, answers = _expected(template, row["messages"])
        assert _decode(tokenizer, sample.ids) == text
        assert _counted_texts(tokenizer, sample) == answers
    assert not renderer.dropped


# the reasoner's prompt opens a thought that its rendered answers never have
@pytest.mark.parametrize("template", [template for template in BY_HAND if template != "reasoner"])
def test_prompt_tokens_are_those_of_generation(make_tokenizer, make_text, template):
    """What precedes the first answer is what a user would tokenize to generate it."""
    tokenizer = make_tokenizer(template, newline_runs=True)
    renderer = _renderer(tokenizer)
    rng = random.Random(12)
    for _ in range(30):
        messages = _conversation(rng, make_text, system=False, thinking=template == "thinking_prompt")[:2]
        sample = _one(renderer, {"messages": messages})
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert sample.ids[: len(ids)].tolist() == ids
        assert int(np.argmax(sample.counted)) == len(ids)


def test_token_that_begins_in_the_prompt_does_not_count(make_tokenizer):
    tokenizer = make_tokenizer("thinking_prompt", newline_runs=True)
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    sample = _one(_renderer(tokenizer), {"messages": messages})
    assert _decode(tokenizer, sample.ids).endswith("<think>\n\n</think>\n\n4<|im_end|>\n")
    assert _counted_texts(tokenizer, sample) == ["</think>\n\n4<|im_end|>"]


def test_reasoning_in_its_own_field_is_an_answer_too(make_tokenizer):
    tokenizer = make_tokenizer("qwen3")
    answer = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2 is 4, so 4"}
    sample = _one(_renderer(tokenizer), {"messages": [{"role": "user", "content": "2+2?"}, answer]})
    assert _counted_texts(tokenizer, sample) == ["<think>\n2 and 2 is 4, so 4\n</think>\n\n4<|im_end|>"]


def test_surrounding_white_space_stays_with_the_answer_or_is_trimmed_by_the_template(make_tokenizer):
    messages = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "   indented\n  "}]
    for template, expected in (("chatml", "   indented\n  <|im_end|>"), ("llama3", "indented<|eot_id|>")):
        tokenizer = make_tokenizer(template)
        assert _counted_texts(tokenizer, _one(_renderer(tokenizer), {"messages": messages})) == [expected]


def test_bos_is_not_doubled(make_tokenizer):
    tokenizer = make_tokenizer("llama3", adds="bos")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    for mask in ("all", "completion"):
        sample = _one(_renderer(tokenizer, mask=mask), {"messages": messages})
        assert sample.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_mask_all_counts_every_token(make_tokenizer, make_text):
    rng = random.Random(1)
    for template in ("chatml", "no_end", "shouting"):
        renderer = _renderer(make_tokenizer(template), mask="all")
        row = {"messages": _conversation(rng, make_text, system=False, thinking=0.0)}
        assert _one(renderer, row).counted.all()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("no_end", "ends no answer with a special token"),
        ("shouting", "answers cannot be found"),
    ],
)
def test_template_without_spans_is_an_error_that_shows_the_sample(make_tokenizer, template, message):
    with pytest.raises(DataError, match=message) as caught:
        _renderer(make_tokenizer(template))
    assert caught.value.where == "data.chat"
    if template:
        assert "Which colour is the sky?" in caught.value.message
        assert "mask: all" in caught.value.hint


def test_conversation_refused_by_the_template_is_dropped_and_counted(make_tokenizer):
    renderer = _renderer(make_tokenizer("mistral"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rendered = renderer.render(
        [{"messages": [{"role": "system", "content": "x"}, *turns]}, {"messages": turns}]
    )
    assert [len(samples) for samples in rendered] == [0, 1]
    assert dict(renderer.dropped) == {"the chat template refuses it: only user and assistant": 1}


def _talk(*roles: str) -> list[dict]:
    return [{"from": role, "value": f"v{index}"} for index, role in enumerate(roles)]


@pytest.mark.parametrize(
    ("conversation", "roles"),
    [
        (_talk("human", "gpt"), "ua"),
        (_talk("system", "human", "gpt", "human", "gpt"), "suaua"),
        (_talk("user", "chatgpt", "human"), "ua"),
        (
            [
                {"role": "user", "content": [{"type": "text", "text": "v0"}]},
                {"role": "assistant", "content": "v1"},
            ],
            "ua",
        ),
    ],
)
def test_conversation_shapes_are_normalised(conversation, roles):
    messages = read_conversation(conversation)
    assert "".join(message["role"][0] for message in messages) == roles
    assert [message["content"] for message in messages] == [f"v{index}" for index in range(len(roles))]


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        ([], "empty or no list"),
        ("hello", "empty or no list"),
        (["hello"], "a message is not an object"),
        (_talk("gpt", "human", "gpt"), "does not start with a user turn"),
        (_talk("human"), "no assistant turn"),
        (_talk("system"), "no assistant turn"),
        (_talk("human", "human", "gpt"), "do not alternate"),
        (_talk("human", "gpt", "gpt"), "do not alternate"),
        (_talk("human", "gpt", "system", "gpt"), "do not alternate"),
        (_talk("human", "bing"), "unknown role 'bing'"),
        ([{"content": "x"}], "unknown role None"),
        ([{"from": "human", "value": " \n"}, {"from": "gpt", "value": "x"}], "a message is blank"),
        ([{"from": "human", "value": None}, {"from": "gpt", "value": "x"}], "a message is not text"),
    ],
)
def test_unusable_conversation_has_a_reason(conversation, reason):
    with pytest.raises(RowDropped, match=reason):
        read_conversation(conversation)


@pytest.mark.parametrize("adds", ["", "bos", "eos"])
def test_text_ends_with_one_eos_and_begins_as_the_tokenizer_does(make_tokenizer, make_text, adds):
    tokenizer = make_tokenizer(adds=adds)
    renderer = _renderer(tokenizer, format="text", mask="all")
    texts = [make_text(random.Random(seed)) for seed in range(20)]
    for text, (sample,) in zip(texts, renderer.render([{"text": text} for text in texts]), strict=True):
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        start = [tokenizer.bos_token_id] if adds == "bos" else []
        assert sample.ids.tolist() == [*start, *plain, tokenizer.eos_token_id]
        assert sample.counted.all()


@pytest.mark.parametrize("adds", ["", "bos", "eos"])
@pytest.mark.parametrize("mask", ["all", "completion"])
def test_prompt_keeps_its_own_tokens_and_the_completion_ends(make_tokenizer, make_text, adds, mask):
    tokenizer = make_tokenizer(adds=adds)
    renderer = _renderer(tokenizer, format="prompt_completion", mask=mask)
    rng = random.Random(4)
    for joint in ("", " ", "\n", "ri"):
        prompt, completion = make_text(rng) + joint, make_text(rng)
        sample = _one(renderer, {"prompt": prompt, "completion": completion})
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        prompt_ids = ([tokenizer.bos_token_id] if adds == "bos" else []) + prompt_ids
        assert sample.ids[: len(prompt_ids)].tolist() == prompt_ids
        assert _decode(tokenizer, sample.ids[len(prompt_ids) :]) == completion + "<|im_end|>"
        expected = np.arange(len(sample)) >= (0 if mask == "all" else len(prompt_ids))
        assert (sample.counted == expected).all()


def test_counted_does_not_depend_on_the_pad_token(make_tokenizer):
    messages = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    plain, padded = make_tokenizer(), make_tokenizer(pad_token="<|im_end|>")
    assert padded.pad_token_id == padded.eos_token_id
    assert plain.pad_token is None
    samples = [_one(_renderer(tokenizer), messages) for tokenizer in (plain, padded)]
    assert samples[0].counted.tolist() == samples[1].counted.tolist()
    assert samples[1].counted[samples[1].ids == padded.eos_token_id].tolist() == [False, False, True]


def test_long_text_is_split_into_consecutive_pieces(make_tokenizer, make_text):
    tokenizer = make_tokenizer()
    text = make_text(random.Random(3), 200, 200)
    whole = _one(_renderer(tokenizer, format="text", mask="all"), {"text": text})
    for seq_len in (8, 31, len(whole) - 2, len(whole)):
        (pieces,) = _renderer(tokenizer, format="text", mask="all", seq_len=seq_len).render([{"text": text}])
        assert all(len(piece) == seq_len for piece in pieces[:-1])
        # a last piece of one token would predict nothing and is left out
        joined = np.concatenate([piece.ids for piece in pieces])
        assert len(whole) - len(joined) == (len(whole) % seq_len == 1)
        assert (joined == whole.ids[: len(joined)]).all()


@pytest.mark.parametrize("template", ["qwen3", "llama3"])
@pytest.mark.parametrize("chars_per_token", [1, 6])
def test_long_completion_is_cut_at_its_end_and_dropped_without_answer(
    make_tokenizer, make_text, template, chars_per_token, monkeypatch
):
    """Whether the head that is encoded first was long enough or not, the sample is a prefix of the whole."""
    monkeypatch.setattr(render, "_MANY_CHARS_PER_TOKEN", chars_per_token)
    tokenizer = make_tokenizer(template)
    rng = random.Random(9)
    rows = [{"messages": _conversation(rng, make_text, system=True, thinking=0.5)} for _ in range(60)]
    wholes = [samples[0] for samples in _renderer(tokenizer).render(rows)]
    for seq_len in (16, 40, 90):
        renderer = _renderer(tokenizer, seq_len=seq_len)
        missing = 0
        for whole, samples in zip(wholes, renderer.render(rows), strict=True):
            if not whole.counted[1:seq_len].any():
                assert samples == []
                missing += 1
                continue
            (sample,) = samples
            assert (sample.ids == whole.ids[:seq_len]).all()
            assert (sample.counted == whole.counted[:seq_len]).all()
        assert renderer.dropped["no answer within seq_len"] == missing
        assert missing or seq_len > 16


def test_rows_of_the_wrong_kind_are_counted_and_all_of_them_is_an_error(make_tokenizer):
    renderer = _renderer(make_tokenizer(), format="text", mask="all")
    rows = [{"text": None}, {"other": "x"}, {"text": "  "}, {"text": "fine"}]
    assert [len(samples) for samples in renderer.render(rows)] == [0, 0, 0, 1]
    assert dict(renderer.dropped) == {"a column is not text": 1, 'no column "text"': 1, "blank text": 1}
    with pytest.raises(
        DataError, match=r"none of 10,000 rows of rows\.jsonl can be used: 10,001 x a column is not text"
    ):
        renderer.render([{"text": 3}] * 10_000)


def test_text_has_no_completion(make_tokenizer):
    with pytest.raises(DataError, match="text rows have no completion") as caught:
        _renderer(make_tokenizer(), format="text")
    assert "mask: all" in caught.value.hint


def test_tokenizer_without_end_is_an_error(make_tokenizer):
    with pytest.raises(DataError, match="no end-of-sequence token"):
        _renderer(make_tokenizer(eos=None), format="text", mask="all")


@pytest.mark.parametrize("mask", ["all", "completion"])
@pytest.mark.parametrize("needs_system", [False, True])
def test_a_template_of_one_turn_renders_conversations_of_one_turn(make_tokenizer, mask, needs_system):
    tokenizer = make_tokenizer("chatml")
    longest = 3 if needs_system else 2
    refusal = (
        f"{{% if messages | length > {longest} %}}{{{{ raise_exception('one turn only') }}}}{{% endif %}}"
    )
    if needs_system:
        refusal += (
            "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        )
    tokenizer.chat_template = refusal + tokenizer.chat_template
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    system = [{"role": "system", "content": "c"}] if needs_system else []
    renderer = _renderer(tokenizer, mask=mask)
    one, two = renderer.render([{"messages": [*system, *turn]}, {"messages": [*system, *turn, *turn]}])
    assert len(one) == 1
    assert not two
    assert renderer.dropped == {"the chat template refuses it: one turn only": 1}
