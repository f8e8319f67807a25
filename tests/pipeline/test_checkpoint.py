"""What a checkpoint folder promises: whole or not there, every byte accounted for."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum

from data_prep.errors import UserError
from data_prep.hashing import ALGORITHM
from pipeline.checkpoints import folder as checkpoint
from pipeline.checkpoints import write as checkpoint_io
from pipeline.checkpoints.retention import prune
from pipeline.random_state import random_state, set_random_state
from pipeline.settings.sections import Retention


@pytest.fixture
def root(runs: dict[str, Any], trained: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 6, to be damaged."""
    copy = tmp_path / "checkpoints"
    shutil.copytree(trained / "unbroken-2" / "checkpoints", copy)
    return copy


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_a_checkpoint_holds_everything(root: Path) -> None:
    folder = root / "step-00000006"
    assert checkpoint.verify(folder) == []
    assert names(folder) == [
        "integrity.json",
        "layout-rank-00000.pt",
        "layout-rank-00001.pt",
        "mp_rank_00_model_states.pt",
        "rng-rank-00000.pt",
        "rng-rank-00001.pt",
        "state.json",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    ]
    state = checkpoint.read_state(folder)
    assert (state.step, state.consumed_samples, state.consumed_tokens) == (6, 48, 48 * 32)
    assert state.world_size == 2
    assert state.zero_stage == 2
    assert len(state.next_batch_hash) == 64


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
def test_every_damage_to_every_file_is_named_and_the_older_one_taken(root: Path, damage: Any, tmp_path: Path) -> None:
    for name in names(root / "step-00000006"):
        shutil.rmtree(root / "step-00000006")
        shutil.copytree(Path(root, "../whole").resolve(), root / "step-00000006")
        damage(root / "step-00000006" / name)
        problems = checkpoint.verify(root / "step-00000006")
        assert len(problems) == 1
        assert name in problems[0]
        assert checkpoint.newest_verified_alone(root) == root / "step-00000003"


def test_a_single_flipped_bit_anywhere_is_found_200_times(root: Path) -> None:
    generator = random.Random(0)
    folder = root / "step-00000006"
    for _ in range(200):
        path = folder / generator.choice(names(folder))
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(damaged))
        (problem,) = checkpoint.verify(folder)
        assert str(path) in problem
        path.write_bytes(content)
    assert checkpoint.verify(folder) == []


@pytest.fixture(autouse=True)
def whole(root: Path) -> None:
    shutil.copytree(root / "step-00000006", root.parent / "whole")


def test_where_none_verifies_the_reasons_are_told(root: Path) -> None:
    flip(root / "step-00000006" / "state.json")
    (root / "step-00000003" / "integrity.json").unlink()
    with pytest.raises(UserError) as caught:
        checkpoint.newest_verified_alone(root)
    text = str(caught.value)
    assert f"step-00000006/state.json: {ALGORITHM}" in text
    assert "step-00000003: has no integrity.json: it was never finished" in text


def test_folders_under_construction_are_not_checkpoints(root: Path) -> None:
    shutil.copytree(root / "step-00000006", root / ".saving-step-00000009" / "step-00000009")
    (root / "step-00000006").rename(root / ".deleting-step-00000006")
    assert checkpoint.list_checkpoints(root) == [root / "step-00000003"]


def test_pruning_never_deletes_the_last_whole_one(root: Path) -> None:
    flip(root / "step-00000006" / "state.json")
    assert prune(root, Retention(keep_last=1), checkpoint.verify).deleted == [root / "step-00000006"]
    assert prune(root, Retention(keep_last=1), checkpoint.verify).deleted == []
    flip(root / "step-00000003" / "state.json")
    assert prune(root, Retention(keep_last=1), checkpoint.verify).deleted == []
    shutil.copytree(root.parent / "whole", root / "step-00000006")
    assert prune(root, Retention(keep_last=1), checkpoint.verify).deleted == [root / "step-00000003"]
    assert names(root) == ["step-00000006"]


def test_a_pickle_that_is_not_ours_is_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "owned",))

    torch.save({"module": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoint_io.DeferringCheckpointEngine().load(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "owned").exists()


def test_files_hold_no_members_of_enumerations(tmp_path: Path) -> None:
    """Some versions of Python 3.11 pickle them as calls of `getattr`, which nothing safe may load."""
    engine = checkpoint_io.DeferringCheckpointEngine()
    engine.save({"optimizer": {"stages": [ZeroStageEnum.gradients], "w": torch.ones(2)}}, str(tmp_path / "a.pt"))
    saved = engine.files["a.pt"]["optimizer"]
    assert type(saved["stages"][0]) is int
    assert saved["stages"] == [2]
    assert torch.equal(saved["w"], torch.ones(2))


def test_an_unknown_field_in_state_json_is_refused(root: Path) -> None:
    path = root / "step-00000006" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "surprise": 1}))
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.read_state(root / "step-00000006")


def test_random_state_survives_a_round_trip_through_the_disk(tmp_path: Path) -> None:
    import random

    import numpy as np

    checkpoint_io.write_durably(tmp_path / "rng.pt", lambda file: torch.save(random_state(), file))
    drawn = (torch.rand(3).tolist(), random.random(), np.random.rand())
    set_random_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert (torch.rand(3).tolist(), random.random(), np.random.rand()) == drawn
