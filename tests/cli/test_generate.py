"""``gendistill generate``: texts, chats and files of prompts; what is refused; what an interruption leaves."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import gendistill as gd
from gendistill.cli import talk
from gendistill.generation import engine
from gendistill.runs import answer_lines, answering, scoring
from gendistill.runs.answer_file import AnswerFile
from gendistill.testing import save_tiny_checkpoint

PROMPTS = ["one", "the second", "3", "and a fourth one"]
FIELDS = {"answer", "tokens", "ended", "error", "fingerprint"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "chatty", max_position_embeddings=256)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A model without chat template and end token."""
    made = save_tiny_checkpoint(tmp_path_factory.mktemp("model") / "plain")
    (made / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((made / "tokenizer_config.json").read_text())
    for name in ("chat_template", "eos_token"):
        settings.pop(name, None)
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("config.json", "generation_config.json"):
        content = json.loads((made / name).read_text())
        content["eos_token_id"] = None
        (made / name).write_text(json.dumps(content))
    return made


def by_transformers(folder: Path, asked: str, *, new: int, raw: bool = False) -> str:
    """Answer a prompt with ``model.generate``."""
    model = gd.load(folder)
    turns = [{"role": "user", "content": asked}]
    ids = (
        model.tokenizer(asked, return_tensors="pt")["input_ids"]
        if raw
        else model.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
    )
    out = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    text = model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text if raw else text.strip()


# ----- texts -----


def test_a_text_is_answered_as_transformers_does(cli, workspace, folder):
    code, out, err = cli("generate", str(folder), "Hello", "--max-new-tokens", "30")
    assert code == 0, err
    assert out == by_transformers(folder, "Hello", new=30) + "\n"
    assert "tokens/s" in err


def test_raw_text_is_completed_as_it_is(cli, workspace, folder):
    code, out, err = cli("generate", "--raw", str(folder), "Hello", "--max-new-tokens", "30")
    assert code == 0, err
    right = by_transformers(folder, "Hello", new=30, raw=True)
    assert out == right + "\n"
    assert right != by_transformers(folder, "Hello", new=30)


def test_raw_answers_keep_the_white_space_around_them(folder, monkeypatch):
    model = gd.load(folder)
    tokens = tuple(model.tokenizer("\n  x; \n", add_special_tokens=False)["input_ids"])
    monkeypatch.setattr(
        engine.Engine, "generate", lambda *_, **__: iter([(0, engine.Answer(tokens, "x", True))])
    )
    for raw, stop, text in [(True, (), "\n  x; \n"), (True, (";",), "\n  x"), (False, (), "x")]:
        with answering.Answerer(model.model, model.tokenizer, answering.Manner(raw=raw)) as answerer:
            ((_, answer),) = answerer.answers([answerer.prompt("a", stop=stop)])
        assert answer.text == text


def test_several_texts_are_answered_in_their_order(cli, workspace, folder):
    words = ["--max-new-tokens", "20", "--max-rows", "2"]
    code, out, err = cli("generate", str(folder), PROMPTS[0], *words, *PROMPTS[1:3], "--", PROMPTS[3])
    assert code == 0, err
    assert out == "".join(by_transformers(folder, text, new=20) + "\n" for text in PROMPTS)
    titles = [line for line in err.splitlines() if line.startswith("> ")]
    assert titles == [f"> {text}" for text in PROMPTS]
    assert "4 answers" in err


def test_answers_wait_for_those_before_them(capsys):
    """Whatever comes first, the first prompt's answer is written first, and as it grows."""

    class Letters:
        def stream(self, prompt):
            return self

        def add(self, token):
            return chr(token)

        def rest(self):
            return "."

    prompt, answer = engine.Prompt([1], 5), engine.Answer(ended=True)
    page = talk._Page(Letters(), [prompt] * 3, titles=["x", "y", "z"])
    written = []
    for step in [(2, "e"), (0, "a"), (2, None), (1, "c"), (0, "b"), (0, None), (1, "d"), (1, None)]:
        number, token = step
        page.end(number, answer) if token is None else page.add(number, ord(token))
        written.append(capsys.readouterr().out)
    assert written == ["", "a", "", "", "b", ".\nc", "d", ".\ne.\n"]


def test_words_that_begin_with_a_dash_follow_two(cli, workspace, folder):
    code, _, err = cli("generate", str(folder), "--max-new-tokens", "1", "--", "-x", "--y", "--")
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith(">")] == ["> -x", "> --y", "> --"]
    code, _, err = cli("generate", str(folder), "x", "--max-new-token", "1")
    assert code == 2
    assert 'did you mean "--max-new-tokens"' in err


