"""What is known of a run, and how it stands: data and pure functions; `read.py` fills it from a folder."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pipeline.exit_codes import HANG, PREEMPTED, USER_ERROR
from pipeline.settings.batches import consumed

RESTART_SECONDS = 300
"""A launcher that has just started a job again is waited for so long."""
State = Literal["running", "preempted", "hung", "failed", "done"]


@dataclass(frozen=True)
class Point:
    """The metrics of one step."""

    step: int
    tokens: float
    time_unix_seconds: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Event:
    """What happened beside the steps: `started`, `saved`, `roll_back`, …

    Attributes:
        step: −1 where none is told.
        facts: the rest of its line.
    """

    kind: str
    step: int
    time_unix_seconds: float
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that stands whole.

    Attributes:
        state: its `state.json`; empty where that cannot be read.
    """

    folder: Path
    step: int
    bytes: int
    state: Mapping[str, Any]

    @property
    def loss(self) -> float | None:
        """Held-out loss at this very step, where it was measured."""
        found = self.state.get("evaluation")
        if not isinstance(found, dict) or found.get("step") != self.step:
            return None
        loss = found.get("loss")
        return loss if isinstance(loss, int | float) else None


@dataclass(frozen=True)
class End:
    """The run ended before its last step, as the launcher saw it: a line of `restarts.jsonl`."""

    time_unix_seconds: float
    step: int
    code: int
    cause: str
    reason: str
    restarted: bool


@dataclass(frozen=True)
class Warned:
    """A warning or error in the log of a rank."""

    time: str
    rank: int
    level: str
    text: str


