"""``gendistill bench``: check, time and tune our kernels on this machine's GPU, and train with them."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gendistill.bench.cases import (
    CASES,
    DECODE_CASES,
    GATES,
    LOSS_CASES,
    NAMES,
    SMOKE_CASES,
    SMOKE_DECODE,
    TUNE_NAMES,
)
from gendistill.bench.engines import choose_engines
from gendistill.bench.shapes import SHAPES, STAGES, Shape
from gendistill.cli.arguments import Parser, add_recipe, command_line, load
from gendistill.cli.launch import add_num_processes, is_launched, launch
from gendistill.errors import GendistillError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from gendistill.bench.generation import GenerationBench
    from gendistill.bench.peers import FlaCore
    from gendistill.bench.rows import Measurement
    from gendistill.bench.step import Peer
    from gendistill.results.table import ResultRow

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    ops = actions.add_parser("ops", help="Kimi Delta Attention: whole sequences and decode steps")
    ops.add_argument("--cases", metavar="NAME", nargs="+", choices=NAMES, help=f"some of: {', '.join(NAMES)}")
    ops.add_argument("--gate", choices=(*GATES, "both"), default="both", help="decay gate (both)")
    ops.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the inputs (bf16)")
    ops.add_argument(
        "--no-peer", action="store_true", help="leave out fla-core, which tunes itself for minutes"
    )
    ops.add_argument(
        "--peer-tuning",
        metavar="FILE",
        type=Path,
        help="start from what fla-core's kernels chose before, and keep what they choose now",
    )
    ops.add_argument("--cold", action="store_true", help="also time a first call, in processes of its own")
    ops.add_argument("--cold-peer", action="store_true", help="as --cold, the peer's as well")
    ops.add_argument("--breakdown", action="store_true", help="also the time of each of our kernels")
    ops.add_argument(
        "--budget",
        metavar="SECONDS",
        type=float,
        help="start no case later than this; what is left out is said",
    )
    ops.add_argument("--json", metavar="PATH", type=Path, help="write a results file, again after every case")
    ops.add_argument("--plot", metavar="PATH", type=Path, help="draw the times, a PNG")
    loss = actions.add_parser(
        "loss", help="divergences of hidden states and heads, beside torch and liger-kernel"
    )
    loss.add_argument("--no-peer", action="store_true", help="leave out torch and liger-kernel")
    loss.add_argument("--budget", metavar="SECONDS", type=float, help="start no case later than this")
    loss.add_argument(
        "--json", metavar="PATH", type=Path, help="write a results file, again after every case"
    )
    train = actions.add_parser("train", help="a small hybrid on our kernels and on the reference ops")
    train.add_argument("--steps", metavar="N", type=int, help="of every run (2000)")
    train.add_argument("--seeds", metavar="N", type=int, help="runs of each implementation, 2 to 10 (10)")
    train.add_argument(
        "--output",
        metavar="FOLDER",
        type=Path,
        default=Path("runs/bench-train"),
        help="holds the runs; the same command continues them (runs/bench-train)",
    )
    train.add_argument("--json", metavar="PATH", type=Path, help="write a results file")
    train.add_argument("--plot", metavar="PATH", type=Path, help="draw the losses, a PNG")
    ops.add_argument("--interpret-smoke", action="store_true", help=argparse.SUPPRESS)
    tune = actions.add_parser("tune", help="launch configurations of the kernels beside other candidates")
    names = [case.name for case in CASES]
    tune.add_argument(
        "--cases",
        metavar="NAME",
        nargs="+",
        choices=names,
        default=TUNE_NAMES,
        help=f"some of: {', '.join(names)} ({', '.join(TUNE_NAMES)})",
    )
    tune.add_argument("--kernels", metavar="NAME", nargs="+", help="of the table; all by default")
    tune.add_argument("--dtype", choices=_DTYPES, default="bf16", help="of the inputs (bf16)")
    tune.add_argument(
        "--budget",
        metavar="SECONDS",
        type=float,
        help="start no kernel later than this; what is left out is said",
    )
    tune.add_argument(
        "--json", metavar="PATH", type=Path, help="write a results file, again after every kernel"
    )
    step = actions.add_parser(
        "step", help="a training step on the shape of a real model, with random weights"
    )
    _add_step_arguments(step)
    generate = actions.add_parser(
        "generate", help="answers of the engine beside transformers, and the cost of a step by context"
    )
    _add_generate_arguments(generate)
    data = actions.add_parser("data", help="reading, tokenizing and packing the data of a recipe")
    add_recipe(data)
    data.add_argument("--stage", metavar="NAME", help="the stage to measure; all unless given")
    data.add_argument("--seconds", metavar="S", type=float, default=3.0, help="for each measurement (3)")
    data.add_argument("--json", metavar="PATH", type=Path, help="write a results file")
    for parser in (ops, loss, train, tune, step, generate, data):
        parser.add_argument("--commit", metavar="SHA", help="the measured code, where git does not know it")


def _add_generate_arguments(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("--model", metavar="MODEL", help="answer --texts with this model")
    generate.add_argument(
        "--texts", metavar="FILE", type=Path, help="JSON lines with question or prompt, for --model"
    )
    generate.add_argument(
        "--choices",
        metavar="FILE",
        type=Path,
        help="JSON lines with input: questions that list options by letter, for --model",
    )
    generate.add_argument("--limit", metavar="N", type=int, help="of the lines; all unless given")
    generate.add_argument("--new-tokens", metavar="N", type=int, default=384, help="longest answer (384)")
    generate.add_argument(
        "--batches",
        metavar="N",
        type=int,
        nargs="*",
        default=(165, 330, 660),
        help="of transformers' generate; none leaves it out (165 330 660)",
    )
    generate.add_argument(
        "--placement",
        metavar="STRIP",
        help="also answer with a hybrid of the model, untrained, of this placement",
    )
    generate.add_argument(
        "--shape", choices=tuple(SHAPES), help="time a teacher of random weights and its hybrid"
    )
    generate.add_argument(
        "--contexts",
        metavar="N",
        type=int,
        nargs="+",
        default=(4096, 32_768, 131_072),
        help="tokens before the first, for --shape (4096 32768 131072)",
    )
    generate.add_argument("--cpu", action="store_true", help="stay on the CPU")
    generate.add_argument(
        "--json", metavar="PATH", type=Path, help="write a results file, again after every row"
    )


def _add_step_arguments(step: argparse.ArgumentParser) -> None:
    step.add_argument(
        "--shape",
        nargs="+",
        choices=SHAPES,
        default=["qwen3-0.6b"],
        help=f"some of: {', '.join(SHAPES)} (qwen3-0.6b)",
    )
    step.add_argument(
        "--stage",
        nargs="+",
        choices=STAGES,
        default=[STAGES[0]],
        help=f"some of: {', '.join(STAGES)} ({STAGES[0]})",
    )
    for name, what in (
        ("--rows", "packed rows of a step, over all processes"),
        ("--micro-batch", "rows of a forward pass"),
        ("--seq-len", "tokens of a row"),
        ("--mean-tokens", "mean length of a document"),
    ):
        step.add_argument(name, metavar="N", type=int, help=f"{what} (as the shape has it)")
    step.add_argument("--steps", metavar="N", type=int, default=8, help="timed steps (8)")
    step.add_argument("--warmup", metavar="N", type=int, default=6, help="steps before these (6)")
    step.add_argument("--checkpointing", action="store_true", help="compute activations again going backward")
    step.add_argument(
        "--engine",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="settings of the recipe's engine: section",
    )
    step.add_argument(
        "--compare",
        metavar="KEY=VALUE,...",
        nargs="*",
        help="also time the engine with these differences; without any: every switch off alone, then all",
    )
    step.add_argument(
        "--peer", action="store_true", help="also time stock parts; fla-core tunes itself for minutes"
    )
    step.add_argument("--no-check", action="store_true", help="time without comparing losses and gradients")
    step.add_argument(
        "--profile", metavar="STEPS", type=int, nargs="?", const=3, default=0, help="profile (3)"
    )
    step.add_argument("--trace", metavar="FILE", type=Path, help="write the profile for a browser, a .json")
    step.add_argument("--top", metavar="N", type=int, default=25, help="kernels that --profile lists (25)")
    step.add_argument("--cpu", action="store_true", help="stay on the CPU")
    add_num_processes(step)
    step.add_argument(
        "--json", metavar="PATH", type=Path, help="write a results file, again after every case"
    )


def run(arguments: argparse.Namespace) -> int:
    """Check and time the ops or the loss, compare training, tune, or time training steps or data."""
    actions = {
        "ops": _run_ops,
        "loss": _run_loss,
        "train": _run_train,
        "tune": _run_tune,
        "step": _run_step,
        "generate": _run_generate,
        "data": _run_data,
    }
    return actions[arguments.action](arguments)


def _run_ops(arguments: argparse.Namespace) -> int:
    _check_budget(arguments)
    if arguments.no_peer and arguments.cold_peer:
        raise RecipeError("--cold-peer measures the peer that --no-peer leaves out", where="--cold-peer")
    if arguments.no_peer and arguments.peer_tuning:
        raise RecipeError("--peer-tuning is for the peer that --no-peer leaves out", where="--peer-tuning")
    commit = _commit(arguments)
    _check_plot(arguments)
    _check_device("ops", smoke=arguments.interpret_smoke)
    import torch

    from gendistill.bench.measure import attempt
    from gendistill.bench.ops import Bench
    from gendistill.bench.peers import FlaCore
    from gendistill.bench.rows import save_plot

    console = _console()
    gates = GATES if arguments.gate == "both" else (arguments.gate,)
    if arguments.interpret_smoke:
        # the interpreter multiplies bfloat16 wrongly
        bench = Bench(
            cases=SMOKE_CASES,
            decode_cases=(SMOKE_DECODE,),
            gates=gates,
            dtype=torch.float32,
            device="cpu",
            console=console,
        )
        return 0 if bench.check_ours() else 1
    peer, reason = (None, None) if arguments.no_peer else attempt(FlaCore)
    if reason is not None:
        console.print(f"fla-core is not measured: {reason}", markup=False)
    names = arguments.cases or NAMES
    device = torch.cuda.get_device_name()
    save = _saver(arguments.json, peer, device, commit)
    if peer is not None and arguments.peer_tuning:
        save = _keep_tuning(save, arguments.peer_tuning, peer, device, console)
    bench = Bench(
        cases=[case for case in CASES if case.name in names],
        decode_cases=DECODE_CASES if "decode" in names else (),
        gates=gates,
        dtype=getattr(torch, _DTYPES[arguments.dtype]),
        peer=peer,
        budget_s=arguments.budget,
        cold=_cold(arguments, has_peer=peer is not None),
        breakdown=arguments.breakdown,
        console=console,
        save=save,
    )
    try:
        return bench.run()
    finally:
        if arguments.plot:
            save_plot(arguments.plot, bench.found, bench.peer_label)


def _run_loss(arguments: argparse.Namespace) -> int:
    _check_budget(arguments)
    commit = _commit(arguments)
    _check_device("loss", op="linear_divergence")
    import torch

    from gendistill.bench.loss import Liger, LossBench, LossContestant, Op
    from gendistill.bench.measure import attempt
    from gendistill.ops import Impl
    from gendistill.results.table import write_results_json

    console, device = _console(), torch.cuda.get_device_name()
    peers: list[LossContestant] = [] if arguments.no_peer else [Op(Impl.REFERENCE)]
    liger, reason = (None, None) if arguments.no_peer else attempt(Liger)
    if reason is not None:
        console.print(f"liger-kernel is not measured: {reason}", markup=False)
    peers += [] if liger is None else [liger]

    def save(rows: Sequence[ResultRow]) -> None:
        if arguments.json:
            write_results_json(
                arguments.json, command=command_line(), device=device, rows=rows, commit=commit
            )

    bench = LossBench(cases=LOSS_CASES, peers=peers, budget_s=arguments.budget, console=console, save=save)
    return bench.run()


def _run_train(arguments: argparse.Namespace) -> int:
    commit = _commit(arguments)
    _check_plot(arguments)
    _check_device("train")
    import torch

    from gendistill.bench.train import MOST_SEEDS, Setup, TrainBench, save_plot

    chosen = {name: getattr(arguments, name) for name in ("steps", "seeds")}
    chosen = {name: number for name, number in chosen.items() if number is not None}
    if chosen.get("steps", 1) < 1:
        raise RecipeError(f"--steps must be positive, got {chosen['steps']}", where="--steps")
    if not 2 <= chosen.get("seeds", 2) <= MOST_SEEDS:
        raise RecipeError(
            f"--seeds must be 2 to {MOST_SEEDS}, got {chosen['seeds']}: the noise is the spread over seeds",
            where="--seeds",
        )
    bench = TrainBench(folder=arguments.output, setup=Setup(**chosen), commit=commit, console=_console())
    try:
        found = bench.run()
    finally:
        if arguments.plot:
            save_plot(arguments.plot, arguments.output)
    if arguments.json:
        from gendistill.results.table import write_results_json

        device, rows = torch.cuda.get_device_name(), found.rows(bench.impls)
        write_results_json(arguments.json, command=command_line(), device=device, rows=rows, commit=commit)
    return 0


def _run_tune(arguments: argparse.Namespace) -> int:
    _check_budget(arguments)
    commit = _commit(arguments)
    _check_device("tune")
    import torch

    from gendistill.bench.launches import PLACES
    from gendistill.bench.tune import Outcome, Tuner, make_jobs
    from gendistill.results.table import write_results_json

    kernels = arguments.kernels or list(PLACES)
    if unknown := [name for name in kernels if name not in PLACES]:
        raise RecipeError(
            f"no kernel {', '.join(unknown)} in the table; there are {', '.join(PLACES)}", where="--kernels"
        )
    device = torch.cuda.get_device_name()

    def save(found: Sequence[Outcome]) -> None:
        rows = [row for outcome in found for row in outcome.rows()]
        if arguments.json and rows:
            write_results_json(
                arguments.json, command=command_line(), device=device, rows=rows, commit=commit
            )

    cases = [case for case in CASES if case.name in arguments.cases]
    jobs = make_jobs(cases, dtype=getattr(torch, _DTYPES[arguments.dtype]), kernels=kernels)
    found = Tuner(jobs=jobs, budget_s=arguments.budget, console=_console(), save=save).run()
    # a configuration in the table that cannot run is not a matter of taste
    return 1 if any(outcome.now.ms is None for outcome in found) else 0


def _run_step(arguments: argparse.Namespace) -> int:
    engines = choose_engines(arguments.engine, arguments.compare)
    commit = _commit(arguments)
    _check_numbers(arguments)
    if arguments.num_processes > 1 and not is_launched():
        return launch(arguments.num_processes)
    import torch

    from gendistill.bench.step import StepBench
    from gendistill.bench.step_parts import device_name
    from gendistill.results.table import write_results_json

    rows: list[ResultRow] = []
    peer = _stock_peer() if arguments.peer else None
    for name, stage in itertools.product(arguments.shape, arguments.stage):
        bench = StepBench(
            shape=_step_shape(arguments, name),
            stage=stage,
            engines=engines,
            peer=peer,
            steps=arguments.steps,
            warmup=arguments.warmup,
            checkpointing=arguments.checkpointing,
            profile_steps=arguments.profile or (3 if arguments.trace else 0),
            trace=arguments.trace,
            top=arguments.top,
            check=not arguments.no_check,
            cpu=arguments.cpu,
            console=_console(),
        )
        try:
            rows += bench.run()
        except torch.OutOfMemoryError as error:
            raise GendistillError(
                f"the GPU has too little memory for {bench.shape.micro_batch} x {bench.shape.seq_len:,} tokens at a "
                f"time: {error}",
                where="gendistill bench step",
                hint="a smaller --micro-batch, or --checkpointing",
            ) from error
        if arguments.json and bench.parallel.is_main:
            device = device_name(bench.device)
            write_results_json(
                arguments.json, command=command_line(), device=device, rows=rows, commit=commit
            )
    return 0


def _run_generate(arguments: argparse.Namespace) -> int:
    if (arguments.model is None) == (arguments.shape is None):
        raise RecipeError(
            "say what to measure: --model MODEL with --texts FILE or --choices FILE, or --shape NAME",
            where="gendistill bench generate",
        )
    if arguments.model and not (arguments.texts or arguments.choices):
        raise RecipeError(
            "--model answers the lines of a file", where="--texts", hint="add --texts FILE or --choices FILE"
        )
    for name in ("limit", "new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise RecipeError(f"must be at least 1, got {value}", where="--" + name.replace("_", "-"))
    if min(arguments.contexts) < 1 or min(arguments.batches, default=1) < 1:
        raise RecipeError("--contexts and --batches must be at least 1", where="gendistill bench generate")
    commit = _commit(arguments)
    if not arguments.cpu:
        _check_device("generate", op="paged")
    import torch

    from gendistill.bench.generation import GenerationBench
    from gendistill.results.table import write_results_json

    device = torch.device("cpu" if arguments.cpu else "cuda")
    name = "CPU" if arguments.cpu else torch.cuda.get_device_name()

    def save(rows: Sequence[ResultRow]) -> None:
        if arguments.json:
            write_results_json(arguments.json, command=command_line(), device=name, rows=rows, commit=commit)

    bench = GenerationBench(_console(), save, device=device)
    dtype = torch.float32 if arguments.cpu else torch.bfloat16
    if arguments.shape:
        bench.latencies(SHAPES[arguments.shape], sorted(set(arguments.contexts)), dtype=dtype)
    else:
        _run_answers(arguments, bench, dtype)
    return 0


def _run_answers(arguments: argparse.Namespace, bench: GenerationBench, dtype: Any) -> None:
    from gendistill.bench.generation import read_lines, read_questions
    from gendistill.bench.pair import for_inference, make_student
    from gendistill.checkpoints.resolve import load_causal_lm, load_tokenizer, resolve_checkpoint
    from gendistill_evals.decoding import greedy_decoding
    from gendistill_evals.hf import HFModel
    from gendistill_evals.prompts import Prompter

    folder = resolve_checkpoint(arguments.model, where="--model").folder
    model = load_causal_lm(folder, dtype=dtype, device=bench.device)
    tokenizer = load_tokenizer(folder)
    ends = greedy_decoding(HFModel(model, tokenizer), Prompter(tokenizer)).eos_token_ids
    if arguments.choices:
        texts = read_lines(arguments.choices, ("input",))[: arguments.limit]
        bench.choices(model, tokenizer, texts, name=str(arguments.model), end_ids=ends)
    if not arguments.texts:
        return
    texts = read_questions(arguments.texts, tokenizer)[: arguments.limit]
    student = None
    if arguments.placement:
        shape = dataclasses.replace(SHAPES["tiny"], placement=arguments.placement)
        student = for_inference(make_student(model, shape), dtype)
    bench.answers(
        model,
        tokenizer,
        texts,
        name=str(arguments.model),
        new_tokens=arguments.new_tokens,
        end_ids=ends,
        batches=arguments.batches,
        student=student,
    )


def _run_data(arguments: argparse.Namespace) -> int:
    if not 0 < arguments.seconds < math.inf:
        raise RecipeError(f"--seconds must be positive, got {arguments.seconds:g}", where="--seconds")
    commit = _commit(arguments)
    recipe = load(arguments)
    stages = [arguments.stage] if arguments.stage else list(recipe.stages)
    if unknown := [stage for stage in stages if stage not in recipe.stages]:
        raise RecipeError(
            f'recipe {recipe.name} has no stage "{unknown[0]}"; stages: {", ".join(recipe.stages)}',
            where="--stage",
        )
    from gendistill.bench.data import time_stream
    from gendistill.checkpoints.resolve import load_tokenizer, resolve_checkpoint
    from gendistill.results.table import write_results_json

    checkpoint = resolve_checkpoint(recipe.teacher.model, revision=recipe.teacher.revision)
    tokenizer = load_tokenizer(checkpoint.folder)
    rows, console = [], _console()
    for stage in stages:
        found = time_stream(recipe, stage, tokenizer, seconds=arguments.seconds)
        console.print(str(found), markup=False)
        rows += found.rows()
    if arguments.json:
        device = f"CPU, {os.cpu_count()} cores"
        write_results_json(arguments.json, command=command_line(), device=device, rows=rows, commit=commit)
    return 0


def _stock_peer() -> Peer:
    from gendistill.bench.measure import attempt
    from gendistill.bench.step import Peer
    from gendistill.bench.stock import FlaParts

    return Peer(*attempt(FlaParts))


def _step_shape(arguments: argparse.Namespace, name: str) -> Shape:
    """Return a shape with the sizes that the command line gives it."""
    sizes = ("rows", "micro_batch", "seq_len", "mean_tokens")
    given = {size: getattr(arguments, size) for size in sizes if getattr(arguments, size) is not None}
    if "rows" in given and "micro_batch" not in given:
        given["micro_batch"] = math.gcd(SHAPES[name].micro_batch, given["rows"])
    shape = dataclasses.replace(SHAPES[name], **given)
    if shape.rows % shape.micro_batch:
        raise RecipeError(
            f"{shape.rows} rows are not a multiple of micro-batches of {shape.micro_batch}",
            where="--micro-batch",
            hint="choose a divisor of the rows",
        )
    return shape


def _check_numbers(arguments: argparse.Namespace) -> None:
    if arguments.profile < 0:
        raise RecipeError(f"--profile must not be negative, got {arguments.profile}", where="--profile")
    for name in ("rows", "micro_batch", "seq_len", "mean_tokens", "steps", "warmup", "top"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            option = f"--{name.replace('_', '-')}"
            raise RecipeError(f"{option} must be positive, got {value}", where=option)
    for name in arguments.shape:
        shape = _step_shape(arguments, name)
        if shape.rows % arguments.num_processes:
            raise RecipeError(
                f"{shape.rows} rows cannot be shared equally by {arguments.num_processes} processes",
                where="--rows",
                hint=f"choose a multiple of {arguments.num_processes}",
            )


def _check_budget(arguments: argparse.Namespace) -> None:
    if arguments.budget is not None and not 0 < arguments.budget < math.inf:
        raise RecipeError(
            f"--budget must be positive and finite, in seconds, got {arguments.budget:g}",
            where="--budget",
            hint="leave it out to measure everything",
        )


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    return console


def _check_plot(arguments: argparse.Namespace) -> None:
    """Refuse a chart that nothing can draw, before anything is measured for it."""
    if arguments.plot and importlib.util.find_spec("matplotlib") is None:
        raise GendistillError(
            "--plot needs matplotlib, which is not installed",
            hint="leave --plot out, or: pip install matplotlib",
        )


def _cold(arguments: argparse.Namespace, *, has_peer: bool) -> tuple[Any, ...]:
    if arguments.cold_peer and has_peer:
        return "ours", "peer"
    return ("ours",) if arguments.cold or arguments.cold_peer else ()


def _commit(arguments: argparse.Namespace) -> str | None:
    """Return the commit for the results file, before anything is measured for it."""
    from gendistill.provenance import source_commit

    commit = arguments.commit or (source_commit() if arguments.json else None)
    if arguments.json and commit is None:
        raise RecipeError(
            "git does not know the commit of this code, which a results file names",
            where="--json",
            hint="add --commit SHA",
        )
    if commit is not None and not re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", commit):
        raise RecipeError(f'a commit is 7 to 40 hexadecimal digits, got "{commit}"', where="--commit")
    return commit


def _check_device(action: str, *, op: str = "delta_rule", smoke: bool = False) -> None:
    import torch

    from gendistill.ops import resolve

    command = f"gendistill bench {action}"
    if smoke and os.environ.get("TRITON_INTERPRET") != "1":
        raise GendistillError(
            "--interpret-smoke needs Triton's interpreter",
            hint=f"TRITON_INTERPRET=1 {command} --interpret-smoke",
        )
    if not smoke and not torch.cuda.is_available():
        raise GendistillError(
            f"{command} measures on a CUDA device, and torch sees none here",
            hint="gendistill doctor says why",
        )
    try:
        resolve("triton", op=op, device=torch.device("cpu" if smoke else "cuda"))
    except ValueError as error:
        raise GendistillError(str(error)) from error


def _keep_tuning(
    save: Callable[[Sequence[Measurement]], None], path: Path, peer: FlaCore, device: str, console: Console
) -> Callable[[Sequence[Measurement]], None]:
    """Hand what the peer chose before to Triton; return what saves results, and what the peer has chosen so far."""
    from triton import knobs  # pyright: ignore[reportMissingImports]

    from gendistill.bench.peer_tuning import PeerTuning

    tuning = PeerTuning(path, Path(knobs.cache.dir), peer=peer.label, device=device)
    console.print(f"{peer.label}: {tuning.restored} choices from {path}", markup=False)

    def both(found: Sequence[Measurement]) -> None:
        save(found)
        tuning.save()

    return both


def _saver(
    path: Path | None, peer: FlaCore | None, device: str, commit: str | None
) -> Callable[[Sequence[Measurement]], None]:
    """Return what writes a results file of everything measured so far."""
    from gendistill.provenance import installed_versions
    from gendistill.results.table import write_results_json

    label = peer.label if peer else None
    versions = installed_versions() | (dict([label.split()]) if label else {})

    def save(found: Sequence[Measurement]) -> None:
        rows = [row for each in found if (row := each.row(label)) is not None]
        if path is not None and rows:
            write_results_json(
                path, command=command_line(), device=device, rows=rows, commit=commit, versions=versions
            )

    return save
