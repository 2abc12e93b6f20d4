"""Settings of the engine as words on a command line, and what is compared with what. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import ValidationError

from gendistill.config.engine import EngineConfig
from gendistill.errors import RecipeError

# how processes share a stage is nothing to compare in one process
_OF_SEVERAL = ("parallel", "gather", "reshard")


def plain_value(name: str) -> Any:
    """Return what switches a setting of the engine off; None if it is not a switch.

    The first word of a choice is ``auto``, the second the plain way; the others are faster ones. A number of things
    done ahead is none, a yes is a no.
    """
    info = EngineConfig.model_fields[name]
    words = get_args(info.annotation)
    if name in _OF_SEVERAL or (words and words[0] != "auto"):
        return None
    plain = words[1] if words else type(info.default)() if isinstance(info.default, int) else info.default
    return None if plain == info.default else plain


SWITCHES = tuple(name for name in EngineConfig.model_fields if plain_value(name) is not None)
PLAIN = EngineConfig(**{name: plain_value(name) for name in SWITCHES})


def read_engine(settings: Sequence[str], base: EngineConfig | None = None, *, where: str) -> EngineConfig:
    """Read ``KEY=VALUE`` words.

    Args:
        settings: The words.
        base: What is not named stays as here.
        where: Option, for errors.
    Raises:
        RecipeError: A word of another form, or a value that is not allowed.
    """
    values = (base or EngineConfig()).model_dump()
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in values:
            raise RecipeError(
                f'"{setting}" is not a setting of the engine; there are {", ".join(values)}',
                where=where,
                hint=f"write KEY=VALUE, as in {SWITCHES[0]}={plain_value(SWITCHES[0])}",
            )
        values[name] = value
    try:
        return EngineConfig.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise RecipeError(
            f'{problem["loc"][0]}="{problem["input"]}": {problem["msg"]}',
            where=where,
            hint="correct the value",
        ) from error


def choose_engines(settings: Sequence[str], compared: Sequence[str] | None) -> dict[str, EngineConfig]:
    """Name the engines to time: the chosen one first, then each that differs from it.

    Args:
        settings: ``KEY=VALUE`` words of the chosen one.
        compared: For each further engine its differences, joined by commas; none of them: every switch off alone, then
            all; None: nothing is compared.
    """
    chosen = read_engine(settings, where="--engine")
    engines = {" ".join(settings) or "default": chosen}
    if compared is None:
        return engines
    if not compared:
        off = [f"{name}={_word(plain_value(name))}" for name in SWITCHES]
        compared = [*off, ",".join(off)] if len(off) > 1 else off
    for difference in compared:
        words = difference.split(",")
        engine = read_engine(words, chosen, where="--compare")
        name = "all off" if engine == PLAIN and len(words) > 1 else " ".join(words)
        if engine not in engines.values():
            engines[name] = engine
    return engines


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
