"""`gendistill data`: counted and ignored tokens told apart, with and without colour."""

import io
import json
import re

import pytest
from rich.console import Console

from gendistill.data.stream import build_stream
from gendistill.runs import preview
from gendistill.runs.preview import preview_stream, split_rows
from gendistill.text import printable


@pytest.fixture
def shown(chat_rows, make_recipe, make_tokenizer, monkeypatch):
    """Preview the chat rows; return the text and the stream that it came from."""
    monkeypatch.setattr(preview, "_TIMED_SECONDS", 0.0)
    recipe = make_recipe(
        {"chat": {"path": str(chat_rows), "format": "messages"}}, mask="completion", seq_len=160
    )
    tokenizer = make_tokenizer()

    def show(plain: bool | None, *, color: bool = False, num_rows: int = 2) -> str:
        out = io.StringIO()
        console = Console(
            file=out, force_terminal=color, color_system="truecolor" if color else None, width=200
        )
        stream = build_stream(recipe, "distill", tokenizer)
        console.print(preview_stream(stream, tokenizer, title="distill", num_rows=num_rows, plain=plain))
        return out.getvalue()

    return show, lambda: next(build_stream(recipe, "distill", tokenizer)), tokenizer


def test_plain_markers_hold_exactly_the_counted_tokens(shown):
    show, first_step, tokenizer = shown
    text = show(True, num_rows=2)
    rows = [row for batch in first_step() for row in split_rows(batch)][:2]
    marked = re.findall(r"\{\+(.*?)\+\}", text.split("context only\n", 1)[1], re.DOTALL)
    counted = sum(int(segment.counted.sum()) for row in rows for segment in row)
    assert sum(len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in marked) == counted
    assert len(re.findall(r"--- row \d, document", text)) == sum(len(row) for row in rows)
    assert all(part.endswith("<|im_end|>") for part in marked[:1])


def test_colour_marks_counted_tokens_without_changing_the_text(shown):
    show, _, _ = shown
    coloured = show(False, color=True)
    assert "\x1b[1;32m" in coloured
    assert "{+" not in coloured
    body = re.sub(r"\x1b\[[0-9;]*m", "", coloured).split("context only\n", 1)[1]
    plain = show(True).split("context only\n", 1)[1]
    assert body == plain.replace("{+", "").replace("+}", "")


def test_statistics_are_shown(shown):
    show, first_step, _ = shown
    batches = first_step()
    labels = sum(batch.num_labels for batch in batches) / sum(batch.num_tokens for batch in batches)
    text = show(True)
    assert f"{labels:.1%} of the tokens enter the loss" in text
    assert "of the positions hold a token" in text
    assert "tokens per second" in text
    assert re.search(r"data\.chat +\d+ rows read; left out: .*\d+ does not start with a user turn", text)


def test_no_color_and_pipes_get_markers(shown, monkeypatch):
    show, _, _ = shown
    assert "{+counted+}" in show(None)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "{+counted+}" not in show(None)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "{+counted+}" in show(None)


@pytest.mark.parametrize(
    "odd", ["\x1b[31m", "\x1b]0;title\x07", "\x7f", "\x9b1m", "[/]", "[red]x[/red]", "\u202e", "\0"]
)
def test_rows_neither_steer_the_terminal_nor_are_markup(
    make_recipe, make_tokenizer, tmp_path, monkeypatch, odd
):
    monkeypatch.setattr(preview, "_TIMED_SECONDS", 0.0)
    turns = [{"role": "user", "content": f"Say {odd}"}, {"role": "assistant", "content": f"a{odd}b"}]
    bad = [{"role": odd, "content": odd}, *turns]
    rows = [{"messages": bad if number % 3 == 2 else turns} for number in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe = make_recipe({"chat": {"path": str(path), "format": "messages"}}, mask="completion", seq_len=160)
    out, tokenizer = io.StringIO(), make_tokenizer()
    stream = build_stream(recipe, "distill", tokenizer)
    # the command prints so; a table of rich interprets what it is given as text
    Console(file=out, highlight=False, width=200).print(preview_stream(stream, tokenizer, title="distill"))
    lines = out.getvalue().split("\n")
    assert [printable(line, longest=10_000) for line in lines] == lines
    assert f"a{printable(odd)}b" in out.getvalue()
