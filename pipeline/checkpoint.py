"""Checkpoints: built under a temporary name, hashed while written, renamed when every rank has fsynced.

A folder without a whole `integrity.json` does not exist. DeepSpeed writes and reads its own files, through
`HashingCheckpointEngine`, its own extension point.
"""

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError
from pipeline.distributed import World
from pipeline.redact import redact

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
    consumed_tokens: int
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
    versions: dict[str, str]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


class _HashingFile:
    """A write-only binary file that knows the sha256 of what passed through it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.digest, self.size = raw, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.raw.write(data)

    def flush(self) -> None:
        self.raw.flush()


@dataclass(frozen=True)
class Written:
    size_bytes: int
    sha256: str


class HashingCheckpointEngine(CheckpointEngine):
    """DeepSpeed's files, hashed on their way to the disk and fsynced.

    An error while writing is kept in `errors` and raised by nobody here: a rank that left `save_checkpoint`
    early would leave the others in its barriers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = "HashingCheckpointEngine"
        self.written: dict[str, Written] = {}
        self.errors: list[str] = []

    def create(self, info: Any) -> None:
        self.written, self.errors = {}, []

    def save(self, state_dict: Any, path: str) -> None:
        if "ds_config" in state_dict:
            state_dict = {**state_dict, "ds_config": redact(state_dict["ds_config"])}
        try:
            self.written[Path(path).name] = write_durably(Path(path), lambda file: torch.save(state_dict, file))
        except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
            self.errors.append(f"{path}: {_first_line(error)}")

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(safe_globals()):
            return torch.load(path, map_location=map_location, weights_only=True)

    def commit(self, info: Any) -> bool:
        return True


def safe_globals() -> list[Any]:
    """The classes, besides tensors, that DeepSpeed's own files hold."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def write_durably(path: Path, write: Any) -> Written:
    """Call `write(file)`, hash what it wrote and fsync it. Raises OSError."""
    with open(path, "wb") as raw:
        file = _HashingFile(raw)
        write(file)
        raw.flush()
        os.fsync(raw.fileno())
    return Written(file.size, file.digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Make the names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------- random state


def random_state() -> dict[str, Any]:
    """Every generator that training may draw from, in types that `weights_only` reads back."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "device" in state:
        get_accelerator().set_rng_state(state["device"])


def _rng_name(rank: int) -> str:
    return f"rng-rank-{rank:05d}.pt"


# ---------------------------------------------------------------- save


def save(engine: Any, root: Path, state: CheckpointState, world: World) -> list[str]:
    """Write `root/step-XXXXXXXX` on all ranks; it appears whole or not at all.

    Returns:
        The problems that kept it from being written, the same on every rank; empty when it stands.
    """
    name = step_name(state.step)
    building, final = root / f".saving-{name}", root / name
    problems: list[str] = []
    if world.is_main:
        try:
            shutil.rmtree(building, ignore_errors=True)
            (building / name).mkdir(parents=True)
        except OSError as error:
            problems.append(f"{building}: {error.strerror}")
    problems = world.broadcast(problems)
    if problems:
        return problems
    writer: HashingCheckpointEngine = engine.checkpoint_engine
    engine.save_checkpoint(str(building), tag=name, save_latest=False)
    written, problems = dict(writer.written), list(writer.errors)
    try:
        path = building / name / _rng_name(world.rank)
        written[path.name] = write_durably(path, lambda file: torch.save(random_state(), file))
    except (OSError, RuntimeError) as error:
        problems.append(f"{building / name / _rng_name(world.rank)}: {_first_line(error)}")
    reports = world.gather((written, problems))
    problems = [problem for _, lines in reports for problem in lines]
    if not problems and world.is_main:
        problems = _commit(building, final, state, [files for files, _ in reports])
    problems = world.broadcast(problems)
    if problems and world.is_main:
        shutil.rmtree(building, ignore_errors=True)
    return problems


def _commit(building: Path, final: Path, state: CheckpointState, reports: list[dict[str, Written]]) -> list[str]:
    """Rank 0: state.json, integrity.json, then the rename that makes it a checkpoint."""
    folder = building / final.name
    files = {name: written for report in reports for name, written in report.items()}
    try:
        text = state.model_dump_json(indent=2).encode()
        files[STATE] = write_durably(folder / STATE, lambda file: file.write(text))
        unknown = {item.name for item in folder.iterdir()} - files.keys()
        if unknown:
            return [f"{folder}: {', '.join(sorted(unknown))} was written past the integrity list"]
        table = {name: {"bytes": item.size_bytes, "sha256": item.sha256} for name, item in sorted(files.items())}
        listing = json.dumps({"format_version": FORMAT_VERSION, "files": table}, indent=2).encode()
        write_durably(folder / INTEGRITY, lambda file: file.write(listing))
        sync_folder(folder)
        if final.exists():  # an earlier try that failed verification
            discard(final)
        os.rename(folder, final)
        sync_folder(final.parent)
        shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        return [f"{error.filename or folder}: {error.strerror}"]
    return []


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


# ---------------------------------------------------------------- find, verify, load


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
        return [f"{folder / INTEGRITY}: cannot be read: {_first_line(error)}"]
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


def newest_verified(root: Path, world: World) -> tuple[Path | None, list[str]]:
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


def verify_together(folder: Path, world: World) -> list[str]:
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
        raise UserError(f"{folder / STATE}: {_first_line(error)}") from None


def load(engine: Any, folder: Path, world: World) -> None:
    """Model, optimizer and random state of a verified checkpoint into the engine.

    Raises:
        UserError: DeepSpeed could not load it, or a rank's random state is absent.
    """
    problems: list[str] = []
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        problems.append(f"{folder}: DeepSpeed loaded nothing from it")
    try:
        state = torch.load(folder / _rng_name(world.rank), weights_only=True)
        set_random_state(state)
    except OSError as error:
        problems.append(f"{folder / _rng_name(world.rank)}: {error.strerror}")
    world.raise_together(problems)


# ---------------------------------------------------------------- proof


@torch.no_grad()
def logit_fingerprint(engine: Any, vocab_size: int, length_tokens: int = 32) -> dict[str, Any]:
    """Logits on a fixed probe: their sha256, and the last token's first 64 in fp32 for a distance."""
    probe = (torch.arange(length_tokens) * 7919 % vocab_size).unsqueeze(0)
    training = engine.training
    engine.eval()
    logits = engine(input_ids=probe.to(engine.device)).logits.float().cpu().contiguous()
    engine.train(training)
    return {
        "sha256": hashlib.sha256(logits.numpy().tobytes()).hexdigest(),
        "values": logits[0, -1, :64].tolist(),
    }


def compare_fingerprints(saved: dict[str, Any], now: dict[str, Any]) -> float:
    """0.0 where the probe's logits are bitwise those that were saved, else their largest distance."""
    if saved["sha256"] == now["sha256"]:
        return 0.0
    distance = max(abs(a - b) for a, b in zip(saved["values"], now["values"], strict=True))
    return max(distance, float(np.finfo(np.float32).tiny))


def _first_line(error: BaseException) -> str:
    with suppress(AttributeError):
        if error.strerror:  # type: ignore[attr-defined]
            return str(error.strerror)  # type: ignore[attr-defined]
    return str(error).strip().split("\n")[0][:200] or type(error).__name__
