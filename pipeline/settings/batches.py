"""Counts of what steps consume, where the first ones consume less."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Whole = TypeVar("Whole", int, np.ndarray)


def consumed(steps: Whole, each: int, warmup: Sequence[tuple[int, int]]) -> Whole:
    """Samples or tokens of the first `steps` steps: `each` of them a step, behind a warm-up of (steps, of each)."""
    count, begin = steps * each, 0
    for length, of_each in warmup:
        smaller = np.clip(steps - begin, 0, length)
        count, begin = count - smaller * (each - of_each), begin + length
    return count if isinstance(steps, np.ndarray) else int(count)
