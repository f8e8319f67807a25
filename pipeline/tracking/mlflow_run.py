"""One run in one MLflow store: finding, creating, and what each record of the spool becomes there."""

import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.tracking.description import NOTE_TAG, keep_what_people_wrote
from pipeline.tracking.spool import Record
from pipeline.tracking.store import Experiment
from pipeline.tracking.tables import merged, table

RUN_KEY_TAG = "globallocal.run_key"
METRICS_PER_BATCH = 1_000  # MLflow's own bounds
NAMES_PER_BATCH = 100
PARAM_VALUE_LENGTH = 6_000
TAG_VALUE_LENGTH = 8_000
REQUEST_TIMEOUT_SECONDS = 10
RETRIES_VARIABLE = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's word for training: its pages then show runs, not traces of language models' calls."""
TABLES_TAG = "mlflow.loggedArtifacts"
# What only a person can change; anything else may heal by itself.
_REFUSALS = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS"}
_DENIALS = {"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"}


def is_refusal(error: BaseException) -> bool:
    """Whether the store will never take this request (or MLflow's client could not even build it)."""
    return getattr(error, "error_code", None) in _REFUSALS or isinstance(error, TypeError | ValueError)


def needs_a_person(error: BaseException) -> bool:
    """Whether an error will not heal by waiting: refused, denied, a bad URI, a missing driver, an old schema."""
    if isinstance(error, ImportError):
        return True
    from mlflow.exceptions import InvalidUrlException
    from sqlalchemy.exc import ArgumentError

    return (
        getattr(error, "error_code", None) in _REFUSALS | _DENIALS
        or isinstance(error, InvalidUrlException | ArgumentError)
        or "out-of-date database schema" in str(error)
    )


def short(value: str, length: int, note: str) -> str:
    """`value`, cut to `length` characters with a note when it is longer."""
    if len(value) <= length:
        return value
    note = f" … [{len(value)} characters; {note}]"
    return value[: length - len(note)] + note


class MlflowRun:
    """One run in one store, by MlflowClient alone: no global state of the fluent interface.

    Args:
        uri: tracking URI, secrets included; it is never written or printed.
        run_key: our own name for the run, found again as a tag whatever happens to an answer.
        run_folder: where the files lie that become artifacts.
    """

    def __init__(self, uri: str, experiment: Experiment, run_key: str, run_name: str, run_folder: Path) -> None:
        self._uri, self._experiment, self._run_key, self._run_name = uri, experiment, run_key, run_name
        self._run_folder = run_folder
        self._client: Any = None

    def client(self) -> Any:
        if self._client is None:
            # The retries are ours: MLflow's own would repeat a creation and block for minutes. A person's wish stands.
            os.environ.setdefault(RETRIES_VARIABLE, "0")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_TIMEOUT_SECONDS))
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # we say which page shows training
            from mlflow import MlflowClient

            for noisy in ("alembic", "mlflow.store.db.utils", "urllib3.connectionpool"):
                logging.getLogger(noisy).setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=r"alembic\.")  # a new SQLite store, every time
            self._client = MlflowClient(self._uri)
        return self._client

    def repeats_requests(self) -> bool:
        """Whether MLflow's client sends a request again that was not answered, so that one creation may make two."""
        return os.environ.get(RETRIES_VARIABLE, "0") != "0"

    def experiment_id(self) -> str:
        """Made where there is none of the name."""
        client = self.client()
        if self._experiment.id:
            experiment = client.get_experiment(self._experiment.id)
        else:
            experiment = client.get_experiment_by_name(self._experiment.name)
        if experiment is None:
            try:
                return str(client.create_experiment(self._experiment.name, tags=EXPERIMENT_TAGS))
            except Exception as error:  # another run may have made it meanwhile
                if getattr(error, "error_code", None) != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(self._experiment.name)
        if experiment.lifecycle_stage != "active":
            from mlflow.exceptions import MlflowException

            raise MlflowException.invalid_parameter_value(
                f"experiment {str(self._experiment)!r} is deleted: restore it with `mlflow experiments restore "
                f"--experiment-id {experiment.experiment_id}`, or set tracking.experiment to another name"
            )
        for name, value in EXPERIMENT_TAGS.items():
            if name not in experiment.tags:
                client.set_experiment_tag(experiment.experiment_id, name, value)
        return str(experiment.experiment_id)

    def experiment_of_run(self, run_id: str) -> str:
        return str(self.client().get_run(run_id).info.experiment_id)

    def find(self) -> list[str]:
        """Ids of the runs that carry our key, oldest first."""
        runs = self.client().search_runs(
            [self.experiment_id()],
            f"tags.`{RUN_KEY_TAG}` = '{self._run_key}'",
            order_by=["attributes.start_time ASC"],
        )
        return [run.info.run_id for run in runs]

    def exists(self, run_id: str) -> bool:
        """False when the run is unknown or deleted; raises when the store does not answer."""
        try:
            return bool(self.client().get_run(run_id).info.lifecycle_stage == "active")
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def create(self) -> str:
        tags = {RUN_KEY_TAG: self._run_key}
        run = self.client().create_run(self.experiment_id(), run_name=self._run_name, tags=tags)
        return str(run.info.run_id)

    def adopt(self, run_id: str) -> dict[str, int]:
        """Puts our key on a run made elsewhere; returns the highest step per metric it holds."""
        client = self.client()
        keys = client.get_run(run_id).data.metrics
        steps = {key: max(point.step for point in client.get_metric_history(run_id, key)) for key in keys}
        client.set_tag(run_id, RUN_KEY_TAG, self._run_key)
        return steps

    def delete_others(self, run_id: str) -> None:
        """Removes the empty runs that unanswered creations left behind."""
        for other in self.find():
            if other != run_id:
                self.client().delete_run(other)

    def send(self, run_id: str, batch: list[Record]) -> None:
        """Either any number of metrics records, or one record of another kind."""
        from mlflow.entities import Metric, Param, RunTag

        client, record = self.client(), batch[0]
        values = record.get("values", {}).items()
        match record["kind"]:
            case "metrics":
                metrics = [
                    Metric(key, _finite_or_nan(value), one["time"], one["step"])
                    for one in batch
                    for key, value in one["values"].items()
                ]
                for part in _parts(metrics, METRICS_PER_BATCH):
                    client.log_batch(run_id, metrics=part, synchronous=True)
            case "params":
                params = [Param(k, short(v, PARAM_VALUE_LENGTH, f"whole: config/{k}.txt")) for k, v in values]
                for part in _parts(params, NAMES_PER_BATCH):
                    client.log_batch(run_id, params=part, synchronous=True)
            case "tags":
                tags = [RunTag(k, short(v, TAG_VALUE_LENGTH, "cut")) for k, v in values]
                for part in _parts(tags, NAMES_PER_BATCH):
                    client.log_batch(run_id, tags=part, synchronous=True)
            case "text":
                client.log_text(run_id, record["text"], record["path"])
            case "file":
                path = Path(record["path"])
                client.log_artifact(
                    run_id, str(self._run_folder / path), str(path.parent) if path.parent.name else None
                )
            case "note":
                note = keep_what_people_wrote(record["text"], client.get_run(run_id).data.tags.get(NOTE_TAG, ""))
                client.set_tag(run_id, NOTE_TAG, note)
            case "table":
                self._send_table(run_id, record)
            case "dataset":
                self._send_dataset(run_id, record)
            case "status" if record["status"] == "RUNNING":
                client.update_run(run_id, status="RUNNING")
            case "status":
                client.set_terminated(run_id, status=record["status"], end_time=record["time"])

    def _send_dataset(self, run_id: str, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        profile = json.dumps(record["profile"]) if "profile" in record else None
        dataset = Dataset(record["name"], record["digest"], record["source_type"], record["source"], profile=profile)
        context = InputTag("mlflow.data.context", record.get("context", "training"))
        inputs = DatasetInput(dataset, [context, InputTag("weight", record.get("weight", "1"))])
        self.client().log_inputs(run_id, datasets=[inputs])

    def _send_table(self, run_id: str, record: Record) -> None:
        """The rows go into the table that stands; the same record twice changes nothing, as `log_table` would."""
        client, path = self.client(), record["path"]
        tags = client.get_run(run_id).data.tags
        known = json.loads(tags.get(TABLES_TAG, "[]"))
        entry, standing = {"path": path, "type": "table"}, []
        if entry in known:
            with tempfile.TemporaryDirectory() as folder:
                standing = table(Path(client.download_artifacts(run_id, path, folder)).read_text())
        client.log_dict(run_id, merged(standing, record["rows"], record["key"]), path)
        if entry not in known:
            client.set_tag(run_id, TABLES_TAG, json.dumps([*known, entry]))


def _finite_or_nan(value: float | str) -> float:
    """MLflow would store inf as 1.8e308; the tracker's tag says what it was."""
    return float(value) if math.isfinite(float(value)) else math.nan


def _parts(items: list[Any], length: int) -> Iterator[list[Any]]:
    return (items[start : start + length] for start in range(0, len(items), length))
