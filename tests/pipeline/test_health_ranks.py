"""Bad numbers on two real ranks: seen by all before the optimizer moves, left out or ended with, gone back from."""

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from deepspeed.accelerator import get_accelerator

from launch.report.read import read_run
from pipeline.checkpoints.folder import list_checkpoints, read_state
from pipeline.files import step_name
from tests.pipeline.comparing import assert_same_state, losses_of
from tests.pipeline.moments import Moment
from tests.pipeline.poison import Poison
from tests.pipeline.ranks import Run, run_ranks, start_plan
from tests.variants import some_of

Runs = dict[str, dict[str, Any]]

FP16 = get_accelerator().is_fp16_supported()
KINDS = some_of(["0-bf16", "2", "3"], ["0", "1", "2-bf16", "1-fp32-muon"])
ROLLED = some_of(["2", "3"], ["0", "2-fp32-muon"])
PLAIN = ["tracking.enabled=false", "evaluation.split=null"]
SHORT = [*PLAIN, "checkpoint.interval_steps=6"]
GROWING = ["training.global_batch_size=16", "training.batch_size_warmup=[{steps: 3, global_batch_size: 8}]"]
BAD = Poison({"2": "nan loss", "3": "inf loss", "5": "inf gradient"})
COUNTERS = frozenset(("global_steps", "global_samples", "skipped_steps"))

STEPS = 42
LONG = [
    *(f"training.max_steps={STEPS}", "checkpoint.interval_steps=30", "health.spike_action=roll_back"),
    *("training.micro_batch_size=4", "model.num_hidden_layers=1"),  # the median wants 32 steps: let them be short
]
SPIKES = Poison({"36": "spike", "37": "spike"})
AROUND = ((35, 38),)
SAVED = dict.fromkeys(ROLLED, 30) | {"3": 34}
"""Stage → the step that is gone back to. Stage 3 has the 30 steps before from stage 2, where they take less time."""
LAST = f"checkpoints/step-{STEPS:08d}"


def engine(kind: str) -> list[str]:
    stage, precision, optimizer = kind.split("-") + ["fp32", "adamw"][kind.count("-") :]
    return [
        f"deepspeed.config=ds_configs/zero{stage}.json",
        f"training.precision={precision}",
        f"optimizer.name={optimizer}",
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("numbers")


@pytest.fixture(scope="module")
def runs(folder: Path, small_dataset: Path) -> Runs:
    plan = []
    for kind in KINDS:
        short = [*SHORT, *GROWING, "model.dropout=0", *engine(kind)]
        plan += [
            Run(f"skip-{kind}", [*short, "health.non_finite=skip"], poison=BAD),
            Run(f"without-{kind}", short, left_out=((2, 4), (5, 6))),
        ]
    for stage in ROLLED:
        tracked = [] if stage == "2" else ["tracking.enabled=false"]
        long = ["evaluation.split=null", *LONG, *engine(stage), f"checkpoint.interval_steps={SAVED[stage]}"]
        begin = f"rolled-2/{step_name(30)}" if stage == "3" else None
        plan += [
            Run(f"rolled-{stage}", [*long, *tracked], begin, poison=SPIKES),
            Run(
                f"around-{stage}",
                [*long, *PLAIN],
                copy_checkpoint=f"rolled-{stage}/{step_name(SAVED[stage])}",  # up to there it is the same run
                poison=SPIKES,
                left_out=AROUND,
            ),
        ]
    always = Poison({str(batch): "nan loss" for batch in range(2, 20)})
    hopeless = Poison({str(batch): "spike" for batch in range(33, 60)})
    plan += [
        Run("stop", [*SHORT, "checkpoint.interval_steps=2"], poison=BAD),
        Run("transient", SHORT, poison=Poison({"2": "nan loss"}, times=1)),
        Run("bound", [*SHORT, "health.non_finite=skip", "health.max_skipped_steps=2"], poison=always),
        Run("hopeless", [*PLAIN, *LONG, "health.max_roll_backs=1"], f"rolled-2/{step_name(30)}", poison=hopeless),
    ]
    if FP16:
        scale = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 24}}
        (folder / "fp16.json").write_text(json.dumps(scale))
        plan.append(Run("fp16", [*SHORT, f"deepspeed.config={folder}/fp16.json", "training.precision=fp16"]))
    return {result["name"]: result for result in run_ranks(plan, folder, small_dataset)}


