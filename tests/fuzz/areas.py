"""What the fuzzer gives to gendistill, area by area: files in a box, and the commands that read them.

Each area is a function of a seeded ``Random`` and a box; it returns commands that end within seconds when all is well.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import mutate
import pyarrow
import pyarrow.parquet
import yaml

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ARCHITECTURES = ("llama", "qwen2", "qwen3")
ASK = "{question}"


@dataclass(frozen=True)
class Base:
    """What all inputs start from: made once, read-only."""

    root: Path

    @property
    def texts(self) -> Path:
        return self.root / "texts.jsonl"

    @property
    def task(self) -> Path:
        return self.root / "colours.yaml"

    @property
    def questions(self) -> Path:
        return self.root / "open.jsonl"

    def teacher(self, family: str = "qwen3") -> Path:
        return self.root / "teachers" / family

    def gguf(self, architecture: str) -> Path:
        return self.root / "gguf" / f"{architecture}.gguf"

    def recipe(self, **sections: Any) -> dict[str, Any]:
        """Write a recipe of two short stages over local files; ``sections`` replace its own."""
        stage = {
            "data": "text",
            "train": ["mixer"],
            "steps": 1,
            "seq_len": 32,
            "batch_size": 2,
            "micro_batch_size": 2,
        }
        return {
            "schema": 1,
            "name": "tiny",
            "teacher": {"model": str(self.teacher()), "dtype": "float32"},
            "student": {"placement": "kda full", "impl": "reference"},
            "data": {"text": {"path": str(self.texts)}},
            "heldout": {"data": "text", "rows": 4, "seq_len": 32},
            "stages": {
                "block": {**stage, "objective": {"kind": "block_output"}, "lr": 1e-3},
                "distill": {
                    **stage,
                    "objective": {"kind": "kl"},
                    "steps": 3,
                    "lr": 1e-3,
                    "save_every_steps": 1,
                },
            },
            "eval": {
                "tasks": [str(self.task)],
                "questions": str(self.questions),
                "question_tokens": 2,
            },
            **sections,
        }

    def full_recipe(self) -> dict[str, Any]:
        """Write a recipe that uses most of what there is."""
        recipe = self.recipe(seed=7, output="runs")
        recipe["student"] |= {
            "placement": ["kda", "full"],
            "from": str(self.teacher()),
            "mixers": {"kda": {"half_life": [4.0, 512.0]}, "swa": {"window": 16}},
        }
        recipe["data"] |= {
            "chat": {
                "path": str(self.root / "chat.jsonl"),
                "format": "messages",
                "column": "messages",
                "limit": 20,
            },
            "pairs": {
                "path": str(self.root / "pairs.jsonl"),
                "format": "prompt_completion",
                "shuffle": False,
            },
            "all": {"mix": {"text": 0.5, "chat": 2.0}},
        }
        recipe["stages"]["distill"] |= {
            "data": "all",
            "lr": {"mixer": 1e-3, "norm": 1e-4},
            "train": ["mixer", "norm"],
            "objective": {"kind": "kl", "direction": "forward", "temperature": 2.0},
            "schedule": {"kind": "wsd", "warmup": 0.1, "decay": 0.2, "min_ratio": 0.02},
            "weight_decay": 0.1,
            "keep_checkpoints": 2,
        }
        recipe["stages"]["more"] = {**recipe["stages"]["block"], "steps": None, "tokens": "1k"}
        recipe["eval"] |= {"protocols": ["likelihood", "generation"], "limit": 2, "batch_size": 4}
        return recipe


@dataclass(frozen=True)
class Box:
    """The folder of one input: what is given lies in ``given``, the command runs in ``cwd``."""

    root: Path
    base: Base

    @property
    def given(self) -> Path:
        return self.root / "given"

    @property
    def cwd(self) -> Path:
        # deep, so that ".." stays in the box
        return self.root / "a" / "b" / "c" / "d" / "work"

    def put(self, name: str, content: bytes) -> Path:
        path = self.given / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def put_recipe(self, content: Any, name: str = "recipe.yaml") -> Path:
        return self.put(name, as_yaml(content))

    def copy(self, source: Path, name: str) -> Path:
        target = self.given / name
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        return target


def as_yaml(content: Any) -> bytes:
    try:
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
    except (RecursionError, yaml.YAMLError, TypeError):
        return mutate.text_of(content)


def recipe(random: Random, box: Box) -> list[list[str]]:
    """Recipes, changed as YAML and as text."""
    kind = random.random()
    shipped = sorted((Path(__file__).parents[2] / "recipes").glob("**/*.yaml"))
    content = box.base.full_recipe() if kind < 0.6 else yaml.safe_load(random.choice(shipped).read_text())
    if kind > 0.9:
        text = mutate.flipped(random, random.choice(shipped).read_bytes(), mutate.changes(random))
    elif kind > 0.85:
        text = random.choice(NASTY_YAML).encode("utf-8", "surrogatepass")
    else:
        text = as_yaml(mutate.structure(random, content, mutate.changes(random)))
        if random.random() < 0.2:
            text = mutate.flipped(random, text)
    if random.random() < 0.1:
        placement = {"kinds": ["kda", "full"], "note": "x"}
        changed = mutate.structure(
            random, random.choice([placement, placement["kinds"]]), mutate.changes(random)
        )
        found = box.put("placement.json", mutate.text_of(changed))
        if random.random() < 0.2:
            _replace(random, found)
        student = {"placement": str(found), "impl": "reference"}
        text = as_yaml(box.base.recipe(student=student))
    file = str(box.put(random.choice(["recipe.yaml", "recipe.yml", "[red]é.yaml"]), text))
    return random.sample(
        [
            ["recipe", "check", file],
            ["recipe", "show", file],
            ["recipe", "check", file, "--json"],
            ["recipe", "show", file, "--json"],
            ["recipe", "diff", "tiny", file],
            ["recipe", "cp", file, "new.yaml"],
            ["run", file, "--dry-run"],
            ["run", file, "--dry-run", "--json"],
        ],
        k=3,
    )


NASTY_YAML = [
    "",
    "# nothing",
    "- 1\n- 2",
    "schema: 1\nschema: 1\n",
    "a: &a [*a]",
    "a: &a {b: *a}\n<<: *a",
    "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\nd: [*c,*c,*c,*c,*c]",
    "extends: recipe.yaml",
    "extends: ./recipe.yml",
    "extends: /dev/zero",
    "extends: tiny\nname: ../x",
    "extends: tiny\nseed: 2026-01-01",
    "extends: tiny\nstages: {distill: {lr: 1:30}}",
    "extends: tiny\nstages: {distill: {lr: .inf, steps: .nan}}",
    "? [1, 2]\n: 3",
    "? {a: b}\n: 3",
    "!!binary aGk=: 1",
    "!!set {a, b}",
    "--- 1\n--- 2",
    "%YAML 9.9\n---\na: 1",
    "\ufeffextends: tiny",
    "extends: tiny\r\nname: x\r\n",
    "extends: tiny\n\tname: x",
    "extends: tiny\nname: \ud800",
    "extends: tiny\nname: \x00",
    "extends: tiny\nstudent: {placement: " + "kda " * 5000 + "}",
    "[" * 5000,
    "{a: " * 5000,
    "extends: tiny\nstages: {" + ", ".join(f"s{i}: null" for i in range(500)) + "}",
]


def overrides(random: Random, box: Box) -> list[list[str]]:
    """``key=value`` texts for a shipped recipe."""
    paths = [".".join(map(str, path)) for path in mutate.places(box.base.full_recipe())[1:]]
    words = [random.choice(GOOD_OVERRIDES) for _ in range(random.choice([0, 0, 1, 2]))]
    for _ in range(random.choice([0, 1, 1, 1, 2])):
        key = random.choice(paths)
        if random.random() < 0.2:
            key = str(mutate.near(random, key)).replace("\0", "")
        value = random.choice(
            [
                lambda: random.choice(mutate.TEXTS),
                lambda: json.dumps(mutate.value(random), default=str)[:100_000],
                lambda: str(random.choice(mutate.NUMBERS)),
                lambda: random.choice(
                    ["null", "{}", "[]", "{", "[", "]", "'", '"', "@", "*a", "&a", "!!x", "a: b", "? "]
                ),
                lambda: str(
                    mutate.near(random, random.choice(["kda full", "float32", "3e-4", "[mixer, norm]", "kl"]))
                ),
            ]
        )()
        words.append(
            random.choice(["{}={}", "{}={}", "{}={}", "{} = {}", "{}=={}", "{}", "={1}"]).format(key, value)
        )
    words = [word.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for word in words]
    words = [word for word in words if not word.startswith("-")]
    command = random.choice([["recipe", "check"], ["recipe", "show"], ["recipe", "check"], ["run"]])
    return [[*command, "tiny", *words, *(["--dry-run"] if command == ["run"] else [])]]


GOOD_OVERRIDES = [
    "seed=3",
    "student.placement=full@0 kda",
    "student.mixers.kda.half_life=[2.0, 8.0]",
    "stages.block=null",
    "stages.distill.weight_decay=0.5",
    "stages.distill.lr={mixer: 1e-3, norm: 1e-4, mlp: 1e-4}",
    "stages.distill.objective={kind: cross_entropy}",
    "stages.distill.schedule.kind=cosine",
    "data.text.format=messages",
    "data.more.path=rows.jsonl",
    "data.all={mix: {text: 1.0}}",
    "heldout.rows=1",
    "eval.tasks=[copy, everyday]",
    "eval.questions=demo",
    "output=here",
]

_FLAGS = {
    "run": ["--dry-run", "--json", "--output", "--num-processes", "--help"],
    "convert": ["--dry-run", "--json", "--output", "--help", "--num-processes"],
    "distill": ["--dry-run", "--only", "--output", "--num-processes", "--json"],
    "eval": [
        "--tasks",
        "--protocols",
        "--limit",
        "--batch-size",
        "--teacher",
        "--questions",
        "--out",
        "--list",
        "--json",
    ],
    "report": ["--json", "--help", "--out"],
    "recipe": ["--json", "--at", "--force", "--help"],
    "data": ["--stage", "-n", "--num-rows", "--num_rows", "--help"],
    "doctor": ["--json", "--help", "--fix"],
    "bench": ["--help", "--json", "--cases", "--gate", "--dtype"],
}
_ACTIONS = {"recipe": ["ls", "show", "cp", "check", "schema", "diff"], "bench": ["ops", "tune"]}


def command_line(random: Random, box: Box) -> list[list[str]]:
    """Commands, flags and values in any order."""
    teacher, texts = (
        str(box.copy(box.base.teacher(), "teacher")),
        str(box.copy(box.base.texts, "texts.jsonl")),
    )
    recipe_file = str(box.put_recipe(box.base.recipe()))
    names = [
        "tiny",
        "qwen3-0.6b-kda",
        recipe_file,
        teacher,
        texts,
        "builtin:tiny",
        "copy",
        "demo",
        "distill",
        "block",
    ]
    # none of these leads out of the box
    texts_ = [text for text in mutate.TEXTS if not text.startswith(("/", "~nobody"))] + [
        "/dev/zero",
        "~nobody-here",
    ]

    def word() -> str:
        return random.choice(
            [random.choice(names), random.choice(texts_), str(random.choice(mutate.NUMBERS))]
        )

    command = random.choice(list(_FLAGS))
    words = [command]
    if command in _ACTIONS:
        words.append(random.choice([*_ACTIONS[command], word()] if random.random() < 0.9 else [word()]))
    if random.random() < 0.8:
        words.append(random.choice(names))
    for _ in range(random.choice([0, 1, 1, 2, 3])):
        flag = random.choice(_FLAGS[command]) if random.random() < 0.85 else mutate.near(random, "--json")
        words += random.choice([[flag, word()], [f"{flag}={word()}"], [flag]])
    if random.random() < 0.2:
        words.insert(random.randrange(len(words) + 1), word())
    if random.random() < 0.1:
        random.shuffle(words)
    if "bench" in words or command == "bench":
        words.append("--help")
    elif {"run", "convert", "distill"} & set(words):
        words.insert(words.index("--") if "--" in words else len(words), "--dry-run")
    elif "eval" in words:
        words += ["--limit", "1"]
    return [[str(each).encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape") for each in words]]


def checkpoint(random: Random, box: Box) -> list[list[str]]:
    """A teacher of each family with one or more of its files changed."""
    folder = box.copy(box.base.teacher(random.choice(FAMILIES)), "teacher")
    if random.random() < 0.2:
        _split(folder, random)
    for _ in range(random.choice([1, 1, 1, 2])):
        _change_file(random, random.choice(sorted(path for path in folder.iterdir())))
    file = box.put_recipe(box.base.recipe(teacher={"model": str(folder), "dtype": "float32"}))
    run = [["run", str(file), "--dry-run"], ["recipe", "check", str(file)]]
    score = ["eval", str(folder), "--tasks", "copy", "--limit", "1", "--out", "scores"]
    return random.choice([[*run, ["convert", str(file)]], [run[0], score], [["convert", str(file)]], [score]])


def _split(folder: Path, random: Random) -> None:
    """Write the weights as two shards with an index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors").unlink()
    total = sum(tensor.nbytes for tensor in tensors.values())
    content: Any = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if random.random() < 0.5:
        content = mutate.structure(random, content, mutate.changes(random))
    (folder / "model.safetensors.index.json").write_bytes(mutate.text_of(content))


