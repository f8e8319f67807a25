"""`training.profile`: a trace of some steps on every rank, and not one bit of training changed."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from torch.autograd import DeviceType

from data_prep.errors import UserError
from pipeline.config import load_config
from pipeline.metrics.profiler import largest
from tests.pipeline.comparing import assert_same_state, losses_of
from tests.pipeline.moments import Moment
from tests.pipeline.ranks import Run, run_ranks

LAST = "checkpoints/step-00000006"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """A run as it is, and others of which something is traced, on two ranks."""
    folder = tmp_path_factory.mktemp("profiled")
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    client.create_experiment("globallocal", artifact_location=str(folder / "artifacts"))
    (folder / "blocked").mkdir()
    (folder / "blocked" / "profile").write_text("a file where the folder should be")
    at_step_3 = "plain/step-00000003"
    plan = [
        Run("plain"),
        Run("profiled", ["training.profile=3-4"]),
        Run("resumed inside", ["training.profile=2-5"], copy_checkpoint=at_step_3),
        Run("resumed behind", ["training.profile=1-2"], copy_checkpoint=at_step_3),
        Run("stopped inside", ["training.profile=2-6"], moment=Moment("backward", 9, rank=0)),
        Run("blocked", ["training.profile=3-4"]),
    ]
    small = ["model.num_hidden_layers=1"]  # a trace holds each of its operators
    tracked = {"profiled": "true"}  # by MLflow
    plan = [
        Run(
            run.name.replace(" ", "-"),
            [*run.overrides, *small, f"tracking.enabled={tracked.get(run.name, 'false')}"],
            run.copy_checkpoint,
            moment=run.moment,
        )
        for run in plan
    ]
    codes = [result["code"] for result in run_ranks(plan, folder, small_dataset)]
    assert codes == [0, 0, 0, 0, 75, 0]
    return folder


def log_of(folder: Path, run: str, rank: int = 0) -> str:
    return (folder / run / "logs" / f"rank-{rank:05d}.log").read_text()


def spans(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Events of a trace that last, by name."""
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    named: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X":
            named.setdefault(event["name"], []).append(event)
    return named


@pytest.mark.parametrize("run", ["profiled", "blocked"])
def test_profiling_changes_no_bit_of_what_is_trained(folder: Path, run: str) -> None:
    for metric in ("loss/train", "gradient_norm"):
        losses = losses_of(folder, "plain", metric)
        assert sorted(losses) == [1, 2, 3, 4, 5, 6]
        assert losses_of(folder, run, metric) == losses
    assert_same_state(folder / "plain" / LAST, folder / run / LAST)


@pytest.mark.parametrize("rank", [0, 1])
def test_each_ranks_trace_shows_the_steps_their_phases_and_operators(folder: Path, rank: int) -> None:
    named = spans(folder / "profiled" / "profile" / "steps-3-4" / f"rank-{rank:05d}.trace.json.gz")
    assert {name for name in named if name.startswith("step ")} == {"step 3", "step 4"}
    assert len(named["forward"]) == len(named["backward"]) == 4  # two micro-steps per step
    (step,) = named["step 3"]
    inside = [one for one in named["aten::mm"] if step["ts"] <= one["ts"] <= step["ts"] + step["dur"]]
    assert inside
    assert named["saving"]  # what comes between two steps is seen too


@pytest.mark.parametrize("rank", [0, 1])
def test_the_ten_largest_items_are_in_each_ranks_log(folder: Path, rank: int) -> None:
    lines = [line.partition("profile: ")[2] for line in log_of(folder, "profiled", rank).splitlines()]
    head, *items, where = [line for line in lines if line]
    assert "ms per step over 2 steps, traced; on the CPU; the largest items:" in head
    assert len(items) == 10
    shares = [float(item.split("%")[0]) for item in items]
    assert shares == sorted(shares, reverse=True)
    traced = spans(folder / "profiled" / "profile" / "steps-3-4" / f"rank-{rank:05d}.trace.json.gz")
    for item in items:
        name = item.partition("times per step")[2].strip().removesuffix("…")
        assert any(span.startswith(name) for span in traced), name
    assert "profiled/profile/steps-3-4" in where


def test_mlflow_holds_the_traces_of_all_ranks(folder: Path, tmp_path: Path) -> None:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("globallocal")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], "attributes.run_name = 'profiled'")
    here = folder / "profiled" / "profile" / "steps-3-4"
    listed = client.list_artifacts(run.info.run_id, "profile/steps-3-4")
    assert sorted(Path(item.path).name for item in listed) == sorted(item.name for item in here.iterdir())
    trace = "profile/steps-3-4/rank-00001.trace.json.gz"
    copy = Path(client.download_artifacts(run.info.run_id, trace, str(tmp_path)))
    assert copy.read_bytes() == (here / "rank-00001.trace.json.gz").read_bytes()


def test_a_resumed_run_traces_what_is_left_of_the_range_and_says_where_nothing_is(folder: Path) -> None:
    assert [item.name for item in (folder / "resumed-inside" / "profile").iterdir()] == ["steps-4-5"]
    assert not (folder / "resumed-behind" / "profile").exists()
    assert "training.profile = 1-2: those steps are taken" in log_of(folder, "resumed-behind")


def test_a_run_that_ends_inside_the_range_gives_its_trace_up(folder: Path) -> None:
    assert not (folder / "stopped-inside" / "profile").exists()
    assert "profile: training ended before step 6; no trace is written" in log_of(folder, "stopped-inside")


def test_a_folder_that_takes_no_trace_is_a_warning(folder: Path) -> None:
    assert "this rank's trace is not written" in log_of(folder, "blocked")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("5", "training.profile = 5: write FIRST-LAST, such as 5-7"),
        ("7-5", "training.profile = '7-5': write FIRST-LAST, such as 5-7"),
        ("0-3", "training.profile = '0-3': write FIRST-LAST"),
        ("a-b", "training.profile = 'a-b': write FIRST-LAST"),
        ("298-301", "training: profile (298-301) reaches past the last step (300); choose from 1 to 300"),
        ("1-100", "training.profile = '1-100': 100 steps are more than a browser shows; at most 50"),
    ],
)
def test_a_range_that_cannot_be_traced_is_one_line(value: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("launch/runs/quickstart.yaml", [f"training.profile={value}"])
    (problem,) = caught.value.problems
    assert line in problem


def test_on_a_gpu_kernels_count_and_what_launched_them_does_not() -> None:
    def event(key: str, device: DeviceType, microseconds: float, annotation: bool = False) -> SimpleNamespace:
        return SimpleNamespace(
            key=key, device_type=device, self_device_time_total=microseconds, count=4, is_user_annotation=annotation
        )

    events = [
        event("aten::mm", DeviceType.CPU, 900.0),
        event("step 1", DeviceType.CUDA, 5000.0, annotation=True),
        event("gemm", DeviceType.CUDA, 600.0),
        event("x" * 200, DeviceType.CUDA, 300.0),
    ]
    head, first, second = largest(events, seconds=1e-3, steps=2, on_gpu=True)
    assert head == "0.5 ms per step over 2 steps, traced; the GPU works 90% of it; the largest items:"
    assert first.split() == ["66.7%", "0.30", "ms", "2.0", "times", "per", "step", "gemm"]
    assert second.endswith("x…")
    assert len(second) < 140
