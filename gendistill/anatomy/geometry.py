"""The geometry of a checkpoint that is to be converted, or the reason why it cannot be. Imports no torch."""

from __future__ import annotations

from typing import Any

from gendistill.anatomy.family import FAMILIES, Geometry, family_of, geometry_of
from gendistill.anatomy.full import FULL
from gendistill.errors import CheckpointError, RecipeError


def read_geometry(config: dict[str, Any], *, where: str = "student.from") -> Geometry:
    """Read the geometry of a teacher, or of a student that still has all its attention.

    Raises:
        CheckpointError: Unsupported family, converted layers, or heads that do not divide.
    """
    if config.get("model_type") == "gendistill":
        converted = [layer for layer, kind in enumerate(config.get("mixers") or ()) if kind != FULL.kind]
        if converted:
            raise CheckpointError(
                f"the checkpoint is a student whose layers {converted} are converted already",
                where=where,
                hint="convert from the pretrained teacher; a student may be the source while all layers are full",
            )
    if family_of(config) not in FAMILIES:
        raise CheckpointError(
            f'the model family "{family_of(config)}" cannot be converted; supported: {", ".join(FAMILIES)}',
            where=where,
            hint="choose a checkpoint of one of these families",
        )
    geometry = geometry_of(config)
    if geometry.num_heads % geometry.num_kv_heads:
        raise CheckpointError(
            f"{geometry.num_heads} query heads cannot share {geometry.num_kv_heads} key/value heads evenly",
            where=where,
            hint="check num_attention_heads and num_key_value_heads in config.json",
        )
    return geometry


def check_vocabulary(teacher_size: Any, student_size: int) -> None:
    """Reject a teacher whose distributions cannot be compared with the student's entry by entry.

    Raises:
        RecipeError: The vocabularies differ in size.
    """
    if teacher_size == student_size:
        return
    entries = f"{teacher_size:,}" if isinstance(teacher_size, int) else "an unknown number of"
    raise RecipeError(
        f"the teacher's vocabulary has {entries} entries, the student's {student_size:,}; "
        "the divergence compares them one by one",
        where="teacher.model and student.from",
        hint="choose a teacher with the student's tokenizer, or drop student.from",
    )
