"""A global batch that grows: which samples a step reads is a function of the step, whatever ranks read them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from launch.preflight.rehearse import _Positions, check_positions
from pipeline.config import load_config
from pipeline.data.loader import BatchLayout, micro_batches
from pipeline.settings.batches import data_step, merge_ranges, trained
from pipeline.settings.sections import TrainingSection

STEPS = 24


@st.composite
def growing(draw: st.DrawFn) -> tuple[int, list[int], int, tuple[tuple[int, int], ...]]:
    """Samples of a micro-batch, numbers of ranks that fit, global batch size, warm-up."""
    micro = draw(st.integers(1, 3))
    sizes = sorted(draw(st.sets(st.integers(1, 5), min_size=1, max_size=4)))
    lengths = draw(st.lists(st.integers(1, 6), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    *small, last = (12 * micro * size for size in sizes)
    return micro, [1, 2, 3, 4, 6], last, tuple(zip(lengths, small, strict=True))


def samples_of(layout: BatchLayout, first: int, steps: int, skipped: tuple[tuple[int, int], ...]) -> list[list[int]]:
    """What each step reads, in order of position, by the loaders of all ranks."""
    loaders = [micro_batches(_Positions(), layout, rank, first, skipped) for rank in range(layout.world_size)]
    read = []
    for step in range(steps):
        size = layout.size(_batch(first, step, skipped))
        count = size // (layout.micro_batch_size * layout.world_size)
        read.append([int(p) for _ in range(count) for loader in loaders for p in next(loader).ravel()])
    return read


def _batch(first: int, step: int, skipped: tuple[tuple[int, int], ...]) -> int:
    """The `step`-th global batch from batch `first` on that is not left out."""
    kept = (n for n in range(first, 10_000) if not any(a <= n < b for a, b in skipped))
    return next(n for place, n in enumerate(kept) if place == step)


@settings(max_examples=40)
@given(batches=growing(), stop=st.integers(0, STEPS), data=st.data())
def test_every_sample_once_for_all_ranks_through_a_resume_without_what_is_left_out(batches, stop, data) -> None:
    micro, ranks, size, warmup = batches
    skipped = merge_ranges(
        data.draw(
            st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=3).map(
                lambda pairs: [(first, first + count) for first, count in pairs]
            )
        )
    )
    layout = BatchLayout(size, micro, data.draw(st.sampled_from(ranks)), warmup)
    numbers = [data_step(step, skipped) for step in range(STEPS)]
    wanted = [list(range(layout.first_sample(n), layout.first_sample(n + 1))) for n in numbers]
    assert samples_of(layout, 0, STEPS, skipped) == wanted
    sizes = [count for steps, count in warmup for _ in range(steps)]
    assert [layout.size(n) for n in range(len(sizes) + 2)] == [*sizes, size, size]
    assert trained(STEPS, size, warmup, skipped) == sum(map(len, wanted))

    other = BatchLayout(size, micro, data.draw(st.sampled_from(ranks)), warmup)
    begin = data_step(stop, skipped)
    assert other.first_step(layout.first_sample(begin)) == begin
    assert samples_of(other, begin, STEPS - stop, skipped) == wanted[stop:]


@given(batches=growing(), epochs=st.floats(0.1, 5), samples=st.integers(1, 500))
def test_steps_of_epochs_are_the_fewest_that_read_them(batches, epochs: float, samples: int) -> None:
    _, _, size, warmup = batches
    stages = [{"steps": steps, "global_batch_size": count} for steps, count in warmup]
    training = TrainingSection(max_epochs=epochs, global_batch_size=size, batch_size_warmup=stages)
    steps = training.steps(samples)
    assert training.samples(steps - 1) < epochs * samples <= training.samples(steps)


def test_the_rehearsal_reads_every_position_once() -> None:
    check_positions(BatchLayout(24, 2, 3, ((3, 6), (2, 12))), 12)


def test_the_position_inside_a_step_is_refused_with_the_size_of_that_step() -> None:
    with pytest.raises(UserError, match=r"consumed_samples \(14\) must be a multiple of global_batch_size \(8\)"):
        BatchLayout(16, 2, 2, ((2, 4), (3, 8))).first_step(14)


@pytest.mark.parametrize(
    ("warmup", "problem"),
    [
        ("[{steps: 2, global_batch_size: 8}, {steps: 2, global_batch_size: 4}]", "of 8, 4 samples, and then training."),
        (
            "[{steps: 2, global_batch_size: 16}]",
            "global batches of 16 samples, and then training.global_batch_size (16)",
        ),
        ("[{steps: 0, global_batch_size: 4}]", "training.batch_size_warmup.0.steps = 0: "),
    ],
)
def test_a_warm_up_that_does_not_grow_is_one_line(warmup: str, problem: str) -> None:
    overrides = ["training.global_batch_size=16", f"training.batch_size_warmup={warmup}"]
    with pytest.raises(UserError) as caught:
        load_config(Path("launch/runs/quickstart.yaml"), overrides)
    (line,) = caught.value.problems
    assert problem in line


def test_each_size_must_be_shared_out_evenly_and_the_nearest_are_named() -> None:
    with pytest.raises(UserError) as caught:
        BatchLayout(16, 2, 2, ((2, 6), (3, 10)))
    assert [line.split("; ")[-1] for line in caught.value.problems] == [
        "nearest global batches: 4, 8",
        "nearest global batches: 8, 12",
    ]
    assert caught.value.problems[0].startswith("global_batch_size (6) must be divisible by micro_batch_size (2) × ")


def test_positions_of_numbers_and_of_arrays_are_the_same() -> None:
    layout = BatchLayout(16, 2, 2, ((2, 4), (3, 8)))
    batches = np.arange(9)
    assert layout.first_sample(batches).tolist() == [layout.first_sample(n) for n in range(9)]
    assert layout.first_sample(batches).tolist() == [0, 4, 8, 16, 24, 32, 48, 64, 80]
