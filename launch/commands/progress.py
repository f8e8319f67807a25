"""Progress of a preparation: a live bar on a terminal, a line every ten seconds without one."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_prep.prepare_settings import PrepareProgress

LINE_SECONDS = 10


class PrepareReporter:
    """Called with every `PrepareProgress`; a context manager."""

    def __init__(self) -> None:
        self._live: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
            self._live = Progress(*columns, TimeRemainingColumn())
        self._split = ""
        self._last_line = 0.0

    def __enter__(self) -> PrepareReporter:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, state: PrepareProgress) -> None:
        now = time.monotonic()
        if state.split != self._split:
            # What an earlier attempt did must not count as speed.
            self._split, self._since, self._from = state.split, now, state
            self._last_line = now
            if self._live:
                self._bar = self._live.add_task(state.split, total=state.total_bytes, rate="")
        seconds = max(now - self._since, 1e-3)
        speed = (state.tokens - self._from.tokens) / seconds
        rate = f"{state.documents:,} documents, {state.tokens:,} tokens, {speed / 1e6:.2f} Mtokens/s"
        if self._live:
            self._live.update(self._bar, completed=state.done_bytes, rate=rate)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print(f"{state.split}: {rate}{self._remaining(state, seconds)}", file=sys.stderr, flush=True)

    def _remaining(self, state: PrepareProgress, seconds: float) -> str:
        done = state.done_bytes - self._from.done_bytes
        if not state.total_bytes or not done:
            return ""
        left = (state.total_bytes - state.done_bytes) / done * seconds
        return f", {100 * state.done_bytes / state.total_bytes:.0f} %, {left:,.0f} s left"