def test_standard_input_is_the_prompt_where_there_is_none(cli, workspace, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("line one\nline two\n"))
    code, out, err = cli("generate", str(folder), "--max-new-tokens", "20")
    assert code == 0, err
    assert out == by_transformers(folder, "line one\nline two", new=20) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
    code, _, err = cli("generate", str(folder))
    assert code == 2
    assert "standard input is empty" in err


def test_a_system_turn_comes_first(cli, workspace, folder, monkeypatch):
    seen = []
    ask = answering.Prompter.prompt_ids
    monkeypatch.setattr(
        answering.Prompter, "prompt_ids", lambda self, turns: seen.append(turns) or ask(self, turns)
    )
    assert cli("generate", str(folder), "hi", "--system", "Be kind.", "--max-new-tokens", "2")[0] == 0
    (turns,) = seen
    assert turns == ({"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"})


def test_draws_depend_on_seed_and_place(cli, workspace, folder):
    words = ["--max-new-tokens", "20", "--temperature", "1", "--top-k", "50", "--end-token", "none"]

    def draw(*more):
        code, out, err = cli("generate", str(folder), *more, *words)
        assert code == 0, err
        return out

    assert draw("a") == draw("a")
    assert draw("a") != draw("a", "--seed", "1")
    assert draw("a", "a", "--seed", "4") == draw("a", "--seed", "4") + draw("a", "--seed", "5")


def test_answers_end_as_asked(cli, workspace, folder):
    free = cli("generate", str(folder), "Hello", "--max-new-tokens", "40", "--end-token", "none")
    assert free[0] == 0
    assert "40 tokens" in free[2]
    assert "cut at 40 tokens" in free[2]
    whole = free[1].removesuffix("\n")
    word = whole[5]
    code, out, err = cli("generate", str(folder), "Hello", "--end-token", "none", "--stop", word)
    assert code == 0, err
    assert out == whole[: whole.index(word)].strip() + "\n"
    assert "ended by a stop text" in err
    plain = [each for each in whole if each.isascii() and each.isprintable()]
    code, out, err = cli("generate", str(folder), "Hello", "--end-token", plain[0])
    assert code == 0, err
    assert out == whole[: whole.index(plain[0])].strip() + "\n"
    assert "ended by the model" in err


def test_without_a_chat_template_texts_are_completed(cli, workspace, plain):
    code, out, err = cli("generate", str(plain), "Hello", "--end-token", "none", "--max-new-tokens", "9")
    assert code == 0, err
    assert out == by_transformers(plain, "Hello", new=9, raw=True) + "\n"
    assert "no chat template" in err


def test_what_would_steer_a_terminal_is_escaped_on_one(capsys, monkeypatch):
    def written():
        page = talk._Page.__new__(talk._Page)
        page.text = ""
        page._write("a\x1b[31m\tb\n\u202e")
        return capsys.readouterr().out

    assert written() == "a\x1b[31m\tb\n\u202e"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert written() == "a\\x1b[31m\tb\n\\u202e"


