"""Restarts of a run as MLflow tells them: the launcher's `restarts.jsonl`, a tag an event."""

import json
from datetime import UTC, datetime
from pathlib import Path

RESTARTS_FILE = "restarts.jsonl"
"""In the run folder; a line each time that the run has ended before its last step. `launch.jobs.restarts` writes it."""


def restart_tags(run_folder: Path) -> dict[str, str]:
    """Each earlier end of this run as a tag, its cause in it; empty for a run that was never started again."""
    try:
        lines = (run_folder / RESTARTS_FILE).read_text().splitlines()
    except FileNotFoundError:
        return {}
    entries = [json.loads(line) for line in lines]
    tags = {
        f"globallocal.restart.{number:03d}": f"{_moment(entry['time'])} {entry['cause']}; {entry['reason']}"
        for number, entry in enumerate(entries, start=1)
    }
    return tags | {"globallocal.restarts": str(len(entries))}


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
