"""A dataset in a bucket of a real S3 server."""

import contextlib

import numpy as np
import pytest

from data_prep.errors import UserError
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.data.remote import open_location
from pipeline.data.samples import SampleSource
from tests.pipeline.remote_fixtures import EVERY_START, GIB, SHARDS, folder, read_all, short_delays
from tests.pipeline.servers_fixture import s3_dataset

__all__ = ["folder", "short_delays"]


@pytest.fixture(scope="module")
def s3(folder, tmp_path_factory):
    """The dataset in a bucket of a real S3 server."""
    with s3_dataset(tmp_path_factory.mktemp("s3"), folder, "corpus/wiki") as system:
        yield system


def test_a_dataset_in_s3_reads_as_the_local_one(tmp_path, folder, s3):
    dataset = open_location("s3://corpus/wiki", tmp_path, GIB)
    expected = SampleSource(open_location(folder), "train", 10, 0).samples(np.arange(600))
    source = SampleSource(dataset, "train", 10, 0)
    with contextlib.closing(source), BatchLoader(source, BatchLayout(8, 4, 2), 1, 8 * 20) as loader:
        assert (next(loader) == expected[164:168]).all()
    assert read_all(SampleSource(dataset, "train", 10, 0, window_tokens=800)) == EVERY_START
    assert len([path for path in tmp_path.iterdir() if len(path.name) == 64]) == SHARDS + 1


def test_a_shard_that_is_gone_or_changed_in_s3_is_named(tmp_path, s3):
    s3.copy("corpus/wiki", "corpus/broken", recursive=True)
    s3.rm("corpus/broken/train-000002.tar")
    content = bytearray(s3.cat_file("corpus/broken/train-000004.tar"))
    content[2000] ^= 1
    s3.pipe_file("corpus/broken/train-000004.tar", bytes(content))
    s3.pipe_file("corpus/broken/train-000005.tar", bytes(content[:2000]))
    stream = SampleSource(open_location("s3://corpus/broken", tmp_path, GIB), "train", 10, 0).stream
    with pytest.raises(UserError, match=r"s3://corpus/broken/train-000002.tar: missing"):
        stream.read(800, 10)
    with pytest.raises(UserError, match=r"s3://corpus/broken/train-000004.tar: sha256 .* damaged"):
        stream.read(1600, 10)
    with pytest.raises(UserError, match=r"s3://corpus/broken/train-000005.tar: 2,000 bytes, expected [\d,]+ \(trunc"):
        stream.read(2000, 10)


def test_a_bucket_that_is_not_there_is_named(tmp_path, s3):
    with pytest.raises(UserError, match=r"s3://nowhere/d/manifest.json: missing"):
        open_location("s3://nowhere/d", tmp_path, GIB)
