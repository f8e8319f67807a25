"""What is in a checkpoint folder: writing its files durably, and reading them back into the engine.

DeepSpeed hands its files to `DeferringCheckpointEngine`, its own extension point; `saver.py` has them written.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch.serialization import get_crc32_options, set_crc32_options

from data_prep.hashing import ALGORITHM, hasher
from data_prep.store import sync_folder
from pipeline.checkpoints import zero_layout
from pipeline.checkpoints.folder import FORMAT_VERSION, INTEGRITY, STATE, CheckpointState, listing_digest, put_in_place
from pipeline.checkpoints.snapshot import HostBuffers
from pipeline.distributed.world import World
from pipeline.engine.internals import (
    Engine,
    leave_out_the_recovery_script,
    load_weights_and_moments,
    pieces_of,
    safe_globals,
)
from pipeline.random_state import random_state, set_random_state
from pipeline.redact import failure_message, redact


class _HashingFile:
    """A write-only binary file that knows the hash of what passed through it.

    Neither hashing nor writing nor the disk holds the interpreter: a large piece is hashed while it is written, and
    goes to the disk while the next one is. Called by one thread.
    """

    def __init__(self, raw: BinaryIO, threads: ThreadPoolExecutor) -> None:
        self.raw, self.threads, self.digest, self.size = raw, threads, hasher(), 0
        self.error: OSError | None = None
        self._syncing: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        self.size += len(data)
        _written[0] += len(data)
        large = len(data) >= _LARGE_BYTES
        hashed = self.threads.submit(self.digest.update, data) if large else None
        try:
            if hashed is None:
                self.digest.update(data)
            count = self.raw.write(data)
            if large and (self._syncing is None or self._syncing.done()):
                self._synced()
                self._syncing = self.threads.submit(os.fsync, self.raw.fileno())
            return count
        except OSError as error:
            self.error = error
            raise
        finally:
            if hashed is not None:
                hashed.result()  # `data` is the caller's again when this returns

    def flush(self) -> None:
        self.raw.flush()

    def sync(self) -> None:
        """All that was written is on the disk when this returns. Raises OSError."""
        self.raw.flush()
        self._synced()
        os.fsync(self.raw.fileno())

    def _synced(self) -> None:
        if self._syncing is not None:
            self._syncing.result()  # the kernel tells of an error once: to this call, not to the one that follows


_LARGE_BYTES = 1 << 16
_written = [0]


def written_bytes() -> int:
    """What this process has written of checkpoints so far."""
    return _written[0]


@dataclass(frozen=True)
class Written:
    """`digest` is hexadecimal, of `hashing.ALGORITHM`."""

    size_bytes: int
    digest: str


class DeferringCheckpointEngine(CheckpointEngine):  # type: ignore[misc]
    """What DeepSpeed would write, kept in `files` for `write_files`: `save_checkpoint` touches no disk.

    Nothing is raised while it does: a rank that left `save_checkpoint` early would leave the others in its
    barriers. What went wrong is in `errors`.

    Attributes:
        buffers: where tensors are copied to; None: `files` refers to the live ones.
    """

    def __init__(self, buffers: HostBuffers | None = None) -> None:
        super().__init__()
        self.name = "DeferringCheckpointEngine"
        self.buffers = buffers
        self.files: dict[str, Any] = {}
        self.errors: list[str] = []

    def create(self, info: Any) -> None:
        self.files, self.errors = {}, []
        if self.buffers is not None:
            self.buffers.begin()

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        state_dict = _without_enums(state_dict)
        if "ds_config" in state_dict:
            state_dict = {**state_dict, "ds_config": redact(state_dict["ds_config"])}
        try:
            self.files[Path(path).name] = state_dict if self.buffers is None else self.buffers.copy(state_dict)
        except (MemoryError, RuntimeError) as error:  # torch says RuntimeError where memory is short
            self.errors.append(
                f"{Path(path).name}: no room in host memory for its copy ({failure_message(error)}); "
                "set checkpoint.background=false to write without one"
            )

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(safe_globals()):
            # Mapped: DeepSpeed reads the file of the weights twice, and copies what it takes.
            return torch.load(path, map_location=map_location, weights_only=True, mmap=True)

    def commit(self, info: Any) -> bool:
        return True


def _without_enums(value: Any) -> Any:
    """Members of enumerations by their values: Python 3.11.0 to 3.11.3 pickles them as calls of `getattr`."""
    if isinstance(value, Enum):
        return value.value
    if type(value) is dict:
        return {key: _without_enums(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_without_enums, value))
    return value


def collect(
    engine: Engine, deferring: DeferringCheckpointEngine, building: Path, name: str, rank: int
) -> tuple[dict[str, Any], list[str]]:
    """This rank's files of a checkpoint as objects for `torch.save`, and problems. A collective.

    Args:
        deferring: the engine's `checkpoint_engine`.
    """
    leave_out_the_recovery_script(engine)
    engine.save_checkpoint(str(building), tag=name, save_latest=False)
    own = {_rng_name(rank): random_state(), zero_layout.file_name(rank): zero_layout.to_plain(pieces_of(engine))}
    files = {**deferring.files, **own}
    deferring.files = {}
    return files, deferring.errors


def write_files(folder: Path, files: dict[str, Any]) -> tuple[dict[str, Written], list[str]]:
    """Write one rank's files; what was written, and the problem that ended it early."""
    written: dict[str, Written] = {}
    for name, content in files.items():
        try:
            folder.mkdir(exist_ok=True)
            written[name] = write_durably(folder / name, partial(_save, content))
        except Exception as error:  # torch.save turns a full disk into a RuntimeError; a thread's error must be said
            return written, [f"{folder / name}: {failure_message(error)}"]
    return written, []


