"""The tracker that training holds: it writes records to the spool and never waits for a network."""

import json
import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from pipeline.redact import redact, redact_text
from pipeline.settings.batches import Ranges
from pipeline.tracking.description import describe
from pipeline.tracking.facts import DatasetUse, RunFacts, Sizes
from pipeline.tracking.history import History, clean_name
from pipeline.tracking.journal import Journal
from pipeline.tracking.mlflow_run import PARAM_VALUE_LENGTH
from pipeline.tracking.provenance import provenance_texts
from pipeline.tracking.shipping import Say, Shipper
from pipeline.tracking.spool import Record, Spool

STATUS_TAG = "globallocal.status"
STATUSES = ("FINISHED", "FAILED", "KILLED")
# Changes of these between two attempts are worth a line; the command line and the process are not.
_WATCHED_TAGS = ("mlflow.source.git.commit", "dataset_id")
_NOT_SET = "(not set)"
DESCRIBED_EVENTS = ("evaluation", "saved", "roll_back")
"""After these the description of the run in MLflow is written anew."""
SOURCE_TYPES = {"http": "http", "https": "http", "s3": "s3", "gs": "gs", "": "local", "file": "local"}
"""MLflow's kinds of dataset sources, by the scheme of their URL."""


class NullTracker:
    """Takes everything, records nothing: the ranks above 0."""

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; None here, and until the store could be reached for the first time."""
        return None

    def log_metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def log_event(self, name: str, step: int | None, **facts: Any) -> None: ...
    def log_text(self, text: str, artifact_path: str) -> None: ...
    def log_file(self, path: str) -> None: ...
    def log_table(self, path: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None: ...
    def set_tags(self, tags: Mapping[str, Any]) -> None: ...
    def leave_out(self, batches: Ranges) -> None: ...

    def close(self, status: str = "FINISHED", deadline_seconds: float = 20.0) -> bool:
        return True

    def __enter__(self) -> "NullTracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        """Closes as FINISHED, as KILLED after an interrupt or a non-zero exit, as FAILED after an error."""
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close("FINISHED")
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.set_tags({STATUS_TAG: "interrupted"})
            self.close("KILLED")
        else:
            self.close("FAILED")


class LocalTracker(NullTracker):
    """Records one run in its folder alone: rank 0 with `tracking.enabled: false`."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._ended = False

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Records scalars at a step (>= 0)."""
        if not self._ended:
            self._journal.metrics(values, step)

    def log_event(self, name: str, step: int | None, **facts: Any) -> None:
        """Records what happened at a step; `facts` are JSON's types."""
        if not self._ended:
            self._journal.event(name, step, facts)

    def leave_out(self, batches: Ranges) -> None:
        """From here on tokens are counted without these global batches: all that the run leaves out by now."""
        self._journal.left_out = batches

    def close(self, status: str = "FINISHED", deadline_seconds: float = 20.0) -> bool:
        self.log_event("ended", None, status=status.lower())
        self._ended = True
        return True


