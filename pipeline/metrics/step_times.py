"""Time by phase and by rank, throughput, and the rank that holds up the others."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.distributed.clock import Clock

PHASES = ("data", "forward", "backward", "step")
"""Of a training step, in their order, as the clock calls them."""


@dataclass(frozen=True)
class StepSeconds:
    """A rank's seconds per step.

    Attributes:
        phases: of each of `PHASES`.
        whole: of the whole step, all that lies between its phases included.
    """

    phases: tuple[float, ...]
    whole: float


@dataclass(frozen=True)
class RankMeasures:
    """What a rank adds to a log line.

    Attributes:
        device_bytes, host_bytes: most of its GPU so far; of its node's memory now.
        system: its node's meters, in one rank of each node.
    """

    seconds: StepSeconds
    device_bytes: int
    host_bytes: int
    node: str
    system: dict[str, float]


class StepTimes:
    """This rank's seconds per step, phase by phase, between two readings."""

    def __init__(self, clock: Clock, step: int) -> None:
        self.clock, self.step = clock, step
        self.marks = self._seconds()

    def _seconds(self) -> list[float]:
        return [self.clock.seconds.get(name, 0.0) for name in (*PHASES, "training")]

    def read(self, step: int) -> StepSeconds:
        """Means over the steps since the last reading."""
        now, steps = self._seconds(), step - self.step
        *phases, whole = [(a - b) / steps for a, b in zip(now, self.marks, strict=True)]
        self.marks, self.step = now, step
        return StepSeconds(tuple(phases), whole)


def times_per_step(by_rank: Sequence[StepSeconds]) -> dict[str, float]:
    """Metrics of the ranks' step times: means over the ranks, whose phases and `other` add up to the step."""
    step = sum(rank.whole for rank in by_rank) / len(by_rank)
    phases = [sum(column) / len(by_rank) for column in zip(*(rank.phases for rank in by_rank), strict=True)]
    named = dict(zip(("data", "forward", "backward", "optimizer"), phases, strict=True))
    parts = {"step": step, **named, "other": max(step - sum(phases), 0.0)}
    return {f"time/{name}_seconds": value for name, value in parts.items()}


@dataclass(frozen=True)
class Straggler:
    """The rank that holds up the others, and where."""

    rank: int
    phase: str
    seconds: float
    typical_seconds: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is slow in {self.phase}: {self.seconds:.2f} s per step, others "
            f"{self.typical_seconds:.2f} s"
        )


def find_straggler(by_rank: Sequence[StepSeconds]) -> Straggler | None:
    """The slowest rank, where what it is late by is 0.3 of a step and more.

    Whoever is late in one phase lets the others wait in a later one. So the slowest rank is that of the first phase
    whose spread over the ranks is at least half the largest.
    """
    columns = list(zip(*(rank.phases for rank in by_rank), strict=True))
    spreads = [max(column) - min(column) for column in columns]
    phase = next(index for index, spread in enumerate(spreads) if spread >= max(spreads) / 2)
    column = columns[phase]
    if spreads[phase] < 0.3 * max(sum(rank.phases) for rank in by_rank):
        return None
    typical = sorted(column)[(len(by_rank) - 1) // 2]
    return Straggler(column.index(max(column)), PHASES[phase], max(column), typical)


class Throughput:
    """Tokens per training second between two readings."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.tokens, self.mark = clock, 0, clock.seconds["training"]

    def reset(self) -> None:
        self.tokens, self.mark = 0, self.clock.seconds["training"]

    def read(self) -> float:
        now = self.clock.seconds["training"]
        rate = self.tokens / max(now - self.mark, 1e-9)
        self.tokens, self.mark = 0, now
        return rate