def test_a_run_folder_means_its_student(cli, workspace, folder):
    run = workspace / "runs" / "mine"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("schema: 1\n")
    code, _, err = cli("generate", str(run), "Hello")
    assert code == 1
    assert "has no finished student" in err
    assert f"gendistill run {run}" in err
    (run / "student").symlink_to(folder)
    code, out, err = cli("generate", str(run), "Hello", "--max-new-tokens", "8")
    assert code == 0, err
    assert out == by_transformers(folder, "Hello", new=8) + "\n"


# ----- what is refused -----


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        ([], "required: MODEL", 2),
        (["", "x"], "is empty", 2),
        (["a\0b", "x"], "NUL", 2),
        (["m", "x", "--prompts", "p.jsonl"], "--out is missing", 2),
        (["m", "--out", "a.jsonl"], "--prompts is missing", 2),
        (["m", "x", "--prompts", "p.jsonl", "--out", "a.jsonl"], "there is another: 'x'", 2),
        (["m", "--prompts", "p.jsonl", "--out", "p.jsonl"], "holds the prompts", 1),
        (["m", "--prompts", "gone.jsonl", "--out", "a.jsonl"], "No such file", 1),
        (["m", "--prompts", "empty.jsonl", "--out", "a.jsonl"], "has no prompt", 1),
        (["m", "--prompts", "torn.jsonl", "--out", "a.jsonl"], "torn.jsonl:2", 1),
        (["m", "--prompts", "", "--out", "a.jsonl"], "--prompts", 2),
        (["m", "x", "--raw", "--system", "s"], "--system is a turn of a chat", 2),
        (["m", "x", "--stop", ""], "stop text must have a character", 2),
        (["m", "x", "--end-token", "none", "--end-token", "a"], "others are given beside it", 2),
        (["m", "x", "--temperature", "warm"], "invalid float", 2),
        (["m", "x", "--temperature", "-1"], "temperature must be", 2),
        (["m", "x", "--temperature", "nan"], "temperature must be", 2),
        (["m", "x", "--top-k", "0"], "not a number above 0", 2),
        (["m", "x", "--top-p", "1.5"], "top_p must be", 2),
        (["m", "x", "--min-p", "-0.1"], "min_p must be", 2),
        (["m", "x", "--seed", "-1"], "not a whole number", 2),
        (["m", "x", "--seed", str(2**62)], "not a whole number", 2),
        (["m", "x", "--max-new-tokens", "0"], "not a number above 0", 2),
        (["m", "x", "--max-rows", "0"], "not a number above 0", 2),
        (["m", "x", "--dtype", "float8"], "invalid choice", 2),
        (["m", "x", "--device", "gpu"], "no device 'gpu'", 2),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_a_model_is_loaded(
    cli, workspace, monkeypatch, words, message, code
):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    for module in (scoring, answer_lines):
        monkeypatch.setattr(module, "load_teacher", load)
    (workspace / "p.jsonl").write_text('{"prompt": "x"}\n')
    (workspace / "empty.jsonl").write_text("\n \n")
    (workspace / "torn.jsonl").write_text('{"prompt": "x"}\n{"prompt": \n')
    found, _, err = cli("generate", *words)
    assert found == code, err
    assert message in err
    assert "next:" in err
    assert "internal error" not in err
    assert not (workspace / "a.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["x" * 300], "the model has 256 positions", 1),
        (["hi", "--max-new-tokens", "250"], "its answer up to 250; the model has 256 positions", 1),
        (["hi", "--end-token", "nothing"], "is not a token of the model's tokenizer, which makes 7", 2),
        (["h\udc80i"], "half of a character", 1),
    ],
    ids=["long", "long answer", "end token", "half"],
)
def test_what_the_model_cannot_answer_says_why(cli, workspace, folder, words, message, code):
    found, out, err = cli("generate", str(folder), *words)
    assert found == code, err
    assert message in err
    assert out == ""


def test_an_answer_without_a_limit_gets_the_positions_that_are_left(cli, workspace, folder):
    code, _, err = cli("generate", str(folder), "x" * 200, "--raw", "--end-token", "none")
    assert code == 0, err
    # with the token that begins a text, if the tokenizer adds one
    assert "cut at 56 tokens" in err or "cut at 55 tokens" in err


