"""Which global batches steps read, and how much that is, where the first ones are smaller and some are left out."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

Whole = TypeVar("Whole", int, np.ndarray)

Ranges = tuple[tuple[int, int], ...]
"""Global batches left out: half-open [first, last) ranges, sorted, apart from each other; see `merge_ranges`."""


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Half-open ranges in any order → the fewest that cover the same numbers, sorted."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted((first, last) for first, last in ranges if first < last):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


def data_step(step: Whole, skipped: Ranges) -> Whole:
    """Which global batch optimizer step `step` reads: the step-th, from 0, that is not left out.

    Args:
        skipped: as `merge_ranges` returns them.
    """
    for first, last in skipped:  # each, from the lowest on, moves what has not come before it
        step = step + (step >= first) * (last - first)
    return step


def consumed(steps: Whole, each: int, warmup: Sequence[tuple[int, int]]) -> Whole:
    """Samples or tokens of the first `steps` global batches: `each` of them, behind a warm-up of (batches, of each)."""
    count, begin = steps * each, 0
    for length, of_each in warmup:
        smaller = np.clip(steps - begin, 0, length)
        count, begin = count - smaller * (each - of_each), begin + length
    return count if isinstance(steps, np.ndarray) else int(count)


def trained(step: int, each: int, warmup: Sequence[tuple[int, int]], skipped: Ranges = ()) -> int:
    """Samples or tokens that the first `step` steps train on, where they leave out what `data_step` does."""
    batch = data_step(step, skipped)
    before = [pair for pair in skipped if pair[1] <= batch]
    left_out = [consumed(last, each, warmup) - consumed(first, each, warmup) for first, last in before]
    return consumed(batch, each, warmup) - sum(left_out)
