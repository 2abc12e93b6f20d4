"""A whole stage on a tiny model; run as a script, it is killed, resumed or split over processes by the tests."""

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console

from gendistill.config.engine import EngineConfig
from gendistill.config.schema import StageConfig
from gendistill.config.watch import WatchConfig
from gendistill.data.batch import IGNORE, Batch
from gendistill.errors import GendistillError
from gendistill.ops import Segments
from gendistill.teachers.live import LiveTeacher
from gendistill.testing import tiny_student, tiny_teacher
from gendistill.training.checkpoint import find_checkpoint  # noqa: F401
from gendistill.training.console import TrainingConsole
from gendistill.training.job import StageJob
from gendistill.training.monitors import MONITORS, Stop, When
from gendistill.training.parallel import choose_parallel
from gendistill.training.stage import train_stage

VOCAB, SEQ_LEN, BATCH_SIZE = 97, 16, 8
STAGE = {
    "data": "none",
    "train": ["mixer", "attention", "mlp", "norm", "embed", "head"],
    "steps": 6,
    "seq_len": SEQ_LEN,
    "batch_size": BATCH_SIZE,
    "micro_batch_size": 4,
    "lr": 1e-3,
}


def row(seed):
    """Make one packed row: two documents of random length, of which only an end counts, and padding."""
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(3, 8, (2,), generator=generator).tolist()
    ids = torch.randint(3, VOCAB, (SEQ_LEN,), generator=generator)
    labels = torch.full((SEQ_LEN,), IGNORE)
    for start, length in ((0, first), (first, second)):
        prompt = int(torch.randint(0, length, (), generator=generator))
        labels[start + prompt : start + length - 1] = ids[start + prompt + 1 : start + length]
    return ids, labels, (first, second, SEQ_LEN - first - second)


def batch_of(seeds):
    """Stack rows into a batch."""
    rows = [row(seed) for seed in seeds]
    lengths = [length for *_, each in rows for length in each if length]
    positions = torch.cat([torch.arange(length) for length in lengths]).view(len(rows), SEQ_LEN)
    labels = torch.stack([labels for _, labels, _ in rows])
    return Batch(
        input_ids=torch.stack([ids for ids, _, _ in rows]),
        labels=labels,
        position_ids=positions,
        segments=Segments(lengths),
        num_labels=int((labels != IGNORE).sum()),
        num_tokens=sum(first + second for *_, (first, second, _) in rows),
    )


def make_student(seed=3):
    """One linear layer, one attention layer."""
    return tiny_student(seed=seed, num_hidden_layers=2, mixers=["kda", "full"])


def make_teacher(seed=4):
    """A transformer of the student's shape."""
    return tiny_teacher(seed=seed, num_hidden_layers=2)


def spoil(student, steps):
    """Make what a layer computes from the first rows of some steps, from 1, not finite; returns the student."""
    beginnings = [row(1000 * (step - 1))[0][:4].tolist() for step in steps]

    def before(module, args, kwargs):
        module.spoilt = module.training and kwargs["input_ids"][0, :4].tolist() in beginnings

    def after(module, args, output):
        return output * float("nan") if student.model.spoilt else output

    student.model.register_forward_pre_hook(before, with_kwargs=True)
    student.model.layers[1].mlp.gate_proj.register_forward_hook(after)
    return student


def special_models(*, tied=False, bad_steps=()):
    """Make the models of a stage that are not the usual ones: with tied embeddings, or spoilt in some steps."""
    models = {}
    if tied:
        sizes = {"num_hidden_layers": 2, "tie_word_embeddings": True}
        models["student"] = tiny_student(seed=3, mixers=["kda", "full"], **sizes)
        models["teacher"] = tiny_teacher("qwen3", seed=4, **sizes)
    if bad_steps:
        models["student"] = spoil(make_student(), bad_steps)
    return models


class TinyStream:
    """The same rows in every step whatever the split."""

    def __init__(self, micro_batch_size=4, rank=0, world=1):
        self.step, self.micro, self.rank, self.world = 0, micro_batch_size, rank, world
        self.dropped: dict[str, dict[str, int]] = {}
        self.notes: list[str] = []

    def __next__(self):
        share = BATCH_SIZE // self.world
        first = 1000 * self.step + self.rank * share
        self.step += 1
        return [
            batch_of(range(start, start + self.micro)) for start in range(first, first + share, self.micro)
        ]

    def state_dict(self):
        return {"step": self.step}

    def load_state_dict(self, state):
        self.step = state["step"]


def heldout():
    """Two batches that no step contains."""
    return [batch_of(range(900, 904)), batch_of(range(904, 906))]


