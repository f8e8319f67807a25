"""The run folder's own record of a run: every value and every event, in order, with MLflow or without.

`RUN/metrics.jsonl` only ever grows. Steps that a start takes again stand there twice, the later ones behind a line
that says why (`started`, `roll_back`).
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.redact import redact
from pipeline.settings.batches import Ranges
from pipeline.tracking.spool import Spool

JOURNAL_FILE = "metrics.jsonl"
"""In the run folder; rank 0 writes it."""


class Journal:
    """Appends to the file; a full disk raises nothing, the lines wait in memory (`Spool`).

    Args:
        tokens: that the first so many steps train on, where they leave out these global batches.

    Attributes:
        left_out: the global batches that the run leaves out by now.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, run_folder: Path, tokens: Callable[[int, Ranges], int]) -> None:
        self._file = Spool(run_folder / JOURNAL_FILE)
        self._tokens = tokens
        self.left_out: Ranges = ()

    def tokens(self, step: int) -> int:
        return self._tokens(step, self.left_out)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """One line: `{"step", "tokens", "time_unix_seconds", "metrics": {name: value}}`."""
        self._file.append(self._place(step) | {"metrics": jsonable(values)})

    def event(self, name: str, step: int | None, facts: Mapping[str, Any]) -> None:
        """One line: `{"event", "step", "tokens", "time_unix_seconds", …}`, secrets redacted.

        Args:
            step: None where it is not known, as when an error ends the run.
        """
        self._file.append({"event": name} | self._place(step) | jsonable(redact(dict(facts))))

    def _place(self, step: int | None) -> dict[str, Any]:
        tokens = None if step is None else self.tokens(step)
        return {"step": step, "tokens": tokens, "time_unix_seconds": round(time.time(), 3)}

    def close(self) -> None:
        self._file.close()


def read_journal(run_folder: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a run's record, under way or after, oldest first; none where the run has no record.

    A line cut by a crash is passed over. Numbers that are not finite come back as `inf`, `-inf` and `nan`.
    """
    path = run_folder / JOURNAL_FILE
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and ("metrics" in entry or "event" in entry):
                entry["metrics"] = {name: float(value) for name, value in entry.get("metrics", {}).items()}
                yield entry


def jsonable(value: Any) -> Any:
    """What JSON can hold of `value`. It knows neither inf nor NaN: they stand there as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