def _save(content: Any, file: Any) -> None:
    """`torch.save` without the CRC32 of its zip format, which takes as long as the hash that we keep instead."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        torch.save(content, file)
    finally:
        set_crc32_options(before)


def write_durably(path: Path, write: Callable[[Any], Any]) -> Written:
    """Call `write(file)`, hash what it wrote and fsync it. Raises OSError."""
    with open(path, "wb") as raw, ThreadPoolExecutor(2, "checkpoint-file") as threads:
        file = _HashingFile(raw, threads)
        try:
            write(file)
        except RuntimeError as error:  # torch.save's, where the disk's own error says more
            raise (file.error or error) from None
        file.sync()
    return Written(file.size, file.digest.hexdigest())


def commit(folder: Path, final: Path, state: CheckpointState, files: dict[str, Written]) -> list[str]:
    """state.json, integrity.json, then the rename that makes `folder` a checkpoint; by one rank.

    Returns:
        What kept it from being one; empty when it stands.
    """
    try:
        text = state.model_dump_json(indent=2).encode()
        files = {**files, STATE: write_durably(folder / STATE, lambda file: file.write(text))}
        problems = _strays(folder, files)
        if problems:
            return problems
        table = {name: {"bytes": item.size_bytes, ALGORITHM: item.digest} for name, item in sorted(files.items())}
        whole = {"format_version": FORMAT_VERSION, "sha256": listing_digest(table), "files": table}
        listing = json.dumps(whole, indent=2).encode()
        write_durably(folder / INTEGRITY, lambda file: file.write(listing))
        sync_folder(folder)
        put_in_place(folder, final)
    except OSError as error:
        return [f"{error.filename or folder}: {error.strerror}"]
    return []


def _strays(folder: Path, files: dict[str, Written]) -> list[str]:
    """Files beside the list, and files that are no longer as they were written."""
    sizes = {item.name: item.stat().st_size for item in folder.iterdir()}
    problems = [f"{folder / name}: was written past the integrity list" for name in sorted(sizes.keys() - files.keys())]
    for name, item in files.items():
        if sizes.get(name) != item.size_bytes:
            now = f"has {sizes[name]:,} bytes" if name in sizes else "is gone"
            problems.append(f"{folder / name}: {now}, {item.size_bytes:,} bytes were written a moment ago")
    return problems


def load(engine: Engine, folder: Path, world: World) -> None:
    """Model and optimizer of a verified checkpoint into an engine of the same ranks, stage and precision, bitwise.

    Raises:
        UserError: DeepSpeed could not load it.
    """
    loaded = load_weights_and_moments(engine, str(folder.parent), folder.name)
    world.raise_together([] if loaded else [f"{folder}: DeepSpeed loaded nothing from it"])


def load_random_state(folder: Path, world: World) -> None:
    """Restore this rank's generators; raises UserError where its file is absent."""
    path, problems = folder / _rng_name(world.rank), []
    try:
        set_random_state(torch.load(path, weights_only=True))
    except Exception as error:  # whatever torch makes of bytes that are no random state
        said = failure_message(error)
        problems.append(
            f"{path}: is no random state ({said}); move {folder.name} away to go on from an older checkpoint"
        )
    world.raise_together(problems)


def _rng_name(rank: int) -> str:
    return f"rng-rank-{rank:05d}.pt"