def _change_file(random: Random, path: Path) -> None:
    """Change one file in a way that fits its kind, or replace it by something else."""
    try:
        _change_content(random, path)
    except (ValueError, struct.error, RecursionError):
        # an earlier change has left another kind of content
        path.write_bytes(mutate.flipped(random, path.read_bytes()))


def _change_content(random: Random, path: Path) -> None:
    kind = random.random()
    if kind < 0.08 or not path.is_file():
        _replace(random, path)
    elif path.suffix == ".json" and kind < 0.75:
        content = mutate.structure(random, json.loads(path.read_bytes()), mutate.changes(random))
        path.write_bytes(mutate.text_of(content, newlines=True))
    elif path.suffix == ".safetensors" and kind < 0.75:
        path.write_bytes(_changed_weights(random, path.read_bytes()))
    elif path.suffix == ".jinja" and kind < 0.75:
        path.write_text(random.choice(TEMPLATES), encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(mutate.flipped(random, path.read_bytes(), mutate.changes(random)))


TEMPLATES = [
    "",
    "{{",
    "{% for m in messages %}",
    "{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.x.y }}{% endfor %}",
    "{{ messages[5].content }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception('\x1b[31m\ud800') }}",
    "{{ 1 / 0 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__.os.popen('touch pwned').read() }}",
    "{% include '/etc/passwd' %}",
    "{% for i in range(10 ** 12) %}x{% endfor %}",
    "{{ 'x' * 10 ** 12 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ namespace(a=1) }}{% set x = y %}{{ x.z }}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}",
    "{% if messages[0].role != 'system' %}{{ raise_exception('a system message first') }}{% endif %}",
    "{{ strftime_now('%Y') }}{{ messages }}",
    "\ud800{{ messages[0].content }}",
    "{{ messages | tojson }}" * 50,
]


def _replace(random: Random, path: Path) -> None:
    """Put something else where a file or a folder is."""
    is_folder = path.is_dir() and not path.is_symlink()
    shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
    kind = random.randrange(8)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to(path.name)
    elif kind == 2:
        path.symlink_to(
            random.choice(["nothing", "..", "/dev/zero", "/dev/null", "/proc/self/mem", ".", "../.."])
        )
    elif kind == 3:
        os.mkfifo(path)
    elif kind == 4:
        path.write_bytes(b"")
    elif kind == 5:
        path.write_bytes(random.randbytes(100))
    elif kind == 6:
        path.mkdir()
        (path / "x").write_text("x")


def _changed_weights(random: Random, content: bytes) -> bytes:
    """Change the header of a safetensors file or some of its values."""
    (length,) = struct.unpack("<Q", content[:8])
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
    kind = random.random()
    if kind < 0.6:
        text = mutate.text_of(mutate.structure(random, header, mutate.changes(random)))
        return struct.pack("<Q", len(text)) + text + values
    if kind < 0.7:
        text = mutate.flipped(random, content[8 : 8 + length], mutate.changes(random))
        return struct.pack("<Q", len(text)) + text + values
    if kind < 0.8:
        return (
            struct.pack("<Q", random.choice([0, 1, length + 1, length - 1, 2**31, 2**63, 2**64 - 1]))
            + content[8:]
        )
    odd = random.choice([float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 1e-40, 0.0])
    start = 4 * random.randrange(len(values) // 4)
    count = random.choice([1, 10, len(values) // 4])
    patch = (struct.pack("<f", odd) * count)[: len(values) - start]
    return content[: 8 + length] + values[:start] + patch + values[start + len(patch) :]


def gguf(random: Random, box: Box) -> list[list[str]]:
    """A GGUF file with bytes changed in its header, metadata, tensor table or values."""
    content = box.base.gguf(random.choice(ARCHITECTURES)).read_bytes()
    for _ in range(mutate.changes(random)):
        content = _changed_gguf(random, content)
    file = box.put("model.gguf", content)
    if random.random() < 0.03:
        _replace(random, file)
    path = box.put_recipe(box.base.recipe(teacher={"model": str(file), "dtype": "float32"}))
    return [[random.choice(["run", "convert"]), str(path), "--dry-run"], ["convert", str(path)]][
        random.randrange(2) :
    ]


def _changed_gguf(random: Random, content: bytes) -> bytes:
    table = content.rfind(b"blk.") + 100
    head = content[:table]
    kind = random.random()
    if kind < 0.2:
        # the numbers at the beginning: magic, version, counts
        at = random.choice([0, 4, 8, 16])
        return (
            content[:at]
            + struct.pack("<Q", random.choice([0, 1, 2, 5, 2**32, 2**63, 2**64 - 1]))
            + content[at + 8 :]
        )
    if kind < 0.6:
        # the bytes after a name: type, length and value of a metadata key, shape and type of a tensor
        words = [b"llama.", b"qwen", b"general.", b"tokenizer.", b"blk.", b"token_embd", b"output_norm"]
        found = head.find(random.choice(words), random.randrange(max(1, len(head))))
        at = max(found, 24) + random.choice([0, 10, 20, 25, 30, 35, 40])
        number = random.choice([0, 1, 2, 3, 4, 8, 9, 12, 255, 2**31, 2**32 - 1])
        patch = struct.pack("<I", number)[: random.choice([1, 4])]
        return content[:at] + patch + content[at + len(patch) :]
    if kind < 0.85:
        return mutate.flipped(random, head) + content[table:]
    if kind < 0.95:
        return head + mutate.flipped(random, content[table:])
    return content[: random.randrange(len(content))]


_ROWS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": f"{i} stones under {i * i} bridges"} for i in range(30)],
    "messages": [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": f"A number, {i}."},
            ]
        }
        for i in range(30)
    ],
    "prompt_completion": [{"prompt": f"What is {i}?", "completion": f"A number, {i}."} for i in range(30)],
}
_EXTENSIONS = [
    "json",
    "jsonl",
    "jsonl",
    "jsonl",
    "csv",
    "tsv",
    "txt",
    "parquet",
    "jsonl.gz",
    "json.gz",
    "csv.gz",
]


def data(random: Random, box: Box) -> list[list[str]]:
    """Files of rows with odd rows or odd bytes, in every kind of file."""
    form = random.choice(list(_ROWS))
    rows: list[Any] = [dict(row) for row in _ROWS[form]]
    for _ in range(random.choice([1, 2, 5, 30])):
        at = random.randrange(len(rows))
        rows[at] = mutate.structure(random, _ROWS[form][at], mutate.changes(random))
    extension = random.choice(_EXTENSIONS)
    content = _table(random, rows, extension.removesuffix(".gz"))
    if random.random() < 0.35:
        content = mutate.flipped(random, content, mutate.changes(random))
    if extension.endswith(".gz"):
        content = gzip.compress(content)
        if random.random() < 0.3:
            content = mutate.flipped(random, content)
    file = box.put(f"rows.{extension}", content)
    if random.random() < 0.04:
        _replace(random, file)
    source: dict[str, Any] = {"path": str(file), "format": form}
    if random.random() < 0.2:
        source["path"] = random.choice(
            [str(box.given), str(box.given / "*"), str(box.given / "**" / "rows*")]
        )
    if random.random() < 0.1:
        source |= random.choice(
            [{"shuffle": False}, {"limit": 5}, {"split": "test"}, {"column": "x"}, {"streaming": True}]
        )
    stages = {"distill": box.base.recipe()["stages"]["distill"] | {"steps": 1}}
    content = box.base.recipe(data={"text": source}, stages=stages, eval={"tasks": []})
    (recipes := box.root / "recipes").mkdir()
    (path := recipes / "recipe.yaml").write_bytes(as_yaml(content))
    return random.choice(
        [[["data", str(path)], ["run", str(path)]], [["data", str(path), "-n", "40"]], [["run", str(path)]]]
    )


def _table(random: Random, rows: list[Any], kind: str) -> bytes:
    """Write rows as a file of one kind."""
    if kind == "json":
        content: Any = rows if random.random() < 0.9 else mutate.structure(random, rows)
        return mutate.text_of(content, newlines=random.random() < 0.5)
    if kind == "jsonl":
        return b"\n".join(map(mutate.text_of, rows)) + b"\n" * random.choice([0, 1, 1, 3])
    objects = [row for row in rows if isinstance(row, dict)]
    if kind == "parquet":
        return _parquet(objects)
    if kind == "txt":
        return "\n".join(str(row.get("text", row))[:10_000] for row in objects).encode(
            "utf-8", "surrogatepass"
        )
    names = sorted({name for row in objects for name in row if isinstance(name, str)})
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t" if kind == "tsv" else ",")
    writer.writerow(names)
    for row in objects:
        cells = [row.get(name, "") for name in names]
        writer.writerow([c if isinstance(c, str) else mutate.text_of(c).decode() for c in cells])
    return out.getvalue().encode("utf-8", "surrogatepass")


def _parquet(objects: list[dict[str, Any]]) -> bytes:
    """Write rows as parquet; a column whose values have no common type becomes text."""
    names = list(dict.fromkeys(name for row in objects for name in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in objects]
        key = str(name).encode("utf-8", "replace").decode()
        try:
            columns[key] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError, RecursionError, UnicodeError):
            columns[key] = pyarrow.array([mutate.text_of(value).decode() for value in values])
    out = io.BytesIO()
    try:
        pyarrow.parquet.write_table(pyarrow.table(columns), out)
    except (pyarrow.ArrowException, RecursionError):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"] * 20}), out)
    return out.getvalue()


_TASKS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "choice": (
        {"kind": "multiple_choice", "prompt": "{question}\n{options}", "answer": "letter", "gold": "text"},
        [{"question": f"Colour {i}?", "options": ["red", "blue"], "gold": "red"} for i in range(4)],
    ),
    "index": (
        {
            "kind": "multiple_choice",
            "prompt": ASK,
            "fields": {"options": "a.b", "gold": "answer"},
            "gold": "index",
        },
        [{"question": f"Colour {i}?", "a": {"b": ["red", "blue"]}, "answer": 1} for i in range(4)],
    ),
    "constant": (
        {"kind": "multiple_choice", "prompt": ASK, "options": ["yes", "no"], "metric": "accuracy_per_token"},
        [{"question": f"Is {i} even?", "gold": "yes"} for i in range(4)],
    ),
    "numeric": (
        {"kind": "numeric", "prompt": ASK, "gold_after": "####", "stop": ["\n"]},
        [{"question": f"{i} + 1?", "gold": f"so #### {i + 1}", "distractors": ["7", "9"]} for i in range(4)],
    ),
    "exact": (
        {"kind": "exact_match", "prompt": ASK, "stop": ["\n"]},
        [{"question": f"Say {i}", "gold": f"{i}"} for i in range(4)],
    ),
}


