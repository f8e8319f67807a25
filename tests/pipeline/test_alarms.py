"""Alarms of recorded healthy runs, and of the same runs with something planted in them."""

import csv
from pathlib import Path

import pytest

from pipeline.health.state import HealthState, find_spike
from pipeline.settings.sections import HealthSection
from tests.pipeline.record_curves import CURVES, settings

PLANTED_STEP = 200

Curve = list[tuple[float, float]]


def read_curve(path: Path) -> Curve:
    with path.open(newline="") as file:
        return [(float(row["loss"]), float(row["gradient_norm"])) for row in csv.DictReader(file)]


def alarms(curve: Curve) -> list[int]:
    """Steps at which a spike begins, under the default settings."""
    state, found = HealthState(), []
    for step, (loss, norm) in enumerate(curve):
        spike = find_spike(state, loss, norm, HealthSection().spike_z_score) is not None
        if spike and not state.spiking:
            found.append(step)
        state = state.remembering(loss, norm, spike)
    return found


@pytest.fixture(scope="module")
def curves() -> dict[str, Curve]:
    return {path.stem: read_curve(path) for path in sorted(CURVES.glob("*.csv"))}


def test_there_are_twenty_whole_curves(curves: dict[str, Curve]) -> None:
    assert set(curves) == {run.name for run in settings()}
    assert [len(curve) for curve in curves.values()] == [300] * 20


def test_a_healthy_run_raises_no_alarm(curves: dict[str, Curve]) -> None:
    found = {name: steps for name, curve in curves.items() if (steps := alarms(curve))}
    print(f"false alarms: {len(found)} of {len(curves)} healthy runs, {sum(map(len, curves.values())):,} steps")
    assert found == {}


@pytest.mark.parametrize(
    ("what", "nats", "factor", "delay"),
    [("both", 4.0, 60.0, 0), ("loss alone", 4.0, 1.0, 0), ("gradient norm alone", 0.0, 60.0, 1)],
)
def test_a_planted_spike_is_found_once(
    curves: dict[str, Curve], what: str, nats: float, factor: float, delay: int
) -> None:
    """For three steps the loss is four nats higher, or gradients are sixty times as large."""
    found = {}
    for name, curve in curves.items():
        planted = list(curve)
        for step in range(PLANTED_STEP, PLANTED_STEP + 3):
            planted[step] = (curve[step][0] + nats, curve[step][1] * factor)
        found[name] = alarms(planted)
    right = [name for name, steps in found.items() if steps == [PLANTED_STEP + delay]]
    print(f"planted spike in {what}: found in {len(right)} of {len(curves)} runs")
    assert len(right) == len(curves), found
