"""What is decided about bad numbers: pure functions."""

import json
import math
import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.samples import SampleSource
from pipeline.health.state import (
    WINDOW_STEPS,
    HealthState,
    RollBack,
    decide_roll_back,
    find_spike,
    robust_z_score,
)

finite = st.floats(-1e6, 1e6)


@settings(max_examples=30)
@given(st.floats(-1e3, 1e3), st.floats(0.01, 1e3), st.integers(0, 2**32))
def test_a_normal_value_scores_as_many_deviations_as_it_lies_above(mean: float, deviation: float, seed: int) -> None:
    history = np.random.default_rng(seed).normal(mean, deviation + abs(mean), 10_000).tolist()
    score = robust_z_score(mean + 5 * (deviation + abs(mean)), history)
    assert score == pytest.approx(5, abs=0.3)


@given(st.lists(finite, min_size=9, max_size=60), finite)
def test_a_few_outliers_in_the_history_hide_nothing(history: list[float], value: float) -> None:
    with_outliers = [*history, *[1e30] * (len(history) // 4)]
    if robust_z_score(value, with_outliers) > 30:
        assert value > statistics.median(history)
    assert robust_z_score(1e30, with_outliers) > 30


def numbers(seed: int, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of a curve like those of a language model: falling, noisy, norms with a heavy tail."""
    draw = random.Random(seed)
    return [
        (
            2.5 + 5 * math.exp(-step / 60) + draw.gauss(0, 0.05),
            0.4 * draw.lognormvariate(0, 0.4) + 2 * math.exp(-step / 30),
        )
        for step in range(steps)
    ]


def fold(state: HealthState, curve: list[tuple[float, float]], z_score: float | None) -> tuple[HealthState, list[bool]]:
    found = []
    for loss, norm in curve:
        spike = find_spike(state, loss, norm, z_score) is not None
        state = state.remembering(loss, norm, spike)
        found.append(spike)
    return state, found


@pytest.mark.parametrize("seed", range(5, 11))
def test_the_default_never_fires_on_a_normal_curve_and_does_on_a_spike(seed: int) -> None:
    from pipeline.settings.sections import HealthSection

    z_score = HealthSection().spike_z_score
    curve = numbers(seed, 1500)
    assert not any(fold(HealthState(), curve, z_score)[1])
    curve[700] = (curve[700][0] + 3, curve[700][1])
    for step in (800, 900, 901):  # one odd batch, and gradients that stay large
        curve[step] = (curve[step][0], 20.0)
    assert [step for step, spike in enumerate(fold(HealthState(), curve, z_score)[1]) if spike] == [700, 901]


def test_nothing_is_a_spike_before_a_quarter_of_the_window_and_where_it_is_off() -> None:
    state, _ = fold(HealthState(), numbers(0, WINDOW_STEPS // 4 - 1), 10)
    assert find_spike(state, 1e9, 1e9, 10) is None
    state = state.remembering(3.0, 1.0, False)
    assert find_spike(state, 1e9, 1e9, None) is None
    reason = find_spike(state, 1e9, 1.0, 10)
    assert reason is not None
    assert reason.startswith("loss 1e+09 is ")
    assert "of the last 32 steps (health.spike_z_score 10)" in reason


@settings(max_examples=30)
@given(st.integers(0, 2**32), st.integers(0, 400))
def test_a_run_resumed_anywhere_decides_as_the_unbroken_one(seed: int, stop: int) -> None:
    curve = numbers(seed, 400)
    curve[random.Random(seed).randrange(400)] = (90.0, 0.1 + 0.2)
    unbroken, found = fold(HealthState(), curve, 12)
    saved, before = fold(HealthState(), curve[:stop], 12)
    loaded = HealthState.model_validate_json(saved.model_dump_json())
    assert loaded == saved
    resumed, after = fold(loaded, curve[stop:], 12)
    assert before + after == found
    assert resumed == unbroken
    assert len(unbroken.losses) <= WINDOW_STEPS


def test_a_bad_batch_is_left_out_and_counted_until_a_step_is_taken() -> None:
    state = HealthState().without_batch(7).without_batch(8).without_batch(12)
    assert state.skipped_batches == ((7, 9), (12, 13))
    assert (state.bad_batches, state.bad_in_a_row) == (3, 3)
    assert (state.applied().bad_batches, state.applied().bad_in_a_row) == (3, 0)
    overflowed = HealthState().overflowed().overflowed()
    assert (overflowed.overflows, overflowed.overflows_in_a_row, overflowed.bad_batches) == (2, 2, 0)
    assert (overflowed.applied().overflows, overflowed.applied().overflows_in_a_row) == (2, 0)


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(1, 6))
def test_roll_backs_leave_out_the_spike_and_twice_as_much_each_time_and_end(to: int, after: int, limit: int) -> None:
    state, widths = HealthState(), []
    batch = to + after
    while decision := decide_roll_back(state, batch + 1, batch, to, to, limit):
        assert to <= decision.first_batch <= batch < decision.last_batch
        widths.append(decision.last_batch - batch - 1)
        state = state.with_decisions([decision])
        assert state == state.with_decisions([decision])
        batch = state.skipped_batches[-1][1]  # the next one spikes too
    assert widths == [2**n for n in range(limit)]
    newer = decide_roll_back(state, batch + 9, batch + 9, batch + 5, batch + 5, limit)
    assert newer is not None
    assert newer.last_batch == batch + 9 + 2


def test_decisions_survive_as_they_are(tmp_path) -> None:
    from data_prep.errors import UserError
    from pipeline.health.decisions import decisions_path, read_decisions, write_decisions

    assert read_decisions(tmp_path) == ()
    decided = (RollBack(step=37, to_step=30, first_batch=35, last_batch=38),)
    write_decisions(tmp_path, decided)
    assert read_decisions(tmp_path) == decided
    path = decisions_path(tmp_path)
    path.write_text(json.dumps([{"step": 1}]))
    with pytest.raises(UserError, match=r"roll_backs\.json: .*it says which batches this run leaves out: restore it"):
        read_decisions(tmp_path)


def test_a_sample_is_found_in_its_document(small_dataset) -> None:
    from data_prep.manifest import open_dataset

    dataset = open_dataset(small_dataset)
    source = SampleSource(dataset, "train", 50, 0)
    tokens = source.stream.read(0, source.stream.tokens)
    ids = [json.loads(line) for line in (small_dataset / "train-000000.ids.jsonl").read_text().splitlines()]
    eos = dataset.manifest.tokenizer.eos_token_id
    for sample in [
        0,
        1,
        *np.random.default_rng(0).integers(0, source.num_samples, 200).tolist(),
        source.num_samples - 1,
    ]:
        document = int((tokens[: sample * 50] == eos).sum())
        assert source.locate(sample) == {
            "split": "train",
            "sample": sample,
            "token_offset": sample * 50,
            "document": document,
            "document_id": ids[document],
        }