def assert_same_run(one: Path, other: Path, kind: str) -> None:
    """Bitwise the same logits, losses and gradient norms of every step; and every tensor and number, but where
    DeepSpeed's files hold more: padding that is never written (stage 3), a count of tries (stage 0 in bf16)."""
    left, right = read_state(one), read_state(other)
    assert left.logit_fingerprint == right.logit_fingerprint
    assert left.health.losses == right.health.losses
    assert left.health.gradient_norms == right.health.gradient_norms
    if kind not in ("3", "0-bf16"):
        assert_same_state(one, other, COUNTERS)


def log_of(folder: Path, run: str) -> str:
    return (folder / run / "logs" / "rank-00000.log").read_text()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_batches_leave_no_trace_in_weights_moments_or_random_state(runs: Runs, folder: Path, kind: str) -> None:
    """One rank's NaN loss, one with finite gradients, one gradient: as if the three batches were not in the data."""
    assert runs[f"skip-{kind}"]["code"] == runs[f"without-{kind}"]["code"] == 0, runs
    step = Path("checkpoints/step-00000006")
    skipped, without = folder / f"skip-{kind}" / step, folder / f"without-{kind}" / step
    assert_same_run(skipped, without, kind)
    state = read_state(skipped)
    assert state.health.skipped_batches == ((2, 4), (5, 6))
    assert (state.health.bad_batches, state.consumed_samples, state.step) == (3, 3 * 8 + 6 * 16, 6)
    assert state.consumed_tokens == (2 * 8 + 4 * 16) * 32
    assert [state.consumed_tokens] * 2 == [read_run(folder / f"{run}-{kind}").tokens for run in ("skip", "without")]
    assert state.health.losses == read_state(without).health.losses
    assert state.next_batch_hash == read_state(without).next_batch_hash
    log = log_of(folder, f"skip-{kind}")
    assert re.search(
        r"step 3: the loss is nan on rank 1, micro-batch 1 of global batch 2 \(sample [\d,]+ of split", log
    )
    assert "step 3: the loss is inf on rank 1, micro-batch 1 of global batch 3 " in log
    assert "step 4: the gradient is not finite, every loss is, on rank 1, micro-batch 1 of global batch 5 " in log
    assert "global batch 5 is left out (1 of 5 in a row)" in log


def test_a_report_holds_samples_norms_and_router_statistics(runs: Runs, folder: Path) -> None:
    health = folder / "skip-3" / "health" / "step-00000003"
    report = json.loads((health / "batch-00000002.json").read_text())
    places = [(item["rank"], item["micro_batch"]) for item in report["micro_batches"]]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1)]
    bad, good = report["micro_batches"][3], report["micro_batches"][2]
    assert bad["language_loss_then"] == bad["language_loss"] == "nan"
    layers = {"embed_tokens", "layers.0", "layers.1", "norm", "lm_head"}
    assert report["weight_norms"].keys() == good["gradient_norms"].keys() == bad["gradient_norms"].keys() == layers
    assert all(norm > 0 for norm in [*report["weight_norms"].values(), *good["gradient_norms"].values()])
    assert set(bad["gradient_norms"].values()) == {"nan"}
    assert len(good["router_statistics"]["pool_hit_rate"]) == 4
    sample = bad["samples"][0]
    assert sample.keys() == {"split", "sample", "token_offset", "document", "document_id"}
    first, *texts = (health / "batch-00000002.txt").read_text().split("\n\n=== ")
    assert first.startswith(f"=== rank 1, micro-batch 1, sample {sample['sample']:,} of split train, from token ")
    assert len(texts) == 7


def test_a_report_is_the_same_at_every_stage(runs: Runs, folder: Path) -> None:
    name = "health/step-00000003/batch-00000002.json"
    zero, *others = [json.loads((folder / f"skip-{kind}" / name).read_text()) for kind in KINDS if "bf16" not in kind]
    for other in others:
        assert other["weight_norms"] == pytest.approx(zero["weight_norms"], rel=1e-4)
        for left, right in zip(other["micro_batches"][:3], zero["micro_batches"][:3], strict=True):
            assert left["gradient_norms"] == pytest.approx(right["gradient_norms"], rel=1e-3)


def test_stop_ends_before_anything_moves_and_says_what_to_do(runs: Runs, folder: Path) -> None:
    assert runs["stop"]["code"] == 2
    (line,) = runs["stop"]["problems"]
    assert line.startswith("step 3: the loss is nan on rank 1, micro-batch 1 of global batch 2 (sample ")
    assert "; no weight has moved, and nothing new is saved; what the batch was: " in line
    assert line.endswith("set health.non_finite=skip to leave such batches out, or lower optimizer.learning_rate")
    assert [item.name for item in list_checkpoints(folder / "stop" / "checkpoints")] == ["step-00000002"]


