"""Batches: layout, exact positions for every world size, resume, the reading thread, evaluation."""

import gc
import threading
import weakref
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from pipeline.data.loader import BatchLayout, BatchLoader, batch_hash, evaluation_batches
from pipeline.data.samples import SampleSource
from pipeline.data.token_stream import TokenStream
from pipeline.settings.batches import data_step, merge_ranges
from tests.pipeline.dataset_fixture import write_dataset, write_stream


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A stream 0, 1, 2, … of 1,001 tokens over several shards with chunk borders inside samples."""
    folder = tmp_path_factory.mktemp("counting")
    return write_stream(folder, np.arange(1001, dtype=np.uint16), chunk_tokens=64, chunks_per_shard=3)


def take(source, layout, rank, consumed, steps, skipped=()):
    """The rank's micro-batches of so many steps, [steps * accumulation, M, S + 1]."""
    with BatchLoader(source, layout, rank, consumed, skipped) as loader:
        return np.stack([next(loader) for _ in range(steps * layout.gradient_accumulation_steps)])


def global_batches(source, layout, consumed, steps, skipped=()):
    """What all ranks read, in order of position: [steps, G, S + 1]."""
    ranks = [take(source, layout, rank, consumed, steps, skipped) for rank in range(layout.world_size)]
    by_position = np.stack(ranks, axis=1)  # [micro-steps, W, M, S + 1]
    return by_position.reshape(steps, layout.global_batch_size, -1)


# ---- layout


def test_layout_refuses_with_all_numbers_and_the_sizes_that_fit():
    with pytest.raises(UserError) as error:
        BatchLayout(global_batch_size=12, micro_batch_size=2, world_size=4)
    assert str(error.value) == (
        "global_batch_size (12) must be divisible by micro_batch_size (2) × world_size (4); "
        "valid world sizes for this micro-batch: 1, 2, 3, 6; valid micro-batches for this world size: 1, 3; "
        "nearest global batches: 8, 16"
    )
    with pytest.raises(UserError, match=r"valid world sizes for this micro-batch: none;.*world size: 1, 2, 4"):
        BatchLayout(global_batch_size=8, micro_batch_size=3, world_size=2)
    with pytest.raises(UserError) as error:
        BatchLayout(global_batch_size=0, micro_batch_size=2, world_size=-1)
    assert error.value.problems == ["global_batch_size (0) must be at least 1", "world_size (-1) must be at least 1"]


@given(total=st.integers(1, 500), micro=st.integers(1, 30), world=st.integers(1, 30))
def test_layout_accepts_what_it_lists_and_nothing_else(total, micro, world):
    if total % (micro * world) == 0:
        layout = BatchLayout(total, micro, world)
        assert layout.gradient_accumulation_steps * micro * world == total
        return
    with pytest.raises(UserError) as error:
        BatchLayout(total, micro, world)
    worlds = str(error.value).split("micro-batch: ")[1].split(";")[0]
    listed = [] if worlds == "none" else [int(w) for w in worlds.split(", ")]
    assert listed == [w for w in range(1, total + 1) if total % (micro * w) == 0]


def test_positions_count_every_sample_once():
    layout = BatchLayout(12, 2, 3)
    positions = [
        layout.position(step, micro_step, rank, sample)
        for step in range(3)
        for micro_step in range(layout.gradient_accumulation_steps)
        for rank in range(3)
        for sample in range(2)
    ]
    assert positions == list(range(36))


def test_a_count_between_two_steps_is_refused_and_says_what_would_do(counting):
    """80 samples at a batch of 8: a batch of 16 goes on at 80, one of 12 would skip or repeat."""
    source = SampleSource(counting, "train", 10, 0)
    assert (global_batches(source, BatchLayout(16, 4, 2), 80, 1)[0] == source.samples(np.arange(80, 96))).all()
    with pytest.raises(UserError) as error:
        BatchLoader(source, BatchLayout(12, 4, 1), 0, 80)
    assert str(error.value) == (
        "consumed_samples (80) must be a multiple of global_batch_size (12): samples would be skipped or "
        "repeated; go on with a global_batch_size that divides it: 1, 2, 4, 5, 8, 10, 16, 20, 40, 80"
    )


# ---- samples


def test_target_is_the_input_shifted_by_one(counting):
    source = SampleSource(counting, "train", sequence_length=10, seed=0)
    assert source.num_samples == 100
    samples = source.samples(np.arange(100))
    assert samples.dtype == np.int64
    assert samples.shape == (100, 11)
    assert (samples[:, 1:] == samples[:, :-1] + 1).all()
    assert sorted(samples[:, 0]) == list(range(0, 1000, 10))


