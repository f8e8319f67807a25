"""Long tables of variants: a test run takes those that show each guarantee once, `make torture ARGS="variants"` all."""

import os
from collections.abc import Iterable
from typing import TypeVar

ALL = "GLOBALLOCAL_TEST_VARIANTS"
"""Environment variable: `all` takes every variant."""

T = TypeVar("T")


def some_of(few: Iterable[T], others: Iterable[T]) -> list[T]:
    """The few, and the others where all are asked for."""
    return [*few, *others] if os.environ.get(ALL) == "all" else [*few]
