"""Is every rank still moving? Threads beside the training thread find out, and end the job where one is not.

Each rank publishes what its clock says through the job's TCPStore, over a connection of its own. Rank 0 judges all
of them; the others watch over rank 0 and read its verdict. On a verdict every process dumps its stacks and ends
with exit code 76, even where its main thread is stuck in C.
"""

import faulthandler
import json
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from pipeline.distributed.clock import Clock
from pipeline.distributed.world import World
from pipeline.exit_codes import HANG

log = logging.getLogger("globallocal")

START_ALLOWANCE = 4
"""Up to its first step a rank may stand still so many times longer: it compiles, reads a checkpoint, fills caches."""
REPORT_SECONDS = 9.0
"""Bound on telling: whoever started the job kills it 10 s after the first sign of a failure."""
WAITING_PLACES = (f"torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}")


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself.

    Attributes:
        number: of the beat.
        step: optimizer steps taken; None until this start has taken one.
        moves: phases begun and ended; all ranks go through the same ones.
        still_seconds: since the last move.
        silent_seconds: since the last beat, by the clock of whoever heard it.
        waits: its innermost frame is in a collective operation.
        ended: it has left training, and is not watched any more.
    """

    rank: int
    host: str
    process: int
    number: int = 0
    phase: str = "start"
    step: int | None = None
    moves: int = 0
    still_seconds: float = 0.0
    silent_seconds: float = 0.0
    waits: bool = False
    ended: bool = False

    def allowance(self, timeout_seconds: float) -> float:
        return timeout_seconds * (START_ALLOWANCE if self.step is None else 1)

    def __str__(self) -> str:
        where = f"in {self.phase}, " + ("before its first step" if self.step is None else f"after step {self.step:,}")
        who = f"rank {self.rank} (host {self.host}, process {self.process})"
        if self.silent_seconds > self.still_seconds / 2:
            lost = "its process is stopped, or its host is gone"
            return f"{who} gave no sign of life for {self.silent_seconds:,.0f} s, last seen {where}: {lost}"
        return f"{who} has not moved for {self.still_seconds:,.0f} s {where}"


def suspects(beats: Sequence[Beat], timeout_seconds: float) -> list[Beat]:
    """The ranks that keep the job from moving; none while they have moved within their allowance.

    Ranks that give no sign of life come first. Otherwise it is those that are behind all others in the sequence of
    phases; of these, not the ones that only wait in a collective operation for the rest.
    """
    beats = [beat for beat in beats if not beat.ended]
    silent = [beat for beat in beats if beat.silent_seconds > timeout_seconds / 2]
    behind = [beat for beat in beats if beat.moves == min(other.moves for other in beats)]
    slow = silent or [beat for beat in behind if not beat.waits] or behind
    return [beat for beat in slow if beat.still_seconds > beat.allowance(timeout_seconds)]


def explain(slow: Sequence[Beat]) -> str:
    """One line, which the launcher recognises by its first word."""
    rest = f"; so do {len(slow) - 3} more ranks" if len(slow) > 3 else ""
    return "hang: " + "; ".join(map(str, slow[:3])) + rest


class Watch:
    """Runs from its making until `close`; every rank makes one at the same time.

    Args:
        run_folder: `logs/rank-XXXXX.stacks` there gets the stacks.
        timeout_seconds: how long a rank may stand still.
    """

    def __init__(self, world: World, clock: Clock, run_folder: Path, timeout_seconds: float) -> None:
        self.world, self.clock, self.timeout_seconds = world, clock, timeout_seconds
        self.tracker: Any = None
        """Told of a hang, once there is one."""
        self._interval = min(2.0, timeout_seconds / 20)
        self._prefix = world.broadcast(f"watch-{time.time_ns()}")
        self._ended = threading.Event()
        self._verdict: str | None = None
        self._mine = Beat(world.rank, platform.node(), os.getpid())
        unheard = [Beat(rank, "not known", 0) for rank in range(world.size)]
        self._heard = [(time.monotonic(), beat) for beat in unheard]
        self._stacks_path = run_folder / "logs" / f"rank-{world.rank:05d}.stacks"
        self._stacks = open(self._stacks_path, "w")  # noqa: SIM115
        # The connection may block for long when rank 0 is gone, so the judge does not touch it.
        self._threads = [
            threading.Thread(target=target, name=f"watch-{target.__name__}", daemon=True)
            for target in (self._exchange, self._judge)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        self.close()

    @property
    def longest_seconds(self) -> float:
        """The watch has ended a hang before so much time has passed, or cannot run itself."""
        return self.timeout_seconds * START_ALLOWANCE + 2 * REPORT_SECONDS

    def close(self) -> None:
        """Stop watching, and being watched."""
        if self._ended.is_set():
            return
        if self._verdict:  # training failed here because a rank that heard of the hang earlier has ended
            time.sleep(2 * REPORT_SECONDS)  # before that, the judge ends this process
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * self._interval)
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        if not self._stacks_path.stat().st_size:
            self._stacks_path.unlink()

    def _exchange(self) -> None:
        """Publish, and read what the others published; whatever fails is tried again."""
        store = None
        while True:
            ended = self._ended.is_set()
            try:
                store = store or _connect()
                self._mine = self._beat(ended)
                store.set(f"{self._prefix}/{self.world.rank}", json.dumps(asdict(self._mine)))
                if self._verdict and self.world.is_main:
                    store.set(f"{self._prefix}/verdict", self._verdict)
                self._read(store)
            except (RuntimeError, OSError, ValueError):
                store = None
            if ended:
                return
            self._ended.wait(self._interval)

    def _read(self, store: dist.Store) -> None:
        for rank in range(self.world.size) if self.world.is_main else (0,):
            key = f"{self._prefix}/{rank}"
            if not self._heard[rank][1].number and not store.check([key]):
                continue
            beat = Beat(**json.loads(store.get(key)))
            if beat.number != self._heard[rank][1].number:
                self._heard[rank] = (time.monotonic(), beat)
        if not self.world.is_main and store.check([f"{self._prefix}/verdict"]):
            self._verdict = store.get(f"{self._prefix}/verdict").decode()

    def _beat(self, ended: bool) -> Beat:
        still = time.monotonic() - self.clock.moved_at
        return replace(
            self._mine,
            number=self._mine.number + 1,
            phase=self.clock.now,
            step=self.clock.step,
            moves=self.clock.moves,
            still_seconds=still,
            waits=still > self._interval and waits_for_others(),
            ended=ended,
        )

    def _judge(self) -> None:
        while not self._ended.wait(self._interval):
            # Should C code never let a thread of ours run again, this one, in C, still ends the process.
            faulthandler.dump_traceback_later(self.longest_seconds, exit=True, file=self._stacks)
            slow = suspects(self._aged(), self.timeout_seconds)
            if self._verdict:
                self._end(self._verdict, alone=False)
            elif slow:
                self._verdict = explain(slow)
                self._end(self._verdict, alone=not self.world.is_main)

    def _aged(self) -> list[Beat]:
        """What was heard, as old as it is now. Ranks above 0 look at rank 0 only, and only whether it lives."""
        now = time.monotonic()
        if not self.world.is_main:
            since, beat = self._heard[0]
            return [replace(beat, still_seconds=now - since, silent_seconds=now - since)]
        return [
            replace(beat, still_seconds=beat.still_seconds + now - since, silent_seconds=now - since)
            for since, beat in self._heard
        ]

    def _end(self, cause: str, alone: bool) -> None:
        telling = threading.Thread(target=self._tell, args=(cause, alone), daemon=True)
        telling.start()
        telling.join(REPORT_SECONDS)
        os._exit(HANG)

    def _tell(self, cause: str, alone: bool) -> None:
        """Stacks, a line, MLflow, in the order of their worth."""
        with suppress(OSError):  # a full disk must not keep the rest from being told
            print(cause, file=self._stacks, flush=True)
            faulthandler.dump_traceback(self._stacks)
        log.error(f"{cause}; stacks of every rank: {self._stacks_path.with_name('rank-*.stacks')}")
        if alone and (self.world.local_rank == 0 or self.world.rank == 1):
            print(cause, flush=True)  # rank 0, which speaks on the terminal, cannot
        if self.tracker:
            self.tracker.set_tags({"globallocal.status": "hung", "globallocal.cause": cause})
            self.tracker.close("FAILED", REPORT_SECONDS / 2)
        if self.world.is_main:
            time.sleep(3 * self._interval)  # the others read the verdict from this process


def _connect() -> dist.Store:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
    )


def waits_for_others() -> bool:
    """Whether a thread of this process is in a collective operation, as its innermost frame tells."""
    own = threading.get_ident()
    frames = [frame for thread, frame in sys._current_frames().items() if thread != own]
    return any(place in frame.f_code.co_filename for frame in frames for place in WAITING_PLACES)
