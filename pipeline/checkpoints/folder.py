"""What a checkpoint folder is: its state, its list of hashes, which one is the newest whole one.

A folder without a whole `integrity.json` does not exist. `write.py` writes and reads them.
"""

import difflib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from data_prep.errors import UserError
from data_prep.hashing import ALGORITHMS, Algorithm, hash_file, hasher
from data_prep.store import sync_folder
from pipeline.checkpoints.fingerprint import Fingerprint
from pipeline.checkpoints.state import Origin, TrainState
from pipeline.evaluation.figures import Evaluation
from pipeline.files import LOCK_FILE, HeldError, hold
from pipeline.health.state import HealthState
from pipeline.redact import failure_message

if TYPE_CHECKING:
    from pipeline.distributed.world import World

FORMAT_VERSION = 1
JOB_VARIABLE = "GLOBALLOCAL_JOB"
"""Our launchers give every process of a job its id in this environment variable, the same at each restart."""
INTEGRITY = "integrity.json"
STATE = "state.json"
MODEL_FOLDER = "model"
"""In the run folder: the model's configuration and the tokenizer, so that a run can be used without its dataset."""
SAVING = ".saving-"
_DELETING = ".deleting-"
_REPLACED = ".replaced-"
_BLOCK_BYTES = 1 << 23


def _read_evaluation(value: Any) -> Any:
    return Evaluation.read(value) if isinstance(value, dict) else value


StoredEvaluation = Annotated[Evaluation, BeforeValidator(_read_evaluation), PlainSerializer(Evaluation.flat)]
"""An evaluation, in files the flat mapping of `Evaluation.flat`."""


class CheckpointState(BaseModel):
    """What is not a tensor; `state.json`."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")

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
    """0: one file for any number of ranks, as `checkpoints reshard` makes it."""
    zero_stage: int
    precision: str
    config: dict[str, Any]
    """The resolved run configuration."""
    mlflow_run_id: str | None
    next_batch_hash: str
    """sha256 of the global batch that follows."""
    logit_fingerprint: Fingerprint
    seconds: dict[str, float]
    """Time spent training, evaluating and saving, over all starts."""
    evaluation: StoredEvaluation | None = None
    """The latest held-out measurement; `step` is when."""
    pending_evaluation: bool = False
    """This step's evaluation was due and is not done: a stop came before its end. The next start does it first."""
    loss_sums: list[list[float]] = []
    """Rank by rank, what the next logged mean of the losses already holds (`LossMeter.sums`)."""
    job: str = ""
    """Which job wrote it, however often that was started again (`JOB_VARIABLE`); empty without a launcher of ours."""
    health: HealthState = HealthState()
    versions: dict[str, str]
    begun_from: Origin | None = None
    """`training.init_from` of the run's first start, and what it held."""

    @property
    def train_state(self) -> TrainState:
        """Where the run stood."""
        return TrainState(
            step=self.step,
            loss_sums=self.loss_sums,
            evaluation=self.evaluation,
            pending_evaluation=self.pending_evaluation,
            health=self.health,
            seconds=self.seconds,
            begun_from=self.begun_from,
        )


def lock(run_folder: Path) -> IO[str]:
    """Hold the run folder while the file that is returned is open: only the holder changes checkpoints.

    Raises:
        UserError: another job is writing there.
    """
    try:
        return hold(run_folder / LOCK_FILE)
    except HeldError as holder:
        raise UserError(
            f"{run_folder}: another job is writing there ({holder}); end it, or choose another run.name"
        ) from None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def kept_model(folder: Path, tokenizer_sha256: str) -> Path | None:
    """The run's `model/`, where `folder` is a checkpoint in its run and the tokenizer there is the checkpoint's."""
    kept = folder.absolute().parent.parent / MODEL_FOLDER
    tokenizer = kept / "tokenizer" / "tokenizer.model"
    return kept if tokenizer.is_file() and hash_file(tokenizer) == tokenizer_sha256 else None