@pytest.mark.parametrize("length", [1, 7, 16, 127, 128, 129, 500])
def test_fewer_than_a_sequence_of_targets_is_left_over(counting, length):
    source = SampleSource(counting, "train", length, 0)
    used = source.num_samples * length
    assert 0 <= 1000 - used < length
    starts = sorted(source.samples(np.arange(source.num_samples))[:, 0])
    assert starts == list(range(0, used, length))


layouts = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4)).map(
    lambda sizes: BatchLayout(sizes[0] * sizes[1] * sizes[2], sizes[0], sizes[1])
)


@settings(max_examples=40)
@given(
    layout=layouts,
    length=st.integers(1, 60),
    chunk_tokens=st.integers(1, 80),
    tokens=st.integers(61, 700),
    seed=st.integers(0, 2**63),
    window_tokens=st.none() | st.integers(60, 800),
    data=st.data(),
)
def test_each_epoch_once_for_every_world_size_through_three_resumes(
    tmp_path_factory, layout, length, chunk_tokens, tokens, seed, window_tokens, data
):
    """The whole of the order's contract, over (N, S, G, M, W, seed, stops, epochs)."""
    dataset = write_stream(tmp_path_factory.mktemp("d"), np.arange(tokens, dtype=np.uint16), chunk_tokens, 2)
    source = SampleSource(dataset, "train", length, seed, window_tokens)
    total = layout.global_batch_size
    steps = min(150, -(-3 * source.num_samples // total) + 1)  # into the fourth epoch
    expected = source.samples(np.arange(steps * total)).reshape(steps, total, -1)

    unbroken = global_batches(source, layout, 0, steps)
    assert (unbroken == expected).all()

    epochs = unbroken.reshape(-1, length + 1)[:, 0]
    for epoch in range(len(epochs) // source.num_samples):
        starts = epochs[epoch * source.num_samples : (epoch + 1) * source.num_samples]
        assert sorted(starts) == [i * length for i in range(source.num_samples)]

    stops = sorted(data.draw(st.lists(st.integers(0, steps), min_size=3, max_size=3)))
    pieces = []
    for first, last in zip([0, *stops], [*stops, steps], strict=True):
        worlds = [w for w in range(1, total + 1) if total % (layout.micro_batch_size * w) == 0 and w <= 6]
        resumed = BatchLayout(total, layout.micro_batch_size, data.draw(st.sampled_from(worlds)))
        if last > first:
            pieces.append(
                global_batches(
                    SampleSource(dataset, "train", length, seed, window_tokens), resumed, first * total, last - first
                )
            )
    assert (np.concatenate(pieces) == expected).all()


ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 6)).map(lambda pair: (pair[0], sum(pair))), max_size=6)


@given(ranges)
def test_merged_ranges_cover_the_same_batches_and_stand_apart(pieces):
    merged = merge_ranges(pieces)
    assert {n for a, b in merged for n in range(a, b)} == {n for a, b in pieces for n in range(a, b)}
    assert all(last < first for (_, last), (first, _) in pairwise(merged))
    assert merge_ranges(merged) == merged


@given(ranges, st.integers(0, 60))
def test_a_step_reads_the_global_batch_that_is_its_turn(pieces, step):
    left_out = {n for a, b in pieces for n in range(a, b)}
    read = [n for n in range(200) if n not in left_out]
    assert data_step(step, merge_ranges(pieces)) == read[step]


@settings(max_examples=40)
@given(layout=layouts, pieces=ranges, stop=st.integers(0, 30), data=st.data())
def test_an_epoch_without_its_skipped_batches_is_read_once_by_every_world_size_through_a_resume(
    counting, layout, pieces, stop, data
):
    source, skipped, total = SampleSource(counting, "train", 10, 3), merge_ranges(pieces), layout.global_batch_size
    steps = 30
    numbers = [n for n in range(200) if not any(a <= n < b for a, b in skipped)][:steps]
    expected = np.stack([source.samples(np.arange(n * total, (n + 1) * total)) for n in numbers])
    assert (global_batches(source, layout, 0, steps, skipped) == expected).all()

    worlds = [w for w in range(1, 7) if total % (layout.micro_batch_size * w) == 0]
    resumed = BatchLayout(total, layout.micro_batch_size, data.draw(st.sampled_from(worlds)))
    position = data_step(stop, skipped)
    if stop < steps:
        rest = global_batches(source, resumed, position * total, steps - stop, skipped)
        assert (rest == expected[stop:]).all()
        assert batch_hash(source, resumed, position) == batch_hash(source, layout, numbers[stop])
    epoch_batches = source.num_samples // total  # whole ones in the first epoch
    first_epoch = expected[np.array(numbers) < epoch_batches][:, :, 0].ravel()
    assert len(np.unique(first_epoch)) == len(first_epoch)


