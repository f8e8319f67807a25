"""Mixtures: exact shares at every moment, each dataset's epochs whole, one count as the only state."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.data.mixture import MixtureSource, mixture_order
from pipeline.data.samples import SampleSource
from tests.pipeline.dataset_fixture import write_stream


@given(counts=st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_the_share_of_each_dataset_is_within_one_sample_at_every_moment(counts):
    order = mixture_order(counts)
    period = len(order.dataset)
    positions = np.arange(2 * period + 7)
    dataset, own_position = order.locate(positions)
    for number, count in enumerate(counts):
        read = np.cumsum(dataset == number)
        share = Fraction(count, sum(counts))
        # |read - p·share| < 1, in whole numbers
        assert (np.abs(read * share.denominator - (positions + 1) * share.numerator) < share.denominator).all()
        assert own_position[dataset == number].tolist() == list(range(int(read[-1])))
    for position in (0, 1, period - 1, period, 2 * period + 3):
        assert order.consumed(position).tolist() == np.bincount(dataset[:position], minlength=len(counts)).tolist()


def test_weights_mean_what_is_written():
    for weights in ([3, 1], ["0.75", "0.25"], [0.75, 0.25], [Fraction(3, 7), Fraction(1, 7)], [0.3, 0.1]):
        assert mixture_order(weights).counts.tolist() == [3, 1]


def test_wrong_weights_are_all_named():
    with pytest.raises(UserError) as error:
        mixture_order([0, "half", 1, -2.5, float("nan")])
    assert error.value.problems == [
        "mixture weight 0 (number 1) must be a finite number above 0",
        "mixture weight 'half' (number 2) must be a finite number above 0",
        "mixture weight -2.5 (number 4) must be a finite number above 0",
        "mixture weight nan (number 5) must be a finite number above 0",
    ]


def test_weights_without_a_short_period_are_refused_with_rounded_ones_that_are_accepted():
    with pytest.raises(UserError) as error:
        mixture_order(["0.123456789", "0.876543211"])
    assert str(error.value) == (
        "mixture weights 0.123456789, 0.876543211 repeat only after 1,000,000,000 samples, at most 100,000 are "
        "allowed; round them, for example to 0.1235, 0.8765"
    )
    assert len(mixture_order(["0.1235", "0.8765"]).dataset) == 2000


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """100 samples of 0, 1, … and 30 of 40,000, 40,001, …, at sequence length 10."""
    first = write_stream(tmp_path_factory.mktemp("a"), np.arange(1001, dtype=np.uint16), 64, 3)
    second = write_stream(tmp_path_factory.mktemp("b"), np.arange(40_000, 40_301, dtype=np.uint16), 50, 2)
    return [SampleSource(first, "train", 10, 1), SampleSource(second, "train", 10, 2)]


def test_each_dataset_goes_through_its_own_epochs(two):
    mixture = MixtureSource(two, ["0.7", "0.3"])
    assert mixture.num_samples == 130
    starts = mixture.samples(np.arange(400))[:, 0]
    first, second = starts[starts < 40_000], starts[starts >= 40_000]
    assert (len(first), len(second)) == (280, 120)
    for epoch in range(2):
        assert sorted(first[epoch * 100 : (epoch + 1) * 100]) == list(range(0, 1000, 10))
    for epoch in range(4):
        assert sorted(second[epoch * 30 : (epoch + 1) * 30]) == list(range(40_000, 40_300, 10))
    assert first.tolist() == two[0].samples(np.arange(280))[:, 0].tolist()


def test_a_mixture_is_read_and_resumed_like_one_dataset(two):
    mixture = MixtureSource(two, [2, 1])
    expected = mixture.samples(np.arange(240)).reshape(20, 12, 11)
    for micro, world in [(12, 1), (2, 3), (1, 4)]:
        layout = BatchLayout(12, micro, world)
        for consumed in (0, 12 * 7):
            steps = 20 - consumed // 12
            ranks = []
            for rank in range(world):
                with BatchLoader(mixture, layout, rank, consumed) as loader:
                    count = steps * layout.gradient_accumulation_steps
                    ranks.append(np.stack([next(loader) for _ in range(count)]))
            read = np.stack(ranks, axis=1).reshape(steps, 12, 11)
            assert (read == expected[consumed // 12 :]).all()


def test_a_weight_for_every_dataset(two):
    with pytest.raises(UserError, match="a mixture needs one weight per dataset: 2 and 1 given"):
        MixtureSource(two, [1])
