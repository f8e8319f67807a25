"""What broke when tried as a new user would, by the parts of a run: one small run, and one that begins from it."""

import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from launch.cli import main
from pipeline.checkpoints.folder import INTEGRITY, listing_digest, verify
from pipeline.distributed.stop import Stopped
from pipeline.evaluation.evaluator import decorating
from pipeline.tracking.store import tracking_uri
from tests import forks
from tests.conftest import ROOT, globallocal
from tests.pipeline.ranks import Run, environment, run_ranks

STEP = "checkpoints/step-00000003"
EVALUATE = """
import resource, sys
from launch.cli import main
code = main(["evaluate", sys.argv[1], "--batch-size", sys.argv[2]])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """Run `a`, with an empty prompt among its samples; run `b`, which begins from it; `c`, a copy with one bad file."""
    folder = tmp_path_factory.mktemp("runs")
    short = ["training.max_steps=3", "training.global_batch_size=2"]
    begun = [f"checkpoint.resume={folder}/a/{STEP}", "training.max_steps=5", "training.global_batch_size=2"]
    results = run_ranks(
        [Run("a", [*short, 'evaluation.prompts=["", "The"]']), Run("b", begun)], folder, small_dataset, processes=1
    )
    assert [result["code"] for result in results] == [0, 0], results
    return folder


def test_an_empty_prompt_begins_as_a_document_does(runs: Path) -> None:
    assert (runs / "a" / "logs" / "rank-00000.log").read_text().count("sample: ") == 2


def test_a_run_that_begins_from_anothers_checkpoint_has_an_mlflow_run_of_its_own(runs: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{runs}/mlflow.db")
    (experiment,) = [item.experiment_id for item in client.search_experiments() if item.name == "globallocal"]
    found = {item.info.run_name: item for item in client.search_runs([experiment])}
    assert sorted(found) == ["a", "b"]
    assert found["b"].data.tags["mlflow.parentRunId"] == found["a"].info.run_id
    assert found["b"].data.tags["globallocal.begins_from"].endswith(STEP)
    steps = {
        name: [point.step for point in client.get_metric_history(item.info.run_id, "loss/train")]
        for name, item in found.items()
    }
    assert steps == {"a": [1, 2, 3], "b": [4, 5]}


def test_a_random_state_that_is_none_is_a_line(runs: Path, small_dataset: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "bad" / STEP
    shutil.copytree(runs / "a" / STEP, checkpoint)
    garbage = b"no random state"
    (checkpoint / "rng-rank-00000.pt").write_bytes(garbage)
    table = json.loads((checkpoint / INTEGRITY).read_text())
    digest = hashlib.sha256(garbage).hexdigest()
    table["files"]["rng-rank-00000.pt"] = {"bytes": len(garbage), "sha256": digest}
    (checkpoint / INTEGRITY).write_text(json.dumps({**table, "sha256": listing_digest(table["files"])}))
    assert verify(checkpoint) == []
    short = ["training.max_steps=4", "training.global_batch_size=2"]
    (result,) = run_ranks([Run("bad", short)], tmp_path, small_dataset, processes=1)
    assert result["code"] == 2
    assert "rng-rank-00000.pt: is no random state" in result["problems"][0]
    assert "move step-00000003 away to go on from an older checkpoint" in result["problems"][0]


def test_tied_embeddings_stand_under_both_names_in_the_one_file(runs: Path, tmp_path: Path) -> None:
    globallocal("checkpoints", "reshard", runs / "a", "--output", tmp_path)
    saved = torch.load(tmp_path / "step-00000003" / "mp_rank_00_model_states.pt", weights_only=True)
    module = saved["module"]
    assert torch.equal(module["lm_head.weight"], module["model.embed_tokens.weight"])


def test_a_run_can_be_used_without_its_dataset(runs: Path, small_dataset: Path, tmp_path: Path) -> None:
    """From another folder, or when the dataset is gone."""
    moved = tmp_path / "moved"
    shutil.copytree(runs / "a", moved)
    state = moved / STEP / "state.json"
    text = state.read_text().replace(str(small_dataset), "not/here")
    state.write_text(text)
    table = json.loads((moved / STEP / INTEGRITY).read_text())
    table["files"]["state.json"] = {"bytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (moved / STEP / INTEGRITY).write_text(json.dumps({**table, "sha256": listing_digest(table["files"])}))
    done = globallocal("generate", moved, "--prompt", "", "--prompt", "The", "--max-new-tokens", 3)
    assert len(done.stdout.splitlines()) >= 2


def test_a_sequence_longer_than_the_split_is_one_line(runs: Path) -> None:
    told = globallocal("evaluate", runs / "a", "--sequence-length", 2**31 - 1, expect=2).stderr
    (line,) = told.splitlines()
    assert re.fullmatch(
        r"error: --sequence-length 2,147,483,647 is longer than split valid, ([\d,]+) tokens; give [\d,]+ or less", line
    )


def test_a_batch_larger_than_the_split_takes_no_more_memory_than_the_split(runs: Path) -> None:
    """And changes no figure."""
    program = runs / "evaluate.py"
    program.write_text(EVALUATE)
    said, peaks = [], []
    for batch in (8, 65536):
        done = forks.run([str(program), str(runs / "a"), str(batch)], environment(runs))
        assert done.returncode == 0, done.stderr
        *lines, peak = done.stdout.splitlines()
        said.append([line for line in lines if "perplexity" not in line])  # e to a sum in another order
        peaks.append(int(peak))
    assert said[0] == said[1]
    assert peaks[1] < 2 * peaks[0]


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--prompt", "a", "--max-new-tokens", "0"],
        ["evaluate", "x", "--batch-size", "0"],
        ["evaluate", "x", "--max-samples", "-1"],
        ["evaluate", "x", "--sequence-length", str(10**30)],
        ["generate", "x", "--prompt", "a", "--seed", "-1"],
        ["generate", "x"],
        ["checkpoints", "prune"],
        ["train"],
        ["nonsense"],
        ["export", "", "--output", ""],
        ["estimate", "--preset", "x" * 1000],
        ["launch", "--config", "launch/runs/quickstart.yaml", "--local", "2", "--slurm"],
        ["rehearse", "--config", "launch/runs/quickstart.yaml", "--ranks", "0"],
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), said.err


def test_a_fault_in_what_only_decorates_is_a_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("globallocal").propagate = True
    with decorating("samples"):
        raise ZeroDivisionError("no tokens")
    assert "samples: ZeroDivisionError: no tokens; training goes on without" in caplog.text
    with pytest.raises(Stopped), decorating("samples"):
        raise Stopped


def test_a_password_leaves_the_tracking_url(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://bob:SEC%40RET@host:5000/path")
    assert tracking_uri(None) == "http://host:5000/path"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://host:5000/path"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("bob", "SEC@RET")


def test_a_stop_while_operators_compile_is_a_preemption(tmp_path: Path, small_dataset: Path) -> None:
    words = [
        "--config",
        "launch/runs/quickstart.yaml",
        f"run.output_dir={tmp_path}/run",
        f"data.dataset={small_dataset}",
        "deepspeed.config=zero3_offload",
    ]
    extensions = tmp_path / "extensions"  # nothing is compiled yet
    program = subprocess.Popen(
        [sys.executable, "pipeline/train.py", *words],
        cwd=ROOT,
        env={**environment(tmp_path), "TORCH_EXTENSIONS_DIR": str(extensions)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list(extensions.rglob(".globallocal.lock")):
        assert program.poll() is None, program.communicate()[0]
        time.sleep(0.05)
    time.sleep(1)
    compilers = psutil.Process(program.pid).children(recursive=True)
    program.send_signal(signal.SIGTERM)
    said = program.communicate(timeout=60)[0]
    assert program.returncode == 75, said
    assert "compiling DeepSpeed's cpu_adam, once per machine: a minute or more; kept in" in said
    assert "SIGTERM: stopped before the first step; nothing to save" in said
    assert not [item for item in compilers if item.is_running() and item.status() != psutil.STATUS_ZOMBIE]