def test_a_batch_skipped_while_it_is_the_newest_needs_no_new_loader(counting):
    """A bad batch is left out after it was read: what the loader gives next is what a new one would give."""
    source, layout = SampleSource(counting, "train", 10, 3), BatchLayout(4, 2, 1)
    running = take(source, layout, 0, 0, 8)[2 * 6 :]  # batches 6 and 7, after batch 5 was found bad
    skipped = ((5, 6),)
    assert (running == take(source, layout, 0, data_step(5, skipped) * 4, 2, skipped)).all()


def test_300_sequences_in_3_shards_stopped_at_137_go_on_at_138(tmp_path, monkeypatch):
    """And read nothing of what came before: each sample is one read, from where it lies."""
    dataset = write_stream(tmp_path, np.arange(3001, dtype=np.uint16), chunk_tokens=1000, chunks_per_shard=1)
    source = SampleSource(dataset, "train", 10, 0)
    reads = []
    real_read = source.read
    monkeypatch.setattr(source, "read", lambda indices: reads.append(len(indices)) or real_read(indices))
    rest = take(source, BatchLayout(1, 1, 1), 0, 137, 163)[:, 0, 0]
    assert reads[0] == 1
    assert sum(reads) <= 163 + 8  # a few batches are read ahead
    assert rest[0] == source.samples(np.array([137]))[0, 0]
    before = source.samples(np.arange(137))[:, 0]
    assert sorted([*before, *rest]) == list(range(0, 3000, 10))


def test_30_and_10_and_5_steps_in_three_runs_leave_the_third_at_40(counting):
    source = SampleSource(counting, "train", 10, 5)
    layout = BatchLayout(2, 1, 2)
    whole = global_batches(source, layout, 0, 45)
    runs = [global_batches(source, layout, first * 2, steps) for first, steps in [(0, 30), (30, 10), (40, 5)]]
    assert (np.concatenate(runs) == whole).all()
    assert (runs[2][0] == source.samples(np.array([80, 81]))).all()


def test_10_batches_an_epoch_resumed_at_7_leave_the_later_epochs_whole(counting):
    source = SampleSource(counting, "train", 10, 1)  # 100 samples
    batches = global_batches(source, BatchLayout(10, 5, 2), 70, 23)[:, :, 0]
    assert len(np.unique(batches[:3])) == 30
    for epoch in (batches[3:13], batches[13:23]):
        assert sorted(epoch.ravel()) == list(range(0, 1000, 10))


def test_a_kill_in_the_middle_of_an_accumulation_repeats_whole_steps(counting):
    """Two ranks stop at different micro-steps; the count that is saved is of whole steps, the same for both."""
    source = SampleSource(counting, "train", 10, 2)
    layout = BatchLayout(12, 2, 2)  # three micro-steps
    for rank, micro_steps in [(0, 8), (1, 7)]:
        with BatchLoader(source, layout, rank, 0) as loader:
            for _ in range(micro_steps):
                next(loader)
    assert (global_batches(source, layout, 2 * 12, 4) == source.samples(np.arange(24, 72)).reshape(4, 12, 11)).all()


def test_uneven_shards_on_four_ranks_give_equal_steps_and_each_sequence_once(tmp_path):
    """Shards of 4, 4, 8 and 4 sequences."""
    flat = np.arange(201, dtype=np.uint16)
    shards = [[flat[0:40]], [flat[40:80]], [flat[80:160]], [flat[160:201]]]
    source = SampleSource(write_dataset(tmp_path, {"train": shards}), "train", 10, 0)
    assert source.num_samples == 20
    ranks = [take(source, BatchLayout(4, 1, 4), rank, 0, 5) for rank in range(4)]
    assert sorted(np.stack(ranks)[..., 0].ravel()) == list(range(0, 200, 10))


@pytest.mark.parametrize("world", [2, 5])
def test_one_shard_feeds_any_number_of_ranks(tmp_path, world):
    dataset = write_stream(tmp_path, np.arange(101, dtype=np.uint16), 200, 1)
    source = SampleSource(dataset, "train", 10, 0)
    batches = global_batches(source, BatchLayout(10, 1, world), 0, 2)
    assert sorted(batches[0, :, 0]) == list(range(0, 100, 10))
    assert not (batches[0] == batches[1]).all()


