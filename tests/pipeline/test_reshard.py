"""A run goes on with another number of ranks, another ZeRO stage or another precision, on real ranks."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler, LossScaleConfig
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.checkpoints import folder as checkpoint
from pipeline.checkpoints import zero_layout as layout
from pipeline.checkpoints.consolidate import consolidate
from pipeline.checkpoints.reshard import ParameterReader, read_loss_scale
from pipeline.engine.internals import MOMENTS, set_loss_scale
from tests.pipeline.only_weights import only_weights
from tests.pipeline.reshard_ranks import ALL_STEPS, FIRST_STEPS, ONE_FILE, has_muon, parse, run_pairs
from tests.variants import some_of

pytestmark = pytest.mark.timeout(1800)  # seven processes start at once

PAIRS = some_of(
    # Out of every stage and into every other, up and down in ranks.
    [
        *[("z0r1", "z3r2"), ("z1r4", "z2r1"), ("z2r2", "z1r1"), ("z3r2", "z2r4")],
        ("z3r2", "z0r2"),  # keeps its ranks
        *[("z2r2-bf16", "z3r1-bf16"), ("z3r1-bf16", "z2r2")],
        ("m3r2", "m2r1"),
    ],
    # Every stage into every stage, every number of ranks into every other.
    [
        *(("z0r1", target) for target in ("z0r2", "z1r4", "z2r2", "z3r4")),
        *(("z1r4", target) for target in ("z0r2", "z1r2", "z3r2")),
        *(("z2r2", target) for target in ("z0r4", "z2r4", "z3r1")),
        *(("z3r2", target) for target in ("z1r1", "z3r4")),
        ("z2r2", "z1r1-bf16"),
        *[("m0r2", "m3r1"), ("m1r2", "m0r1"), ("m2r1", "m1r4"), ("m1r2-bf16", "m3r1-bf16")],
    ],
)
FROM_ONE_FILE = (f"z3r2{ONE_FILE}", "z2r1")
FP32_PAIRS = [pair for pair in PAIRS if "bf16" not in "".join(pair)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_dataset: Path) -> Path:
    """A folder for every run of `PAIRS`, and its measurements in `NAME.json`."""
    folder = tmp_path_factory.mktemp("resharded")
    run_pairs([*PAIRS, FROM_ONE_FILE], folder, small_dataset)
    return folder


def results(folder: Path, pair: tuple[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the unbroken run and of the one that resumed it."""
    source, target = pair
    names = (source.removesuffix(ONE_FILE), f"{source}-to-{target}")
    unbroken, resumed = (json.loads((folder / f"{name}.json").read_text()) for name in names)
    return unbroken, resumed


def saved(folder: Path, source: str) -> Path:
    return folder / source / "checkpoints" / f"step-{FIRST_STEPS:08d}"


def reader(folder: Path) -> ParameterReader:
    return ParameterReader(folder, checkpoint.read_state(folder))


@pytest.mark.parametrize("pair", FP32_PAIRS, ids="-to-".join)
def test_losses_and_gradients_go_on_as_if_unbroken(folder: Path, pair: tuple[str, str]) -> None:
    unbroken, resumed = results(folder, pair)
    assert len(resumed["loss"]) == ALL_STEPS - FIRST_STEPS
    assert resumed["loss"] == pytest.approx(unbroken["loss"], rel=1e-5)
    # Muon makes the small singular values of a gradient large, and so their rounding errors.
    within = 1e-3 if has_muon(pair[0]) else 1e-4
    assert resumed["gradient_norm"] == pytest.approx(unbroken["gradient_norm"], rel=within)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair not in FP32_PAIRS], ids="-to-".join)