class Greedy:
    """An examiner without tokenizer: answers are ids, and a score is the share of them that are even."""

    def answers(self, student):
        ids = student.generate(
            torch.tensor([[5, 6, 7]], device=student.device),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
        )
        return [{"id": 0, "question": "567", "student": str(ids[0, 3:].tolist()), "teacher": ""}]

    def score(self, student, task, limit):
        ids = json.loads(self.answers(student)[0]["student"])
        return {"value": sum(each % 2 == 0 for each in ids) / len(ids), "n": len(ids)}


def watching(every):
    """Return the fields of a job that looks at everything every so many steps."""
    names = ("layers_every_steps", "answers_every_steps", "score_every_steps")
    return {"watch": WatchConfig(**dict.fromkeys(names, every)), "examiner": Greedy()}


def run_stage(
    folder,
    *,
    student=None,
    teacher=None,
    parallel=None,
    heldout_every=None,
    out=None,
    engine=None,
    job=None,
    **changes,
):
    """Train the tiny stage in ``folder`` and return the result and the student; ``job`` are more of its fields."""
    stage = StageConfig(**{key: value for key, value in {**STAGE, **changes}.items() if value is not None})
    engine = EngineConfig(**(engine or {}))
    parallel = parallel or choose_parallel(Accelerator(cpu=True), engine)
    student = make_student() if student is None else student
    job = StageJob(
        name="tiny",
        config=stage,
        folder=Path(folder) / "stages" / "tiny",
        seed=7,
        heldout=heldout(),
        heldout_every=heldout_every,
        engine=engine,
        **(job or {}),
    )
    result = train_stage(
        job,
        student=student,
        teacher=LiveTeacher(make_teacher() if teacher is None else teacher),
        stream=TinyStream(stage.micro_batch_size, parallel.rank, parallel.world),
        parallel=parallel,
        console=TrainingConsole(main=parallel.is_main, console=Console(file=out or sys.stdout, width=500)),
    )
    return result, student


def rows(folder):
    """Read the metrics without what depends on the clock."""
    path = Path(folder) / "stages" / "tiny" / "metrics.jsonl"
    if not path.exists():
        return []
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    clocks = ("speed", "shares")
    return [
        {key: value for key, value in each.items() if "second" not in key and key not in clocks}
        for each in lines
    ]


def in_child(folder, environment=None, work=run_stage, **changes):
    """Fork a process that trains; it exits with the error's code."""
    child = os.fork()
    if child:
        return child
    os.environ.update(environment or {})
    code = 1
    try:
        work(folder, **changes)
        code = 0
    except GendistillError as error:
        print(error, flush=True)
        code = error.exit_code
    except Exception:
        traceback.print_exc(file=sys.stdout)
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def interrupt(folder, number, after_step, **changes):
    """Send a signal once the metrics show a step, and return how the process ended."""
    child = in_child(folder, **changes)
    while len(rows(folder)) < after_step and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    os.kill(child, number)
    return exit_code(child)


def start(folder, world, **changes):
    """Start processes that train together; their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        ranks.append(in_child(folder, environment, **{"micro_batch_size": 2, **changes}))
    return ranks


def together(folder, world, **changes):
    """Train with some processes and return the worst of their codes."""
    return max(exit_code(child) for child in start(folder, world, **changes))


class EndAtFour:
    """End a stage at the checkpoint of its fourth step."""

    when: When = "save"
    every = None

    def __init__(self, job):
        pass

    def __call__(self, run):
        return Stop("enough") if run.progress.step == 4 else None


def main(folder):
    """Run every scenario that needs processes of its own and print what they found."""
    folder = Path(folder)
    saving = {"save_every_steps": 2}
    codes = {"whole": exit_code(in_child(folder / "whole", **saving))}
    for after in (1, 3):
        name = f"killed_{after}"
        codes[name] = interrupt(folder / name, signal.SIGKILL, after, **saving)
        codes[f"{name}_resumed"] = exit_code(in_child(folder / name, **saving))
    codes["terminated"] = interrupt(folder / "terminated", signal.SIGTERM, 2)
    codes["terminated_resumed"] = exit_code(in_child(folder / "terminated"))

    codes["two"] = together(folder / "two", 2, save_every_steps=2)
    MONITORS["early"] = EndAtFour
    codes["two_early"] = together(folder / "two_early", 2, save_every_steps=2, log_every_steps=3)
    codes["two_early_resumed"] = together(folder / "two_early", 2, save_every_steps=2, log_every_steps=3)
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(sys.argv[1])
