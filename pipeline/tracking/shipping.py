"""From the spool to MLflow: one daemon thread, in order, in batches, for as long as it takes.

Delivery is at least once; everything sent is idempotent (a metric point is stored under its key, step,
time and value; tags, parameters and artifacts under their names), so a repeated batch changes nothing.
Only this thread talks to the network.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data_prep.store import publish_file
from pipeline.redact import failure_message
from pipeline.tracking.mlflow_run import METRICS_PER_BATCH, MlflowRun, is_refusal
from pipeline.tracking.spool import Record, Spool

GATHER_SECONDS = 1.0
FIRST_RETRY_SECONDS = 0.5
LONGEST_RETRY_SECONDS = 30.0
ARTIFACTS = ("text", "file", "table")
"""Kinds of records that go to the artifact store."""
ARTIFACT_ATTEMPTS = 3

Say = Callable[[str], None]


class RunGoneError(Exception):
    """The run was deleted from the store."""


@dataclass
class Delivery:
    """What a store has received, kept in `delivery.json`. Losing it costs a repeated delivery, no more.

    Attributes:
        store: tracking URI without secrets; with another one, delivery starts over.
        experiment: experiment name, likewise.
        run_id, experiment_id: the run there, None before it was created.
        offset: bytes of the spool that arrived.
        adopt: a run made elsewhere that is to be gone on with, None once done.
        steps_before: highest step per metric that the adopted run held.
        uncertain_create: a creation went unanswered, so that a second, empty run may exist.
    """

    store: str
    experiment: str
    run_id: str | None = None
    experiment_id: str | None = None
    offset: int = 0
    adopt: str | None = None
    steps_before: dict[str, int] = field(default_factory=dict)
    uncertain_create: bool = False

    @classmethod
    def load(cls, path: Path) -> "Delivery | None":
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


class Shipper(threading.Thread):
    """Delivers a spool until told to finish. Nothing here raises into training.

    Args:
        spool: what to deliver.
        run: where to.
        delivery: how far it got before; saved as `delivery.json` beside the spool after every batch.
        say: receives one line when the store goes away, comes back, or refuses something.
        pause_seconds: before the first connection, which imports MLflow.
    """

    def __init__(self, spool: Spool, run: MlflowRun, delivery: Delivery, say: Say, pause_seconds: float = 0.0) -> None:
        super().__init__(name="tracking", daemon=True)
        self._pause_seconds = pause_seconds
        self._spool, self._run, self._delivery, self._say = spool, run, delivery, say
        self._connected = False
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._given_up = False
        self._down_since: float | None = None
        self._artifact_failures = 0
        self._metrics_limit = METRICS_PER_BATCH
        self.first_attempt = threading.Event()
        self.first_error: Exception | None = None
        self.rejected = 0

    @property
    def run_id(self) -> str | None:
        return self._delivery.run_id

    @property
    def experiment_id(self) -> str | None:
        return self._delivery.experiment_id

    @property
    def undelivered_bytes(self) -> int:
        return self._spool.size_bytes - self._delivery.offset + self._spool.waiting_bytes

    def wake(self) -> None:
        self._wake.set()

    def finish(self, deadline_seconds: float) -> bool:
        """Delivers what is left; returns whether all of it arrived within the deadline."""
        self._closing.set()
        self._wake.set()
        self.join(deadline_seconds)
        self._given_up = True
        return not self.is_alive() and not self.undelivered_bytes

    def run(self) -> None:
        self._closing.wait(self._pause_seconds)
        retry_seconds = FIRST_RETRY_SECONDS
        while not self._given_up:
            closing = self._closing.is_set()  # looked at first: what came before it is shipped below
            try:
                if not self._connected:
                    self._connect()
                    self.first_attempt.set()
                self._ship()
            except RunGoneError:
                self._connected = False
                self._closing.wait(FIRST_RETRY_SECONDS)
            except Exception as error:
                self._went_down(error)
                time.sleep(min(retry_seconds, 1.0)) if closing else self._closing.wait(retry_seconds)
                retry_seconds = min(2 * retry_seconds, LONGEST_RETRY_SECONDS)
            else:
                self._came_back()
                retry_seconds = FIRST_RETRY_SECONDS
                if closing:
                    return
                self._wake.wait()
                self._closing.wait(GATHER_SECONDS)
                self._wake.clear()

    def _connect(self) -> None:
        """Finds or creates the run: exactly one, whatever was answered or lost before."""
        run, delivery = self._run, self._delivery
        if delivery.run_id and not run.exists(delivery.run_id):
            self._forget_run()
        if delivery.adopt and not delivery.run_id:
            if run.exists(delivery.adopt):
                delivery.steps_before = run.adopt(delivery.adopt)
                delivery.run_id = delivery.adopt
            else:
                self._say(f"tracking: run {delivery.adopt} is not in {delivery.store}; another one is made")
        delivery.adopt = None
        if not delivery.run_id:
            found = run.find()
            delivery.run_id = found[0] if found else self._create()
        delivery.experiment_id = run.experiment_of_run(delivery.run_id)
        self._tidy()
        self._save()
        self._connected = True

    def _create(self) -> str:
        earlier, self._delivery.uncertain_create = self._delivery.uncertain_create, True
        self._save()
        run_id = self._run.create()
        self._delivery.uncertain_create = earlier or self._run.repeats_requests()
        return run_id

    def _tidy(self) -> None:
        if self._delivery.uncertain_create and self._delivery.run_id:
            self._run.delete_others(self._delivery.run_id)

    def _forget_run(self) -> None:
        delivery = self._delivery
        self._say(f"tracking: run {delivery.run_id} is gone from {delivery.store}; its history is sent again")
        delivery.run_id, delivery.offset, delivery.steps_before = None, 0, {}

    def _ship(self) -> None:
        for batch, end in self._batches():
            if batch:
                self._deliver(batch)
                self._metrics_limit = min(2 * self._metrics_limit, METRICS_PER_BATCH)
            self._delivery.offset = end
            self._save()

    def _batches(self) -> Iterator[tuple[list[Record], int]]:
        """What is in the spool now: adjacent metrics together, anything else alone; the offset behind."""
        metrics: list[Record] = []
        points, start, end = 0, self._delivery.offset, self._delivery.offset
        for record, behind in self._spool.read(start):
            if record and record["kind"] == "metrics":
                metrics.append(self._without_steps_before(record))
                points += len(record["values"])
                if points >= self._metrics_limit:
                    yield metrics, behind
                    metrics, points, start = [], 0, behind
            elif record:
                if metrics:
                    yield metrics, end
                    metrics, points = [], 0
                yield [record], behind
                start = behind
            end = behind
        if end > start:
            yield metrics, end

    def _without_steps_before(self, record: Record) -> Record:
        before = self._delivery.steps_before
        values = {k: v for k, v in record["values"].items() if record["step"] > before.get(k, -1)}
        return record | {"values": values}

    def _deliver(self, batch: list[Record]) -> None:
        """Sends a batch; what the store refuses is taken out alone, written down and said."""
        run_id = self._delivery.run_id
        assert run_id
        if batch[0]["kind"] == "status":
            self._tidy()
        try:
            self._run.send(run_id, batch)
            self._artifact_failures = 0
        except Exception as error:
            self._metrics_limit = max(self._metrics_limit // 2, 50)  # the store may be slow, not away
            if not self._run.exists(run_id):
                self._forget_run()
                raise RunGoneError from error
            if not self._is_refusal(batch[0], error):
                raise
            parts = list(_halves(batch))
            if not parts:
                self._reject(batch[0], error)
            for part in parts:
                self._deliver(part)

    def _is_refusal(self, record: Record, error: Exception) -> bool:
        """The store answers otherwise; will it never take this? Artifacts live elsewhere: a few attempts."""
        if record["kind"] in ARTIFACTS:
            self._artifact_failures += 1
            return self._artifact_failures >= ARTIFACT_ATTEMPTS
        return is_refusal(error)

    def _reject(self, record: Record, error: Exception) -> None:
        self._artifact_failures = 0
        self.rejected += 1
        what = record.get("path") or ", ".join(record.get("values", [])) or record["kind"]
        reason = failure_message(error)
        path = self._spool.path.with_name("rejected.jsonl")
        with path.open("a") as file:
            file.write(json.dumps({"kind": "rejected", "error": reason, "record": record}) + "\n")
        self._say(f"tracking: MLflow refuses {record['kind']} {what}: {reason} (kept in {path})")

    def _save(self) -> None:
        try:
            text = json.dumps(asdict(self._delivery), indent=1)
            publish_file(self._spool.path.with_name("delivery.json"), text.encode())
        except OSError:
            pass  # a full disk: what arrived is then sent once more, which changes nothing

    def _went_down(self, error: Exception) -> None:
        first = not self.first_attempt.is_set()
        if first:  # whoever waits for it decides whether this ends the run, and says so
            self.first_error = error
            self.first_attempt.set()
        if self._down_since is None:
            self._down_since = time.monotonic()
            if not first:
                self.say_down(error)

    def say_down(self, error: Exception) -> None:
        self._say(
            f"tracking: MLflow at {self._delivery.store} cannot be used ({failure_message(error)}); training "
            f"goes on, everything is kept in {self._spool.path} and sent when it can be"
        )

    def _came_back(self) -> None:
        if self._down_since is not None:
            seconds = time.monotonic() - self._down_since
            self._down_since = None
            self._say(f"tracking: MLflow is back after {seconds:.0f} s; everything kept meanwhile has arrived")


def _halves(batch: list[Record]) -> Iterable[list[Record]]:
    """A refused batch in smaller pieces: records, then single values; nothing when it is one value."""
    if len(batch) > 1:
        return ([record] for record in batch)
    values = batch[0].get("values", {})
    return ([batch[0] | {"values": {k: v}}] for k, v in values.items()) if len(values) > 1 else ()