@dataclass(frozen=True)
class Run:
    """All that a run's folder tells.

    Attributes:
        settings: resolved, by section; empty where `config.yaml` cannot be read.
        points: in order of steps; of a step that was taken twice, the later.
        undone: what was logged and then gone back from, after a kill or a roll back.
        last_error: the last line that told the person of a mistake to fix; "" where none did.
        read_at: when the folder was read, Unix seconds.
        missing: what the folder does not tell, a sentence each.
    """

    folder: Path
    state: State
    why: str
    settings: Mapping[str, Any]
    points: Sequence[Point]
    undone: Sequence[Point]
    events: Sequence[Event]
    checkpoints: Sequence[Checkpoint]
    ends: Sequence[End]
    roll_backs: Sequence[Mapping[str, Any]]
    warnings: Sequence[Warned]
    last_error: str
    read_at: float
    missing: Sequence[str] = field(default=())

    @property
    def name(self) -> str:
        return str(self.setting("run.name") or self.folder.name)

    @property
    def step(self) -> int:
        """The last step that is known to be taken."""
        return max([0, *(point.step for point in self.points[-1:]), *(item.step for item in self.checkpoints)])

    @property
    def tokens(self) -> float:
        """As recorded with the last step, which knows of batches that were left out; else by the batches' sizes."""
        told = [point.tokens for point in self.points[-1:] if point.step == self.step and math.isfinite(point.tokens)]
        return told[0] if told else self.tokens_after(self.step)

    def tokens_after(self, step: int) -> int:
        return consumed(step, self.tokens_per_step, self.fact("warmup_tokens") or ())

    @property
    def starts(self) -> list[Event]:
        return [event for event in self.events if event.kind == "started"]

    def fact(self, name: str) -> Any:
        """What the newest start that says it says of the run, such as `ranks`; None where none does."""
        return next((event.facts[name] for event in reversed(self.starts) if event.facts.get(name)), None)

    @property
    def tokens_per_step(self) -> int:
        samples, length = (self.setting_number(key) for key in ("training.global_batch_size", "data.sequence_length"))
        return int(self.figure("tokens_per_step") or (samples or 0) * (length or 0))

    @property
    def steps(self) -> int | None:
        """Steps that the run is to take; None where nothing says it."""
        given = self.figure("max_steps") or self.setting_number("training.max_steps")
        return int(given) if given else None

    def figure(self, name: str) -> float | None:
        """`fact`, where that is a number."""
        value = self.fact(name)
        return float(value) if isinstance(value, int | float) else None

    def setting(self, key: str) -> Any:
        """The value of `section.key`; None where it is absent."""
        section, _, name = key.partition(".")
        values = self.settings.get(section)
        return values.get(name) if isinstance(values, Mapping) else None

    def setting_number(self, key: str) -> float | None:
        value = self.setting(key)
        return float(value) if isinstance(value, int | float) else None

    @cached_property
    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Metric → steps and values, finite or not."""
        found: dict[str, list[tuple[int, float]]] = {}
        for point in self.points:
            for name, value in point.metrics.items():
                found.setdefault(name, []).append((point.step, value))
        return found

    def curve(self, metric: str) -> list[tuple[int, float]]:
        return self.curves.get(metric, [])

    def last(self, metric: str) -> float | None:
        curve = self.curve(metric)
        return curve[-1][1] if curve else None

    @property
    def metrics(self) -> list[str]:
        return sorted(self.curves)


def label_of(run: Run, runs: Sequence[Run]) -> str:
    """What a run is called among others: its name, its folder where another has the same name."""
    return run.name if sum(other.name == run.name for other in runs) == 1 else str(run.folder)


def judge_state(run: Run, *, held: bool, last_sign: float) -> tuple[State, str]:
    """How a run is doing, and why one thinks so.

    Args:
        held: a process holds the run's lock.
        last_sign: when anything was last written to its logs, Unix seconds.
    """
    silent = run.read_at - last_sign
    limit = run.setting_number("training.hang_timeout_seconds") or 1800.0
    if held:
        if silent > limit:
            return "hung", f"a process holds the run, and has written nothing for {silent:,.0f} s"
        return "running", ""
    if run.steps is not None and run.checkpoints and run.checkpoints[-1].step >= run.steps:
        return "done", ""
    began = run.starts[-1].time_unix_seconds if run.starts else last_sign - 60
    end = run.ends[-1] if run.ends and run.ends[-1].time_unix_seconds >= began else None
    if end is not None and end.restarted and run.read_at - end.time_unix_seconds < RESTART_SECONDS:
        return "running", f"being started again after: {end.cause}"
    if end is not None and end.code == USER_ERROR:
        return "failed", run.last_error or end.cause
    if end is not None:
        state: State = "preempted" if end.code == PREEMPTED else "hung" if end.code == HANG else "failed"
        return state, end.cause if state == "preempted" else f"{end.cause}; {end.reason}"
    last = run.events[-1] if run.events else None
    if last is not None and last.kind == "ended":
        status = str(last.facts.get("status", "without a word"))
        return ("preempted" if status == "preempted" else "failed"), f"its last process ended: {status}"
    return "failed", "no process holds the run, and none said how it ended: it was killed, or its machine was lost"


def settle(record: Sequence[Point | Event]) -> tuple[list[Point], list[Point]]:
    """A record → the points that stand, in order of steps, and those that were gone back from.

    A start and a roll back undo what was logged behind their step; so does a step that is logged again.
    """
    kept: list[Point] = []
    undone: list[Point] = []
    for item in record:
        if isinstance(item, Event):
            to_step = item.step if item.kind == "started" else item.facts.get("to_step")
            while kept and isinstance(to_step, int) and kept[-1].step > to_step:
                undone.append(kept.pop())
            continue
        while kept and (item.step < kept[-1].step or (item.step == kept[-1].step and _overlap(item, kept[-1]))):
            undone.append(kept.pop())
        if kept and kept[-1].step == item.step:
            kept[-1] = Point(item.step, item.tokens, kept[-1].time_unix_seconds, {**kept[-1].metrics, **item.metrics})
        else:
            kept.append(item)
    return kept, sorted(undone, key=lambda point: point.step)


def _overlap(one: Point, other: Point) -> bool:
    return bool(one.metrics.keys() & other.metrics.keys())


def axes(run: Run) -> dict[str, list[float]]:
    """What a step is on each axis: `step`, `tokens`, `hours` of training (stops left out) and `flops`."""
    points = run.points or [Point(0, 0.0, run.read_at, {})]
    starts = sorted(filter(math.isfinite, (event.time_unix_seconds for event in run.starts)))
    hours, clock = [], 0.0
    before = starts[0] if starts else points[0].time_unix_seconds
    for point in points:
        begun = bisect.bisect_right(starts, point.time_unix_seconds)
        since = max(before, starts[begun - 1]) if begun else before
        if math.isfinite(point.time_unix_seconds):
            clock += max(point.time_unix_seconds - since, 0.0) / 3600
            before = point.time_unix_seconds
        hours.append(clock)
    tokens = [point.tokens if math.isfinite(point.tokens) else run.tokens_after(point.step) for point in points]
    columns = {"step": [float(point.step) for point in points], "tokens": tokens, "hours": hours}
    each = run.figure("flops_per_token")
    return columns | ({"flops": [count * each for count in tokens]} if each else {})
