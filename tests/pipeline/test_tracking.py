"""One run across kills and resumes, against a real SQLite store."""

import importlib.metadata
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.data
import pytest
from mlflow import MlflowClient

import pipeline.tracking.opening as tracking
from data_prep.errors import UserError
from pipeline.redact import redact_arguments, redact_lines
from pipeline.tracking.description import NOTE_TAG
from pipeline.tracking.facts import RunFacts, Sizes
from pipeline.tracking.history import CHECKPOINTS_TABLE
from pipeline.tracking.journal import JOURNAL_FILE, read_journal
from pipeline.tracking.opening import open_tracker, settle_run
from pipeline.tracking.store import page_of_run_folder, run_page, tracking_uri
from tests.pipeline.tracking_fixtures import (
    DATASET,
    Config,
    empty_store,
    file_size_limit,
    only_run,
    points,
    runs,
    start,
    store,
)

__all__ = ["store"]


def folder_text(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


def made(folder: Path) -> str:
    """A new folder for downloads: without one MLflow makes its own, and leaves it."""
    return tempfile.mkdtemp(dir=folder)


def test_a_run_holds_what_was_logged(store: str, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = start(
        store,
        tmp_path / "run",
        said,
        params={"optimizer.learning_rate": 3e-4, "model.conv_dilations": [1, 2], "run.name": "a run"},
        tags={"purpose": "test", "dataset_id": DATASET.dataset_id},
        datasets=[DATASET],
    )
    for step in range(5):
        tracker.log_metrics({"loss": 5.0 - step, "evaluation/loss": 6}, step)
    tracker.log_text("Once upon a time — é\n", "samples/step-4.txt")
    assert tracker.close("FINISHED") is True

    run = only_run(store)
    assert run.info.run_id == tracker.run_id
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "a run"
    kind = MlflowClient(store).get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    assert points(store, run.info.run_id, "loss") == [(step, 5.0 - step) for step in range(5)]
    assert points(store, run.info.run_id, "evaluation/loss") == [(step, 6.0) for step in range(5)]
    assert run.data.params == {
        "optimizer.learning_rate": "0.0003",
        "model.conv_dilations": "[1, 2]",
        "run.name": "a run",
    }
    tags = run.data.tags
    assert tags["purpose"] == "test"
    assert tags["dataset_id"] == DATASET.dataset_id
    assert tags["globallocal.status"] == "finished"
    assert Path(sys.executable).name in tags["globallocal.command"]
    assert {"globallocal.host", "globallocal.command"} < set(tags)
    assert {"python", "torch", "deepspeed"} < set(tags["globallocal.versions"].replace(",", "").split()[::2])
    sample = MlflowClient(store).download_artifacts(run.info.run_id, "samples/step-4.txt", made(tmp_path))
    assert Path(sample).read_text() == "Once upon a time — é\n"
    assert any(f"MLflow run {run.info.run_id}" in line and "'tests'" in line for line in said)


def test_the_dataset_is_an_input_of_the_run(store: str, tmp_path: Path) -> None:
    held_out = replace(DATASET, source="s3://bucket/books", split="valid", context="validation", weight=0.25)
    relative = replace(DATASET, name="pages", source="data/pages")
    start(store, tmp_path / "run", [], datasets=[DATASET, held_out, relative]).close()
    used = {item.dataset.name: item for item in only_run(store).inputs.dataset_inputs}
    assert set(used) == {"books/train", "books/valid", "pages/train"}
    assert {item.dataset.digest for item in used.values()} == {DATASET.dataset_id[:36]}
    contexts = {name: {tag.key: tag.value for tag in item.tags} for name, item in used.items()}
    assert contexts["books/train"] == {"mlflow.data.context": "training", "weight": "1"}
    assert contexts["books/valid"] == {"mlflow.data.context": "validation", "weight": "0.25"}
    assert json.loads(used["books/train"].dataset.profile) == {"num_tokens": 1000, "num_documents": 10}
    opened: dict[str, Any] = {name: mlflow.data.get_source(item.dataset) for name, item in used.items()}
    sources = {name: source.uri for name, source in opened.items()}
    assert sources["books/train"] == DATASET.source
    assert sources["books/valid"] == "s3://bucket/books"
    assert used["books/valid"].dataset.source_type == "s3"
    assert sources["pages/train"] == str(tmp_path / "data/pages")


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


def test_a_run_is_running_while_it_runs(store: str, tmp_path: Path) -> None:
    for attempt in (1, 2):
        tracker = start(store, tmp_path / "run", [])
        tracker.log_metrics({"loss": 1.0}, attempt)
        while tracker._shipper.undelivered_bytes:
            tracker._shipper.wake()
        run = only_run(store)
        assert run.info.status == "RUNNING"
        assert run.data.tags["globallocal.status"] == "running"
        tracker.close()


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


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (None, "FINISHED", "finished"),
        (RuntimeError("boom"), "FAILED", "failed"),
        (KeyboardInterrupt(), "KILLED", "interrupted"),
        (SystemExit(143), "KILLED", "interrupted"),
        (SystemExit(0), "FINISHED", "finished"),
    ],
)
def test_how_the_block_ends_is_how_the_run_ends(
    store: str, tmp_path: Path, error: BaseException | None, status: str, reason: str
) -> None:
    def block() -> None:
        with start(store, tmp_path / "run", []) as tracker:
            tracker.log_metrics({"loss": 1.0}, 0)
            if error:
                raise error

    if error:
        with pytest.raises(type(error)):
            block()
    else:
        block()
    run = only_run(store)
    assert (run.info.status, run.data.tags["globallocal.status"]) == (status, reason)