class Tracker(LocalTracker):
    """Records one run. Its methods write to local files and return; none of them waits for a network.

    Made by `open_tracker`. MLflow is given each step of a metric once: points at or below its highest are replays.
    """

    def __init__(
        self,
        journal: Journal,
        sizes: Sizes,
        spool: Spool,
        history: History,
        shipper: Shipper,
        lock: IO[str],
        say: Say,
    ) -> None:
        super().__init__(journal)
        self._sizes = sizes
        self._spool, self._history, self._shipper, self._lock_file = spool, history, shipper, lock
        self._say = say
        self._lock = threading.RLock()
        self._closed = False
        self._delivered = False
        self._replay_said = False
        self._disk_full_said = False

    @property
    def run_id(self) -> str | None:
        return self._shipper.run_id

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Records scalars at a step (>= 0). inf and NaN reach MLflow as NaN, and a tag says which, where."""
        super().log_metrics(values, step)
        step = int(step)
        if step > self._history.highest_step.get("progress/steps", 0):
            values = {**values, **self._progress(step)}
        points = {clean_name(name): float(value) for name, value in values.items()}
        with self._lock:
            highest = self._history.highest_step
            new = {name: value for name, value in points.items() if step > highest.get(name, -1)}
            if len(new) < len(points) and not self._replay_said:
                self._replay_said = True
                name = next(name for name in points if name not in new)
                self._say(
                    f"tracking: {name} is recorded up to step {highest[name]}; points up to there are not "
                    "logged again, the first values stand"
                )
            odd = {name: value for name, value in new.items() if not math.isfinite(value)}
            first = {
                f"globallocal.nonfinite.{name}": f"{value} at step {step}, the first"
                for name, value in odd.items()
                if name not in self._history.nonfinite
            }
            if new:
                texts = {name: str(value) for name, value in odd.items()}
                self._append({"kind": "metrics", "time": now_ms(), "step": step, "values": new | texts})
            if first:
                self.set_tags(first)

    def _progress(self, step: int) -> dict[str, float]:
        """What else than the step a chart may have for its axis."""
        tokens = self._journal.tokens(step)
        flops = tokens * self._sizes.flops_per_token
        axes = {"progress/steps": step, "progress/tokens": tokens, "progress/flops": flops}
        return {name: float(value) for name, value in axes.items() if value}

    def leave_out(self, batches: Ranges) -> None:
        super().leave_out(batches)
        if batches:
            self._append({"kind": "facts", "values": {**self._history.facts, "left_out": batches}})

    def log_event(self, name: str, step: int | None, **facts: Any) -> None:
        """Records what happened, in the run folder; MLflow's description of the run follows."""
        super().log_event(name, step, **facts)
        if name in DESCRIBED_EVENTS:
            self._describe()

    def log_table(self, path: str, rows: Sequence[Mapping[str, Any]], key: Sequence[str]) -> None:
        """Records rows of a table, an artifact of the run; a row whose `key` columns stand there changes that row."""
        plain = [{name: _plain(v) if isinstance(v, str) else v for name, v in redact(row).items()} for row in rows]
        self._append({"kind": "table", "path": path, "rows": plain, "key": list(key)})

    def log_text(self, text: str, artifact_path: str) -> None:
        """Records a text file of the run; the same path again replaces it. URLs lose their passwords."""
        self._append({"kind": "text", "path": artifact_path, "text": _plain(redact_text(text))})

    def log_file(self, path: str) -> None:
        """Records a file by its path in the run folder, as an artifact of the same path. It has to stay there."""
        self._append({"kind": "file", "path": path})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Records tags, secrets redacted; a value longer than 8,000 characters is cut, and says so."""
        self._append({"kind": "tags", "values": _strings(tags)})

    def close(self, status: str = "FINISHED", deadline_seconds: float = 20.0) -> bool:
        """Ends the run and delivers what is left, within the deadline.

        The tag `globallocal.status` can say more than MLflow's status: set it before, to "preempted" for
        example. Otherwise it becomes the status in lower case.

        Args:
            status: MLflow's FINISHED, FAILED or KILLED.
            deadline_seconds: the longest this call may take.

        Returns:
            Whether everything arrived. What did not stays in the spool for the next start of the run.
        """
        if status not in STATUSES:
            raise ValueError(f"status is {status!r}, must be one of {', '.join(STATUSES)}")
        with self._lock:
            if self._closed:
                return self._delivered
            tag = self._history.tags[STATUS_TAG]
            reason = status.lower() if tag == "running" else tag
            super().close(reason)
            self._record_status(status, reason)
            return self._finish(deadline_seconds)

    def _settle(self, status: str, deadline_seconds: float, reason: str) -> bool:
        """`close` for a process that is gone: a run that it had closed keeps its status."""
        if self._history.is_open:
            self.set_tags({STATUS_TAG: reason})
            return self.close(status, deadline_seconds)
        return self._finish(deadline_seconds)

    def _record_afterwards(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of a step long past: neither journal nor axes, and earlier steps are no replays."""
        latest = self._history.latest
        points = {clean_name(name): float(value) for name, value in values.items() if math.isfinite(value)}
        new = {name: value for name, value in points.items() if latest.get(name) != (step, value)}
        if new:
            self._append({"kind": "metrics", "time": now_ms(), "step": step, "values": new})

    def _finish(self, deadline_seconds: float) -> bool:
        self._closed = True
        arrived = self._shipper.finish(deadline_seconds)
        if arrived:
            self._spool.close()
        else:
            self._say(
                f"tracking: {self._shipper.undelivered_bytes:,} bytes of {self._spool.path} have not reached "
                f"MLflow within {deadline_seconds:g} s; they are kept, and sent at the next start of this run"
            )
        self._lock_file.close()
        self._delivered = arrived and not self._shipper.rejected
        return self._delivered

    def _append(self, record: Record) -> None:
        with self._lock:
            if self._closed:
                self._say(f"tracking: {record['kind']} logged after the run was closed is not recorded")
                return
            self._spool.append(record)
            self._history.apply(record)
            full = self._spool.write_error
            if full and not self._disk_full_said:
                self._say(f"tracking: cannot write {self._spool.path} ({full.strerror}); records wait in memory")
            elif self._disk_full_said and not full:
                self._say(f"tracking: {self._spool.path} can be written again; nothing was lost")
            self._disk_full_said = full is not None
        self._shipper.wake()

    def _record_status(self, status: str, reason: str, time_ms: int | None = None) -> None:
        self._append({"kind": "status", "status": status, "reason": reason, "time": time_ms or now_ms()})
        attempts = ", ".join(f"{i} {how}" for i, how in enumerate(self._history.attempts, start=1))
        self.set_tags({STATUS_TAG: reason, "globallocal.attempts": attempts})
        if status != "RUNNING":
            self._describe()

    def _describe(self) -> None:
        self._append({"kind": "note", "text": _plain(redact_text(describe(self._history)))})

    def _begin_attempt(self, facts: RunFacts, tags: Mapping[str, Any]) -> None:
        """What every start records: how the last attempt ended, the status, what changed since."""
        history = self._history
        if history.is_open:
            self._record_status("KILLED", "lost", history.last_time)
            self._say("tracking: the process before this one was killed without closing the run")
        self._record_status("RUNNING", "running")
        all_tags = _strings(tags)
        lines = [
            f"{name}: {history.tags[name]} → {all_tags[name]}"
            for name in _WATCHED_TAGS
            if name in history.tags and all_tags.get(name, history.tags[name]) != history.tags[name]
        ]
        self.set_tags(all_tags)
        for dataset in facts.datasets:
            self._append(_dataset_record(dataset))
        self._append({"kind": "facts", "values": redact(facts.described())})
        self._record_params(_strings(facts.params), lines)
        for path, text in (provenance_texts() | dict(facts.texts)).items():
            self.log_text(text, path)
        self._describe()

    def _record_params(self, params: dict[str, str], lines: list[str]) -> None:
        """New ones as parameters; MLflow refuses changed ones, so they become a tag, an artifact, a line."""
        known = self._history.params
        new = {name: value for name, value in params.items() if name not in known}
        changed = {name: value for name, value in params.items() if known.get(name, value) != value}
        changed |= {name: _NOT_SET for name in known if name not in params and known[name] != _NOT_SET}
        for name, value in (new | changed).items():
            if len(value) > PARAM_VALUE_LENGTH:
                self.log_text(value, f"config/{name}.txt")
        lines += [f"{name}: {_brief(known[name])} → {_brief(value)}" for name, value in changed.items()]
        if known:
            lines += [f"{name}: {_NOT_SET} → {_brief(value)}" for name, value in new.items()]
        if new:
            self._append({"kind": "params", "values": new})
        if lines:
            numbered = [f"attempt {len(self._history.attempts)}: {line}" for line in lines]
            self._append({"kind": "changes", "params": changed, "lines": numbered})
            self.log_text("\n".join(self._history.changes) + "\n", "config/changes.txt")
            self.set_tags({"config.changes": "\n".join(self._history.changes[::-1])})
            for line in lines:
                self._say(f"tracking: changed since the last attempt: {line}")


