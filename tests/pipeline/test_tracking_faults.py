"""A store that refuses, a full disk, damaged lines, a second process: what can be kept is kept, the rest is said."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

import pipeline.tracking.opening as tracking
from data_prep.errors import UserError
from pipeline.tracking.opening import settle_run
from tests.pipeline.tracking_fixtures import Config, file_size_limit, made, only_run, points, start, store

__all__ = ["store"]


def test_one_refused_value_costs_no_other(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [])
    tracker.close()
    MlflowClient(store).log_param(tracker.run_id, "taken", "by hand")
    said: list[str] = []
    tracker = start(store, tmp_path / "run", said, params={"a": 1, "taken": 2, "z": 3})
    tracker.log_metrics({"loss": 1.0}, 0)
    assert tracker.close() is False
    run = only_run(store)
    assert run.data.params == {"a": "1", "taken": "by hand", "z": "3"}
    assert run.data.metrics == {"loss": 1.0}
    assert run.info.status == "FINISHED"
    (refused,) = [line for line in said if "MLflow refuses" in line]
    assert refused.startswith("tracking: MLflow refuses params taken: Changing param values is not allowed")
    (line,) = (tmp_path / "run/tracking/rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["record"]["values"] == {"taken": "2"}


def test_an_artifact_store_that_fails_holds_up_nothing_and_is_asked_again(store: str, tmp_path: Path) -> None:
    (tmp_path / "mlruns").write_text("a file where artifacts should go")
    said: list[str] = []
    tracker = start(store, tmp_path / "run", said)
    tracker.log_text("a sample", "samples/a.txt")
    tracker.log_metrics({"loss": 1.0}, 0)
    assert tracker.close() is False
    run = only_run(store)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    assert any("MLflow refuses text samples/a.txt" in line for line in said)
    (tmp_path / "mlruns").unlink()
    assert start(store, tmp_path / "run", []).close() is True
    sample = MlflowClient(store).download_artifacts(run.info.run_id, "samples/a.txt", made(tmp_path))
    assert Path(sample).read_text() == "a sample"


def test_a_full_disk_is_said_and_loses_nothing(store: str, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = start(store, tmp_path / "run", said)
    with file_size_limit((tmp_path / "run/tracking/spool.jsonl").stat().st_size + 10):
        for step in range(3):
            tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_metrics({"loss": 3.0}, 3)
    assert tracker.close()
    assert points(store, only_run(store).info.run_id, "loss") == [(step, float(step)) for step in range(4)]
    assert sum("records wait in memory" in line for line in said) == 1
    assert sum("can be written again; nothing was lost" in line for line in said) == 1


def test_a_second_process_on_the_same_run_is_refused(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "LOCK_WAIT_SECONDS", 0.3)
    start(store, tmp_path / "run", []).close()
    holder = (
        "import sys; from pathlib import Path; from pipeline.tracking.opening import _lock\n"
        "lock = _lock(Path(sys.argv[1]), print); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "run/tracking/lock")]
    root = Path(tracking.__file__).parents[2]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root)}
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"host .*, process {process.pid} is writing this run: stop it first"):
            start(store, tmp_path / "run", [])
        with pytest.raises(UserError, match="is writing this run"):
            settle_run(Config(store), tmp_path / "run")
        process.communicate()
    start(store, tmp_path / "run", []).close()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match=r"run/tracking: cannot be written"):
        start("sqlite:///x.db", tmp_path / "run", [])


def test_damaged_lines_are_said_and_passed_over(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [])
    tracker.log_metrics({"loss": 1.0}, 0)
    tracker.close()
    with (tmp_path / "run/tracking/spool.jsonl").open("a") as file:
        file.write('{"kind":"metrics","step":1,"values":{"loss"')
    said: list[str] = []
    tracker = start(store, tmp_path / "run", said)
    tracker.log_metrics({"loss": 2.0}, 1)
    assert tracker.close()
    assert points(store, only_run(store).info.run_id, "loss") == [(0, 1.0), (1, 2.0)]
    assert any("1 damaged lines" in line for line in said)
