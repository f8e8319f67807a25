"""Where runs go: the settings, MLflow's own variables, and tracking switched off."""

import math
import os
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from data_prep.errors import UserError
from pipeline.tracking.facts import RunFacts, Sizes
from pipeline.tracking.journal import read_journal
from pipeline.tracking.opening import open_tracker
from pipeline.tracking.store import tracking_uri
from tests.pipeline.tracking_fixtures import Config, only_run, start, store

__all__ = ["store"]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("file:///tmp/somewhere", "filesystem tracking backend"),
        ("gopher://user:hunter2@host", "gopher"),
        ("http://user:hunter2@127.0.0.1:port", "Invalid url"),
        ("postgresql+nodriver://user:hunter2@host/db", "nodriver"),
    ],
)
def test_a_wrong_uri_is_refused_before_the_first_step(tmp_path: Path, uri: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        start(uri, tmp_path / "run", [])
    (problem,) = caught.value.problems
    assert words in problem
    assert "tracking.enabled=false" in problem
    assert "hunter2" not in problem
    assert "\n" not in problem


def test_a_deleted_experiment_is_refused_with_the_remedy(store: str, tmp_path: Path) -> None:
    client = MlflowClient(store)
    number = client.create_experiment("tests")
    client.delete_experiment(number)
    with pytest.raises(UserError, match=rf"mlflow experiments restore --experiment-id {number}"):
        start(store, tmp_path / "run", [])
    client.restore_experiment(number)
    start(store, tmp_path / "run", []).close()
    assert only_run(store).data.tags["globallocal.attempts"] == "1 finished"


def test_tracking_switched_off_keeps_the_run_folders_own_record(tmp_path: Path) -> None:
    config, sizes = Config(None, enabled=False), Sizes(tokens_per_step=512)
    with open_tracker(config, tmp_path / "run", RunFacts("a run", sizes=sizes)) as tracker:
        tracker.log_metrics({"loss": 1.0, "odd": math.nan}, 3)
        tracker.log_event("saved", 3, folder=Path("there"), uri="http://user:hunter2@host")
        tracker.log_text("a", "b")
        tracker.set_tags({"a": 1})
    assert tracker.run_id is None
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
    begin, metrics, saved, end = read_journal(tmp_path / "run")
    assert (begin["event"], begin["step"], begin["tokens_per_step"]) == ("started", 0, 512)
    assert (metrics["step"], metrics["tokens"]) == (3, 1536)
    assert metrics["metrics"] == pytest.approx({"loss": 1.0, "odd": math.nan}, nan_ok=True)
    assert (saved["event"], saved["folder"], saved["uri"]) == ("saved", "there", "http://***@host")
    assert (end["event"], end["status"]) == ("ended", "finished")
    assert begin["time_unix_seconds"] <= end["time_unix_seconds"] == pytest.approx(time.time(), abs=60)


def test_where_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri("sqlite:///runs/x.db") == f"sqlite:///{tmp_path}/runs/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(None) == "http://host:5000"
    assert tracking_uri("sqlite:////srv/x.db") == "sqlite:////srv/x.db"


def test_experiment_run_and_tags_come_from_mlflows_variables(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = MlflowClient(store)
    number = client.create_experiment("theirs")
    made = client.create_run(number, run_name="made elsewhere").info.run_id
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "language"}')
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    tracker = open_tracker(Config(store, experiment=None), tmp_path / "run", RunFacts("a run"), say=print)
    assert tracker.close()
    run = only_run(store, "theirs")
    assert (run.info.run_id, run.data.tags["team"], run.info.status) == (made, "language", "FINISHED")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with pytest.raises(UserError, match="are both set"):
        open_tracker(Config(store, experiment=None), tmp_path / "run", RunFacts("a run"))
    monkeypatch.setenv("MLFLOW_TAGS", "team=language")
    with pytest.raises(UserError, match="is not a JSON object"):
        open_tracker(Config(store), tmp_path / "other", RunFacts("a run"))


def test_a_persons_retries_stay(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    assert start(store, tmp_path / "run", []).close()
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"


def test_an_error_that_ends_the_run_does_not_say_that_training_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    with pytest.raises(UserError):
        start("gopher://host", tmp_path / "run", said)
    assert not [line for line in said if "goes on" in line]
