"""Guarantees of a training run, on two real ranks."""

import math
import re
from pathlib import Path

import pytest

from launch.report.page import page
from launch.report.read import read_run
from model.configuration_globallocal import GlobalLocalConfig
from pipeline.checkpoints.folder import read_state
from pipeline.checkpoints.space import checkpoint_bytes, copy_bytes, size_bytes
from pipeline.metrics.losses import SUMMARY
from tests.pipeline.comparing import Runs, assert_resumed_is_unbroken, losses_of
from tests.pipeline.conftest import GROWING, POLICIES, STAGES


@pytest.mark.parametrize("kind", [*map(str, STAGES), "bf16", "muon", "growing"])
def test_a_resumed_run_is_bitwise_the_unbroken_one(runs: Runs, trained: Path, kind: str) -> None:
    assert_resumed_is_unbroken(runs, trained, f"resumed-{kind}", f"unbroken-{kind}")


@pytest.mark.parametrize("kind", [*map(str, STAGES), "bf16", "muon"])
def test_the_room_that_a_checkpoint_takes_is_known_before_the_first(runs: Runs, trained: Path, kind: str) -> None:
    folder = trained / f"unbroken-{kind}"
    saved = folder / "checkpoints" / "step-00000006"
    state = read_state(saved)
    model, optimizer = GlobalLocalConfig.from_pretrained(folder / "model"), state.config["optimizer"]["name"]
    known = (model, optimizer, state.zero_stage, state.precision, state.world_size)
    assert size_bytes(saved) == pytest.approx(checkpoint_bytes(*known), rel=0.08)
    rank_0 = sum(file.stat().st_size for file in saved.glob("*.pt") if re.search(r"pp_rank_0_|^mp_rank_00_", file.name))
    assert rank_0 == pytest.approx(copy_bytes(*known), rel=0.1)


@pytest.mark.parametrize("metric", ["loss/train", "gradient_norm"])
def test_stages_train_the_same_model(runs: Runs, trained: Path, metric: str) -> None:
    curves = [losses_of(trained, f"unbroken-{stage}", metric) for stage in STAGES]
    assert len(curves[0]) == 6
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-4)


@pytest.mark.parametrize("special", ["offload", "hpz"])
def test_offload_and_hierarchical_partitions_train_the_same_model(runs: Runs, trained: Path, special: str) -> None:
    assert runs[special]["code"] == 0, runs[special]
    plain = losses_of(trained, "unbroken-3")
    assert losses_of(trained, special) == pytest.approx({step: plain[step] for step in (1, 2, 3)}, rel=1e-4)


def test_a_batch_that_grows_is_the_same_at_every_stage_and_counts_its_tokens(runs: Runs, trained: Path) -> None:
    curve = losses_of(trained, "unbroken-growing")
    for stage in GROWING:
        assert losses_of(trained, f"growing-{stage}") == pytest.approx(curve, rel=1e-4)
        norms = losses_of(trained, f"growing-{stage}", "gradient_norm")
        assert norms == pytest.approx(losses_of(trained, "unbroken-growing", "gradient_norm"), rel=1e-4)
    tokens = losses_of(trained, "unbroken-growing", "progress/tokens")
    assert tokens == {step: 32 * samples for step, samples in zip(range(1, 7), (4, 12, 24, 36, 52, 68), strict=True)}
    state = read_state(trained / "unbroken-growing" / "checkpoints" / "step-00000006")
    assert (state.consumed_samples, state.consumed_tokens) == (68, 68 * 32)
    assert read_run(trained / "unbroken-growing").tokens == 68 * 32


def test_bf16_stays_near_fp32(runs: Runs, trained: Path) -> None:
    assert losses_of(trained, "unbroken-bf16") == pytest.approx(losses_of(trained, "unbroken-2"), rel=5e-3)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("metric", ["loss/train", "router/diversity_loss", "gradient_norm"])
def test_recomputing_activations_changes_no_bit_at_stage_3(runs: Runs, trained: Path, policy: str, metric: str) -> None:
    run = f"recomputed-{policy}"
    assert runs[run]["code"] == 0, runs[run]
    plain = losses_of(trained, "unbroken-3", metric)
    assert losses_of(trained, run, metric) == {step: plain[step] for step in (1, 2)}


def test_the_routers_health_is_summarised_over_the_layers(runs: Runs, trained: Path) -> None:
    for name, most in {"gate": 1.0, "hit_rate": 1.0, "entropy_nats": math.log(64), "dead_rows": 1.0}.items():
        least, mean, greatest = (losses_of(trained, "unbroken-3", f"router/{name}_{what}")[6] for what in SUMMARY)
        assert 0.0 <= least <= mean <= greatest <= most + 1e-6
    assert losses_of(trained, "unbroken-3", "router/layer_00/gate") == {}


