"""The base of every section of settings, and how wrong values are told to a person."""

import re
import reprlib
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationInfo, field_validator

MOST = 2**40
"""Of steps, samples, tokens: more than any run counts, and safe in 64 bits when multiplied by another count."""
LONGEST_SECONDS = 1e8
"""Three years."""
LARGEST_SEED = 2**31 - 1
"""Room for the rank, which is added, below numpy's 2^32."""


class Unknown(Exception):
    """What was asked for is wrong or missing, which is said elsewhere: what follows from it cannot be told yet.

    Attributes:
        what: a setting, such as `training.max_steps`, or a part of a run, such as `the dataset`.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


class Section(BaseModel):
    """Settings. One made by `right_part` lacks those that are wrong, and raises `Unknown` where one is asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    _name: str = PrivateAttr("")
    """As a run file calls it; known where a setting may be missing."""

    @classmethod
    def right_part(cls, values: Mapping[Any, Any], wrong: Collection[str], name: str) -> Self:
        """The section without the settings in `wrong`; each of the others has been found right."""
        right = {key: value for key, value in values.items() if key in cls.model_fields and key not in wrong}
        needed = {key: field for key, field in cls.model_fields.items() if field.is_required() and key not in right}
        made = cls.model_validate({**{key: (field.examples or [None])[0] for key, field in needed.items()}, **right})
        for key in (*wrong, *needed):
            made.__dict__.pop(key, None)
        made._name = f"{name}." if name else ""
        return made

    if not TYPE_CHECKING:  # a type checker would take any name

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise Unknown(f"{self._name}{name}")
            return super().__getattr__(name)

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
    message = re.sub(r", (\S+) or \1$", r" or \1", message)  # an enumeration with two names for its last value
    return message[0].lower() + message[1:]


def counted(count: int, word: str) -> str:
    """1 rank, 1,024 ranks."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


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