def test_in_16_bits_losses_stay_as_near_as_the_precision(folder: Path, pair: tuple[str, str]) -> None:
    unbroken, resumed = results(folder, pair)
    assert resumed["loss"] == pytest.approx(unbroken["loss"], rel=5e-3)
    # Later ones part by tens of percent for single steps: rounding alone does that (docs/reliability.md).
    assert resumed["gradient_norm"][0] == pytest.approx(unbroken["gradient_norm"][0], rel=2e-2)


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_the_same_samples_rates_and_decays_for_ten_steps(folder: Path, pair: tuple[str, str]) -> None:
    unbroken, resumed = results(folder, pair)
    assert resumed["batch"] == unbroken["batch"]
    assert len(set(resumed["batch"])) == len(resumed["batch"]) == 10
    assert resumed["groups"] == unbroken["groups"]
    part, decays = (1, [0.1, 0.1, 0.0]) if has_muon(pair[0]) else (0.5, [0.2, 0.1, 0.0])
    assert [decay for _, _, decay in resumed["groups"][0]] == decays
    whole = [rate for step in resumed["groups"] for _, rate, _ in step[-1:]]
    assert [[rate for _, rate, _ in step] for step in resumed["groups"]] == [
        [part * rate, rate, rate] for rate in whole
    ]
    assert len(set(whole)) == 10


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_weights_moments_steps_and_buffers_are_bitwise_those_saved(folder: Path, pair: tuple[str, str]) -> None:
    source, target = pair
    before, after = reader(saved(folder, source)), reader(folder / f"{source}-to-{target}" / "restored")
    assert before.optimizer_step == after.optimizer_step == FIRST_STEPS
    assert before.counters == after.counters
    assert before.elements == after.elements
    assert len(before.elements) > 20
    assert {len(before.moments(name)) for name in before.elements} == ({1, 2} if has_muon(source) else {2})
    for name, elements in before.elements.items():
        assert before.moments(name) == after.moments(name)
        for kind in ("fp32", *before.moments(name)):
            there, here = (item.read(name, 0, elements, kind) for item in (before, after))
            assert there.abs().sum() > 0 or name.endswith("bias")
            assert torch.equal(there, here), f"{kind} of {name}"
    assert before.buffers.keys() == after.buffers.keys()
    assert before.buffers
    for name, buffer in before.buffers.items():
        assert torch.equal(buffer.to(after.buffers[name].dtype), after.buffers[name]), name


@pytest.mark.parametrize("pair", FP32_PAIRS, ids="-to-".join)
def test_deepspeeds_own_reader_finds_the_same_weights(folder: Path, pair: tuple[str, str]) -> None:
    source, target = pair
    there, here = (
        deepspeeds_weights(item) for item in (saved(folder, source), folder / f"{source}-to-{target}" / "restored")
    )
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in there)


def deepspeeds_weights(folder: Path) -> dict[str, torch.Tensor]:
    with only_weights():
        if checkpoint.read_state(folder).zero_stage:
            return dict(get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name))
        weights: dict[str, torch.Tensor] = torch.load(folder / "mp_rank_00_model_states.pt")["module"]
        return weights


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_random_state_is_restored_or_a_function_of_seed_step_and_rank(folder: Path, pair: tuple[str, str]) -> None:
    source, target = pair
    _, resumed = results(folder, pair)
    ranks = parse(target)[1]
    assert len(set(resumed["random"])) == ranks  # no two ranks drop the same units
    if parse(source)[1] == ranks:
        states = [torch.load(saved(folder, source) / f"rng-rank-{rank:05d}.pt")["torch"] for rank in range(ranks)]
        assert resumed["random"] == [float(torch.rand(1, generator=torch.Generator().set_state(s))) for s in states]
        return
    again = [results(folder, other)[1] for other in PAIRS if parse(other[0])[1] != parse(other[1])[1]]
    for other in again:
        assert other["random"][0] == resumed["random"][0]


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_the_resume_says_what_it_did_and_proves_it(folder: Path, pair: tuple[str, str]) -> None:
    source, target = pair
    log = (folder / f"{source}-to-{target}" / "logs" / "rank-00000.log").read_text()
    (then, ranks_then, precision_then), (now, ranks_now, precision_now) = parse(source), parse(target)
    ranks = {1: "1 rank", 2: "2 ranks", 4: "4 ranks"}
    line = (
        f"resharded: {ranks[ranks_then]}, ZeRO stage {then}, {precision_then} → "
        f"{ranks[ranks_now]}, ZeRO stage {now}, {precision_now}"
    )
    assert line in log
    assert "resume verified: " in log.split(line)[1].split("saved")[0]


def test_resharding_leaves_the_checkpoint_as_it_was_and_writes_nothing(folder: Path) -> None:
    for source in {source for source, _ in PAIRS}:
        assert checkpoint.verify(saved(folder, source)) == []
    for source, target in PAIRS:
        names = {item.name for item in (folder / f"{source}-to-{target}" / "checkpoints").iterdir()}
        assert names == {f"step-{ALL_STEPS:08d}"}


def test_a_run_goes_on_from_one_file(folder: Path) -> None:
    unbroken, resumed = results(folder, FROM_ONE_FILE)
    assert resumed["loss"] == pytest.approx(unbroken["loss"], rel=1e-5)
    assert resumed["batch"] == unbroken["batch"]
    log = (folder / "-to-".join(FROM_ONE_FILE) / "logs" / "rank-00000.log").read_text()
    assert "resharded: one file → 1 rank, ZeRO stage 2, fp32" in log


