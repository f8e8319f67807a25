"""MLflow tracking that training cannot feel: one run across kills and resumes, nothing lost on the way.

Every record goes to `RUN/tracking/spool.jsonl` first; a thread delivers it (`pipeline.tracking.shipping`). What a
store has not received when the process ends is delivered at the next start of the run. The spool is the
whole history: a store that lost the run, or another one, is given all of it again.

Steps are never doubled: a metric's point is recorded only when its step is above the highest recorded one,
so what a resumed run computes a second time is not logged a second time, and the first values stand.

Rank 0 holds a `Tracker`, the other ranks a `NullTracker`.
"""

import contextlib
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_prep.errors import UserError
from pipeline.files import HeldError, hold, is_held
from pipeline.redact import failure_message, redact_text
from pipeline.tracking.facts import RunFacts, Sizes
from pipeline.tracking.history import History
from pipeline.tracking.journal import Journal, jsonable
from pipeline.tracking.mlflow_run import MlflowRun, needs_a_person
from pipeline.tracking.provenance import provenance_tags
from pipeline.tracking.shipping import ARTIFACTS, Delivery, Say, Shipper
from pipeline.tracking.spool import Spool
from pipeline.tracking.store import Experiment, experiment_of, run_page, tags_of_environment, tracking_uri
from pipeline.tracking.tracker import LocalTracker, NullTracker, Tracker, now_ms

if TYPE_CHECKING:
    from pipeline.settings.sections import TrackingSection

START_WAIT_SECONDS = 60.0  # a new SQLite store takes 5 to 10 s to lay out its tables
LOCK_WAIT_SECONDS = 10.0
KNOWN_PAUSE_SECONDS = 5.0


def open_tracker(
    config: "TrackingSection", run_folder: Path, facts: RunFacts, run_id: str | None = None, say: Say = print
) -> NullTracker:
    """Creates the MLflow run of a run folder, or goes on with it.

    A store that cannot be reached does not keep training from starting: the run is then created when the
    store comes back. What only a person can put right (a wrong password, an unsupported URI) is refused
    at the first start of a run, and at a resume is said while training goes on.

    Args:
        config: `enabled`, `experiment` (see `experiment_of`), `uri` (see `tracking_uri`).
        run_folder: the run's folder; its `tracking/` and `metrics.jsonl` are ours.
        run_id: the run a checkpoint belongs to; used when `tracking/` knows of no run in this store. Without one,
            MLFLOW_RUN_ID.
        say: receives one line at a time.

    Returns:
        A Tracker; one that writes to the run folder alone where `config.enabled` is false.

    Raises:
        UserError: another process writes this run; the folder cannot be written; refused by the store.
    """
    folder, tags = Path(run_folder), provenance_tags() | tags_of_environment() | dict(facts.tags)
    if not config.enabled:
        tracker = LocalTracker(_journal(folder, facts.sizes))
        tracker.log_event("started", facts.step, **facts.started(), tags=tags)
        return tracker
    run_id = run_id or os.environ.get("MLFLOW_RUN_ID")
    opened = _open(config, folder, facts.name, run_id, _careful(say), facts.sizes)
    opened.log_event("started", facts.step, **facts.started(), tags=tags)
    opened._begin_attempt(facts, tags)
    return opened


def _journal(run_folder: Path, sizes: Sizes) -> Journal:
    try:
        run_folder.mkdir(parents=True, exist_ok=True)
        return Journal(run_folder, sizes.tokens)
    except OSError as error:
        raise UserError(f"{run_folder}: cannot be written ({error.strerror}): free space or rights") from error


def settle_run(
    config: "TrackingSection",
    run_folder: Path,
    status: str = "KILLED",
    reason: str = "lost",
    files: Sequence[str] = (),
    deadline_seconds: float = 60.0,
    say: Say = print,
) -> bool:
    """Closes and delivers a run whose process is gone (SIGKILL, a lost host), from outside.

    A run that was closed keeps its status; only what it could not deliver is delivered.

    Args:
        files: paths in the run folder, to become artifacts.

    Returns:
        Whether everything arrived.

    Raises:
        UserError: a process still writes this run.
    """
    folder = Path(run_folder)
    if not (folder / "tracking" / "spool.jsonl").exists():
        return True
    tracker = _open(config, folder, folder.name, None, _careful(say))
    for path in files:
        tracker.log_file(path)
    return tracker._settle(status, deadline_seconds, reason)


def check_recordable(run_folder: Path) -> Delivery:
    """What MLflow has of a run, for `record_afterwards`.

    Raises:
        UserError: it has none; a process writes it now.
    """
    folder = run_folder / "tracking"
    delivery = Delivery.load(folder / "delivery.json")
    if delivery is None or not delivery.run_id or not (folder / "spool.jsonl").exists():
        raise UserError(f"{run_folder}: MLflow knows no run of it; train with tracking.enabled=true, or do not record")
    if is_held(folder / "lock"):
        raise UserError(f"{run_folder}: is being trained, and its MLflow run written; wait for its end")
    return delivery