def test_a_fault_that_does_not_come_again_is_not_blamed_on_the_data(runs: Runs) -> None:
    (line,) = runs["transient"]["problems"]
    assert "; computed once more it is finite: not the data, but a fault of that device; no weight has moved" in line


def test_bad_batches_in_a_row_are_bounded(runs: Runs) -> None:
    assert runs["bound"]["code"] == 2
    (line,) = runs["bound"]["problems"]
    assert "that is 3 global batches in a row (health.max_skipped_steps 2): it is not the data" in line


@pytest.mark.parametrize("stage", ROLLED)
def test_a_spike_is_rolled_back_and_its_batches_left_out(runs: Runs, folder: Path, stage: str) -> None:
    """Bitwise the run that never read those batches, the random state and the history of losses included."""
    assert runs[f"rolled-{stage}"]["code"] == runs[f"around-{stage}"]["code"] == 0, runs
    rolled, around = folder / f"rolled-{stage}", folder / f"around-{stage}"
    assert_same_run(rolled / LAST, around / LAST, stage)
    one, other = read_state(rolled / LAST), read_state(around / LAST)
    assert one.health.skipped_batches == other.health.skipped_batches == AROUND
    assert one.health.losses == other.health.losses
    assert one.consumed_samples == (STEPS + 3) * 8
    (decision,) = one.health.roll_backs
    assert (decision.step, decision.to_step) == (37, SAVED[stage])
    log = log_of(folder, f"rolled-{stage}")
    assert re.search(r"step 37: spike: loss [\d.]+ is \d+ robust deviations above the median", log)
    assert f"step 37: going back to step {SAVED[stage]}, leaving out global batches 35 to 37" in log
    assert (rolled / "health" / "step-00000037" / "batch-00000036.txt").is_file()


def test_a_roll_back_doubles_no_step_in_mlflow(runs: Runs, folder: Path) -> None:
    losses = losses_of(folder, "rolled-2")
    assert sorted(losses) == list(range(1, STEPS + 1))
    spool = (folder / "rolled-2" / "tracking" / "spool.jsonl").read_text()
    assert "step 37 \\u2192 30, without [35, 38)" in spool
    assert '"health/step-00000037/batch-00000036.json"' in spool


def test_roll_backs_to_one_checkpoint_are_bounded(runs: Runs) -> None:
    assert runs["hopeless"]["code"] == 2
    (line,) = runs["hopeless"]["problems"]
    assert "a spike again, after 1 roll back to step 30 (health.max_roll_backs): it is not the data" in line


@pytest.mark.skipif(not FP16, reason="DeepSpeed trains in fp16 on no CPU without AVX512-FP16 or AMX-FP16")
def test_fp16_overflows_are_counted_apart(runs: Runs, folder: Path) -> None:
    assert runs["fp16"]["code"] == 0, runs["fp16"]
    health = read_state(folder / "fp16" / "checkpoints/step-00000006").health
    assert health.overflows >= 1
    assert (health.bad_batches, health.skipped_batches) == (0, ())
    assert "the scaled gradient overflowed fp16, no update; the loss scale is now " in log_of(folder, "fp16")


def test_killed_between_the_decision_and_the_roll_back_the_next_start_carries_it_out(
    runs: Runs, folder: Path, tmp_path: Path, small_dataset: Path
) -> None:
    settings = [*PLAIN, *LONG, *engine("2")]
    root = tmp_path / "rolled" / "checkpoints"
    saved = step_name(SAVED["2"])
    shutil.copytree(folder / "rolled-2" / "checkpoints" / saved, root / saved)
    killed = Run("rolled", settings, poison=SPIKES, moment=Moment("loading", do=("SIGKILL",)))
    codes = [process.wait(600) for process in start_plan([killed], tmp_path, small_dataset)]
    assert -signal.SIGKILL in codes
    assert [item.name for item in list_checkpoints(root)] == [saved]
    (result,) = run_ranks([Run("rolled", settings, poison=SPIKES)], tmp_path, small_dataset)
    assert result["code"] == 0, result
    assert_same_state(tmp_path / "rolled" / LAST, folder / "around-2" / LAST)
    assert "leaving out global batches 35 to 37, as decided at step 37" in log_of(tmp_path, "rolled")