def test_the_routers_health_is_logged_for_every_layer_on_wish(runs: Runs, trained: Path) -> None:
    for layer in ("layer_00", "layer_01"):
        gate = losses_of(trained, "tied", f"router/{layer}/gate")
        assert sorted(gate) == [1, 2, 3, 4, 5, 6]
        assert all(0.0 < value < 1.0 for value in gate.values())
        for router in ("attention", "block"):
            values = [
                losses_of(trained, "tied", f"router/{layer}/{router}_{name}")[6]
                for name in ("hit_rate", "entropy_nats", "dead_rows")
            ]
            hit_rate, entropy, dead = values
            assert 0.0 < hit_rate <= 1.0
            assert 0.0 < entropy <= math.log(64)
            assert 0.0 <= dead <= 1.0 - hit_rate + 1e-6  # both ranks and all micro-batches reach no fewer rows


def test_accumulation_does_not_change_the_loss(runs: Runs, trained: Path) -> None:
    assert losses_of(trained, "whole-batch") == pytest.approx(losses_of(trained, "accumulated"), rel=2e-5)


def test_loss_starts_at_the_uniform_guess_and_falls(runs: Runs, trained: Path) -> None:
    losses = losses_of(trained, "unbroken-2")
    assert losses[1] == pytest.approx(math.log(512), abs=0.1)
    assert losses[6] < losses[1]


def test_a_batch_that_does_not_divide_is_one_line_with_all_numbers(runs: Runs, trained: Path) -> None:
    result = runs["indivisible"]
    assert result["code"] == 2
    (line,) = result["problems"]
    assert "global_batch_size (8)" in line
    assert "micro_batch_size (3)" in line
    assert "world_size (2)" in line
    assert not (trained / "indivisible" / "config.yaml").exists()  # settings of no run


def test_one_flipped_bit_in_a_shard_is_one_line_before_step_0(runs: Runs, trained: Path) -> None:
    result = runs["damaged"]
    assert result["code"] == 2
    (line,) = result["problems"]
    assert "damaged-data/train-000000.tar: blake3" in line
    assert not list(trained.glob("damaged/checkpoints/step-*"))


def test_what_a_resume_may_not_change_is_refused_by_name(runs: Runs, trained: Path) -> None:
    (dataset,) = runs["wrong-dataset"]["problems"]
    assert "was written with dataset " in dataset
    assert "give data.dataset the same dataset, or mixture" in dataset
    (model,) = runs["wrong-model"]["problems"]
    assert "model.hidden_size 32 → 64: a resumed run may not change it" in model
    (optimizer,) = runs["wrong-optimizer"]["problems"]
    assert "optimizer.name adamw → muon: a resumed run may not change it" in optimizer
    (width,) = runs["wrong-width"]["problems"]
    assert "optimizer.base_hidden_size None → 16: a resumed run may not change it" in width
    assert {runs[f"wrong-{what}"]["code"] for what in ("dataset", "model", "optimizer", "width")} == {2}
    # What exports and evaluations of the run are built from is that of a start that was not refused.
    assert [(trained / name / "model").exists() for name in ("unbroken-2", "wrong-model")] == [True, False]


def test_a_new_learning_rate_is_said_and_used(runs: Runs, trained: Path) -> None:
    assert runs["new-rate"]["code"] == 0
    log = (trained / "new-rate" / "logs" / "rank-00000.log").read_text()
    assert "changed since the checkpoint: optimizer.learning_rate 0.003 → 0.0001" in log
    assert losses_of(trained, "new-rate")[4] == losses_of(trained, "unbroken-2")[4]  # the weights of step 3
    assert losses_of(trained, "new-rate")[6] != losses_of(trained, "unbroken-2")[6]


def test_decay_and_no_decay_are_printed(runs: Runs, trained: Path) -> None:
    log = (trained / "unbroken-2" / "logs" / "rank-00000.log").read_text()
    assert "decay: " in log
    assert "weight_decay 0.1" in log
    assert "no_decay: " in log
    assert "weight_decay 0\n" in log


def test_a_trained_runs_folder_makes_a_whole_report(runs: Runs, trained: Path) -> None:
    run = read_run(trained / "unbroken-2")
    assert (run.state, run.step, run.steps, run.missing) == ("done", 6, 6, [])
    assert [step for step, _ in run.curve("loss/train")] == [1, 2, 3, 4, 5, 6]
    assert dict(run.curve("loss/train")) == losses_of(trained, "unbroken-2")
    assert [step for step, _ in run.curve("loss/valid")] == [3, 6]
    assert [item.step for item in run.checkpoints] == [3, 6]
    text = page([run, read_run(trained / "resumed-2")])
    titles = re.findall(r"<figcaption>([^<]+)", text)
    drawn = {title.strip() for title in titles}
    assert {"Loss", "Perplexity", "Throughput", "Time per step, by phase", "Gate", "Dead rows"} <= drawn
    assert not {title for title in drawn if "/" in title}, "a metric that no chart names"


def test_the_run_folder_tells_the_resolved_configuration(runs: Runs, trained: Path) -> None:
    from pipeline.config import load_config

    config = load_config(trained / "unbroken-2" / "config.yaml")
    assert config.training.max_steps == 6
    assert config.data.sequence_length == 32
