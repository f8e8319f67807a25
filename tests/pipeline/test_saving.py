"""Saving while training goes on, on two real ranks: of the right step, and in every trouble of a disk."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.checkpoints.folder import read_state
from pipeline.checkpoints.space import retained, start_problems
from pipeline.checkpoints.write import write_files
from pipeline.settings.sections import Retention
from tests.conftest import missing
from tests.pipeline.comparing import plain
from tests.pipeline.only_weights import only_weights
from tests.pipeline.ranks import outputs, start_ranks, wait
from tests.pipeline.saving import STAGES, WRITES

pytestmark = pytest.mark.timeout(1800)

MOUNTS = {"trouble/checkpoints": "8m", "tiny": "24k"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """With small disks in it, where this user may mount them."""
    folder = tmp_path_factory.mktemp("saving")
    mounted = []
    if os.geteuid() == 0:
        for name, size in MOUNTS.items():
            (folder / name).mkdir(parents=True)
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder / name)]
            if subprocess.run(command, capture_output=True).returncode == 0:
                mounted.append(folder / name)
    if len(mounted) == len(MOUNTS):
        (folder / "mounted").touch()
    yield folder
    for item in mounted:
        subprocess.run(["umount", "--lazy", str(item)], check=True)


@pytest.fixture(scope="module")
def results(folder: Path, small_dataset: Path) -> dict[str, Any]:
    (folder / "dataset").write_text(str(small_dataset))
    codes = wait(start_ranks(["-m", "tests.pipeline.saving", str(folder)], folder), folder, 1500)
    assert codes == [0, 0], outputs(folder)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@pytest.fixture
def small_disks(results: dict[str, Any], folder: Path) -> dict[str, Any]:
    if not (folder / "mounted").exists():
        missing("a small disk (tmpfs)", "run the tests as root, who may mount it")
    return results


@pytest.mark.parametrize("stage", STAGES)
def test_the_checkpoint_is_of_the_step_it_says_though_training_has_moved_on(
    results: dict[str, Any], folder: Path, stage: int
) -> None:
    result = results[f"later-{stage}"]
    assert (result["step"], result["steps"], result["problems"]) == (4, [2], [])
    assert result["ended_before_written"] == 0
    saved, expected = folder / f"later-{stage}" / "checkpoints" / "step-00000002", folder / f"plain-{stage}" / "step"
    files = sorted(item.name for item in expected.glob("*.pt"))
    assert len(files) >= (1 if stage == 0 else 3)
    for name in files:
        with only_weights():
            ours = torch.load(saved / name)
        # Written by this test; DeepSpeed's own writer leaves a member of an enumeration in it.
        deepspeeds = torch.load(expected / name, weights_only=False)
        assert plain(ours) == plain(deepspeeds), name
    assert read_state(saved).step == 2


def test_a_save_that_overtakes_another_waits_for_it_and_says_so(results: dict[str, Any], folder: Path) -> None:
    result = results["overtaking"]
    assert (result["steps"], result["problems"]) == ([1, 2], [])
    log = (folder / "trouble" / "logs" / "rank-00000.log").read_text()
    assert "step 2: the checkpoint of step 1 is still being written; waiting for it" in log


def assert_survived(result: dict[str, Any], *words: str) -> None:
    """Nothing of the failed save is left, the older checkpoint stands, the next save succeeds."""
    text = "\n".join(result["problems"])
    assert all(word in text for word in words), text
    assert result["steps"] == [result["step"]]
    assert result["newest"]
    assert result["newest"] < f"step-{result['step']:08d}"
    assert result["passed_over"] == []
    assert result["then"]["problems"] == []
    assert result["then"]["newest"] == f"step-{result['then']['step']:08d}"
    assert result["then"]["left"] == []


def test_a_folder_deleted_while_it_is_written(results: dict[str, Any]) -> None:
    assert_survived(results["deleted"], ".saving-step-00000003", "No such file or directory")


@pytest.mark.parametrize(("rank", "number"), [(rank, number) for rank in WRITES for number in range(WRITES[rank])])
def test_a_disk_that_is_full_at_any_write(small_disks: dict[str, Any], rank: int, number: int) -> None:
    result = small_disks[f"full-{rank}-{number}"]
    assert_survived(result, "No space left on device")
    assert result["left"] == []


def test_a_disk_that_fails_at_any_time_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {str(number): torch.full((50_000,), float(number)) for number in range(4)}
    fsync, calls = os.fsync, 0

    def failing(descriptor: int) -> None:  # no disk of a test breaks on demand
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    for fails_at in range(1, 10):
        calls = 0
        written, problems = write_files(tmp_path / "step", {"weights.pt": content})
        if calls < fails_at:
            break
        assert (written, problems) == ({}, [f"{tmp_path}/step/weights.pt: Input/output error"])
    assert fails_at > 2  # one while the file was written, and one at its end
    assert written
    assert not problems
    assert torch.equal(torch.load(tmp_path / "step" / "weights.pt")["3"], content["3"])


def test_a_target_that_is_read_only(small_disks: dict[str, Any]) -> None:
    assert_survived(small_disks["read-only"], "Read-only file system")


def test_too_little_room_is_seen_before_a_save(small_disks: dict[str, Any]) -> None:
    assert_survived(small_disks["no room"], "free, a checkpoint takes about", "globallocal checkpoints prune")


def test_a_disk_of_24_kilobytes_is_one_line_before_step_0(small_disks: dict[str, Any]) -> None:
    (line,) = small_disks["tiny"]
    assert "kB free, but the run keeps up to 2 checkpoints of about 1." in line
    assert "move run.output_dir to a larger disk" in line


def test_retention_counts_the_checkpoint_being_written(tmp_path: Path) -> None:
    assert retained(Retention(keep_last=3), max_steps=100, interval_steps=10) == 4
    assert retained(Retention(keep_last=3), max_steps=20, interval_steps=10) == 2
    assert retained(Retention(2, keep_every_steps=20, keep_best=1), max_steps=100, interval_steps=10) == 9
    (line,) = start_problems(tmp_path, 10**18, 4)
    assert "4 checkpoints of about 1000000.0 TB" in line
