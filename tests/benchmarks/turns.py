"""Contenders that take turns: the best turn of each is compared, and the spread says how much one turn differs."""

from collections.abc import Sequence


def over(seconds: Sequence[float], others: Sequence[float]) -> float:
    """How many times as fast the first is as the other, each in its best turn."""
    return min(others) / min(seconds)


def spread(seconds: Sequence[float], others: Sequence[float]) -> str:
    """The same in each turn by itself: the lowest and the highest."""
    ratios = sorted(other / own for own, other in zip(seconds, others, strict=True))
    return f"{ratios[0]:.3g} to {ratios[-1]:.3g}"