def test_a_prompt_that_cannot_be_answered_harms_no_other(cli, workspace, folder):
    code, out, err = cli("generate", str(folder), "one", "x" * 300, "3", "--max-new-tokens", "8")
    assert code == 1
    assert out == "".join(by_transformers(folder, text, new=8) + "\n" for text in ("one", "3"))
    assert "no answer: the prompt has" in err


def test_without_an_end_token_one_has_to_be_named(cli, workspace, plain):
    code, _, err = cli("generate", str(plain), "Hello")
    assert code == 2
    assert "--end-token none" in err
    assert cli("generate", str(plain), "Hello", "--end-token", "e", "--max-new-tokens", "3")[0] == 0
    code, _, err = cli("generate", str(plain), "Hello", "--system", "s", "--end-token", "none")
    assert code == 2
    assert "no chat template" in err


def test_a_family_that_the_engine_does_not_run_is_refused_with_another_way(cli, workspace, folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt2", vocab_size=260, n_embd=32, n_layer=1, n_head=4, eos_token_id=2)
    other = workspace / "other"
    AutoModelForCausalLM.from_config(config).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).write_bytes((folder / name).read_bytes())
    code, out, err = cli("generate", str(other), "Hello")
    assert code == 1
    assert "cannot run this gpt2 model" in err
    assert "model.generate" in err
    assert out == ""


# ----- chats -----


@pytest.fixture
def terminal(cli, monkeypatch):
    """Return a function that chats: lines that are typed, or errors that keys raise."""

    def call(*words: str, typed: list):
        lines = iter(typed)

        def read(prompt):
            line = next(lines, EOFError())
            if isinstance(line, BaseException) or (
                isinstance(line, type) and issubclass(line, BaseException)
            ):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        found = cli("generate", *words)
        assert next(lines, None) is None
        return found

    return call


@pytest.fixture
def asked(monkeypatch):
    """What the model was asked, in order."""
    seen = []
    ask = answering.Answerer.prompt

    def record(self, what, **settings):
        seen.append(what)
        return ask(self, what, **settings)

    monkeypatch.setattr(answering.Answerer, "prompt", record)
    return seen


def contents(turns):
    return [turn["content"] for turn in turns]


def test_a_chat_goes_on_from_what_was_said(terminal, workspace, folder, asked):
    words = [str(folder), "--max-new-tokens", "6", "--end-token", "none"]
    code, _, err = terminal(*words, typed=["hi", " ", "and?", "/reset", "new"])
    assert code == 0, err
    first, second, third = asked
    assert contents(first) == ["hi"]
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"]
    assert contents(second)[::2] == ["hi", "and?"]
    assert contents(second)[1] == by_transformers(folder, "hi", new=6)
    assert contents(third) == ["new"]
    assert err.count("cut at 6 tokens") == 3
    assert terminal(*words, typed=["/exit"])[0] == 0


