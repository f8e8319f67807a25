"""One start says all that is wrong, whatever its kind, before any rank starts; what a fault hides is named."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import main
from launch.preflight import doctor
from pipeline.config import read_config
from pipeline.settings.section import Unknown
from tests.conftest import ROOT

QUICKSTART = "launch/runs/quickstart.yaml"


@pytest.fixture
def knobs(tmp_path: Path) -> Path:
    """A DeepSpeed JSON whose stage does not exist."""
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 7}}')
    return path


def lines_of(capsys: pytest.CaptureFixture[str], *overrides: str) -> list[str]:
    assert main(["train", "--config", QUICKSTART, "--processes", "2", *overrides]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert all(line.startswith("error: ") for line in said.err.splitlines())
    return said.err.splitlines()


def test_six_kinds_of_faults_are_one_list(capsys: pytest.CaptureFixture[str], knobs: Path, tmp_path: Path) -> None:
    lines = lines_of(
        capsys,
        f"run.output_dir={tmp_path / 'run'}",
        "training.log_interval_step=5",  # schema
        "model.router_top_k=5000",  # model
        "training.micro_batch_size=3",  # batch
        f"data.dataset={tmp_path / 'absent'}",
        f"deepspeed.config={knobs}",
        "data.sequence_length=2000000000",  # machine
    )
    *faults, one, other = lines
    told = ["unknown key", "router_top_k", "micro_batch_size (3)", "absent: no such dataset", "zero_optimization.stage"]
    assert [part for part in told if not any(part in line for line in faults)] == []
    assert len(faults) == len(told)
    assert one.startswith("error: not checked yet: the splits, the samples, the model, ")
    assert one.endswith("; these need the dataset, which is wrong")
    assert other == "error: not checked yet: the machine, compiling; these need the DeepSpeed JSON, which is wrong"
    assert not (tmp_path / "run").exists()
    lines = lines_of(capsys, f"data.dataset={tmp_path / 'absent'}", "model.hidden_size=400000")
    assert "GiB per rank or more, this machine has" in lines[1]


def test_the_program_of_a_rank_says_all_at_once_too(small_dataset: Path, tmp_path: Path) -> None:
    words = [f"run.output_dir={tmp_path / 'run'}", f"data.dataset={small_dataset}", "training.log_interval_step=5"]
    words += ["model.router_top_k=5000", "training.micro_batch_size=3"]
    command = [sys.executable, "pipeline/train.py", "--config", QUICKSTART, *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2, run.stderr
    lines = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    told = ["unknown key training.log_interval_step", "micro_batch_size (3)", "router_top_k is 5000", "not checked yet"]
    assert [part in line for part, line in zip(told, lines, strict=True)] == [True] * 4
    assert not (tmp_path / "run").exists()


def test_what_hangs_on_a_wrong_setting_is_named_and_not_guessed(
    capsys: pytest.CaptureFixture[str], small_dataset: Path
) -> None:
    lines = lines_of(
        capsys,
        f"data.dataset={small_dataset}",
        "training.micro_batch_size=x",
        "training.global_batch_size=1",
        "optimizer.learning_rate=-1",
        "evaluation.split=null",
    )
    assert len(lines) == 4
    assert "evaluation.prompts (1) are continued" in lines[2]
    assert lines[3] == (
        "error: not checked yet: the batch, memory; these need training.micro_batch_size, which is wrong"
    )


def test_settings_that_are_wrong_are_missing_and_the_others_stand() -> None:
    read = read_config(QUICKSTART, ["training.max_steps=0", "model.preset=huge", "run.name=a/b", "health=7", "x=1"])
    assert len(read.problems) == 5, read.problems
    assert read.config.training.global_batch_size == 8
    for missing, name in (
        (lambda: read.config.training.max_steps, "training.max_steps"),
        (lambda: read.config.run_folder, "run.name"),
        (lambda: read.config.model, "model"),
        (lambda: read.config.health, "health"),
    ):
        with pytest.raises(Unknown) as caught:
            missing()
        assert caught.value.what == name
    with pytest.raises(AttributeError):
        read.config.training.max_stepss  # type: ignore[attr-defined]  # noqa: B018


def test_a_misspelt_key_is_not_taken_for_absent(tmp_path: Path) -> None:
    text = Path(QUICKSTART).read_text().replace("max_steps:", "max_step:")
    (tmp_path / "run.yaml").write_text(text)
    (problem,) = read_config(tmp_path / "run.yaml").problems
    assert "unknown key training.max_step; nearest: training.max_steps" in problem


def test_doctor_looks_at_everything_although_settings_are_wrong(knobs: Path, tmp_path: Path) -> None:
    given = [f"data.dataset={tmp_path}/absent", f"deepspeed.config={knobs}", "training.global_batch_size=x"]
    found = list(doctor.run_findings(Path(QUICKSTART), [*given, "tracking.enabled=false"], 2))
    levels = {finding.check: (finding.level, finding.found) for finding in found}
    assert levels["config"][0] == levels["dataset"][0] == "problem"
    assert levels["batch"] == ("warning", "not checked until training.global_batch_size is right")
    assert doctor.exit_code(found) == 2