def discard(folder: Path) -> None:
    """Delete a checkpoint; it stops being one at once, however long the deletion takes."""
    doomed = folder.with_name(f"{_DELETING}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def put_in_place(folder: Path, final: Path) -> None:
    """Rename `folder` to `final`, durably. One that stands there gives way; `tidy` brings it back if this is cut."""
    replaced = final.with_name(f"{_REPLACED}{final.name}")
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    os.rename(folder, final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def tidy(root: Path) -> None:
    """End what a killed process began: unfinished saves and deletions go. Only for who holds the run's lock.

    Raises:
        UserError: a checkpoint whose replacement never came cannot be given its name back.
    """
    for item in root.iterdir() if root.is_dir() else ():
        final = root / item.name.removeprefix(_REPLACED)
        if item.name.startswith(_REPLACED) and not final.exists():
            try:
                os.rename(item, final)
            except OSError as error:
                raise UserError(f"{item}: cannot be renamed to {final.name}: {error.strerror}") from None
        elif item.name.startswith((_REPLACED, SAVING, _DELETING)):
            shutil.rmtree(item, ignore_errors=True)


def list_checkpoints(root: Path) -> list[Path]:
    """Folders named like checkpoints, the newest first, whole or not."""
    if not root.is_dir():
        return []
    found = [item for item in root.iterdir() if re.fullmatch(r"step-\d+", item.name) and item.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def recorded(entry: Mapping[str, Any]) -> tuple[Algorithm, str]:
    """Algorithm and hex digest that a file's entry in integrity.json holds. Raises ValueError where it holds none."""
    for algorithm in ALGORITHMS:
        if algorithm in entry:
            return algorithm, entry[algorithm]
    raise ValueError("its entry in integrity.json names no hash")


def listing_digest(files: dict[str, dict[str, Any]]) -> str:
    """What integrity.json says of itself, so that damage to it is not laid to the files."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_listing(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """File → `bytes` and its hash (`recorded`) as integrity.json tells, and why it cannot be read."""
    try:
        table = json.loads((folder / INTEGRITY).read_bytes())
        version, files = table["format_version"], table["files"]
        if version != FORMAT_VERSION:
            return {}, [f"{folder / INTEGRITY}: format version {version}, this program reads {FORMAT_VERSION}"]
        if listing_digest(files) != table["sha256"]:
            return {}, [f"{folder / INTEGRITY}: is not what was written: its own sha256 differs"]
        return files, []
    except FileNotFoundError:
        if not folder.is_dir():
            return {}, [f"{folder}: no such folder; {nearest_checkpoints(folder)}"]
        return {}, [f"{folder}: has no {INTEGRITY}: it was never finished"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, [f"{folder / INTEGRITY}: cannot be read: {failure_message(error)}"]


def nearest_checkpoints(folder: Path) -> str:
    """Words for a person who mistyped a checkpoint's name."""
    standing = [str(item) for item in list_checkpoints(folder.parent)]
    near = difflib.get_close_matches(str(folder), standing, n=3, cutoff=0.3)
    return f"nearest: {', '.join(near)}" if near else "globallocal checkpoints list RUN shows those that stand"


def verify_sizes(folder: Path) -> list[str]:
    """Problems of a checkpoint that show without reading its files, one per line."""
    files, problems = read_listing(folder)
    return problems + [line for name in files for line in _verify_size(folder / name, files[name])]


def verify(
    folder: Path, only: Iterable[str] | None = None, progress: Callable[[int], None] = lambda count: None
) -> list[str]:
    """Problems of a checkpoint, one per line; none means that every byte is what was written.

    Args:
        only: names of files to hash, for sharing the work; all when absent.
        progress: called with the number of bytes hashed since the last call.
    """
    files, problems = read_listing(folder)
    for name in files if only is None else only:
        found = _verify_size(folder / name, files[name])
        problems += found or _verify_hash(folder / name, files[name], progress)
    return problems


def _verify_size(path: Path, expected: dict[str, Any]) -> list[str]:
    try:
        size = path.stat().st_size
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    return [] if size == expected["bytes"] else [f"{path}: {size:,} bytes, {expected['bytes']:,} were written"]


def _verify_hash(path: Path, expected: dict[str, Any], progress: Callable[[int], None]) -> list[str]:
    try:
        algorithm, written = recorded(expected)
        block_bytes = min(_BLOCK_BYTES, expected["bytes"])  # new ones are filled with zeros, which takes time
        digest, blocks = hasher(algorithm, all_cores=True), itertools.cycle([bytearray(block_bytes) for _ in range(2)])
        with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(1, "hash") as thread:
            hashed: Future[None] | None = None
            while True:  # one block is hashed while the next is read; both leave the interpreter to others
                block = next(blocks)
                count = file.readinto(block)
                if hashed:
                    hashed.result()
                if not count:
                    break
                hashed = thread.submit(digest.update, memoryview(block)[:count])
                progress(count)
    except (OSError, ValueError) as error:
        return [f"{path}: {failure_message(error)}"]
    actual = digest.hexdigest()
    return [] if actual == written else [f"{path}: {algorithm} {actual[:12]}…, {written[:12]}… was written"]


def newest_verified(folders: Iterable[Path], world: "World") -> tuple[Path | None, list[str]]:
    """The first of `folders`, the same on every rank, that verifies; the hashing is shared by all ranks.

    Returns:
        Its folder (None: there is none), and why each before it was passed over.
    """
    passed_over: list[str] = []
    for folder in folders:
        problems = verify_together(folder, world)
        if not problems:
            return folder, passed_over
        passed_over += problems
    return None, passed_over


def verify_together(folder: Path, world: "World") -> list[str]:
    """`verify`, each rank hashing its share; the same list on every rank."""
    names = sorted(read_listing(folder)[0])
    lines = [line for report in world.gather(verify(folder, names[world.rank :: world.size])) for line in report]
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
        raise UserError(f"{folder / STATE}: {failure_message(error)}") from None
