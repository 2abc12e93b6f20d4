"""The strict base of every recipe section, and what each of its settings affects."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, Union

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class Affects(IntEnum):
    """What changes with a setting. Unmarked settings affect the result.

    A setting is marked in its annotation, as in ``batch_size: Annotated[int, Affects.NOTHING]``.

    Attributes:
        NOTHING: Logs, files, memory and speed; finished work stays valid.
        CONTENT: It names something outside the recipe. What that holds affects the result, its name does not.
        ARITHMETIC: Rounding alone.
        RESULT: The data or the mathematics.
    """

    NOTHING = 0
    CONTENT = 1
    ARITHMETIC = 2
    RESULT = 3


class AddedLater:
    """The mark of a setting that came after recipes had been run: at its default it stands in no identity.

    So what was finished before there was such a setting stays finished.
    """


@dataclass(frozen=True, slots=True, eq=False)
class OneWordOf:
    """The words that a text may be, as a mark in its annotation.

    A ``Literal`` whose words are looked up when a recipe is read: other packages may have added some by then.

    Attributes:
        words: Usually a mapping from the words to what they mean.
    """

    words: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._checked)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.words)}

    def _checked(self, value: Any) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": " or ".join(map(repr, self.words))}
        )


class Section(BaseModel):
    """A section of a recipe: it rejects unknown keys, and stays unchanged once it is read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False, defer_build=True
    )


class OneSectionOf:
    """Annotation of a setting that takes one of several sections, told apart by their ``kind``.

    A section that is added to the mapping later is accepted from then on.

    Args:
        sections: Kind to section; each has ``kind: Literal[...]`` of its own.
    """

    def __init__(self, sections: Mapping[str, type[Section]]) -> None:
        self.sections = sections

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        known = dict(self.sections)

        def read(value: Any, read_known: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
            kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
            if self.sections.get(str(kind)) is known.get(str(kind)):
                return read_known(value)
            late = TypeAdapter(_union(self.sections))
            # recipes are read from strict JSON, of which only the values arrive here
            if info.mode == "json":
                return late.validate_json(json.dumps(value), strict=True)
            return late.validate_python(value)

        return core_schema.with_info_wrap_validator_function(
            read, handler.generate_schema(_union(known)), serialization=core_schema.simple_ser_schema("any")
        )


def _union(sections: Mapping[str, type[Section]]) -> Any:
    return Annotated[Union[tuple(sections.values())], Field(discriminator="kind")]  # noqa: UP007


def affects(section: type[Section], name: str) -> Affects:
    """Say what a field of a section affects."""
    marks = [mark for mark in section.model_fields[name].metadata if isinstance(mark, Affects)]
    return marks[0] if marks else Affects.RESULT


def identity(section: Section, *, at_least: Affects = Affects.ARITHMETIC) -> dict[str, Any]:
    """Return the settings that decide what comes out, as plain data.

    Two sections with equal identities give equal results, provided that what their ``CONTENT`` settings name holds
    the same. Marks of finished steps, the lock of a stage and the comparison of recipes all use this.

    Args:
        section: A section of a recipe, with everything in it.
        at_least: The weakest effect that counts; ``RESULT`` leaves out what only rounds differently.
    """
    kept: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if affects(type(section), name) < at_least or _is_left_out(field, value):
            continue
        if _holds_sections(value):
            kept[field.alias or name] = _identity_of(value, at_least)
        else:
            kept[field.alias or name] = section.model_dump(mode="json", include={name})[name]
    return kept


def affects_at(section: Section, path: Sequence[Any]) -> Affects:
    """Say what the setting at a path of names, as written, affects; a path that leads nowhere affects the result."""
    value: Any = section
    mark = Affects.RESULT
    for step in path:
        if isinstance(value, Section):
            names = {field.alias or name: name for name, field in type(value).model_fields.items()}
            if step not in names:
                return Affects.RESULT
            mark = affects(type(value), names[step])
            value = getattr(value, names[step])
        elif isinstance(value, dict):
            value = value.get(step)
    return mark


def _identity_of(value: Any, at_least: Affects) -> Any:
    if isinstance(value, Section):
        return identity(value, at_least=at_least)
    if isinstance(value, dict):
        return {key: _identity_of(each, at_least) for key, each in value.items()}
    return [_identity_of(each, at_least) for each in value]


def _is_left_out(field: FieldInfo, value: Any) -> bool:
    return AddedLater in field.metadata and value == field.get_default(call_default_factory=True)


def _holds_sections(value: Any) -> bool:
    """Whether a value is a section, or a mapping or list of sections."""
    if isinstance(value, dict):
        return any(isinstance(each, Section) for each in value.values())
    return isinstance(value, Section) or (
        isinstance(value, tuple) and any(isinstance(each, Section) for each in value)
    )