def test_what_is_logged_after_closing_starts_no_new_run(store: str, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = start(store, tmp_path / "run", said)
    tracker.log_metrics({"loss": 1.0}, 0)
    assert tracker.close("FAILED")
    tracker.log_metrics({"loss": 2.0}, 1)
    assert tracker.close("FINISHED") is True
    run = only_run(store)
    assert run.info.status == "FAILED"
    assert points(store, run.info.run_id, "loss") == [(0, 1.0)]
    assert said[-1] == "tracking: metrics logged after the run was closed is not recorded"


def test_an_unknown_status_is_refused(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [])
    with pytest.raises(ValueError, match="status is 'PREEMPTED', must be one of FINISHED, FAILED, KILLED"):
        tracker.close("PREEMPTED")
    tracker.close()


def test_infinite_and_missing_numbers_are_stated(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [])
    for step, value in enumerate((1.0, float("-inf"), float("nan"), float("inf"))):
        tracker.log_metrics({"loss": value, "lr": 0.5}, step)
    tracker.close()
    tracker = start(store, tmp_path / "run", [])
    tracker.log_metrics({"loss": float("nan")}, 4)
    tracker.close()
    run = only_run(store)
    stored = MlflowClient(store).get_metric_history(run.info.run_id, "loss")
    assert [(point.step, repr(point.value)) for point in stored] == [
        (0, "1.0"),
        *[(step, "nan") for step in range(1, 5)],
    ]
    assert run.data.tags["globallocal.nonfinite.loss"] == "-inf at step 1, the first"
    assert points(store, run.info.run_id, "lr") == [(step, 0.5) for step in range(4)]


def test_odd_names_arrive_under_names_that_mlflow_takes(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [], params={"päram@1": 1, "x" * 300: 2}, tags={"tag#": 3})
    tracker.log_metrics({"loss@0": 1.0, "loss#0": 2.0, "/": 3.0}, 0)
    assert tracker.close()
    run = only_run(store)
    assert len(run.data.metrics) == 3
    assert len(run.data.params) == 2


def test_secrets_reach_neither_disk_nor_store_nor_screen(store: str, tmp_path: Path) -> None:
    said: list[str] = []
    word = uuid.uuid4().hex  # none that stands in this file: the difference from the commit is an artifact
    secret = f"http://user:{word}@127.0.0.1:9"
    known = {
        "params": {"tracking.uri": secret, "wandb.api_key": word, "nested": {"token": word}},
        "tags": {"remote": secret, "hf_token": word},
        "datasets": [replace(DATASET, source=f"{secret}/data")],
    }
    for uri in (secret, store):  # the first store is out of reach, the second receives everything
        tracker = start(uri, tmp_path / "run", said, **known)
        tracker.log_text(f"uri: {secret}\n", "config/run.yaml")
        tracker.set_tags({"later": secret})
        tracker.close(deadline_seconds=0.5 if uri == secret else 20)
    run = only_run(store)
    assert run.data.params["wandb.api_key"] == "***"
    assert run.data.tags["later"] == "http://***@127.0.0.1:9"
    assert any("http://127.0.0.1:9 cannot be used" in line for line in said)
    assert word not in "\n".join(said)
    assert word not in folder_text(tmp_path / "run")
    assert word.encode() not in (tmp_path / "mlflow.db").read_bytes()
    assert word not in folder_text(tmp_path / "mlruns")


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


def test_where_runs_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert tracking_uri("sqlite:///runs/x.db") == f"sqlite:///{tmp_path}/runs/x.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(None) == "http://host:5000"
    assert tracking_uri("sqlite:////srv/x.db") == "sqlite:////srv/x.db"


def test_settling_a_run_that_never_was_or_was_closed_changes_no_status(store: str, tmp_path: Path) -> None:
    assert settle_run(Config(store), tmp_path / "nothing", say=print)
    assert not (tmp_path / "nothing").exists()
    start(store, tmp_path / "run", []).close("FINISHED")
    assert settle_run(Config(store), tmp_path / "run")
    assert only_run(store).info.status == "FINISHED"
    assert len(runs(store)) == 1


def test_the_description_follows_the_run_and_keeps_what_people_wrote(store: str, tmp_path: Path) -> None:
    facts: dict[str, Any] = {
        "sizes": Sizes(max_steps=10, tokens_per_step=512, flops_per_token=2.0),
        "about": {"Model": "small | 1,000 parameters", "Go on with": "`globallocal train`"},
    }

    def note() -> str:
        return str(only_run(store).data.tags[NOTE_TAG])

    tracker = start(store, tmp_path / "run", [], **facts)
    while tracker._shipper.undelivered_bytes:
        tracker._shipper.wake()
    assert note().startswith("**running** · step 0 of 10")
    assert "| **Model** | small \\| 1,000 parameters |" in note()
    for step, loss in ((5, 3.0), (6, 2.0), (7, 2.5)):
        tracker.log_metrics({"loss/train": loss + 1, "loss/valid": loss}, step)
    rows = [{"step": 6, "path": "/runs/x/step-00000006", "sha256": "ab", "state": "stands"}]
    tracker.log_table(CHECKPOINTS_TABLE, rows, key=("step",))
    MlflowClient(store).set_tag(tracker.run_id, NOTE_TAG, f"{note()}\n\nLook at step 6.")
    tracker.set_tags({"globallocal.status": "preempted"})
    assert tracker.close("KILLED")
    assert note().startswith(
        "**preempted: start it again, and it goes on** · step 7 of 10 · training loss **3.5000** · held-out loss "
        "**2.5000** at step 7 · best 2.0000 at step 6"
    )
    assert "| **Checkpoint** | step 6: `/runs/x/step-00000006` |" in note()
    assert note().endswith("stays.*\n\nLook at step 6.")
    start(store, tmp_path / "run", [], **facts).close()
    assert note().startswith("**finished** · step 7 of 10")
    assert "| **Starts** | 1 preempted, 2 finished |" in note()
    assert note().count("Look at step 6.") == 1
    run = only_run(store)
    assert points(store, run.info.run_id, "progress/tokens") == [(5, 2560.0), (6, 3072.0), (7, 3584.0)]
    assert points(store, run.info.run_id, "progress/flops")[-1] == (7, 7168.0)


def test_tables_grow_by_rows_and_rows_change(store: str, tmp_path: Path) -> None:
    tracker = start(store, tmp_path / "run", [])
    tracker.log_table(CHECKPOINTS_TABLE, [{"step": 1, "state": "stands", "path": "a"}], key=("step",))
    tracker.log_table(
        CHECKPOINTS_TABLE, [{"step": 1, "state": "deleted"}, {"step": 2, "state": "stands", "path": "b"}], key=("step",)
    )
    assert tracker.close()
    (tmp_path / "run/tracking/delivery.json").unlink()  # all of it is delivered a second time
    assert start(store, tmp_path / "run", []).close()
    table = MlflowClient(store).load_table(only_run(store).info.experiment_id, CHECKPOINTS_TABLE)
    assert table.to_dict("records") == [
        {"step": 1, "state": "deleted", "path": "a"},
        {"step": 2, "state": "stands", "path": "b"},
    ]


def test_what_a_run_was_made_of_is_an_artifact(store: str, tmp_path: Path) -> None:
    start(store, tmp_path / "run", [], texts={"config/config.yaml": "uri: http://u:hunter2@h\n"}).close()
    folder = Path(MlflowClient(store).download_artifacts(only_run(store).info.run_id, "", made(tmp_path)))
    assert (folder / "config/config.yaml").read_text() == "uri: http://***@h\n"
    assert f"torch=={importlib.metadata.version('torch')}\n" in (folder / "environment/requirements.txt").read_text()
    command = shlex.split((folder / "environment/command.txt").read_text())
    assert command == redact_arguments(sys.orig_argv)


def test_secrets_leave_source_lines() -> None:
    diff = '+    api_key = "hunter2"\n+  hf_token: hunter2\n+url = "http://u:hunter2@h"\n+tokens_per_step = 4\n'
    hidden = redact_lines(diff)
    assert "hunter2" not in hidden
    assert "+tokens_per_step = 4\n" in hidden


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


def test_the_page_of_a_run(store: str, tmp_path: Path) -> None:
    assert page_of_run_folder(tmp_path / "run") is None
    said: list[str] = []
    tracker = start(store, tmp_path / "run", said)
    tracker.close()
    path = f"/#/experiments/{only_run(store).info.experiment_id}/runs/{tracker.run_id}?workflowType=machine_learning"
    page = page_of_run_folder(tmp_path / "run")
    assert page == f"mlflow ui --backend-store-uri {store}    then open  http://127.0.0.1:5000{path}"
    assert f"tracking: {page}" in said
    assert run_page("https://host/mlflow/", "1", "ab").startswith("https://host/mlflow/#/experiments/1/runs/ab?")
