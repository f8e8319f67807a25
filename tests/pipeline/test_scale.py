"""Nothing grows with the number of samples; the benchmark measures the same on a million shards."""

import tracemalloc

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.manifest import open_dataset
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.data.samples import SampleSource
from tests.pipeline.dataset_fixture import fill_shards, write_hollow_dataset


def peak_bytes(dataset, sequence_length: int) -> int:
    """Python's and numpy's memory while a source is made and 4,096 samples at 90 % of the epoch are found."""
    tracemalloc.start()
    source = SampleSource(dataset, "train", sequence_length, 0)
    start = source.num_samples * 9 // 10
    indices = source.sample_indices(np.arange(start, start + 4096))
    for index in indices[:100].tolist():
        source.stream.shards_of(index * sequence_length, (index + 1) * sequence_length)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_is_that_of_one_plan_for_a_thousand_or_a_billion_samples(tmp_path):
    few = write_hollow_dataset(tmp_path / "few", num_shards=10, chunks_per_shard=1, chunk_tokens=1000)
    many = write_hollow_dataset(tmp_path / "many", num_shards=20_000, chunks_per_shard=10, chunk_tokens=10_000)
    assert many.split("train").tokens == 2_000_000_000
    peak_bytes(few, 10)  # what is imported or cached at the first use
    small = peak_bytes(few, 10)
    assert peak_bytes(many, 2) < small + (64 << 10)  # the index of the larger one alone has 6.4 MB


@pytest.mark.parametrize("share", [0.0, 0.9])
def test_the_first_batch_touches_no_shard_but_its_own(tmp_path, share):
    """Every other shard is missing, so a read of anything else would be an error."""
    dataset = write_hollow_dataset(tmp_path, num_shards=5000, chunks_per_shard=4, chunk_tokens=500)
    source = SampleSource(dataset, "train", 100, 0)
    layout = BatchLayout(8, 8, 1)
    consumed = int(source.num_samples * share) // 8 * 8
    first = source.sample_indices(np.arange(consumed, consumed + 8)) * 100
    own = {shard for start in first.tolist() for shard in source.stream.shards_of(start, start + 101)}
    fill_shards(dataset, own)
    with BatchLoader(SampleSource(open_dataset(tmp_path), "train", 100, 0), layout, 0, consumed) as loader:
        assert next(loader).shape == (8, 101)
        with pytest.raises(UserError, match="missing"):
            next(loader)