def tasks(random: Random, box: Box) -> list[list[str]]:
    """Task files, items and open questions."""
    task, items = _TASKS[random.choice(list(_TASKS))]
    task = {"name": "mine", "items": "items.jsonl", "max_new_tokens": 3, **task}
    questions = [{"question": "Why?"}, {"question": "Who?"}]
    part = random.random()
    text = as_yaml(mutate.structure(random, task, mutate.changes(random)) if part < 0.5 else task)
    rows = [mutate.text_of(row) for row in items]
    if part > 0.45:
        at = random.randrange(len(rows))
        rows[at] = mutate.text_of(mutate.structure(random, items[at], mutate.changes(random)))
    lines = b"\n".join(rows)
    asked = b"\n".join(
        map(mutate.text_of, questions if part < 0.8 else mutate.structure(random, questions, 2) or [1])
    )
    if random.random() < 0.1:
        text = mutate.flipped(random, text)
    if random.random() < 0.15:
        lines = mutate.flipped(random, lines, mutate.changes(random))
    if random.random() < 0.05:
        asked = mutate.flipped(random, asked)
    file, item_file = box.put("mine.yaml", text), box.put("items.jsonl", lines)
    question_file = box.put("asked.jsonl", asked)
    if random.random() < 0.06:
        _replace(random, random.choice([file, item_file, question_file]))
    ask = ["--questions", str(question_file)] if random.random() < 0.4 else []
    score = ["eval", str(box.base.teacher()), "--tasks", str(file), *ask, "--limit", "2", "--out", "scores"]
    section = {"tasks": [str(file)], "questions": str(question_file), "question_tokens": 2}
    path = str(box.put_recipe(box.base.recipe(eval=section)))
    return random.choice([[["recipe", "check", path]], [score], [score, ["recipe", "check", path], score]])


