"""Something happens to a rank at a named moment of a run: a signal, or sleep without end.

The moment is a phase of the run's clock, so that no product code has to know of it.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from pipeline.distributed import stop
from pipeline.distributed.clock import Clock


@dataclass(frozen=True)
class Moment:
    """
    Attributes:
        place: a phase as `Clock.now` names it, such as `backward` or `evaluation/agreement`; `start`.
        count: it happens when the place is entered for the so-manieth time.
        rank: to whom.
        do: names of signals that the rank sends itself; `sleep`: it never moves again; `pause`: for three seconds;
            `maps`: it prints which files it has mapped into its memory.
        every: from then on, each time again.
        slow: `step` and `save`: what has been measured to take for ever, and fits into no grace.
    """

    place: str
    count: int = 1
    rank: int = 1
    do: tuple[str, ...] = ("SIGTERM",)
    slow: tuple[str, ...] = ()
    every: bool = False


@contextmanager
def happening(moment: Moment, rank: int) -> Iterator[None]:
    original, count, last = Clock.move, 0, ""

    def move(self: Clock, name: str | None = None) -> None:
        nonlocal count, last
        original(self, name)
        inward = name != "training" and not last.startswith(f"{name}/")  # not coming back out of something
        last = self.now
        if self.now == moment.place and inward and rank == moment.rank:
            count += 1
            if count == moment.count or (moment.every and count > moment.count):
                act(moment.do)

    def plan(left: float, step: float, save: float) -> Any:
        return stop.plan(left, step * 1e9 if "step" in moment.slow else step, 1e9 if "save" in moment.slow else save)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(Clock, "move", move))
        if moment.slow:
            patches.enter_context(mock.patch("pipeline.distributed.grace.plan", plan))
        yield


def act(what: tuple[str, ...]) -> None:
    for name in what:
        if name in ("sleep", "pause"):
            time.sleep(100_000 if name == "sleep" else 3)
        elif name == "maps":
            print(Path("/proc/self/maps").read_text(), flush=True)
        else:
            os.kill(os.getpid(), signal.Signals[name])
