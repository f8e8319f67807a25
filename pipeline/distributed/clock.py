"""Seconds by phase, and the phase that a rank is in."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext


class Clock:
    """Seconds by phase over all starts of a run, and the phase that this process is in.

    Phases nest: `training` holds data, forward, backward, agreement and step, and is not charged for saving or
    evaluation. Every begin and end counts as a move. The watch (`watchdog.py`), another thread, reads all of it. An
    error that leaves a phase carries its name as `phase`.

    Attributes:
        now: the phase, a slash before what it holds: `forward`, `evaluation/agreement`.
        step: optimizer steps taken; None until this start has taken one.
        moves, moved_at: how many, and when the last one was (`time.monotonic`).
        annotate: called with a phase's name for a context around it; a profiler shows phases by it.
        start_seconds: of the parts of this start, in their order.

    Args:
        since: when this start began (`time.time`); now when absent.
    """

    OUTERMOST = ("start", "training")

    def __init__(self, since: float | None = None) -> None:
        self.seconds = {"training": 0.0, "evaluation": 0.0, "saving": 0.0}
        self.now = "start"
        self.step: int | None = None
        self.moves = 0
        self.moved_at = time.monotonic()
        self.annotate: Callable[[str], AbstractContextManager[object]] = nullcontext
        self.start_seconds: dict[str, float] = {}
        self._part_began = time.time() if since is None else since

    def end_part(self, name: str, at: float | None = None) -> None:
        """A part of the start ends, now or `at`, and the next one begins."""
        at = time.time() if at is None else at
        self.start_seconds[name], self._part_began = max(0.0, at - self._part_began), at

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer, start = self.now, time.perf_counter()
        self.move(name if outer in self.OUTERMOST else f"{outer}/{name}")
        try:
            with self.annotate(self.now):
                yield
        except Exception as error:
            if not hasattr(error, "phase"):  # the innermost one stays
                error.phase = self.now  # type: ignore[attr-defined]
            raise
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.move(outer)

    def move(self, name: str | None = None) -> None:
        """A place in the program that all ranks come to, the same number of times."""
        self.now = name or self.now
        self.moves += 1
        self.touch()

    def touch(self) -> None:
        """Something was done between two moves, by this rank alone: it does not stand still."""
        self.moved_at = time.monotonic()
