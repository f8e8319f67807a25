"""Figures that are measured after training reach its MLflow run, and nothing that training recorded changes."""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_prep.errors import UserError
from pipeline.tracking.opening import check_recordable, record_afterwards
from pipeline.tracking.tracker import Tracker
from tests.pipeline.tracking_fixtures import only_run, points, start, store

__all__ = ["store"]

KEY = ("step", "dataset_id")


@pytest.fixture
def ended(store: str, tmp_path: Path) -> Path:
    """A run that was trained and evaluated up to step 20."""
    tracker = start(store, tmp_path / "run", [])
    for step in (10, 20):
        tracker.log_metrics({"loss/train": 5.0 - step / 10, "loss/valid": 6.0 - step / 10}, step)
    assert tracker.close()
    return tmp_path / "run"


def test_an_evaluation_is_recorded_beside_what_training_measured(ended: Path, store: str) -> None:
    before = (ended / "metrics.jsonl").read_bytes()
    said: list[str] = []
    for step, loss in ((20, 3.5), (10, 4.5), (10, 4.5)):  # an earlier checkpoint later, and once more
        row = {"step": step, "dataset_id": "a", "loss": loss, "word_perplexity": float("inf")}
        values = {"evaluated/books/loss": loss, "evaluated/books/word_perplexity": float("inf")}
        assert record_afterwards(ended, step, values, ("evaluations.json", [row], KEY), said.append)
    run = only_run(store)
    assert points(store, run.info.run_id, "evaluated/books/loss") == [(10, 4.5), (20, 3.5)]
    assert points(store, run.info.run_id, "loss/valid") == [(10, 5.0), (20, 4.0)]
    assert points(store, run.info.run_id, "progress/steps") == [(10, 10.0), (20, 20.0)]
    assert (run.info.status, run.data.tags["globallocal.status"]) == ("FINISHED", "finished")
    assert "evaluated/books/word_perplexity" not in run.data.metrics
    table = json.loads(Path(MlflowClient(store).download_artifacts(run.info.run_id, "evaluations.json")).read_text())
    assert table["columns"] == ["step", "dataset_id", "loss", "word_perplexity"]
    assert table["data"] == [[20, "a", 3.5, "inf"], [10, "a", 4.5, "inf"]]
    assert (ended / "metrics.jsonl").read_bytes() == before
    assert any("recorded as evaluated/… at step 10" in line for line in said)


def test_the_store_is_that_of_training_wherever_the_command_runs(
    ended: Path,
    store: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    assert record_afterwards(ended, 20, {"evaluated/loss": 1.0}, ("evaluations.json", [], KEY))
    assert only_run(store).data.metrics["evaluated/loss"] == 1.0
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_under_way_is_left_alone(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [])
    assert isinstance(tracker, Tracker)
    with pytest.raises(UserError, match="is being trained, and its MLflow run written; wait for its end"):
        check_recordable(tmp_path / "run")
    assert tracker.close()
    with pytest.raises(UserError, match="MLflow knows no run of it"):
        check_recordable(tmp_path / "other")
