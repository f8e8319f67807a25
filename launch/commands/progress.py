"""Progress of preparing and of evaluating: a live bar on a terminal, a line every ten seconds without one."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
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


class EvaluationReporter:
    """Progress of an evaluation: a live bar on a terminal, a line every ten seconds without one. A context manager.

    Args:
        totals: target tokens of each dataset, by its name.
    """

    def __init__(self, totals: dict[str, int]) -> None:
        self._totals, self._done, self._name = totals, 0, ""
        self._live: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
            self._live = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self._since = self._last_line = time.monotonic()
        self._all_done = 0

    def __enter__(self) -> EvaluationReporter:
        if self._live:
            self._live.start()
            self._bar = self._live.add_task("", total=sum(self._totals.values()), rate="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def __call__(self, name: str, tokens: int) -> None:
        """`tokens` more of dataset `name` are measured."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._done = name, 0
        self._done += tokens
        self._all_done += tokens
        speed = self._all_done / max(now - self._since, 1e-3)
        rate = f"{self._done:,} of {self._totals[name]:,} tokens, {speed:,.0f} tokens/s"
        if self._live:
            self._live.update(self._bar, completed=self._all_done, description=name, rate=rate)
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            left = (sum(self._totals.values()) - self._all_done) / speed
            print(f"{name}: {rate}, {left:,.0f} s left", file=sys.stderr, flush=True)
