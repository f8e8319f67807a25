"""The generators are pure, ask what can be known, and cannot be answered by a shortcut."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.benchmarks.recall.tasks import ASK, BLANK, KEYS, TASKS, UNASKED, VALUES, VOCAB_SIZE

NAMES = sorted(TASKS)
SIZES = {name: sorted({*TASKS[name].trained, *TASKS[name].asked}) for name in NAMES}


def behind_its_first(read: Sequence[int]) -> int:
    """What followed the last token of a prefix where it first stood."""
    return read[read.index(read[-1]) + 1]


def next_value(read: Sequence[int]) -> int:
    """Selective copying: the n-th value at the n-th question."""
    return [token for token in read if token not in (BLANK, ASK)][read.count(ASK) - 1]


SOLVERS = {
    "recall": behind_its_first,
    "induction": behind_its_first,
    "copying": next_value,
    "needle": behind_its_first,
}
"""Each answers from a prefix alone."""


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25)
@given(data=st.data())
def test_every_answer_follows_from_what_was_read(name: str, data: st.DataObject) -> None:
    size, seed = data.draw(st.sampled_from(SIZES[name])), data.draw(st.integers(0, 2**32 - 1))
    ids, targets = TASKS[name].generate(np.random.default_rng(seed), 2, size)
    assert ids.shape == targets.shape
    assert ids.dtype == targets.dtype == np.int64
    assert 0 <= ids.min() <= ids.max() < VOCAB_SIZE
    for row, asked in zip(ids.tolist(), targets.tolist(), strict=True):
        places = [t for t, target in enumerate(asked) if target != UNASKED]
        assert places
        assert [SOLVERS[name](row[: t + 1]) for t in places] == [asked[t] for t in places]


@pytest.mark.parametrize("name", NAMES)
def test_one_seed_gives_one_batch_and_another_seed_another(name: str) -> None:
    task = TASKS[name]
    first, again, other = (task.generate(np.random.default_rng(s), 4, task.trained[-1]) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize("name", ["recall", "copying", "needle"])
def test_what_is_asked_is_not_read_behind_the_first_question(name: str) -> None:
    ids, targets = TASKS[name].generate(np.random.default_rng(0), 8, TASKS[name].trained[-1])
    for row, asked in zip(ids, targets, strict=True):
        assert not np.isin(row[(asked != UNASKED).argmax() :], VALUES).any()


@pytest.mark.parametrize("name", NAMES)
def test_no_fixed_distance_tells_the_answers(name: str) -> None:
    ids, targets = TASKS[name].generate(np.random.default_rng(0), 256, TASKS[name].trained[-1])
    asked = targets != UNASKED
    length = ids.shape[1]
    for distance in range(length):
        right = ids[:, : length - distance] == targets[:, distance:]
        assert right.sum() < 0.2 * asked.sum(), distance
    counts = np.bincount(targets[asked], minlength=VOCAB_SIZE)
    assert counts.max() < 0.06 * asked.sum()  # nor does a favourite answer


def test_keys_values_and_signs_are_apart() -> None:
    assert len({BLANK, ASK, *KEYS, *VALUES}) == VOCAB_SIZE == 2 + len(KEYS) + len(VALUES)
    assert max(TASKS["recall"].asked) <= len(KEYS)
    assert max(TASKS["induction"].asked) <= len(KEYS)
