"""The base of every section of settings, and how wrong values are told to a person."""

import reprlib
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

MOST = 2**40
"""Of steps, samples, tokens: more than any run counts, and safe in 64 bits when multiplied by another count."""
LONGEST_SECONDS = 1e8
"""Three years."""
LARGEST_SEED = 2**31 - 1
"""Room for the rank, which is added, below numpy's 2^32."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def of_its_own_kind(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = other_kind(cls.model_fields[str(info.field_name)].annotation, value)
        if wanted:
            raise ValueError(wanted)
        return value


def other_kind(annotation: Any, value: Any) -> str | None:
    """What is wanted, where pydantic would read `value` as it: `yes` as 1, `"7"` as 7, `1` or `"on"` as true."""
    kinds = set(_kinds(annotation))
    numbers = kinds & {int, float}
    if isinstance(value, bool) and numbers and bool not in kinds:
        return "must be a number, not true or false"
    if isinstance(value, str) and numbers and str not in kinds and value != "auto":
        return "must be a number, not text"
    if Literal["auto"] in kinds and bool in kinds:
        return None if isinstance(value, bool) or value == "auto" else "must be true, false or auto"
    if bool in kinds and not numbers and isinstance(value, int | float | str) and not isinstance(value, bool):
        return "must be true or false"
    if isinstance(value, float) and numbers == {int} and abs(value) >= 2**63:
        return f"must be a whole number below {2**63}"
    if value == "" and Path in kinds:
        return "must be a path, not empty"
    return None


def plain(message: str) -> str:
    """A message of pydantic's as a person would say it."""
    message = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if "exceeded maximum size" in message:
        return f"must be a whole number below {2**63}"
    return message[0].lower() + message[1:]


def _kinds(annotation: Any) -> list[Any]:
    """The types that a field takes; what stands inside a list or a tuple is none of them."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def short(value: Any) -> str:
    """As Python writes it, cut in the middle where it is long."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlist = _SHORT.maxtuple = 8
