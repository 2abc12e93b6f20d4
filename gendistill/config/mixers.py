"""The section ``student.mixers``: one section per kind of mixer with settings, made from the catalogue."""

from __future__ import annotations

import functools
import json
from typing import Annotated, Any, Self, get_type_hints

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, create_model, model_validator
from pydantic_core import CoreSchema, core_schema

from gendistill.anatomy.mixers import MIXERS
from gendistill.anatomy.settings import Rule, rules
from gendistill.config.base import Affects, Section


class MixerSection(Section):
    """Settings of one kind of mixer."""

    @property
    def settings(self) -> Any:
        """The settings as the class that the kind's spec names."""
        raise NotImplementedError


class MixersConfig(Section):
    """One section per kind of mixer; kept attention (``full``) has no settings.

    The kinds are those of the catalogue at the moment of reading, so that a mixer that somebody adds has its section.
    What is made or validated is therefore an instance of :func:`mixers_section`.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        made: Any = mixers_section() if cls is MixersConfig else cls
        return super().__new__(made)

    def of(self, kind: str) -> Any:
        """Return the settings of a kind, as the class that its spec names; None if it has none."""
        section = getattr(self, kind, None)
        return None if section is None else section.settings

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if cls is not MixersConfig:
            return handler(source)
        serialize = core_schema.plain_serializer_function_ser_schema
        return core_schema.with_info_plain_validator_function(
            _read, serialization=serialize(_dump, info_arg=True)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        if cls is not MixersConfig:
            return handler(core_schema)
        section = mixers_section()
        section.model_rebuild()
        return handler(section.__pydantic_core_schema__)


def _read(value: Any, info: core_schema.ValidationInfo) -> MixersConfig:
    section = mixers_section()
    if info.mode == "json":  # as everywhere in a recipe, which is read as strict JSON
        return section.model_validate_json(json.dumps(value), strict=True)
    return section.model_validate(value.model_dump() if isinstance(value, MixersConfig) else value)


def _dump(value: MixersConfig, info: core_schema.SerializationInfo) -> dict[str, Any]:
    return value.model_dump(mode=info.mode)


def mixers_section() -> type[MixersConfig]:
    """Return the section with one field per kind in the catalogue that has settings."""
    kinds = ((kind, spec.settings) for kind, spec in sorted(MIXERS.items()) if spec.settings is not None)
    return _mixers_section(tuple(kinds))


@functools.cache
def _mixers_section(kinds: tuple[tuple[str, type], ...]) -> type[MixersConfig]:
    sections = {kind: mixer_section(settings) for kind, settings in kinds}
    fields: dict[str, Any] = {kind: (section, section()) for kind, section in sections.items()}
    about = str(MixersConfig.__doc__).partition("\n")[0]
    return create_model("MixersConfig", __base__=MixersConfig, __doc__=about, **fields)


@functools.cache
def mixer_section(settings: type) -> type[MixerSection]:
    """Make the section of a settings class: the same fields, with the same bounds and defaults."""
    hints, known = get_type_hints(settings), rules(settings)
    fields: dict[str, Any] = {name: _field(hints[name], known[name], settings, name) for name in known}

    def make(self: Any) -> Any:
        return settings(**{name: getattr(self, name) for name in known})

    def check(self: Any) -> Any:
        make(self)  # what its fields rule together, it says itself
        return self

    name = f"{settings.__name__.removesuffix('Settings')}Config"
    validators: dict[str, Any] = {"check": model_validator(mode="after")(check)}
    section = create_model(
        name, __base__=MixerSection, __doc__=settings.__doc__, __validators__=validators, **fields
    )
    section.settings = property(make)  # pyright: ignore[reportAttributeAccessIssue]
    return section


def _field(annotation: Any, rule: Rule, settings: type, name: str) -> tuple[Any, Any]:
    default = settings.__dataclass_fields__[name].default
    marked = annotation
    if rule.affects != "result":
        marked = Annotated[annotation, Affects[rule.affects.upper()]]
    return marked, Field(
        default=default, description=rule.about or None, ge=rule.ge, gt=rule.gt, le=rule.le, lt=rule.lt
    )
