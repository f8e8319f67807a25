"""Writing and reading checkpoints with all ranks.

A checkpoint is built under a temporary name, hashed while it is written, and renamed when every rank has fsynced.
DeepSpeed writes and reads its own files, through `HashingCheckpointEngine`, its own extension point.
"""

import hashlib
import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

from pipeline.checkpoint import (
    FORMAT_VERSION,
    INTEGRITY,
    STATE,
    CheckpointState,
    discard,
    first_line,
    step_name,
    sync_folder,
)
from pipeline.distributed import World
from pipeline.redact import redact


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
            self.errors.append(f"{path}: {first_line(error)}")

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
        problems.append(f"{building / name / _rng_name(world.rank)}: {first_line(error)}")
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
