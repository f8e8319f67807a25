"""Batches: layout, exact positions for every world size, resume, the reading thread, evaluation."""

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.data import BatchLayout, BatchLoader, SampleSource, TokenStream, batch_hash, evaluation_batches
from tests.pipeline.dataset_fixture import write_stream


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """A stream 0, 1, 2, … of 1,001 tokens over several shards with chunk borders inside samples."""
    folder = tmp_path_factory.mktemp("counting")
    return write_stream(folder, np.arange(1001, dtype=np.uint16), chunk_tokens=64, chunks_per_shard=3)


def take(loader, count):
    with loader:
        return [next(loader) for _ in range(count)]


def test_layout_refuses_with_all_numbers_and_the_sizes_that_fit():
    with pytest.raises(UserError) as error:
        BatchLayout(global_batch_size=12, micro_batch_size=2, world_size=4)
    assert str(error.value) == (
        "global_batch_size (12) must be divisible by micro_batch_size (2) × world_size (4); "
        "valid world sizes for this micro-batch: 1, 2, 3, 6; valid micro-batches for this world size: 1, 3"
    )


def test_target_is_the_input_shifted_by_one(counting):
    source = SampleSource(counting, "train", sequence_length=10, seed=0)
    assert source.num_samples == 100
    samples = source.samples(np.arange(100))
    assert samples.dtype == np.int64
    assert samples.shape == (100, 11)
    assert (samples[:, 1:] == samples[:, :-1] + 1).all()
    assert sorted(samples[:, 0]) == list(range(0, 1000, 10))


def test_every_world_size_reads_the_same_global_batches(counting):
    source = SampleSource(counting, "train", sequence_length=10, seed=3)

    def global_batches(micro, world):
        layout = BatchLayout(12, micro, world)
        count = 20 * layout.gradient_accumulation_steps
        ranks = [take(BatchLoader(source, layout, rank, 0), count) for rank in range(world)]
        return np.concatenate([rank[i] for i in range(count) for rank in ranks])

    expected = source.samples(np.arange(240))  # more than two epochs
    for micro, world in [(12, 1), (1, 1), (1, 12), (2, 3), (3, 2), (6, 2)]:
        assert (global_batches(micro, world) == expected).all()


def test_batch_hash_names_the_next_global_batch_whatever_the_layout(counting):
    source = SampleSource(counting, "train", sequence_length=10, seed=3)
    hashes = {batch_hash(source, BatchLayout(12, m, w), 5) for m, w in [(12, 1), (2, 3), (1, 4)]}
    assert len(hashes) == 1
    assert batch_hash(source, BatchLayout(12, 12, 1), 6) not in hashes


def test_evaluation_counts_every_target_once_on_any_number_of_ranks(counting):
    stream = TokenStream(counting, "train")
    for length, batch, world in [(10, 4, 1), (16, 3, 4), (999, 2, 3), (5000, 2, 2)]:
        seen = []
        lengths = set()
        for rank in range(world):
            batches = list(evaluation_batches(stream, length, batch, rank, world))
            lengths.add(len(batches))
            for tokens, valid in batches:
                assert tokens.shape == (batch, length + 1)
                assert valid.shape == (batch, length)
                seen.extend(tokens[:, 1:][valid])
        assert len(lengths) == 1
        assert sorted(seen) == list(range(1, 1001))
