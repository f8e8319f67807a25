"""Resources that drop out while training goes on: speed, data, one rank. Each is said once, until it is over.

No number of the model depends on it, and nothing is done about it: a person should look.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.metrics.duration import duration
from pipeline.metrics.step_times import StepSeconds, find_straggler

SLOW_PART = 0.5
"""Below this part of the usual throughput a run is slow."""
WAITING_PART = 0.1
"""Above this part of a step a run waits for its data."""
LASTING_SECONDS = {"throughput": 600.0, "data": 60.0, "rank": 60.0}
"""So long something must last, in seconds of training, before it is said."""
USUAL_READINGS = 128
"""The usual throughput is the median of so many readings at which it was not low."""
FEWEST_READINGS = 5
"""Before so many are known, nothing is usual."""


@dataclass(frozen=True)
class Alarm:
    """Something that a person should look at.

    Attributes:
        kind: throughput, data or rank.
        text: one line.
    """

    kind: str
    text: str


@dataclass
class _Episode:
    """Since when something lasts, and whether it was said; it is over at the second reading in a row without it."""

    what: str
    since: float
    said: bool = False
    missed: bool = False


@dataclass
class ResourceWatch:
    """Hears how each log interval went. What this start has seen is all that it knows.

    Args:
        seconds: of training before the first interval.
    """

    seconds: float = 0.0
    _rates: deque[float] = field(default_factory=lambda: deque(maxlen=USUAL_READINGS))
    _episodes: dict[str, _Episode] = field(default_factory=dict)

    def look(self, seconds: float, tokens_per_second: float, by_rank: Sequence[StepSeconds]) -> list[Alarm]:
        """What has now lasted long enough to be said, and was not said before.

        Args:
            seconds: of training up to the end of the interval.
            by_rank: as `StepTimes.read` gives them.
        """
        before, self.seconds = self.seconds, seconds
        found = {
            "throughput": self._low(tokens_per_second),
            "data": _waits(by_rank),
            "rank": _late(by_rank),
        }
        return [alarm for kind, what in found.items() if (alarm := self._judge(kind, what, before))]

    def _low(self, rate: float) -> tuple[str, str] | None:
        if len(self._rates) >= FEWEST_READINGS and rate < SLOW_PART * (usual := statistics.median(self._rates)):
            return "", f"throughput is {rate:,.0f} tokens/s, {rate / usual:.0%} of the usual {usual:,.0f}"
        self._rates.append(rate)
        return None

    def _judge(self, kind: str, what: tuple[str, str] | None, before: float) -> Alarm | None:
        """
        Args:
            what: what it is about, so that another rank is another episode, and words; None where all is well.
            before: seconds of training up to the interval.
        """
        episode = self._episodes.get(kind)
        if what is None:
            if episode and episode.missed:
                del self._episodes[kind]
            elif episode:
                episode.missed = True
            return None
        if episode is None or episode.what != what[0]:
            episode = self._episodes[kind] = _Episode(what[0], before)
        episode.missed = False
        lasted = self.seconds - episode.since
        if episode.said or lasted < LASTING_SECONDS[kind]:
            return None
        episode.said = True
        return Alarm(kind, f"{what[1]}, for {duration(lasted)} now")


def _waits(by_rank: Sequence[StepSeconds]) -> tuple[str, str] | None:
    """Of all ranks, since one that has its data soon then waits for the one that has not."""
    data, step = max(rank.phases[0] for rank in by_rank), max(rank.whole for rank in by_rank)
    if data <= WAITING_PART * step:
        return None
    return "", f"data is waited for: {data:.2f} s of the {step:.2f} s of a step, {data / step:.0%}"


def _late(by_rank: Sequence[StepSeconds]) -> tuple[str, str] | None:
    slow = find_straggler(by_rank)
    return (str(slow.rank), str(slow)) if slow else None
