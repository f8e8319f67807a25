"""The one thread that uses the model: texts wait in a bounded queue, join the batch, and are told piece by piece."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.serve.limits import Limits
from launch.serve.metrics import Metrics

if TYPE_CHECKING:
    from pipeline.generation.decoder import Decoder, Piece, Request, Row

FIRST_GUESS_SECONDS = 1.0
"""What a text takes, before one was measured."""


class Busy(Exception):
    """The queue is full.

    Attributes:
        retry_seconds: when a place may be free again.
    """

    def __init__(self, asked: int, free: int, retry_seconds: int) -> None:
        super().__init__(f"texts asked for: {asked}, free places: {free}; try again in {retry_seconds} s")
        self.retry_seconds = retry_seconds


@dataclass(eq=False)
class Job:
    """One text that a client waits for.

    Attributes:
        deliver: called in the worker's thread with each piece; with None where the text cannot be finished.
    """

    request: Request
    deliver: Callable[[Piece | None], None]
    cancelled: bool = False


class Worker(threading.Thread):
    """Decodes what is submitted until it is closed; a daemon, so that nothing hangs on it."""

    def __init__(self, decoder: Decoder, limits: Limits, metrics: Metrics) -> None:
        super().__init__(name="decoding", daemon=True)
        self._decoder, self._limits, self._metrics = decoder, limits, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: list[tuple[Row, Job, float]] = []
        self._closing = False
        self._text_seconds = FIRST_GUESS_SECONDS
        metrics.gauges = lambda: {"waiting": len(self._waiting), "decoding": len(self._running)}

    def submit(self, jobs: Sequence[Job]) -> None:
        """Puts all of them into the queue, or none.

        Raises:
            Busy: so many may not wait.
        """
        with self._changed:
            free = self._limits.max_waiting + max(0, self._limits.max_batch - len(self._running)) - len(self._waiting)
            if len(jobs) > free:
                before = len(self._waiting) + len(jobs)
                seconds = min(60, max(1, round(self._text_seconds * before / self._limits.max_batch)))
                raise Busy(len(jobs), max(0, free), seconds)
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Their places are free again, at once or after the step under way."""
        with self._changed:
            for job in jobs:
                job.cancelled = True
            self._waiting = deque(job for job in self._waiting if not job.cancelled)

    def close(self) -> None:
        """Ends the thread after its step; texts that are not finished are told so."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join()

    def run(self) -> None:
        going = True
        while going:
            try:
                going = self._next()
                self._step()
            except Exception:
                traceback.print_exc(file=sys.stderr)
                self._metrics.add("failures_total")
                self._give_up()
        self._give_up()

    def _next(self) -> bool:
        """Waits for something to do; cancelled rows leave, waiting ones join. False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._running)
            if self._closing:
                return False
            self._decoder.leave(row for row, job, _ in self._running if job.cancelled)
            self._running = [item for item in self._running if not item[1].cancelled]
            room = self._limits.max_batch - len(self._running)
            joining = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        for job in joining:
            try:
                self._running.append((self._decoder.join(job.request), job, time.monotonic()))
            except Exception:
                traceback.print_exc(file=sys.stderr)
                self._metrics.add("failures_total")
                job.deliver(None)
        return True

    def _step(self) -> None:
        """One token more for every row."""
        if self._closing or not self._running:
            return
        pieces = {id(row): piece for row, piece in self._decoder.step()}
        self._metrics.add("steps_total")
        self._metrics.add("generated_tokens_total", len(pieces))
        going_on, now = [], time.monotonic()
        for row, job, since in self._running:
            piece = pieces[id(row)]
            if piece.finish_reason is None:
                going_on.append((row, job, since))
            else:
                self._text_seconds += 0.1 * (now - since - self._text_seconds)
                self._metrics.add("text_seconds_sum", now - since)
                self._metrics.add("text_seconds_count")
            job.deliver(piece)
        self._running = going_on

    def _give_up(self) -> None:
        """Nothing that was begun, or waits for a thread that ends, will be finished."""
        with self._changed:
            jobs = [job for _, job, _ in self._running]
            if self._closing:
                jobs += self._waiting
                self._waiting.clear()
            self._running = []
        self._decoder.clear()
        for job in jobs:
            job.deliver(None)
