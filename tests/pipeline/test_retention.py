"""Which checkpoints stay, and that a whole one stands at every moment of a save, wherever it is cut off."""

import math
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.checkpoints import folder as checkpoint
from pipeline.checkpoints import write as checkpoint_io
from pipeline.checkpoints.folder import SAVING
from pipeline.checkpoints.retention import Entry, prune, reasons
from pipeline.files import step_name
from pipeline.settings.sections import Retention
from tests.pipeline.saved_checkpoints import save, state

ENTRIES = st.lists(
    st.builds(Entry, st.integers(1, 40), st.none() | st.floats(0, 10), st.booleans()),
    unique_by=lambda entry: entry.step,
)
RETENTION = st.builds(Retention, st.integers(1, 4), st.none() | st.integers(1, 10), st.integers(0, 3))


@given(ENTRIES, RETENTION)
def test_what_is_kept_is_what_the_settings_say(entries: list[Entry], retention: Retention) -> None:
    kept = {step for step, why in reasons(entries, retention).items() if why}
    whole = sorted((entry.step for entry in entries if entry.whole), reverse=True)
    if not whole:
        assert kept == {entry.step for entry in entries}
        return
    assert set(whole[: retention.keep_last]) <= kept <= set(whole)
    measured = sorted(entry.validation_loss for entry in entries if entry.whole and entry.validation_loss is not None)
    best = [entry.validation_loss for entry in entries if entry.step in kept and entry.validation_loss is not None]
    assert sorted(best)[: retention.keep_best] == measured[: retention.keep_best]
    if retention.keep_every_steps:
        assert {step for step in whole if step % retention.keep_every_steps == 0} <= kept
    most = retention.keep_last + retention.keep_best
    assert len([step for step in kept if step % (retention.keep_every_steps or 10**9)]) <= most


def steps(root: Path) -> list[int]:
    return sorted(map(checkpoint.step_of, checkpoint.list_checkpoints(root)))


def test_the_newest_the_best_and_every_tenth_stay(tmp_path: Path) -> None:
    losses = {5: 3.0, 10: 2.0, 15: 1.0, 20: 1.5, 25: 1.4, 30: 1.6, 35: 1.7}
    for step, loss in losses.items():
        assert save(tmp_path, step, Retention(keep_last=2, keep_every_steps=10, keep_best=2), loss) == []
    assert steps(tmp_path) == [10, 15, 20, 25, 30, 35]
    assert prune(tmp_path, Retention(keep_last=1, keep_best=1)).deleted == [
        tmp_path / step_name(step) for step in (10, 20, 25, 30)
    ]


def test_a_later_checkpoint_that_was_passed_over_does_not_push_the_new_one_out(tmp_path: Path) -> None:
    for step in (3, 6):
        save(tmp_path, step, Retention(keep_last=2))
    damage = tmp_path / step_name(6) / "file-0.pt"
    damage.write_bytes(bytes(damage.stat().st_size))  # its size is right
    assert save(tmp_path, 4, Retention(keep_last=1)) == []
    assert steps(tmp_path) == [4, 6]
    assert checkpoint.newest_verified_alone(tmp_path) == tmp_path / step_name(4)
    assert save(tmp_path, 6, Retention(keep_last=1)) == []
    assert steps(tmp_path) == [6]
    assert checkpoint.verify(tmp_path / step_name(6)) == []


def in_child(work: Callable[[], object]) -> int:
    """Run `work` in a forked process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


TOUCHING = ("open", "os.", "shutil.")


def die_at(count: int) -> None:
    """SIGKILL to this process when it is about to touch the disk for the `count`-th time."""
    touched = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal touched
        if event.startswith(TOUCHING):
            touched += 1
            if touched == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that stands already"])
def test_killed_before_any_touch_of_the_disk_with_keep_1_a_whole_one_stands(tmp_path: Path, again: bool) -> None:
    """Before a file, between files, before the list, before the rename, in the rotation: everywhere."""
    root, keep = tmp_path / "checkpoints", Retention(keep_last=1)
    save(root, 3, keep)
    step, seen = 3, set()
    for count in range(1, 1000):
        new = step if again else step + 1

        def work(new: int = new, count: int = count) -> None:
            die_at(count)
            assert save(root, new, keep) == []

        status = in_child(work)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        seen.add(tuple(sorted(item.name.split("-")[0] for item in root.iterdir())))
        checkpoint.tidy(root)  # what the next start does first
        found = checkpoint.newest_verified_alone(root)
        assert checkpoint.step_of(found) in (step, new)
        assert all(item.name.startswith("step-") for item in root.iterdir())
        step = checkpoint.step_of(found)
        prune(root, keep)
    assert count > 20
    assert steps(root) == [new]
    assert (".saving", "step") in seen
    assert any(".replaced" in names or ".deleting" in names for names in seen)


def test_killed_in_the_middle_of_a_file_the_older_one_stands(tmp_path: Path) -> None:
    save(tmp_path, 3, Retention(keep_last=1))
    whole_bytes = (tmp_path / step_name(3) / "file-0.pt").stat().st_size
    for cut in range(0, whole_bytes, whole_bytes // 12):

        def work(cut: int = cut) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (cut, cut))  # the kernel kills who writes past it
            save(tmp_path, 4, Retention(keep_last=1))

        assert os.WTERMSIG(in_child(work)) == signal.SIGXFSZ
        assert next(tmp_path.glob(f"{SAVING}*/*/file-0.pt")).stat().st_size == cut
        checkpoint.tidy(tmp_path)
        assert checkpoint.newest_verified_alone(tmp_path) == tmp_path / step_name(3)
        assert [item.name for item in tmp_path.iterdir()] == [step_name(3)]


def test_a_file_that_vanishes_or_appears_before_the_commit_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "building" / step_name(3)
    folder.mkdir(parents=True)
    files, _ = checkpoint_io.write_files(folder, {"a.pt": torch.zeros(9), "b.pt": torch.zeros(9)})
    (folder / "a.pt").unlink()
    (folder / "stray").touch()
    problems = checkpoint_io.commit(folder, tmp_path / step_name(3), state(3), files)
    assert any("a.pt: is gone" in line for line in problems)
    assert any("stray: was written past the integrity list" in line for line in problems)
    assert not (tmp_path / step_name(3)).exists()


def test_a_checkpoint_whose_figures_are_not_finite_is_read_again(tmp_path: Path) -> None:
    """JSON has no infinity: `null`, as earlier versions wrote it, kept such a checkpoint from being resumed."""
    assert save(tmp_path, 3, Retention(keep_last=1), loss=2.0) == []
    folder = tmp_path / step_name(3)
    evaluation = checkpoint.read_state(folder).evaluation
    assert evaluation is not None
    assert evaluation.loss == 2.0
    assert math.isnan(evaluation.held_out.total.word_perplexity)
    text = (folder / checkpoint.STATE).read_text()
    assert '"NaN"' in text
    (folder / checkpoint.STATE).write_text(text.replace('"NaN"', "null"))
    earlier = checkpoint.read_state(folder).evaluation
    assert earlier is not None
    assert math.isnan(earlier.held_out.total.word_perplexity)