@pytest.mark.parametrize("source", ["z0r1", "z1r4", "z2r2-bf16", "z3r2"])
def test_one_file_holds_all_that_the_ranks_held(folder: Path, source: str, tmp_path: Path) -> None:
    lines: list[str] = []
    made = consolidate(saved(folder, source), tmp_path, lines.append)
    assert checkpoint.verify(made) == []
    assert sorted(item.name for item in made.iterdir()) == [
        "integrity.json",
        "layout-rank-00000.pt",
        "mp_rank_00_model_states.pt",
        "state.json",
    ]
    there, here = reader(saved(folder, source)), reader(made)
    assert (there.elements, there.shapes, there.counters) == (here.elements, here.shapes, here.counters)
    assert there.optimizer_step == here.optimizer_step
    for name, elements in there.elements.items():
        for kind in ("fp32", *MOMENTS):
            assert torch.equal(there.read(name, 0, elements, kind), here.read(name, 0, elements, kind))
    assert lines == []


def test_one_file_is_made_once_and_anew_where_it_is_damaged_or_was_cut_off(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / f".resharding-step-{FIRST_STEPS:08d}" / "half.pt"
    cut.parent.mkdir()
    cut.write_bytes(b"half")  # what a SIGKILL leaves
    lines: list[str] = []
    with ThreadPoolExecutor(2) as jobs:
        made = list(jobs.map(lambda _: consolidate(saved(folder, "z3r2"), tmp_path, lines.append), range(2)))
    assert made[0] == made[1]
    assert checkpoint.verify(made[0]) == []
    assert sorted(item.name for item in tmp_path.iterdir()) == [".lock", made[0].name]
    assert f"{made[0]}: stands already, and verifies" in lines
    file = made[0] / "mp_rank_00_model_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    lines.clear()
    consolidate(saved(folder, "z3r2"), tmp_path, lines.append)
    (line,) = lines
    assert f"is damaged, and made anew: {file}: blake3" in line
    assert checkpoint.verify(made[0]) == []


def test_a_damaged_checkpoint_is_not_put_into_one_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(saved(folder, "z1r4"), tmp_path / "step-00000003")
    (tmp_path / "step-00000003" / layout.file_name(2)).write_bytes(b"")
    with pytest.raises(UserError, match=r"layout-rank-00002\.pt: 0 bytes, [\d,]+ were written"):
        consolidate(tmp_path / "step-00000003", tmp_path / "one", print)
    assert not (tmp_path / "one" / "step-00000003").exists()


@given(data=st.data())
def test_any_slice_of_any_parameter_is_that_of_the_whole(folder: Path, data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(["z0r1", "z1r4", "z2r2", "z3r2"]))
    checkpoint_reader = _readers.setdefault(source, reader(saved(folder, source)))
    name = data.draw(st.sampled_from(sorted(checkpoint_reader.elements)))
    elements = checkpoint_reader.elements[name]
    start = data.draw(st.integers(0, elements - 1))
    length = data.draw(st.integers(1, elements - start))
    kind = data.draw(st.sampled_from(["fp32", *MOMENTS]))
    whole = checkpoint_reader.read(name, 0, elements, kind)
    assert torch.equal(checkpoint_reader.read(name, start, length, kind), whole[start : start + length])


_readers: dict[str, ParameterReader] = {}


def test_a_checkpoint_without_layouts_is_refused_with_the_way_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(saved(folder, "z2r2"), tmp_path / "old")
    (tmp_path / "old" / layout.file_name(1)).unlink()
    with pytest.raises(UserError, match=r"has no layout-rank-00001\.pt, an earlier version wrote it: it can only be"):
        reader(tmp_path / "old")


def test_loss_scales_cross_between_the_forms_of_stage_0_and_the_others() -> None:
    arguments = {"init_scale": 2.0**16, "scale_window": 100, "min_scale": 1, "delayed_shift": 2}
    later = CreateLossScaler(torch.half, 1.0, True, {**arguments, "consecutive_hysteresis": False})
    later.cur_scale, later.cur_iter, later.last_overflow_iter = 2.0**15, 4, 1
    plain = LossScaleConfig(torch.half, True, 1.0, None)

    class Wrapper:
        def __init__(self, **held: Any) -> None:
            self.__dict__.update(held)

    set_loss_scale(Wrapper(loss_scale_config=plain), read_loss_scale({"loss_scaler": later}))
    assert (plain.cur_scale, plain.cur_iter, plain.last_overflow_iter) == (2.0**15, 4, 1)
    fresh = CreateLossScaler(torch.half, 1.0, True, {**arguments, "consecutive_hysteresis": False})
    held = {"cur_scale": 2.0**10, "cur_iter": 7, "last_overflow_iter": 3, "dynamic_loss_scale": True}
    set_loss_scale(Wrapper(loss_scaler=fresh), read_loss_scale(held))
    assert (fresh.cur_scale, fresh.cur_iter, fresh.last_overflow_iter) == (2.0**10, 7, 3)
    static = CreateLossScaler(torch.bfloat16, 1.0, False, None)
    set_loss_scale(Wrapper(loss_scaler=static), read_loss_scale({"loss_scaler": later}))
    assert static.loss_scale == 1.0
    assert read_loss_scale({"loss_scaler": static}) == {}
