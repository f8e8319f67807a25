"""The roll backs that a run has decided, in its folder: written down before anyone acts on them."""

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from data_prep.errors import UserError
from data_prep.store import publish_file, sync_folder
from pipeline.health.state import RollBack
from pipeline.redact import failure_message

_DECISIONS = TypeAdapter(tuple[RollBack, ...])


def decisions_path(run_folder: Path) -> Path:
    return run_folder / "health" / "roll_backs.json"


def read_decisions(run_folder: Path) -> tuple[RollBack, ...]:
    """The roll backs that were decided in this run. Raises UserError where the file is of another form."""
    path = decisions_path(run_folder)
    try:
        return _DECISIONS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{path}: {failure_message(error)}; it says which batches this run leaves out: restore it"
        ) from None


def write_decisions(run_folder: Path, decided: Sequence[RollBack]) -> None:
    """Whole or not at all, and durable. Raises OSError."""
    path = decisions_path(run_folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_file(path, (json.dumps([item.model_dump() for item in decided], indent=2) + "\n").encode())
    sync_folder(run_folder)
