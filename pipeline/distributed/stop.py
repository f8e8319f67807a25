"""The wish to stop: a signal or a spent time budget, and what can still be done before the grace is over."""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Literal, NoReturn

from pipeline.exit_codes import PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
MEETING_SECONDS = 3.0
"""A rank that is asked to stop waits so long for others, to stop together with them."""


class Stopped(Exception):
    """Raised on every rank at the same place: training ends here, in order."""


class StopRequest:
    """Signals set a flag, nothing more; the training loop looks at it. Later signals change nothing.

    Python runs a handler only when the main thread is not in C, which may be a whole `backward` later. So that the
    grace counts from the signal itself, a thread hears of it too, through the wake-up descriptor.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._since: float | None = None
        self._budget_end = math.inf
        self._started = time.monotonic()
        self._wanted: frozenset[int] = frozenset()
        ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._hear, args=(ear,), name="signals", daemon=True).start()
        self.listen(SIGNALS)

    def listen(self, signals: Sequence[signal.Signals], max_seconds: float | None = None) -> None:
        """Take only these signals from now on, and ask to stop when this start has lasted `max_seconds`."""
        self._budget_end = self._started + (math.inf if max_seconds is None else max_seconds)
        self._wanted = frozenset(signals)
        for number in set(SIGNALS) - set(signals):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for number in signals:
            signal.signal(number, self._note)

    def _hear(self, ear: socket.socket) -> None:
        while number := ear.recv(1):
            self._note(number[0], None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._since is None and number in self._wanted:
            self.received, self._since = signal.Signals(number), time.monotonic()

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Inside, ranks wait for others. Those may never come where the job is to stop: then this process ends."""
        met, begin = threading.Event(), time.monotonic()

        def look() -> None:
            while not met.wait(0.2):
                if min(self.waited_seconds(), time.monotonic() - begin) > MEETING_SECONDS:
                    self.leave()

        threading.Thread(target=look, name="meeting", daemon=True).start()
        try:
            yield
        finally:
            met.set()

    def leave(self) -> NoReturn:
        """End this process before its first step."""
        print(f"{self.reason}: stopped before the first step; nothing to save", flush=True)
        sys.stderr.flush()
        os._exit(PREEMPTED)  # a thread may be in a compiler's hands

    @property
    def reason(self) -> str:
        if self.received:
            return self.received.name
        return "training.max_seconds" if time.monotonic() >= self._budget_end else "another rank's signal"

    def waited_seconds(self) -> float:
        """How long ago this rank was asked to stop; 0 where it was not."""
        now = time.monotonic()
        since = min(self._since if self._since is not None else math.inf, self._budget_end)
        return max(now - since, 1e-9) if since <= now else 0.0


Plan = Literal["finish the step", "save what stands", "leave"]


def plan(left_seconds: float, rest_of_step_seconds: float, save_seconds: float) -> Plan:
    """The most that fits into the time left, judged by how long steps and saves have taken so far.

    What has not been measured yet counts 0 and is tried: a save that is cut off leaves the older checkpoints whole.
    """
    if rest_of_step_seconds + save_seconds <= left_seconds:
        return "finish the step"
    return "save what stands" if save_seconds <= left_seconds else "leave"