def record_afterwards(
    run_folder: Path,
    step: int,
    values: Mapping[str, float],
    table: tuple[str, Sequence[Mapping[str, Any]], Sequence[str]],
    say: Say = print,
    deadline_seconds: float = 60.0,
) -> bool:
    """Adds figures to the MLflow run of a training that has ended; its status stays, and what training recorded.

    Args:
        step: of the checkpoint that was measured; an earlier one than the last recorded is as good.
        values: metrics, of names that training does not use; those that are not finite are left out.
        table: path, rows and key of the artifact that holds all of them, as of `Tracker.log_table`.

    Returns:
        Whether everything arrived. What did not stays in the spool.

    Raises:
        UserError: as `check_recordable`; the store's password is missing.
    """
    delivery = check_recordable(run_folder)
    uri = delivery.store if "***" not in delivery.store else tracking_uri(None)
    if redact_text(uri) != delivery.store:
        raise UserError(f"{delivery.store}: its password is not known here; set MLFLOW_TRACKING_URI as for training")
    number = delivery.experiment.removeprefix("id ")
    experiment = Experiment(number) if number == delivery.experiment else Experiment(id=number)
    tracker = _open_at((uri, experiment), run_folder, run_folder.name, None, _careful(say))
    tracker._record_afterwards(step, values)
    path, rows, key = table
    tracker.log_table(path, jsonable(rows), key)
    arrived = tracker._finish(deadline_seconds)
    if arrived:
        say(f"tracking: recorded as evaluated/… at step {step:,}, and in the artifact {path}")
    return arrived


def _open(
    config: "TrackingSection", run_folder: Path, run_name: str, run_id: str | None, say: Say, sizes: Sizes | None = None
) -> Tracker:
    """As `_open_at`, where the settings and the environment say."""
    place = tracking_uri(config.uri), experiment_of(config)
    return _open_at(place, run_folder, run_name, run_id, say, sizes)


def _open_at(
    place: tuple[str, Experiment],
    run_folder: Path,
    run_name: str,
    run_id: str | None,
    say: Say,
    sizes: Sizes | None = None,
) -> Tracker:
    """Lock, spool, thread; waits for the thread's first try at the store, where this makes the run there."""
    folder = run_folder / "tracking"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder / "lock", say)
        spool = Spool(folder / "spool.jsonl")
        _ask_again(folder / "rejected.jsonl", spool)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}): free space or rights") from error
    history = History.read(spool)
    if history.damaged_lines:
        say(f"tracking: {history.damaged_lines} damaged lines in {spool.path} are passed over")
    first_start = not history.run_key
    if first_start:
        header = {"kind": "run", "run_key": uuid.uuid4().hex, "name": run_name, "time": now_ms()}
        spool.append(header)
        history.apply(header)
    uri, experiment = place
    delivery = _delivery(folder, redact_text(uri), experiment, run_id, say)
    run = MlflowRun(uri, experiment, history.run_key, history.run_name, run_folder)
    known = delivery.run_id is not None  # then nothing waits for MLflow, and the first steps go before its import
    shipper = Shipper(spool, run, delivery, say, KNOWN_PAUSE_SECONDS if known else 0.0)
    if history.attempts and shipper.undelivered_bytes:
        say(f"tracking: {shipper.undelivered_bytes:,} bytes that had not reached MLflow are sent first")
    if known:
        shipper.first_attempt.set()
    shipper.start()
    answered = shipper.first_attempt.wait(START_WAIT_SECONDS)
    if not answered:
        say(f"tracking: MLflow at {delivery.store} takes its time; training goes on, all is kept in {spool.path}")
    elif first_start and shipper.first_error and needs_a_person(shipper.first_error):
        shipper.finish(0.0)
        spool.path.unlink(missing_ok=True)
        lock.close()
        raise UserError(
            f"tracking.uri {delivery.store}: {failure_message(shipper.first_error)}: correct tracking.uri, "
            "tracking.experiment or MLFLOW_TRACKING_*, or set tracking.enabled=false"
        )
    elif shipper.first_error:
        shipper.say_down(shipper.first_error)
    if shipper.run_id and shipper.experiment_id:
        say(f"tracking: MLflow run {shipper.run_id} ({history.run_name}) in experiment {str(experiment)!r}")
        say(f"tracking: {run_page(delivery.store, shipper.experiment_id, shipper.run_id)}")
    sizes = sizes or Sizes()
    return Tracker(_journal(run_folder, sizes), sizes, spool, history, shipper, lock, say)


def _delivery(folder: Path, store: str, where: Experiment, run_id: str | None, say: Say) -> Delivery:
    """What this store has received; another store starts from nothing."""
    delivery, experiment = Delivery.load(folder / "delivery.json"), str(where)
    if delivery and (delivery.store, delivery.experiment) == (store, experiment):
        if delivery.run_id and run_id and delivery.run_id != run_id:
            say(f"tracking: the checkpoint names run {run_id}; {delivery.run_id} of this folder goes on")
        elif not delivery.run_id:
            delivery.adopt = run_id
        return delivery
    if delivery:
        say(
            f"tracking: before, this run went to {delivery.store}, experiment {delivery.experiment!r}; its "
            f"whole history is sent to {store}, experiment {experiment!r}"
        )
    return Delivery(store, experiment, adopt=None if delivery else run_id)


def _ask_again(path: Path, spool: Spool) -> None:
    """Artifacts that could not be stored last time are tried once more."""
    if not path.exists():
        return
    rejected = Spool(path)
    for record, _ in rejected.read(0):
        if record and record["record"]["kind"] in ARTIFACTS:
            spool.append(record["record"])
    rejected.close()
    path.unlink()


def _lock(path: Path, say: Say) -> IO[str]:
    """The run's lock, freed with the process."""
    try:
        return hold(path, LOCK_WAIT_SECONDS)
    except HeldError as holder:
        raise UserError(
            f"{path.parent.parent}: {holder} is writing this run: stop it first, or set another run.name"
        ) from None
    except OSError as error:
        say(f"tracking: {path} cannot be locked ({error.strerror}); see that only one process writes")
        return path.open("a+")


def _careful(say: Say) -> Say:
    """A closed terminal must not end the delivery."""

    def say_if_possible(line: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            say(line)

    return say_if_possible
