"""What a spool says of its run so far, and the names that MLflow takes."""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from pipeline.tracking.spool import Record, Spool

NAME_LENGTH = 250
BEST_OF = "loss/valid"
CHECKPOINTS_TABLE = "checkpoints.json"
"""An artifact: every checkpoint that the run has kept, a row each."""
_NAME_CHARACTERS = re.compile(r"[^\w\-. :/]")


def clean_name(name: str) -> str:
    """A metric, parameter or tag name that MLflow takes: letters, digits and `_-. :/`, 250 characters.

    A name that had to change gets six hex digits of its sha256, so that two names never become one.
    """
    parts = _NAME_CHARACTERS.sub("_", name).split("/")
    clean = "/".join(part for part in parts if part not in ("", ".", ".."))
    if clean == name and 0 < len(name) <= NAME_LENGTH:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:6]
    return f"{clean[: NAME_LENGTH - 7]}-{digest}"


@dataclass
class History:
    """What a spool says of the run so far; `apply` is called for every record, read or written.

    Attributes:
        run_key: our own unique name of the run, a tag in the store.
        run_name: what it is called when it is created.
        attempts: how each process ended ("running" while it has not).
        highest_step: per metric; points at or below it are replays.
        nonfinite: metrics whose first inf or NaN has been stated.
        changes: one line for each setting that differed at a resume.
        facts: what the latest start said of the run (`description.py` tells it).
        latest: per metric the last finite point, (step, value).
        best: the point of the least held-out loss.
        checkpoint: the newest row of the checkpoints' table.
    """

    run_key: str = ""
    run_name: str = ""
    attempts: list[str] = field(default_factory=list)
    highest_step: dict[str, int] = field(default_factory=dict)
    nonfinite: set[str] = field(default_factory=set)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    latest: dict[str, tuple[int, float]] = field(default_factory=dict)
    best: tuple[int, float] | None = None
    checkpoint: dict[str, Any] | None = None
    last_time: int = 0
    damaged_lines: int = 0

    @classmethod
    def read(cls, spool: Spool) -> "History":
        history = cls()
        for record, _ in spool.read(0):
            if record is None:
                history.damaged_lines += 1
            else:
                history.apply(record)
        return history

    def apply(self, record: Record) -> None:
        self.last_time = record.get("time", self.last_time)
        match record["kind"]:
            case "run":
                self.run_key, self.run_name = record["run_key"], record["name"]
            case "metrics":
                for key, value in record["values"].items():
                    self.highest_step[key] = max(record["step"], self.highest_step.get(key, -1))
                    if isinstance(value, str):
                        self.nonfinite.add(key)
                    else:
                        self._point(key, (record["step"], value))
            case "params":
                self.params |= record["values"]
            case "changes":
                self.params |= record["params"]
                self.changes += record["lines"]
            case "facts":
                self.facts = record["values"]
            case "table" if record["path"] == CHECKPOINTS_TABLE:
                self.checkpoint = record["rows"][-1]
            case "tags":
                self.tags |= record["values"]
            case "status" if record["status"] == "RUNNING":
                self.attempts.append(record["reason"])
            case "status":
                self.attempts[-1:] = [record["reason"]]

    def _point(self, key: str, point: tuple[int, float]) -> None:
        self.latest[key] = point
        if key == BEST_OF and (self.best is None or point[1] < self.best[1]):
            self.best = point

    @property
    def latest_step(self) -> int:
        """The highest step that any metric was recorded at, or that the newest checkpoint is of."""
        saved = self.checkpoint["step"] if self.checkpoint else 0
        return max([saved, *self.highest_step.values()])

    @property
    def is_open(self) -> bool:
        """The last process has not said how it ended: it runs, or was killed."""
        return self.attempts[-1:] == ["running"]
