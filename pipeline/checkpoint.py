"""What a checkpoint folder is: its state, its list of hashes, which one is the newest whole one.

A folder without a whole `integrity.json` does not exist. `checkpoint_io.py` writes and reads them.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError
from pipeline.health import HealthState

if TYPE_CHECKING:
    from pipeline.distributed import World

FORMAT_VERSION = 1
INTEGRITY = "integrity.json"
STATE = "state.json"


class CheckpointState(BaseModel):
    """What is not a tensor; `state.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    step: int
    """Optimizer steps taken."""
    consumed_samples: int
    """Position in the data of the batch that follows, those left out before it included."""
    consumed_tokens: int
    """Tokens of the batches that steps were taken with."""
    dataset_id: str
    tokenizer_sha256: str
    world_size: int
    zero_stage: int
    precision: str
    config: dict[str, Any]
    """The resolved run configuration."""
    mlflow_run_id: str | None
    next_batch_hash: str
    """sha256 of the global batch that follows."""
    logit_fingerprint: dict[str, Any]
    seconds: dict[str, float]
    """Time spent training, evaluating and saving, over all starts."""
    evaluation: dict[str, float] | None = None
    """The latest held-out measurement."""
    pending_evaluation: bool = False
    """This step's evaluation was due and is not done: a stop came before its end. The next start does it first."""
    loss_sums: list[list[float]] = []
    """Rank by rank, what the next logged mean of the losses already holds (`LossMeter.sums`)."""
    health: HealthState = HealthState()
    versions: dict[str, str]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Delete a checkpoint; it stops being one at once, however long the deletion takes."""
    doomed = folder.with_name(f".deleting-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(root: Path, keep_last: int) -> list[Path]:
    """Delete all but the newest `keep_last`, and never the newest one that verifies."""
    folders = list_checkpoints(root)
    doomed = folders[keep_last:]
    if not doomed or not any(not verify(folder) for folder in folders[:keep_last]):
        return []
    for folder in doomed:
        discard(folder)
    return doomed


def list_checkpoints(root: Path) -> list[Path]:
    """Folders named like checkpoints, the newest first, whole or not."""
    if not root.is_dir():
        return []
    found = [item for item in root.iterdir() if re.fullmatch(r"step-\d+", item.name) and item.is_dir()]
    return sorted(found, key=lambda item: int(item.name[5:]), reverse=True)


def verify(folder: Path, only: Iterable[str] | None = None) -> list[str]:
    """Problems of a checkpoint, one a line; none means that every byte is what was written.

    Args:
        only: names of files to hash, for sharing the work; all when absent.
    """
    try:
        table = json.loads((folder / INTEGRITY).read_bytes())
        files: dict[str, dict[str, Any]] = table["files"]
    except FileNotFoundError:
        return [f"{folder}: has no {INTEGRITY}: it was never finished"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{folder / INTEGRITY}: cannot be read: {first_line(error)}"]
    if table.get("format_version") != FORMAT_VERSION:
        return [f"{folder}: format version {table.get('format_version')}, this program reads {FORMAT_VERSION}"]
    problems = []
    for name in files if only is None else only:
        path, expected = folder / name, files[name]
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                problems.append(f"{path}: {size:,} bytes, {expected['bytes']:,} were written")
                continue
            with open(path, "rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected["sha256"]:
                problems.append(f"{path}: sha256 {actual[:12]}…, {expected['sha256'][:12]}… was written")
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
    return problems


def newest_verified(root: Path, world: "World") -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, the hashing shared by all ranks.

    Returns:
        Its folder (None: there is none), and why each newer one was passed over.
    """
    passed_over: list[str] = []
    for folder in world.broadcast(list_checkpoints(root) if world.is_main else None):
        problems = verify_together(folder, world)
        if not problems:
            return folder, passed_over
        passed_over += problems
    return None, passed_over


def verify_together(folder: Path, world: "World") -> list[str]:
    """`verify`, each rank hashing its share; the same list on every rank."""
    try:
        names = sorted(json.loads((folder / INTEGRITY).read_bytes())["files"])
        mine: list[str] | None = names[world.rank :: world.size]
    except (OSError, ValueError, KeyError, TypeError):
        mine = None
    lines = [line for report in world.gather(verify(folder, mine)) for line in report]
    return list(dict.fromkeys(lines))


def newest_verified_alone(root: Path) -> Path:
    """`newest_verified` for one process that needs a checkpoint.

    Raises:
        UserError: there is none, or none verifies; why, one line each.
    """
    problems: list[str] = []
    for folder in list_checkpoints(root):
        found = verify(folder)
        if not found:
            return folder
        problems += found
    raise UserError([*problems, f"{root}: no checkpoint that verifies"])


def read_state(folder: Path) -> CheckpointState:
    """Raises UserError where state.json is absent or of another form."""
    try:
        return CheckpointState.model_validate_json((folder / STATE).read_bytes())
    except (OSError, ValidationError) as error:
        raise UserError(f"{folder / STATE}: {first_line(error)}") from None


def first_line(error: BaseException) -> str:
    """An error in one line, for a message."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
