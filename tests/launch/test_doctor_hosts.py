"""What is concluded from the hosts' answers; asking real ones is tested in tests/cluster."""

from itertools import combinations, pairwise

import pytest

from launch.preflight.bandwidth import PARTNERS, rounds
from launch.preflight.hosts import skew, slow_hosts, spread


@pytest.mark.parametrize("size", range(2, 40))
def test_rounds_pair_hosts_without_asking_one_of_two_things_at_once(size: int) -> None:
    made = rounds(size)
    for pairs in made:
        ranks = [rank for pair in pairs for rank in pair]
        assert len(set(ranks)) == len(ranks)
        assert len(ranks) >= size - 1
    everyone = [pair for pairs in made for pair in pairs]
    assert len(set(everyone)) == len(everyone)
    assert set(everyone) <= set(combinations(range(size), 2))
    assert len(made) == min(PARTNERS, size - 1 + size % 2)


def test_a_host_that_is_slow_with_every_partner_is_named() -> None:
    hosts = ["a", "b", "c", "d"]
    pairs = [(one, other, 1.0 if "c" in (one, other) else 10.0) for one, other in combinations(hosts, 2)]
    assert slow_hosts(pairs) == {"c": 1.0}
    assert spread(pairs) == "1.00 (a, c) to 10.00 Gbit/s"


def test_one_slow_pair_blames_no_host() -> None:
    pairs = [(one, other, 10.0) for one, other in pairwise("abcd")] + [("a", "d", 1.0)]
    assert slow_hosts(pairs) == {}
    assert slow_hosts([("a", "b", 0.1)]) == {}


def test_a_clock_that_is_off_is_named() -> None:
    assert skew({"a": {"time": 100.0}, "b": {"time": 101.0}}).level == "ok"
    found = skew({"a": {"time": 100.0}, "b": {"time": 160.0}, "c": {"time": 100.5}})
    assert found.level == "warning"
    assert found.found == "clocks are within 60.0 s; b is farthest off"
    assert "NTP" in found.remedy
