"""A run's folder → typed data. Nothing here writes, asks a server or imports torch.

A folder may be half written: a process was killed, a disk was full, the run is older than the record. What cannot be
read is a line in `Run.missing`, and all else is there.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from launch.report.run import Checkpoint, End, Event, Point, Run, Warned, judge_state, settle
from pipeline.files import LOCK_FILE, is_held
from pipeline.tracking.journal import JOURNAL_FILE
from pipeline.tracking.restarts import RESTARTS_FILE

TAIL_BYTES = 1 << 18
"""Of the record, for a look at how a run is doing."""
LOG_LINE = re.compile(
    r"^(?P<time>\S+ \S+) (?P<host>\S+) rank (?P<rank>\d+) (?P<level>WARNING|ERROR|CRITICAL) (?P<text>.*)"
)
MOST_WARNINGS = 200
ROLL_BACK_FACTS = ("step", "to_step", "first_batch", "last_batch")


def read_run(folder: Path, *, whole: bool = True) -> Run:
    """Read a run's folder.

    Args:
        whole: False for a glance: the record's tail, no logs.
    """
    missing: list[str] = []
    settings = _settings(folder / "config.yaml", missing)
    record = [
        item
        for line in _json_lines(folder / JOURNAL_FILE, None if whole else TAIL_BYTES, missing)
        if (item := _point(line) or _event(line))
    ]
    points, undone = settle(record)
    checkpoints = _checkpoints(folder / "checkpoints", missing)
    ends = _ends(folder / RESTARTS_FILE, missing)
    if not checkpoints:
        missing.append("no checkpoint stands yet")
    run = Run(
        folder=folder,
        state="running",
        why="",
        settings=settings,
        points=points,
        undone=undone,
        events=[item for item in record if isinstance(item, Event)],
        checkpoints=checkpoints,
        ends=ends,
        roll_backs=_roll_backs(folder / "health" / "roll_backs.json", missing),
        warnings=list(_warnings(folder / "logs")) if whole else [],
        last_error=_last_error(folder / "logs" / "launch.log"),
        read_at=time.time(),
        missing=missing,
    )
    state, why = judge_state(run, held=is_held(folder / LOCK_FILE), last_sign=_last_sign(folder))
    return replace(run, state=state, why=why)


def is_run(folder: Path) -> bool:
    """Whether a training has written here."""
    return any((folder / name).exists() for name in ("config.yaml", "checkpoints", JOURNAL_FILE, RESTARTS_FILE))


def find_runs(folder: Path) -> list[Path]:
    """The folder itself where it is a run's; else its own folders that are."""
    if is_run(folder):
        return [folder]
    return sorted(item for item in folder.iterdir() if item.is_dir() and is_run(item))


def _last_sign(folder: Path) -> float:
    signs = [folder / JOURNAL_FILE, *(folder / "logs").glob("*.log")]
    return max((path.stat().st_mtime for path in signs if path.exists()), default=0.0)


def _settings(path: Path, missing: list[str]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(errors="replace"))
    except (OSError, yaml.YAMLError) as error:
        missing.append(f"{path.name} cannot be read ({_reason(error)}): the settings are not known")
        return {}
    if isinstance(values, dict):
        return values
    missing.append(f"{path.name} holds no settings")
    return {}


def _json_lines(path: Path, last_bytes: int | None, missing: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines; what is no object is counted, and said.

    Args:
        last_bytes: read the first line, which is the run's first start, and so much of the end; None for all.
    """
    try:
        with open(path, "rb") as file:
            lines = [file.readline()]
            if last_bytes is not None and path.stat().st_size > last_bytes:
                file.seek(-last_bytes, os.SEEK_END)
                file.readline()
            lines += file.read().split(b"\n")
    except OSError as error:
        missing.append(f"{path.name} cannot be read ({_reason(error)}): there are no curves")
        return
    torn = 0
    for line in lines:
        if line.strip():
            try:
                values = json.loads(line)
            except ValueError:
                values = None
            if isinstance(values, dict):
                yield values
            else:
                torn += 1
    if torn:
        missing.append(f"of {path.name} {torn} line{'s' * (torn > 1)} cannot be read")


def _point(line: Mapping[str, Any]) -> Point | None:
    metrics, step = line.get("metrics"), _number(line.get("step"))
    if not isinstance(metrics, dict) or not math.isfinite(step) or step < 0:
        return None
    values = {
        str(name): value
        for name, item in metrics.items()
        if not math.isnan(value := _number(item)) or item in ("nan", "NaN")
    }
    return Point(int(step), _number(line.get("tokens")), _number(line.get("time_unix_seconds")), values)


def _event(line: Mapping[str, Any]) -> Event | None:
    if not isinstance(line.get("event"), str):
        return None
    step = _number(line.get("step"))
    facts = {name: value for name, value in line.items() if name not in ("event", "step", "time_unix_seconds")}
    return Event(line["event"], int(step) if math.isfinite(step) else -1, _number(line.get("time_unix_seconds")), facts)


def _number(value: Any) -> float:
    """NaN for what is no number; "inf" and "nan" are how JSON lines say them."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _checkpoints(folder: Path, missing: list[str]) -> list[Checkpoint]:
    found = []
    for path in sorted(folder.glob("step-*/integrity.json")) if folder.is_dir() else ():
        step = path.parent.name.removeprefix("step-")
        if not step.isdigit():
            continue
        try:
            size = sum(int(item["bytes"]) for item in json.loads(path.read_bytes())["files"].values())
            state = json.loads((path.parent / "state.json").read_bytes())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            missing.append(f"checkpoints/{path.parent.name} cannot be read ({_reason(error)})")
            continue
        found.append(Checkpoint(path.parent, int(step), size, state if isinstance(state, dict) else {}))
    return sorted(found, key=lambda item: item.step)


def _ends(path: Path, missing: list[str]) -> list[End]:
    found = []
    for entry in _json_lines(path, None, missing) if path.exists() else ():
        code, moment = _number(entry.get("code")), _number(entry.get("time"))
        if math.isfinite(code) and math.isfinite(moment):
            step = _number(entry.get("step"))
            found.append(
                End(
                    moment,
                    int(step) if math.isfinite(step) else -1,
                    int(code),
                    str(entry.get("cause", "")),
                    str(entry.get("reason", "")),
                    entry.get("restart") is True,
                )
            )
    return found


def _roll_backs(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_bytes())
        return [item for item in found if all(isinstance(item[name], int) for name in ROLL_BACK_FACTS)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        missing.append(f"health/{path.name} cannot be read ({_reason(error)})")
        return []


def _warnings(folder: Path) -> Iterator[Warned]:
    for path in sorted(folder.glob("rank-*.log")):
        found = []
        with open(path, errors="replace") as file:
            for line in file:
                if match := LOG_LINE.match(line):
                    found.append(Warned(match["time"], int(match["rank"]), match["level"].lower(), match["text"]))
        yield from found[-MOST_WARNINGS:]


def _last_error(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            file.seek(-min(path.stat().st_size, TAIL_BYTES), os.SEEK_END)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return " ".join(str(error).split())[:120] or type(error).__name__
