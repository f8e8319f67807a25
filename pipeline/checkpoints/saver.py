"""Saving while training goes on: a snapshot between two steps, then writing in the background, then agreement.

`start` copies this rank's state into host memory and returns. A thread of each rank writes, hashes and fsyncs its
files under a temporary name. The training threads agree, in `poll`, between two steps, that all ranks are done; then
rank 0's thread writes the list of hashes, renames the folder and prunes. No collective ever runs outside the training
thread. A process killed at any moment leaves a folder under a temporary name, which is no checkpoint.

Memory: one copy of the bytes that this rank writes (`HostBuffers`), held from the first save on.
One save is in flight at most: a save that begins earlier waits for the one before it, and says so.
"""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoints import write as checkpoint_io
from pipeline.checkpoints.folder import SAVING, CheckpointState
from pipeline.checkpoints.retention import Pruned, prune
from pipeline.checkpoints.space import save_problems
from pipeline.checkpoints.write import DeferringCheckpointEngine, Written
from pipeline.context import RunContext
from pipeline.engine.internals import Engine
from pipeline.files import step_name
from pipeline.redact import failure_message

log = logging.getLogger("globallocal")

_SAY_SECONDS = 30.0
_WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Saved:
    """How one save ended, the same on every rank.

    Attributes:
        problems: why there is no checkpoint of this step; empty when it stands.
        deleted: older checkpoints that went by the run's retention.
        warnings: older ones that should have gone, and why they did not.
        size_bytes: of all ranks' files.
        seconds: of the snapshot, the slowest rank's writing, and the commit; the steps in between are not counted.
    """

    step: int
    folder: Path
    problems: list[str]
    deleted: list[Path]
    warnings: list[str]
    size_bytes: int
    seconds: float


@dataclass
class _Flight:
    """The save under way. `job` gives this rank's Report; once `committing`, rank 0's gives the Saved."""

    state: CheckpointState
    snapshot_seconds: float
    job: Future[Any]
    committing: bool = False


@dataclass(frozen=True)
class Report:
    """What one rank has written."""

    files: dict[str, Written]
    problems: list[str]
    seconds: float


class Saver:
    """Writes `root/step-XXXXXXXX`; each appears whole or not at all.

    Every method is called by all ranks, between the same two steps.

    Args:
        deferring: the engine's `checkpoint_engine`; where it has no buffers, `start` writes, and returns when all is
            written.
        expected_bytes: of one checkpoint, until the first has been written.
        alive: called now and then while `start` and `finish` wait, if some rank still writes.
    """

    def __init__(
        self,
        context: RunContext,
        engine: Engine,
        deferring: DeferringCheckpointEngine,
        expected_bytes: int,
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        self.world, self.engine, self.deferring = context.world, engine, deferring
        self.root, self.retention = context.config.checkpoints, context.config.retention
        self.expected_bytes, self.alive = expected_bytes, alive
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._flight: _Flight | None = None
        self._ended: list[Saved] = []

    def start(self, state: CheckpointState) -> None:
        """Begin to save the engine as it is now; `poll` and `finish` tell how it ended."""
        if self._flight:
            log.warning(
                f"step {state.step:,}: the checkpoint of step {self._flight.state.step:,} is still being written; "
                "waiting for it (a larger checkpoint.interval_steps, or a faster disk, would not)"
            )
            self._settle()
        began = time.perf_counter()
        building = self._building(state.step)
        problems = self.world.broadcast(self._prepare(building) if self.world.is_main else None)
        if problems:
            folder = self.root / step_name(state.step)
            self._ended.append(Saved(state.step, folder, problems, [], [], 0, time.perf_counter() - began))
            return
        name = step_name(state.step)
        files, problems = checkpoint_io.collect(self.engine, self.deferring, building, name, self.world.rank)
        job = self._thread.submit(self._write, building / name, files, problems)
        self._flight = _Flight(state, time.perf_counter() - began, job)
        if self.deferring.buffers is None:
            self._settle()

    def poll(self) -> list[Saved]:
        """The saves that have ended since the last call. Costs one flag of all ranks while one is in flight."""
        if self._flight and not self.world.any(not self._flight.job.done()):
            self._advance(self._flight)
        ended, self._ended = self._ended, []
        return ended

    def finish(self) -> list[Saved]:
        """Wait for the save in flight; all that have ended since the last call."""
        self._settle()
        return self.poll()

    def close(self) -> None:
        """Wait for this rank's own writing; what it wrote is left unfinished. No collective."""
        self._thread.shutdown()

    def _settle(self) -> None:
        said, moved = time.monotonic(), -1
        while self._flight:
            # Short waits and a flag, not one long collective: that would run into the process group's time-out.
            wait([self._flight.job], timeout=_WAIT_SECONDS)
            written = checkpoint_io.written_bytes()
            agreed = self.world.agree({"busy": not self._flight.job.done(), "moved": written != moved})
            moved = written
            if agreed["moved"]:
                self.alive()
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                log.info(f"writing the checkpoint of step {self._flight.state.step:,} …")
            if not agreed["busy"]:
                self._advance(self._flight)

    def _advance(self, flight: _Flight) -> None:
        """All ranks' jobs are done: on to the commit, or to the end."""
        result = flight.job.result()
        if flight.committing:
            saved: Saved = self.world.broadcast(result)
            if not saved.problems:
                self.expected_bytes = saved.size_bytes
            self._ended.append(saved)
            self._flight = None
            return
        reports = self.world.gather(result)
        flight.committing = True
        if self.world.is_main:
            flight.job = self._thread.submit(self._commit, flight, reports)
        else:
            flight.job = Future()
            flight.job.set_result(None)

    def _prepare(self, building: Path) -> list[str]:
        try:
            shutil.rmtree(building, ignore_errors=True)
            problems = save_problems(self.root, self.expected_bytes)
            if not problems:
                building.mkdir(parents=True)
        except OSError as error:
            return [f"{building}: {error.strerror}"]
        return problems

    @staticmethod
    def _write(folder: Path, files: dict[str, Any], problems: list[str]) -> Report:
        began = time.perf_counter()
        written, problems = ({}, problems) if problems else checkpoint_io.write_files(folder, files)
        return Report(written, problems, time.perf_counter() - began)

    def _commit(self, flight: _Flight, reports: list[Report]) -> Saved:
        """In rank 0's thread, once all ranks have written."""
        began, state = time.perf_counter(), flight.state
        building, final = self._building(state.step), self.root / step_name(state.step)
        problems = [line for report in reports for line in report.problems]
        files = {name: written for report in reports for name, written in report.files.items()}
        pruned = Pruned([], [])
        try:
            problems = problems or checkpoint_io.commit(building / final.name, final, state, files)
            shutil.rmtree(building, ignore_errors=True)
            if not problems:
                pruned = prune(self.root, self.retention, newest_step=state.step)
        except Exception as error:  # an error of a thread must be said, and must not leave the other ranks waiting
            problems = [*problems, f"{final}: {type(error).__name__}: {failure_message(error)}"]
        size_bytes = sum(item.size_bytes for item in files.values())
        seconds = flight.snapshot_seconds + max(report.seconds for report in reports) + time.perf_counter() - began
        return Saved(state.step, final, problems, pruned.deleted, pruned.problems, size_bytes, seconds)

    def _building(self, step: int) -> Path:
        return self.root / f"{SAVING}{step_name(step)}"
