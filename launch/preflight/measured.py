"""Measured speeds of training, which `estimate`, the run files and docs/scaling.md reckon with.

After a measurement write its line here, and run `python -m tests.launch.test_scaling`, which makes those pages anew.
"""

import math
from dataclasses import dataclass

from pipeline.metrics.utilisation import PEAK_TERAFLOPS


@dataclass(frozen=True)
class Measured:
    """One measurement of a whole trainer, from its own log.

    Attributes:
        preset: of the model.
        card: a key of `PEAK_TERAFLOPS`.
        tokens_per_second: of one device.
        mfu: of the card's peak rate.
        date, commit, setup: when, with which code, how.
    """

    preset: str
    card: str
    tokens_per_second: float
    mfu: float
    date: str
    commit: str
    setup: str

    @property
    def flops_per_token(self) -> float:
        """The operations per token of the model that was measured."""
        return self.mfu * PEAK_TERAFLOPS[self.card] * 1e12 / self.tokens_per_second


MEASURED = (
    Measured("small", "H200", 909_000, 0.2316, "2026-11-27", "a3d237a", "1 GPU, ZeRO 2, bf16, 64 × 1,024 tokens"),
)

SAME_MODEL = 0.05
"""Operations per token may differ by so much between a preset and the model measured under its name."""


@dataclass(frozen=True)
class Expected:
    """An MFU to reckon with, and where it comes from."""

    mfu: float
    measured: bool
    source: str


def expected(preset: str, flops_per_token: float, card: str) -> Expected:
    """The speed measured for a preset and a card; else a guess, from the model measured that is nearest in size."""

    def distance(item: Measured) -> tuple[float, bool]:
        return abs(math.log(item.flops_per_token / flops_per_token)), item.card != card

    for item in MEASURED:
        if (item.preset, item.card) == (preset, card) and distance(item)[0] <= SAME_MODEL:
            return Expected(item.mfu, True, f"measured on {item.date} at {item.commit}: {item.setup}")
    near = min(MEASURED, key=distance)
    return Expected(near.mfu, False, f"a guess: as `{near.preset}` on one {near.card}; nothing nearer was measured")