def run_files(random: Random, box: Box) -> list[list[str]]:
    """A finished or an interrupted run, with files of it changed, replaced or gone."""
    name = random.choice(["finished", "finished", "stopped"])
    shutil.copytree(box.base.root / name / "runs", box.cwd / "runs", symlinks=True)
    run = box.cwd / "runs" / "tiny"
    found = sorted(path for path in (box.cwd / "runs").rglob("*") if not path.name.endswith((".py", ".lock")))
    touched: list[Path] = []
    for _ in range(random.choice([1, 1, 2, 4])):
        small = [path for path in found if path.suffix in (".json", ".jsonl", ".yaml", ".csv", ".md")]
        path = random.choice(random.choice([found, small, small]))
        if not os.path.lexists(path):
            continue
        touched.append(path)
        _change_run_file(random, path)
    # a changed recipe may ask for days of work
    again = any(path.name in ("recipe.yaml", "tiny") for path in touched)
    recipe_file = box.put_recipe(box.base.recipe(output=str(run.parent)))
    one = [
        ["report", str(run)],
        ["report", str(run), "--json"],
        ["report", str(run), str(run)],
        ["recipe", "show", str(run)],
        ["recipe", "diff", str(recipe_file), str(run)],
        ["run", str(run), "--dry-run"],
    ]
    long = [[word, str(recipe_file)] for word in ("run", "eval", "distill", "convert")]
    # the recipe in the run folder names the folder that the copy was made from
    long += [] if again else [[word, str(run), f"output={run.parent}"] for word in ("run", "eval", "distill")]
    return [random.choice(one), random.choice(long), ["report", str(run)]][: random.choice([1, 2, 3])]


def _change_run_file(random: Random, path: Path) -> None:
    if path.is_symlink() or path.is_dir() or random.random() < 0.15:
        _replace(random, path)
    elif path.suffix == ".jsonl" and random.random() < 0.7:
        lines = path.read_bytes().splitlines() or [b"{}"]
        at = random.randrange(len(lines))
        lines[at] = mutate.text_of(mutate.structure(random, json.loads(lines[at]), mutate.changes(random)))
        path.write_bytes(b"\n".join(lines) + b"\n" * random.choice([0, 1]))
    elif path.suffix == ".yaml" and random.random() < 0.7:
        path.write_bytes(
            as_yaml(mutate.structure(random, yaml.safe_load(path.read_bytes()), mutate.changes(random)))
        )
    else:
        _change_file(random, path)


AREAS: dict[str, Callable[[Random, Box], list[list[str]]]] = {
    "recipe": recipe,
    "overrides": overrides,
    "command_line": command_line,
    "checkpoint": checkpoint,
    "gguf": gguf,
    "data": data,
    "tasks": tasks,
    "run_files": run_files,
}
