"""Restarts of a run as MLflow tells them: the launcher's `restarts.jsonl`, a tag an event."""

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

log = logging.getLogger("globallocal")

RESTARTS_FILE = "restarts.jsonl"
"""In the run folder; a line each time that the run has ended before its last step. `launch.jobs.restarts` writes it."""


def restart_tags(run_folder: Path) -> dict[str, str]:
    """Each earlier end of this run as a tag, its cause in it; empty for a run that was never started again."""
    entries = read_restarts(run_folder)
    if not entries:
        return {}
    tags = {
        f"globallocal.restart.{number:03d}": f"{_moment(entry['time'])} {entry['cause']}; {entry['reason']}"
        for number, entry in enumerate(entries, start=1)
    }
    return tags | {"globallocal.restarts": str(len(entries))}


def read_restarts(run_folder: Path) -> list[dict[str, Any]]:
    """Each line of the file; one that is not whole, as a full disk leaves it, is passed over and said."""
    path, entries = run_folder / RESTARTS_FILE, []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entries.append({**entry, "time": float(entry["time"]), "cause": entry["cause"], "reason": entry["reason"]})
        except (ValueError, KeyError, TypeError):
            log.warning(f"{path}: line {number} is not whole, and passed over")
    return entries


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
