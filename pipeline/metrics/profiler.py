"""Where the time and memory of some steps go: `training.profile: FIRST-LAST` has them traced."""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.context import RunContext
from pipeline.distributed.clock import Clock
from pipeline.tracking.tracker import NullTracker

log = logging.getLogger("globallocal")

LARGEST_ITEMS = 10
NAME_LENGTH = 90
MEMORY_EVENTS = 1_000_000
"""Allocations and releases that a snapshot of a GPU's memory remembers, the newest."""


class StepProfiler:
    """Traces those steps of `training.profile` that this start takes, on every rank; what is trained stays the same,
    bit for bit.

    Each rank's trace goes to RUN/profile and to MLflow, for a browser (ui.perfetto.dev), and on a GPU a snapshot of its
    memory (pytorch.org/memory_viz). Its ten largest items go to the log.
    """

    def __init__(self, context: RunContext, tracker: NullTracker, clock: Clock) -> None:
        self.steps, self.run_folder = context.config.training.profiled_steps, context.config.run_folder
        self.world, self.clock, self.tracker = context.world, clock, tracker
        self.on_gpu = self.world.device.type == "cuda"
        self.trace: profile | None = None
        self.first = 0
        self.began = 0.0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`: the trace begins before the first step asked for and is written after the last."""
        if self.trace is None and number in self.steps:
            self._begin(number)
        if self.trace is None:
            yield
            return
        with record_function(f"step {number}"):
            yield
        if number >= self.steps[-1]:
            with self.clock.phase("profiling"):
                self._write(self.trace, number)

    def close(self) -> None:
        """When training ends: a trace that has not come to its last step is given up."""
        if self.trace is not None:
            log.warning(f"profile: training ended before step {self.steps[-1]:,}; no trace is written")
            with suppress(RuntimeError):  # of a GPU that has failed, which is told elsewhere
                self._end(self.trace)

    def _begin(self, number: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self.on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MEMORY_EVENTS)
        self.trace = profile(activities=activities)
        self.trace.start()
        self.clock.annotate = record_function  # so that the trace shows the phases
        self.first, self.began = number, time.perf_counter()

    def _end(self, trace: profile) -> None:
        self.clock.annotate = nullcontext
        trace.stop()
        if self.on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)
        self.trace, self.steps = None, range(0)

    def _write(self, trace: profile, last: int) -> None:
        """Files, table, artifacts; a disk that takes no files costs the trace and not the run. A collective."""
        if self.on_gpu:
            torch.cuda.synchronize()
        seconds, count = time.perf_counter() - self.began, last - self.first + 1
        folder = Path("profile") / f"steps-{self.first}-{last}"
        rank, written = f"rank-{self.world.rank:05d}", []
        try:
            (self.run_folder / folder).mkdir(parents=True, exist_ok=True)
            if self.on_gpu:
                written.append(str(folder / f"{rank}.memory.pickle"))
                torch.cuda.memory._dump_snapshot(str(self.run_folder / written[-1]))
            self._end(trace)
            written.append(str(folder / f"{rank}.trace.json.gz"))
            trace.export_chrome_trace(str(self.run_folder / written[-1]))
        except OSError as error:
            log.warning(f"profile: {error.filename or folder}: {error.strerror}; this rank's trace is not written")
            written = []
            if self.trace is not None:
                self._end(trace)
        for line in largest(trace.key_averages(), seconds, count, self.on_gpu):
            log.info(f"profile: {line}")
        for files in self.world.gather(written):
            for file in files:
                self.tracker.log_file(file)
        if written:
            log.info(f"profile: {self.run_folder / folder}; a trace opens in ui.perfetto.dev")


def largest(events: Iterable[Any], seconds: float, steps: int, on_gpu: bool) -> list[str]:
    """The items with most time of their own, as lines: a GPU's kernels and copies, or a CPU's operators and phases.

    Args:
        events: a profiler's averages.
        seconds: what the traced steps took, and all between them.
    """
    if on_gpu:
        kernels = [item for item in events if item.device_type == DeviceType.CUDA and not item.is_user_annotation]
        times = [(item.self_device_time_total, item.count, item.key) for item in kernels]
    else:
        times = [(item.self_cpu_time_total, item.count, item.key) for item in events]
    total = sum(microseconds for microseconds, _, _ in times) or 1.0
    device = f"the GPU works {total / 1e6 / seconds:.0%} of it" if on_gpu else "on the CPU"
    lines = [f"{1000 * seconds / steps:,.1f} ms per step over {steps} steps, traced; {device}; the largest items:"]
    for microseconds, count, name in sorted(times, reverse=True)[:LARGEST_ITEMS]:
        short = name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
        per_step = f"{microseconds / 1000 / steps:10,.2f} ms  {count / steps:8,.1f} times per step"
        lines.append(f"{microseconds / total:6.1%}  {per_step}  {short}")
    return lines