def test_a_budget_of_all_tokens_on_three_ranks_fits(counting):
    """No rank runs dry: positions run on into the next epoch, so the last step is whole."""
    source = SampleSource(counting, "train", 10, 0)
    layout = BatchLayout(9, 3, 3)
    steps = -(-source.num_samples // 9)
    batches = global_batches(source, layout, 0, steps)
    assert batches.shape == (12, 9, 11)
    assert sorted(batches.reshape(108, 11)[:100, 0]) == list(range(0, 1000, 10))


def test_ranks_with_folders_of_their_own_read_the_same(tmp_path):
    flat = np.arange(401, dtype=np.uint16)
    sources = [SampleSource(write_stream(tmp_path / str(r), flat, 64, 2), "train", 10, 9) for r in range(2)]
    layout = BatchLayout(4, 2, 2)
    shared = global_batches(sources[0], layout, 0, 10)
    apart = np.stack([take(sources[rank], layout, rank, 0, 10) for rank in range(2)], axis=1)
    assert (apart.reshape(shared.shape) == shared).all()


def test_batch_hash_names_the_next_global_batch_whatever_the_layout(counting):
    source = SampleSource(counting, "train", sequence_length=10, seed=3)
    hashes = {batch_hash(source, BatchLayout(12, m, w), 5) for m, w in [(12, 1), (2, 3), (1, 4)]}
    assert len(hashes) == 1
    assert batch_hash(source, BatchLayout(12, 12, 1), 6) not in hashes
    assert batch_hash(SampleSource(counting, "train", 10, 4), BatchLayout(12, 12, 1), 5) not in hashes


# ---- the reading thread


class Failing(SampleSource):
    """Raises at its fifth read."""

    reads = 0

    def read(self, indices):
        self.reads += 1
        if self.reads == 5:
            raise OSError("the disk is gone")
        return super().read(indices)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "batch-loader"]


def test_what_the_thread_raises_reaches_the_consumer_after_the_good_batches(counting):
    loader = BatchLoader(Failing(counting, "train", 10, 0), BatchLayout(1, 1, 1), 0, 0)
    for _ in range(4):
        next(loader)
    with pytest.raises(OSError, match="the disk is gone"):
        next(loader)
    assert not threads()
    with pytest.raises(RuntimeError, match="the batch loader is closed"):
        next(loader)


def test_close_ends_the_thread_and_may_be_repeated(counting):
    source = SampleSource(counting, "train", 10, 0)
    loader = BatchLoader(source, BatchLayout(1, 1, 1), 0, 0)
    next(loader)
    assert threads()
    loader.close()
    loader.close()
    assert not threads()


def test_a_loader_that_is_let_go_of_leaves_no_thread(counting):
    loader = BatchLoader(SampleSource(counting, "train", 10, 0), BatchLayout(1, 1, 1), 0, 0)
    next(loader)
    (thread,) = threads()
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_only_a_few_batches_are_read_ahead(counting):
    source = Failing(counting, "train", 10, 0)
    source.reads = -1000
    with BatchLoader(source, BatchLayout(1, 1, 1), 0, 0) as loader:
        for _ in range(50):
            next(loader)
    assert source.reads + 1000 <= 50 + 8


# ---- evaluation


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("length", "batch"), [(10, 4), (16, 3), (999, 2), (1000, 1), (5000, 2)])
def test_evaluation_counts_every_target_once_on_any_number_of_ranks(counting, length, batch, world):
    stream = TokenStream(counting, "train")
    seen, lengths = [], set()
    for rank in range(world):
        batches = list(evaluation_batches(stream, length, batch, rank, world))
        lengths.add(len(batches))
        for tokens, valid in batches:
            assert tokens.shape == (batch, length + 1)
            assert valid.shape == (batch, length)
            assert (tokens[:, 1:][valid] == tokens[:, :-1][valid] + 1).all()
            seen.extend(tokens[:, 1:][valid])
    assert len(lengths) == 1
    assert sorted(seen) == list(range(1, 1001))


def test_evaluation_of_a_split_smaller_than_one_batch_gives_every_rank_one_batch(tmp_path):
    stream = TokenStream(write_stream(tmp_path, np.arange(21, dtype=np.uint16), 50, 1), "train")
    counts = [[valid.sum() for _, valid in evaluation_batches(stream, 10, 8, rank, 4)] for rank in range(4)]
    assert counts == [[20], [0], [0], [0]]


def test_evaluation_of_the_first_samples_only(counting):
    stream = TokenStream(counting, "train")
    valid = [valid.sum() for rank in range(2) for _, valid in evaluation_batches(stream, 10, 4, rank, 2, 9)]
    assert sum(valid) == 90
