"""One run across kills and resumes, whatever became of the store meanwhile."""

import shutil
from pathlib import Path

from mlflow import MlflowClient

from pipeline.tracking.journal import JOURNAL_FILE, read_journal
from pipeline.tracking.opening import settle_run
from tests.pipeline.tracking_fixtures import DATASET, Config, empty_store, made, only_run, points, runs, start, store

__all__ = ["store"]


def test_resumed_runs_go_on_in_the_same_run_and_repeat_no_step(store: str, tmp_path: Path) -> None:
    said: list[str] = []
    for first, last, status in ((0, 30, "KILLED"), (20, 45, "FAILED"), (45, 60, "FINISHED")):
        tracker = start(store, tmp_path / "run", said, datasets=[DATASET])
        for step in range(first, last):
            tracker.log_metrics({"loss": step / 2}, step)
        if status == "KILLED":
            tracker.set_tags({"globallocal.status": "preempted"})
        assert tracker.close(status)
        run = only_run(store)
        assert run.info.status == status
        assert run.data.tags["globallocal.status"] == {"KILLED": "preempted"}.get(status, status.lower())
        assert points(store, run.info.run_id, "loss") == [(step, step / 2) for step in range(last)]
    assert run.data.tags["globallocal.attempts"] == "1 preempted, 2 failed, 3 finished"
    assert len(run.inputs.dataset_inputs) == 1
    replays = [line for line in said if "not logged again" in line]
    assert replays == [
        "tracking: loss is recorded up to step 29; points up to there are not logged again, the first values stand"
    ]


def test_changed_parameters_are_recorded_and_nothing_else_is_lost(store: str, tmp_path: Path) -> None:
    params = {"lr": 0.1, "short": "s" * 400, "long": "l" * 7_000, "gone": 1}
    start(store, tmp_path / "run", [], params=params).close()
    run = only_run(store)
    assert run.data.params["short"] == "s" * 400
    assert len(run.data.params["long"]) == 6_000
    assert run.data.params["long"].endswith(" … [7000 characters; whole: config/long.txt]")
    whole = MlflowClient(store).download_artifacts(run.info.run_id, "config/long.txt", made(tmp_path))
    assert Path(whole).read_text() == "l" * 7_000

    said: list[str] = []
    changed = {"lr": 0.2, "short": "s" * 400, "long": "m" * 7_000, "new": "here", "at": "here too"}
    start(store, tmp_path / "run", said, params=changed).close()
    run = only_run(store)
    assert run.data.params["lr"] == "0.1"
    assert (run.data.params["new"], run.data.params["at"]) == ("here", "here too")
    lines = [
        line.removeprefix("tracking: changed since the last attempt: ") for line in said if "changed since" in line
    ]
    assert lines == [
        "lr: 0.1 → 0.2",
        f"long: {'l' * 200}… (7000 characters) → {'m' * 200}… (7000 characters)",
        "gone: 1 → (not set)",
        "new: (not set) → here",
        "at: (not set) → here too",
    ]
    assert "attempt 2: lr: 0.1 → 0.2" in run.data.tags["config.changes"].splitlines()
    history = MlflowClient(store).download_artifacts(run.info.run_id, "config/changes.txt", made(tmp_path))
    assert Path(history).read_text().splitlines() == [f"attempt 2: {line}" for line in lines]
    whole = MlflowClient(store).download_artifacts(run.info.run_id, "config/long.txt", made(tmp_path))
    assert Path(whole).read_text() == "m" * 7_000

    said.clear()
    start(store, tmp_path / "run", said, params=changed).close()
    assert not [line for line in said if "changed since" in line]


def test_another_dataset_or_commit_at_a_resume_is_a_change(store: str, tmp_path: Path) -> None:
    start(store, tmp_path / "run", [], tags={"dataset_id": DATASET.dataset_id}).close()
    said: list[str] = []
    tags = {"mlflow.source.git.commit": "abc", "dataset_id": "f" * 64}
    start(store, tmp_path / "run", said, tags=tags).close()
    changes = [line for line in said if "changed since" in line]
    assert any(f"dataset_id: {DATASET.dataset_id} → {'f' * 64}" in line for line in changes)
    assert only_run(store).data.tags["dataset_id"] == "f" * 64


