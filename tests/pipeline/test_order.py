"""The order of samples: a permutation, the same everywhere and for ever, without a trace of the old order."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import MAX_SAMPLES, SampleOrder, WindowedOrder, order_key, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_sends_a_range_onto_itself(size, key):
    assert sorted(permute(np.arange(size), size, key)) == list(range(size))


@given(size=st.integers(1, MAX_SAMPLES), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permute_of_trillions_takes_no_memory_and_keeps_indices_apart(size, key, data):
    start = data.draw(st.integers(0, size - 1))
    indices = np.arange(start, min(start + 1000, size))
    sent = permute(indices, size, key)
    assert len(set(sent.tolist())) == len(indices)
    assert ((sent >= 0) & (sent < size)).all()


def test_permute_of_an_array_is_that_of_each_index():
    sizes = np.array([1, 7, 7, 1000, 1 << 40])
    keys = np.array([5, 6, 7, 8, 9], dtype=np.uint64)
    indices = np.array([0, 3, 3, 999, 123_456_789_012])
    together = permute(indices, sizes, keys)
    assert [int(permute(i, s, k)[0]) for i, s, k in zip(indices, sizes, keys, strict=True)] == together.tolist()


def test_the_order_never_changes_between_releases():
    """A run that is resumed with a newer release must read on in the same order."""
    two_epochs = [2, 7, 9, 8, 5, 1, 0, 3, 6, 4, 6, 8, 5, 4, 7, 9, 2, 0, 3, 1]
    assert SampleOrder(10, seed=0).sample_index(np.arange(20)).tolist() == two_epochs
    large = SampleOrder(MAX_SAMPLES - 1, seed=42).sample_index(np.array([0, 1, 10**13, 10**14]))
    assert large.tolist() == [13519856812501, 11765658701351, 18465403958314, 16965731742699]
    windows = WindowedOrder(20, seed=7, block_samples=3, blocks_per_window=2)
    expected = [3, 8, 5, 4, 7, 6, 11, 1, 10, 9, 0, 2, 16, 18, 14, 19, 13, 17, 15, 12]
    assert windows.sample_index(np.arange(20)).tolist() == expected


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13, 100])
def test_every_sample_is_as_likely_at_every_place(size):
    """Chi-square of (place, sample) over many keys, against its mean plus five standard deviations."""
    epochs, place = np.divmod(np.arange(200 * size * size), size)
    sent = permute(place, size, order_key(0, epochs))
    counts = np.bincount(place * size + sent, minlength=size * size)
    expected = 200
    degrees = (size - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees)


def test_neighbours_do_not_stay_neighbours():
    order = permute(np.arange(100_000), 100_000, order_key(1, 0))
    steps = np.abs(np.diff(order))
    assert abs(steps.mean() / (100_000 / 3) - 1) < 0.02  # mean distance of two random samples
    assert (steps == 1).sum() < 20  # 2 are expected
    assert abs(np.corrcoef(np.arange(100_000), order)[0, 1]) < 0.02


@given(num_samples=st.integers(1, 400), seed=st.integers(), epochs=st.integers(1, 3))
def test_each_epoch_reads_every_sample_once(num_samples, seed, epochs):
    order = SampleOrder(num_samples, seed)
    read = order.sample_index(np.arange(epochs * num_samples)).reshape(epochs, num_samples)
    assert (np.sort(read, axis=1) == np.arange(num_samples)).all()


def test_epochs_and_seeds_differ():
    first, second = SampleOrder(1000, 0).sample_index(np.arange(2000)).reshape(2, 1000)
    other = SampleOrder(1000, 1).sample_index(np.arange(1000))
    for a, b in [(first, second), (first, other), (second, other)]:
        assert (a == b).sum() < 12  # 1 is expected


def windowed(most_samples: int) -> st.SearchStrategy[WindowedOrder]:
    return st.builds(
        WindowedOrder,
        num_samples=st.integers(1, most_samples),
        seed=st.integers(),
        block_samples=st.integers(1, most_samples // 5),
        blocks_per_window=st.integers(1, 8),
    )


@given(order=windowed(400), epochs=st.integers(1, 3))
def test_each_epoch_reads_every_sample_once_in_windows_too(order, epochs):
    read = order.sample_index(np.arange(epochs * order.num_samples)).reshape(epochs, order.num_samples)
    assert (np.sort(read, axis=1) == np.arange(order.num_samples)).all()


@settings(max_examples=30)
@given(order=windowed(60))
def test_a_window_reads_exactly_the_ranges_it_names(order):
    """Also at the borders: what a window reads is known before, whole, and read in no other window."""
    positions = np.arange(2 * order.num_samples)
    windows = np.array([order.window(p) for p in positions.tolist()])
    assert (np.diff(windows) >= 0).all()
    for window in np.unique(windows):
        read = np.sort(order.sample_index(positions[windows == window]))
        named = np.concatenate([np.arange(first, last) for first, last in order.window_ranges(int(window))])
        assert read.tolist() == sorted(named.tolist())


def test_windows_mix_blocks_from_all_over_and_samples_inside():
    order = WindowedOrder(100_000, seed=3, block_samples=100, blocks_per_window=50)
    first = order.sample_index(np.arange(5000))
    blocks = np.unique(first // 100)
    assert len(blocks) == 50
    assert blocks.max() - blocks.min() > 800
    assert len(np.unique(first[:200] // 100)) > 40
