"""What a run in MLflow holds and shows, against a real SQLite store."""

import importlib.metadata
import json
import shlex
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow.data
import pytest
from mlflow import MlflowClient

from pipeline.redact import redact_arguments, redact_lines
from pipeline.tracking.description import NOTE_TAG
from pipeline.tracking.facts import Sizes
from pipeline.tracking.history import CHECKPOINTS_TABLE
from pipeline.tracking.journal import read_journal
from pipeline.tracking.store import page_of_run_folder, run_page
from tests.pipeline.tracking_fixtures import DATASET, made, only_run, points, start, store

__all__ = ["store"]


def folder_text(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*") if path.is_file())


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


def test_tokens_are_counted_without_the_batches_that_are_left_out(store: str, tmp_path: Path) -> None:
    sizes = Sizes(max_steps=10, tokens_per_step=512, warmup_tokens=((3, 128),))
    tracker = start(store, tmp_path / "run", [], sizes=sizes)
    tracker.log_metrics({"loss/train": 3.0}, 1)
    tracker.leave_out(((1, 2), (3, 5)))
    tracker.log_metrics({"loss/train": 2.0}, 3)
    tracker.close()
    run = only_run(store)
    assert points(store, run.info.run_id, "progress/tokens") == [(1, 128.0), (3, 2 * 128.0 + 512.0)]
    assert "| **Progress** | 768 tokens |" in run.data.tags[NOTE_TAG]
    assert [entry["tokens"] for entry in read_journal(tmp_path / "run") if entry["metrics"]] == [128, 768]


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