def test_a_deleted_run_is_made_again_with_its_whole_history(store: str, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = start(store, tmp_path / "run", said, params={"lr": 0.1})
    tracker.log_metrics({"loss": 1.0}, 0)
    while tracker._shipper.undelivered_bytes:
        tracker._shipper.wake()
    first = tracker.run_id
    MlflowClient(store).delete_run(first)
    tracker.log_metrics({"loss": 2.0}, 1)
    assert tracker.close()
    run = only_run(store)
    assert run.info.run_id != first
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.1"})
    assert points(store, run.info.run_id, "loss") == [(0, 1.0), (1, 2.0)]
    assert any(f"run {first} is gone" in line for line in said)


def test_another_store_receives_the_whole_history(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [], params={"lr": 0.1})
    tracker.log_metrics({"loss": 1.0}, 0)
    tracker.close()
    shutil.copy(empty_store(), tmp_path / "other.db")
    said: list[str] = []
    other = f"sqlite:///{tmp_path}/other.db"
    tracker = start(other, tmp_path / "run", said, params={"lr": 0.1}, run_id=tracker.run_id)
    tracker.log_metrics({"loss": 2.0}, 1)
    assert tracker.close()
    run = only_run(other)
    assert run.data.params == {"lr": "0.1"}
    assert points(other, run.info.run_id, "loss") == [(0, 1.0), (1, 2.0)]
    assert any(f"before, this run went to {store}" in line for line in said)


def test_a_lost_delivery_file_changes_nothing(store: str, tmp_path: Path) -> None:
    for last in (10, 20):
        tracker = start(store, tmp_path / "run", [], params={"lr": 0.1})
        for step in range(last):
            tracker.log_metrics({"loss": float(step), "odd": float("nan")}, step)
        assert tracker.close()
        (tmp_path / "run/tracking/delivery.json").write_text("{")
    run = only_run(store)
    assert points(store, run.info.run_id, "loss") == [(step, float(step)) for step in range(20)]
    assert len(points(store, run.info.run_id, "odd")) == 20


def test_a_checkpoint_without_its_spool_goes_on_with_its_run(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [])
    for step in range(10):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.close()
    shutil.rmtree(tmp_path / "run/tracking")
    for _ in range(2):
        resumed = start(store, tmp_path / "run", [], run_id=tracker.run_id)
        for step in range(5, 15):
            resumed.log_metrics({"loss": float(step)}, step)
        assert resumed.close()
        assert resumed.run_id == tracker.run_id
    run = only_run(store)
    assert points(store, run.info.run_id, "loss") == [(step, float(step)) for step in range(15)]


def test_an_unknown_run_id_is_said(store: str, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = start(store, tmp_path / "run", said, run_id="f" * 32)
    assert tracker.close()
    assert f"tracking: run {'f' * 32} is not in {store}; another one is made" in said
    assert only_run(store).info.run_id == tracker.run_id


def test_a_resume_is_never_refused_by_the_store(store: str, tmp_path: Path) -> None:
    start(store, tmp_path / "run", []).close()
    said: list[str] = []
    tracker = start("file:///tmp/somewhere", tmp_path / "run", said)
    tracker.log_metrics({"loss": 1.0}, 0)
    assert tracker.close(deadline_seconds=0.5) is False
    assert any("cannot be used" in line and "training goes on" in line for line in said)
    assert "they are kept, and sent at the next start of this run" in said[-1]
    said.clear()
    assert start(store, tmp_path / "run", said).close()
    run = only_run(store)
    assert points(store, run.info.run_id, "loss") == [(0, 1.0)]
    assert run.data.tags["globallocal.attempts"] == "1 finished, 2 finished, 3 finished"


def test_the_record_has_steps_taken_again_and_survives_a_cut_line(store: str, tmp_path: Path) -> None:
    for first, last in ((1, 4), (3, 6)):
        tracker = start(store, tmp_path / "run", [], step=first - 1)
        for step in range(first, last):
            tracker.log_metrics({"loss": 1.0 / step}, step)
        tracker.set_tags({"globallocal.status": "preempted"})
        tracker.close("KILLED")
        with (tmp_path / "run" / JOURNAL_FILE).open("a") as file:
            file.write('{"step":7,"metri')
    entries = list(read_journal(tmp_path / "run"))
    assert [entry.get("event", entry["step"]) for entry in entries] == [
        *("started", 1, 2, 3, "ended"),
        *("started", 3, 4, 5, "ended"),
    ]
    assert [entry["status"] for entry in entries if entry.get("event") == "ended"] == ["preempted"] * 2
    assert [entry["step"] for entry in entries if entry.get("event") == "started"] == [0, 2]


def test_settling_a_run_that_never_was_or_was_closed_changes_no_status(store: str, tmp_path: Path) -> None:
    assert settle_run(Config(store), tmp_path / "nothing", say=print)
    assert not (tmp_path / "nothing").exists()
    start(store, tmp_path / "run", []).close("FINISHED")
    assert settle_run(Config(store), tmp_path / "run")
    assert only_run(store).info.status == "FINISHED"
    assert len(runs(store)) == 1
