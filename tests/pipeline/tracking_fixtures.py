"""What the tracking tests share: a configuration, a fresh SQLite store, looking into it."""

import atexit
import functools
import resource
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipeline.tracking.facts import DatasetUse, RunFacts
from pipeline.tracking.opening import open_tracker

DATASET = DatasetUse("books", "0123456789abcdef" * 4, "/data/books", tokens=1000, documents=10)


@dataclass
class Config:
    """The fields of the run configuration's tracking section."""

    uri: str | None
    enabled: bool = True
    experiment: str | None = "tests"


def start(uri: str, folder: Path, said: list[str], experiment: str = "tests", **changes: Any) -> Any:
    """`open_tracker` with defaults."""
    run_id = changes.pop("run_id", None)
    return open_tracker(Config(uri, experiment=experiment), folder, RunFacts("a run", **changes), run_id, said.append)


def runs(uri: str, experiment: str = "tests") -> list[Any]:
    """All runs of the experiment that were not deleted."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def only_run(uri: str, experiment: str = "tests") -> Any:
    (run,) = runs(uri, experiment)
    return MlflowClient(uri).get_run(run.info.run_id)


def points(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) as the store holds them, in order of step."""
    history = MlflowClient(uri).get_metric_history(run_id, key)
    return sorted((point.step, point.value) for point in history)


def made(folder: Path) -> str:
    """A new folder for downloads: without one MLflow makes its own, and leaves it."""
    return tempfile.mkdtemp(dir=folder)


@functools.cache
def empty_store() -> Path:
    """A SQLite store with its tables, to be copied: laying them out takes seconds."""
    folder = tempfile.mkdtemp(prefix="tracking-store-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    MlflowClient(f"sqlite:///{folder}/empty.db").search_experiments()
    return Path(folder) / "empty.db"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty SQLite store; artifacts go to the test's folder as well."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copy(empty_store(), tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@contextmanager
def file_size_limit(size_bytes: int) -> Iterator[None]:
    """Writes beyond this size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
