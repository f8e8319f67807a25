"""`globallocal checkpoints list | verify | prune`, on folders that were written as training writes them."""

from pathlib import Path

import pytest

from data_prep.hashing import ALGORITHM
from launch.cli import main
from pipeline.checkpoints.folder import list_checkpoints, lock, step_of
from pipeline.config import load_config
from pipeline.files import step_name
from pipeline.settings.sections import Retention
from tests.pipeline.saved_checkpoints import save

LOSSES = {10: 4.0, 20: 3.0, 30: 3.5, 40: None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 10 to 40; the settings keep the newest one, the best one, and multiples of 30."""
    overrides = ["checkpoint.keep_last=1", "checkpoint.keep_best=1", "checkpoint.keep_every_steps=30"]
    load_config("launch/runs/quickstart.yaml", overrides).save(tmp_path / "config.yaml")
    for step, loss in LOSSES.items():
        save(tmp_path / "checkpoints", step, Retention(keep_last=9), loss, files=2)
    return tmp_path


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def test_list_says_what_stands_and_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / step_name(10) / "file-1.pt").write_bytes(b"")
    assert main(["checkpoints", "list", str(run)]) == 0
    rows = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "newest" in rows["40"]
    assert "every 30 steps" in rows["30"]
    assert "best" in rows["20"]
    assert "3.0000" in rows["20"]
    assert "ZeRO-2, 2 ranks, fp32" in rows["20"]
    assert "whole" in rows["20"]
    assert "0 bytes" in rows["10"]
    assert "whole" not in rows["10"]


def test_verify_names_every_fault_in_one_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "verify", str(run)]) == 0
    assert capsys.readouterr().out.count(": whole,") == 4
    root = run / "checkpoints"
    flip(root / step_name(40) / "file-0.pt")
    (root / step_name(40) / "state.json").unlink()
    (root / step_name(20) / "integrity.json").unlink()
    assert main(["checkpoints", "verify", str(run)]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert f"step-00000040/file-0.pt: {ALGORITHM}" in errors[0]
    assert "step-00000040/state.json: No such file" in errors[1]
    assert "step-00000020: has no integrity.json" in errors[2]
    assert main(["checkpoints", "verify", str(root / step_name(30))]) == 0


def test_prune_applies_the_settings_and_a_dry_run_only_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    flip(root / step_name(40) / "file-0.pt")
    assert main(["checkpoints", "prune", str(run), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"would delete {root / step_name(10)} (whole, not kept by the run's settings)" in said
    assert f"would delete {root / step_name(40)} (damaged: " in said
    assert "2 of 4 checkpoints" in said
    assert len(list_checkpoints(root)) == 4
    assert main(["checkpoints", "prune", str(run)]) == 0
    assert [step_of(folder) for folder in list_checkpoints(root)] == [30, 20]


def test_prune_keeps_away_from_a_run_that_is_writing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock(run):
        assert main(["checkpoints", "prune", str(run)]) == 2
    assert "another job is writing there" in capsys.readouterr().err
    assert len(list_checkpoints(run / "checkpoints")) == 4


@pytest.mark.parametrize("command", ["list", "verify", "prune"])
def test_a_folder_that_is_no_run_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", command, str(tmp_path / "absent")]) == 2
    assert "is no run folder: it has no checkpoints/" in capsys.readouterr().err