def _dataset_record(dataset: DatasetUse) -> Record:
    scheme, mark, _ = dataset.source.partition("://")
    kind = SOURCE_TYPES.get(scheme if mark else "", "local")
    source = redact_text(dataset.source if mark else str(Path(dataset.source).absolute()))
    return {
        "kind": "dataset",
        "name": f"{dataset.name}/{dataset.split}",
        "digest": dataset.dataset_id[:36],  # MLflow's bound; the checkpoints' state has it whole
        "context": dataset.context,
        "weight": f"{dataset.weight:g}",
        "profile": {"num_tokens": dataset.tokens, "num_documents": dataset.documents},
        "source_type": kind,
        "source": json.dumps({"url" if kind == "http" else "uri": source}),
    }


def _strings(values: Mapping[str, Any]) -> dict[str, str]:
    return {clean_name(name): _plain(str(value)) for name, value in redact(dict(values)).items()}


def _plain(text: str) -> str:
    """Lone surrogates (bytes of a broken encoding) cannot be sent: `?` stands for each."""
    return text.encode("utf-8", "replace").decode()


def _brief(value: str, length: int = 200) -> str:
    return value if len(value) <= length else f"{value[:length]}… ({len(value)} characters)"


def now_ms() -> int:
    return int(time.time() * 1000)
