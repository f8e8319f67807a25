"""Resources that drop out are said once: planted in the speeds of healthy runs, and not in the runs themselves."""

import random
from collections.abc import Callable

import pytest

from pipeline.health.resources import Alarm, ResourceWatch
from pipeline.metrics.step_times import StepSeconds

INTERVAL_SECONDS = 20.0
HEALTHY = 100
PLANTED = 60
"""Intervals: 33 minutes as always, then 20 with a fault."""

Reading = tuple[float, list[list[float]]]


def healthy(draw: random.Random, ranks: int = 4) -> Reading:
    """Tokens per second and [data, forward, backward, step, whole step] by rank, with a tenth of noise."""
    rows = [[0.01, 0.3, 0.6, 0.08, 1.0] for _ in range(ranks)]
    return 1000.0 * draw.uniform(0.9, 1.1), [[second * draw.uniform(0.9, 1.1) for second in row] for row in rows]


def slow(reading: Reading) -> Reading:
    rate, rows = reading
    return 0.45 * rate, [[second / 0.45 for second in row] for row in rows]


def starved(reading: Reading) -> Reading:
    """Every rank waits for data, for a quarter of the step."""
    return reading[0] * 0.8, [[0.3, *row[1:4], 1.25] for row in reading[1]]


def one_late(reading: Reading) -> Reading:
    """Rank 2 computes forward twice as slowly; the others wait for it in backward."""
    rate, rows = reading
    late = [[0.01, 0.9 if rank == 2 else 0.3, 0.6 if rank == 2 else 1.2, 0.08, 1.6] for rank in range(len(rows))]
    return rate * 0.62, late


def alarms(watch: ResourceWatch, draw: random.Random, count: int, change: Callable[[Reading], Reading]) -> list[Alarm]:
    found = []
    for _ in range(count):
        rate, rows = change(healthy(draw))
        found += watch.look(
            watch.seconds + INTERVAL_SECONDS, rate, [StepSeconds(tuple(row[:4]), row[4]) for row in rows]
        )
    return found


def as_it_is(reading: Reading) -> Reading:
    return reading


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (slow, "throughput", ["% of the usual ", "for 10 min"]),
        (starved, "data", ["data is waited for: 0.30 s of the 1.25 s", "24%"]),
        (one_late, "rank", ["rank 2 is slow in forward: 0.90 s per step, others 0.30 s"]),
    ],
)
def test_a_resource_that_drops_out_is_said_once(
    fault: Callable[[Reading], Reading], kind: str, words: list[str]
) -> None:
    for seed in range(20):
        draw, watch = random.Random(seed), ResourceWatch()
        assert alarms(watch, draw, HEALTHY, as_it_is) == []
        (alarm,) = alarms(watch, draw, PLANTED, fault)
        assert alarm.kind == kind
        assert not [word for word in words if word not in alarm.text], alarm.text
        assert alarms(watch, draw, HEALTHY, as_it_is) == []
        assert [again.kind for again in alarms(watch, draw, PLANTED, fault)] == [kind], "a second time is another alarm"


def test_what_passes_soon_is_not_said() -> None:
    draw, watch = random.Random(0), ResourceWatch()
    alarms(watch, draw, HEALTHY, as_it_is)
    for _ in range(3):
        assert alarms(watch, draw, 25, slow) == []  # 8 minutes
        assert alarms(watch, draw, 2, starved) == []  # 40 seconds
        assert alarms(watch, draw, 2, one_late) == []
        assert alarms(watch, draw, 2, as_it_is) == []


def test_two_ranks_in_turn_are_two_episodes() -> None:
    draw, watch = random.Random(0), ResourceWatch()

    def late(rank: int) -> Callable[[Reading], Reading]:
        def change(reading: Reading) -> Reading:
            rate, rows = one_late(reading)
            rows[2], rows[rank] = rows[rank], rows[2]
            return rate, rows

        return change

    said = [alarm.text.split(" is ")[0] for rank in (1, 3) for alarm in alarms(watch, draw, PLANTED, late(rank))]
    assert said == ["rank 1", "rank 3"]
