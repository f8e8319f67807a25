"""Every run of a folder at a glance."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.errors import UserError
from launch.report import words
from launch.report.read import find_runs, read_run
from launch.report.run import Run, State
from pipeline.metrics.duration import duration

STYLES: dict[State, str] = {
    "running": "blue",
    "preempted": "yellow",
    "hung": "bold red",
    "failed": "bold red",
    "done": "green",
}


@dataclass(frozen=True)
class Row:
    """How one run stands; None is not known.

    Attributes:
        steps: that it is to take.
        last_restart_unix_seconds: when it was last started again.
        why: of a run that does not run and is not done.
    """

    run: str
    state: State
    step: int
    steps: int | None
    train_loss: float | None
    valid_loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    restarts: int
    last_restart_unix_seconds: float | None
    why: str


def look(folder: Path) -> list[Row]:
    """
    Raises:
        UserError: no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds your runs")
    rows = []
    for path in find_runs(folder):
        run = read_run(path, whole=False)
        rows.append(
            Row(
                run=str(path),
                state=run.state,
                step=run.step,
                steps=run.steps,
                train_loss=_finite(run.last(words.LOSS)),
                valid_loss=_finite(_valid_loss(run)),
                tokens_per_second=_finite(run.last(words.SPEED)),
                seconds_left=words.seconds_left(run) if run.state != "done" else 0.0,
                restarts=words.restart_count(run),
                last_restart_unix_seconds=_last_restart(run),
                why=run.why,
            )
        )
    if not rows:
        raise UserError(f"{folder}: holds no run; a training writes one into runs/NAME")
    return rows


def _valid_loss(run: Run) -> float | None:
    """The latest; of a run without a record that of its newest checkpoint."""
    told = run.last(words.VALID_LOSS)
    return told if told is not None or not run.checkpoints else run.checkpoints[-1].loss


def _last_restart(run: Run) -> float | None:
    moments = [start.time_unix_seconds for start in run.starts[1:]]
    moments += [end.time_unix_seconds for end in run.ends if end.restarted]
    return max(filter(math.isfinite, moments), default=None)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def to_json(rows: Sequence[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=2)


def show(rows: Sequence[Row], folder: Path, console: Console) -> None:
    """A table on a terminal, with a line below it for each run that needs one; elsewhere aligned lines, never cut."""
    heads = ("run", "state", "step", "loss", "held-out", "tokens/s", "left", "restarts", "last restart", "why")
    cells = [_cells(row, folder) for row in rows]
    kept = [place for place in range(len(heads)) if place < 6 or any(row[place] for row in cells)]
    if not console.is_terminal:
        lines = [heads, *cells]
        widths = [max(len(line[place]) for line in lines) for place in kept]
        for line in lines:
            print("  ".join(line[place].ljust(width) for place, width in zip(kept, widths, strict=True)).rstrip())
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place in kept[:-1] if kept[-1] == len(heads) - 1 else kept:
        table.add_column(heads[place], justify="right" if 2 <= place <= 7 else "left", overflow="fold")
    for row, texts in zip(rows, cells, strict=True):
        shown = texts[: len(heads) - 1]
        table.add_row(
            *(Text(shown[place], STYLES[row.state] if place == 1 else "") for place in kept[: len(table.columns)])
        )
    console.print(table)
    for row, texts in zip(rows, cells, strict=True):
        if row.why:
            console.print(Text(f"{texts[0]}: {row.why}", "dim"), soft_wrap=True)


def _cells(row: Row, folder: Path) -> tuple[str, ...]:
    left = duration(row.seconds_left) if row.state == "running" and row.seconds_left is not None else ""
    last = row.last_restart_unix_seconds
    return (
        Path(row.run).relative_to(folder).as_posix() if Path(row.run) != folder else row.run,
        row.state,
        f"{row.step:,}" + (f"/{row.steps:,}" if row.steps else ""),
        words.number(row.train_loss),
        words.number(row.valid_loss),
        words.quantity(row.tokens_per_second) if row.tokens_per_second else "–",
        left,
        str(row.restarts) if row.restarts else "",
        f"{duration(time.time() - last)} ago" if last else "",
        row.why,
    )