def test_thoughts_are_no_part_of_what_was_said(terminal, workspace, folder, asked, monkeypatch):
    monkeypatch.setattr(talk._Page, "add", lambda self, number, token: None)
    monkeypatch.setattr(
        talk._Page, "end", lambda self, number, answer: self._write("<think>x</think>\n\nyes")
    )
    assert terminal(str(folder), "--max-new-tokens", "1", typed=["hi", "and?"])[0] == 0
    assert contents(asked[1]) == ["hi", "yes", "and?"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(terminal, workspace, folder, asked, monkeypatch):
    count = 0
    add = talk._Page.add

    def press(self, number, token):
        nonlocal count
        add(self, number, token)
        count += 1
        if count == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(talk._Page, "add", press)
    before = signal.getsignal(signal.SIGINT)
    words = [str(folder), "--max-new-tokens", "9", "--end-token", "none"]
    code, _, err = terminal(*words, typed=["hi", KeyboardInterrupt, "again"])
    assert code == 0, err
    assert "4 tokens" in err
    assert "ended by Ctrl-C" in err
    assert "/exit or Ctrl-D leaves" in err
    assert "cut at 9 tokens" in err
    assert contents(asked[1])[::2] == ["hi", "again"]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_answer_that_was_stopped_leaves_nothing_behind(folder, device):
    class Stopped(Exception):
        pass

    model = gd.load(folder, device=device)
    seen = []

    def watch(_, token):
        seen.append(token)
        if len(seen) == 5:
            raise Stopped

    with answering.Answerer(model.model, model.tokenizer, answering.Manner(end_tokens=())) as answerer:
        prompts = [answerer.prompt(text, max_new_tokens=20) for text in PROMPTS]
        right = dict(answerer.answers(prompts))
        with pytest.raises(Stopped):
            list(answerer.answers(prompts, watch=watch))
        again = dict(answerer.answers(prompts))
    assert len(seen) == 5
    assert {number: each.token_ids for number, each in again.items()} == {
        number: each.token_ids for number, each in right.items()
    }


def test_ctrl_c_twice_ends_the_program(terminal, workspace, folder, monkeypatch):
    def press(self, number, token):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(talk._Page, "add", press)
    code, _, err = terminal(str(folder), typed=["hi"])
    assert code == 130
    assert "interrupted" in err
    assert "resumes" not in err


def test_a_turn_that_cannot_be_answered_is_not_remembered(terminal, workspace, folder, asked):
    words = [str(folder), "--max-new-tokens", "5"]
    code, _, err = terminal(*words, typed=["x" * 300, "hi", "h\udc80i", "then"])
    assert code == 0, err
    assert "256 positions" in err
    assert "half of a character" in err
    assert contents(asked[1]) == ["hi"]
    assert contents(asked[3])[::2] == ["hi", "then"]


def test_without_a_template_every_line_is_a_text_of_its_own(terminal, workspace, plain, asked):
    words = [str(plain), "--max-new-tokens", "5", "--end-token", "none"]
    code, _, err = terminal(*words, typed=["one", "two "])
    assert code == 0, err
    assert asked == ["one", "two "]
    assert "no chat template" in err


def test_a_chat_on_a_real_terminal(workspace, folder):
    words = ["generate", str(folder), "--max-new-tokens", "200", "--end-token", "none"]
    child, screen = pty.fork()
    if child == 0:  # pragma: no cover
        os.execv(sys.executable, [sys.executable, "-m", "gendistill", *words])

    def until(text: str) -> str:
        shown, limit = b"", time.monotonic() + 60
        while text.encode() not in shown:
            assert time.monotonic() < limit, shown
            if select.select([screen], [], [], 0.2)[0]:
                shown += os.read(screen, 4096)
        return shown.decode(errors="replace")

    try:
        until("\n> ")
        os.write(screen, b"hello\n")
        until("hello\r\n")
        time.sleep(0.1)
        os.write(screen, b"\x03")
        assert "ended by Ctrl-C" in until("\n> ")
        os.write(screen, b"\x04")
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(screen)


# ----- files -----


@pytest.fixture
def rows():
    return [
        {"prompt": "one", "id": "a", "gold": 7},
        {"prompt": "the second", "max_new_tokens": 3},
        {"messages": [{"role": "user", "content": "3"}], "stop": "e"},
        {"prompt": "x" * 300, "id": None},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
        {"prompt": "one", "seed": 9, "stop": ["q", "r"]},
    ]


@pytest.fixture
def ask(cli, workspace, folder):
    """Return a function that answers rows into a file, and gives exit code, rows of it and error output."""

    def call(rows: list, *words: str, out: str = "answers.jsonl", model: Path = folder):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (workspace / "prompts.jsonl").write_text(text)
        command = ["generate", str(model), "--prompts", "prompts.jsonl", "--out", out]
        code, said, err = cli(*command, "--max-new-tokens", "12", *words)
        return code, lines_of(workspace / out), said + err

    return call


def lines_of(path: Path) -> list:
    """Read JSON lines; none where the file holds something else."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []


def test_a_file_of_prompts_is_answered_in_its_order(ask, workspace, folder, rows):
    code, found, said = ask(rows, "--max-rows", "2")
    assert code == 1
    assert [{name: row[name] for name in row.keys() - FIELDS} for row in found] == rows
    assert found[0]["answer"] == by_transformers(folder, "one", new=12)
    assert found[1]["answer"] == by_transformers(folder, "the second", new=3)
    assert found[1]["tokens"] == 3
    assert not found[1]["ended"]
    assert [row["error"] is None for row in found] == [True, True, True, False, False, True]
    assert "positions" in found[3]["error"]
    assert "nothing to answer" in found[4]["error"]
    assert found[3]["answer"] is None
    assert "2 prompts have no answer" in said
    assert "line 4: the prompt has" in said
    assert "4 answers" in said


def test_a_text_file_is_a_prompt_a_line(cli, workspace, folder):
    (workspace / "prompts.txt").write_text("one\r\n\n  the second\n")
    code, said, err = cli(
        *["generate", str(folder), "--prompts", "prompts.txt", "--out", "deep/er/answers.jsonl"],
        *["--max-new-tokens", "5"],
    )
    assert code == 0, err
    assert said.startswith("ok ")
    found = [json.loads(line) for line in (workspace / "deep/er/answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in found] == ["one", "  the second"]
    assert found[0]["answer"] == by_transformers(folder, "one", new=5)


def interrupt(monkeypatch, after: int) -> list[str]:
    """Have Ctrl-C come after so many answers; returns the fingerprints of all that are written."""
    written = []
    add = AnswerFile.add

    def write(self, prompt, record):
        if len(written) == after:
            raise KeyboardInterrupt
        add(self, prompt, record)
        written.append(prompt)

    monkeypatch.setattr(AnswerFile, "add", write)
    return written


@pytest.mark.parametrize("words", [[], ["--temperature", "1", "--seed", "3"]], ids=["greedy", "drawn"])
def test_what_is_answered_is_not_answered_again(ask, workspace, monkeypatch, rows, words):
    right = [*rows[:3], *rows[5:], *({"prompt": f"more {number}"} for number in range(6))]
    assert ask(right, *words, out="whole.jsonl")[0] == 0
    with monkeypatch.context() as patched:
        first = interrupt(patched, 4)
        code, found, said = ask(right, *words)
        assert code == 130
        assert "the same command resumes it" in said
        assert len(found) == 4
    # the last line was not written to its end
    path = workspace / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    second = interrupt(monkeypatch, 99)
    code, _, said = ask(right, *words)
    assert code == 0
    assert "3 of them from before" in said
    assert len(second) == 7
    assert set(first[:3]).isdisjoint(second)
    assert path.read_bytes() == (workspace / "whole.jsonl").read_bytes()
    # and when all are there, no model is loaded
    monkeypatch.setattr(answer_lines, "load_teacher", None)
    code, _, said = ask(right, *words)
    assert code == 0
    assert "10 of them from before" in said
    assert path.read_bytes() == (workspace / "whole.jsonl").read_bytes()


def test_a_killed_command_goes_on(ask, workspace, folder):
    rows = [{"prompt": f"number {number}"} for number in range(40)]
    words = ["--end-token", "none", "--max-rows", "2"]
    (workspace / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "gendistill", "generate", str(folder), "--prompts", "prompts.jsonl"]
    path = workspace / "answers.jsonl"
    with subprocess.Popen([*command, "--out", path.name, "--max-new-tokens", "12", *words]) as process:
        limit = time.monotonic() + 60
        while not path.is_file() or path.read_bytes().count(b"\n") < 3:
            assert time.monotonic() < limit
            assert process.poll() is None
        process.kill()
    before = path.read_bytes().count(b"\n")
    code, found, said = ask(rows, *words)
    assert code == 0
    assert f"{before:,} of them from before" in said
    assert ask(rows, *words, out="whole.jsonl")[1] == found


def test_prompts_may_be_added_and_errors_are_tried_again(ask, rows, monkeypatch):
    assert ask(rows)[0] == 1
    written = interrupt(monkeypatch, 99)
    code, found, said = ask([{"prompt": "new"}, *rows])
    assert code == 1
    assert len(written) == 3  # the new one, and the two that have no answer
    assert [row.get("prompt", "-") for row in found] == ["new", *(row.get("prompt", "-") for row in rows)]
    assert "4 of them from before" in said


def test_other_fields_do_not_decide_answers(ask, monkeypatch):
    _, before, _ = ask([{"prompt": "one", "id": 1}, {"prompt": "two"}])
    written = interrupt(monkeypatch, 99)
    code, after, _ = ask([{"prompt": "two", "note": "x"}, {"id": 2, "prompt": "one"}])
    assert code == 0
    assert written == []
    assert [row["answer"] for row in after] == [row["answer"] for row in before[::-1]]
    assert [row.get("id") for row in after] == [None, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--temperature", "1"], "answers.jsonl:1"),
        (["--raw"], "with other settings"),
        (["--system", "s"], "with other settings"),
        (["--end-token", "none"], "with other settings"),
        (["--dtype", "bfloat16"], "with other settings"),
        (["--max-new-tokens", "13"], "not among those asked now"),
        (["--stop", "zzz"], "not among those asked now"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_answers_with_other_settings_are_never_mixed(ask, workspace, words, message):
    rows = [{"prompt": "one"}, {"prompt": "two"}]
    assert ask(rows)[0] == 0
    before = (workspace / "answers.jsonl").read_bytes()
    code, _, said = ask(rows, *words)
    assert code == 1
    assert message in said
    assert "nothing was changed" in said
    assert (workspace / "answers.jsonl").read_bytes() == before


def test_answers_of_another_model_are_never_mixed(ask, workspace):
    rows = [{"prompt": "one"}]
    assert ask(rows)[0] == 0
    before = (workspace / "answers.jsonl").read_bytes()
    code, _, said = ask(rows, model=save_tiny_checkpoint(workspace / "other", "llama"))
    assert code == 1
    assert "by another model" in said
    assert (workspace / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["my notes", "my notes\n", '{"prompt": "one"}\n', "[1]\n", '{\n  "a": 1\n}\n', '{"a": 1}', "\x00"],
    ids=repr,
)
def test_a_file_of_something_else_is_left_alone(ask, workspace, content):
    (workspace / "answers.jsonl").write_text(content)
    code, _, said = ask([{"prompt": "one"}])
    assert code == 1
    assert "next: give another file with --out" in said
    assert (workspace / "answers.jsonl").read_text() == content


def test_a_torn_line_behind_other_answers_changes_nothing(ask, workspace):
    assert ask([{"prompt": "one"}])[0] == 0
    path = workspace / "answers.jsonl"
    content = path.read_bytes() + b'{"prompt": "tw'
    path.write_bytes(content)
    code, _, said = ask([{"prompt": "two"}])
    assert code == 1
    assert "nothing was changed" in said
    assert path.read_bytes() == content


def test_one_process_writes_a_file(ask, workspace):
    assert ask([{"prompt": "one"}])[0] == 0
    with (workspace / "answers.jsonl").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, _, said = ask([{"prompt": "one"}, {"prompt": "two"}])
    assert code == 1
    assert "another process writes" in said
    assert ask([{"prompt": "one"}, {"prompt": "two"}])[0] == 0


def test_a_place_where_nothing_can_be_written_is_refused(ask, workspace, monkeypatch):
    monkeypatch.setattr(answer_lines, "load_teacher", None)
    for out in (".", "prompts.jsonl/a.jsonl", "/dev/null"):
        code, _, said = ask([{"prompt": "one"}], out=out)
        assert code == 1
        assert "--out" in said


def test_a_model_that_cannot_be_loaded_leaves_no_file(ask, workspace, monkeypatch):
    def load(*_):
        raise MemoryError("no more")

    monkeypatch.setattr(answer_lines, "load_teacher", load)
    assert ask([{"prompt": "one"}])[0] == 1
    assert not (workspace / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "dictionary"),
        ("{}", 'either "prompt" or "messages"'),
        ('{"question": "x"}', "its fields: question"),
        ('{"prompt": "x", "messages": [{"role": "user", "content": "x"}]}', "either"),
        ('{"prompt": 3}', "prompt"),
        ('{"messages": []}', "messages"),
        ('{"messages": [{"role": "user"}]}', "content"),
        ('{"prompt": "x", "max_new_tokens": 0}', "max_new_tokens"),
        ('{"prompt": "x", "max_new_tokens": "5"}', "max_new_tokens"),
        ('{"prompt": "x", "seed": -1}', "seed"),
        ('{"prompt": "x", "stop": [""]}', "stop"),
        ('{"prompt": "x", "stop": ""}', "stop"),
        ('{"prompt": "x", "answer": "42"}', 'a field "answer"'),
        ('{"prompt": "x", "score": NaN}', "not a finite number"),
        ("\udc80", "not JSON"),
    ],
    ids=ascii,
)
def test_a_line_that_is_not_a_prompt_is_named(cli, workspace, line, message):
    (workspace / "p.jsonl").write_bytes(
        b'{"prompt": "x"}\n\n' + line.encode(errors="surrogateescape") + b"\n"
    )
    code, _, err = cli("generate", "m", "--prompts", "p.jsonl", "--out", "a.jsonl")
    assert code == 1
    assert "p.jsonl:3" in err
    assert message in err
    assert "next:" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '[{"prompt": "x"}]', "not a JSON document"),
        ("p.txt", '{"prompt": "x"}\n', "let the name of a file of JSON lines end in .jsonl"),
        ("p.txt", "a\n\udc80\n", "p.txt:2"),
        ("p.txt", "", "has no prompt"),
    ],
)
def test_a_file_of_another_kind_is_refused(cli, workspace, name, content, message):
    (workspace / name).write_bytes(content.encode(errors="surrogateescape"))
    code, _, err = cli("generate", "m", "--prompts", name, "--out", "a.jsonl")
    assert code == 1
    assert message in err


def test_progress_lives_on_a_terminal(workspace, folder):
    (workspace / "p.txt").write_text("one\ntwo\n")
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    settings = answer_lines.Settings(manner=answering.Manner(), max_new_tokens=5)
    paths = workspace / "p.txt", workspace / "a.jsonl"
    outcome = answer_lines.answer_lines(str(folder), *paths, settings, console=console)
    assert (outcome.answered, outcome.before, outcome.errors) == (2, 0, {})
    assert "2/2" in screen.getvalue()
    assert "tok/s" in screen.getvalue()


def test_a_device_without_enough_memory_is_told_of(cli, workspace, folder, monkeypatch):
    def load(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(scoring, "load_teacher", load)
    code, _, err = cli("generate", str(folder), "hi")
    assert code == 1
    assert "memory error" in err
    assert "smaller model" in err


def test_progress_is_told_now_and_then(ask, monkeypatch):
    monkeypatch.setattr(answer_lines, "_SECONDS", 0.0)
    code, _, said = ask([{"prompt": "one"}, {"prompt": "two"}])
    assert code == 0
    lines = [line for line in said.splitlines() if line.startswith("answers ")]
    assert [line.split()[1] for line in lines] == ["1/2", "2/2"]
    assert all("tok/s" in line and "eta" in line for line in lines)
