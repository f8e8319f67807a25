"""The token stream: every slice right whatever the chunks, and damage named, never fatal or silent."""

import os
import resource
import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.manifest import check_shards, open_dataset
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.tokenizers.tokenizer import TokenizerSettings, train_tokenizer
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.data.samples import SampleSource
from pipeline.data.token_stream import TokenStream
from tests.pipeline.dataset_fixture import write_dataset, write_stream


@settings(max_examples=40)
@given(data=st.data(), dtype=st.sampled_from([np.uint16, np.uint32]))
def test_any_slice_equals_that_of_the_flat_array(tmp_path_factory, data, dtype):
    shards = data.draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=4))
    flat = np.arange(sum(map(sum, shards)), dtype=dtype) + dtype(60_000)
    borders = iter(np.split(flat, np.cumsum([length for shard in shards for length in shard])))
    dataset = write_dataset(tmp_path_factory.mktemp("d"), {"train": [[next(borders) for _ in s] for s in shards]})
    stream = TokenStream(dataset, "train")
    start = data.draw(st.integers(0, len(flat) - 1))
    count = data.draw(st.integers(1, len(flat) - start))
    read = stream.read(start, count)
    assert read.dtype == dtype
    assert (read == flat[start : start + count]).all()
    starts = np.array([start, 0, len(flat) - count])
    assert (stream.read_rows(starts, count) == [flat[s : s + count] for s in starts]).all()


def test_a_plain_webdataset_client_sees_the_same_stream(tmp_path):
    flat = np.random.default_rng(0).integers(0, 50_000, 10_000).astype(np.uint16)
    dataset = write_stream(tmp_path, flat, chunk_tokens=700, chunks_per_shard=4)
    urls = [str(tmp_path / dataset.split("train").shard_name(i)) for i in range(dataset.split("train").num_shards)]
    client = wds.WebDataset(urls, shardshuffle=False).decode()
    assert (np.concatenate([sample["tokens.npy"] for sample in client]) == flat).all()
    assert (TokenStream(dataset, "train").read(0, len(flat)) == flat).all()


def test_an_unknown_split_lists_the_known_ones(tmp_path):
    dataset = write_stream(tmp_path, np.arange(100, dtype=np.uint16), 50, 1)
    with pytest.raises(UserError, match="no split 'test'; it has train"):
        TokenStream(dataset, "test")


@pytest.mark.parametrize(("start", "count"), [(-1, 5), (100, 1), (96, 5), (10**12, 1)])
def test_tokens_outside_the_stream_are_an_error(tmp_path, start, count):
    stream = TokenStream(write_stream(tmp_path, np.arange(100, dtype=np.uint16), 50, 1), "train")
    with pytest.raises(IndexError):
        stream.read(start, count)


def test_too_few_tokens_for_one_sample_are_refused_with_both_numbers(tmp_path):
    dataset = write_stream(tmp_path, np.arange(100, dtype=np.uint16), 50, 1)
    assert SampleSource(dataset, "train", 99, 0).num_samples == 1
    with pytest.raises(UserError, match=r"has 100 tokens, one sample needs sequence_length \+ 1 = 101; lower"):
        SampleSource(dataset, "train", 100, 0)


def test_open_files_are_bounded_however_many_shards_are_read(tmp_path):
    dataset = write_stream(tmp_path, np.arange(2000, dtype=np.uint16), 2, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + 100, hard))
    try:
        stream = TokenStream(dataset, "train")
        assert (stream.read(0, 2000) == np.arange(2000)).all()
        assert len(os.listdir("/proc/self/fd")) <= before + 64
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    stream.close()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- damage


@pytest.fixture
def three_shards(tmp_path):
    return write_stream(tmp_path, np.arange(1200, dtype=np.uint16), chunk_tokens=100, chunks_per_shard=4)


@pytest.mark.parametrize("extra_bytes", [0, 100])
def test_a_tar_cut_at_a_member_border_is_refused_with_both_sizes(three_shards, extra_bytes):
    """As webdataset reads it, it is a shorter, clean shard."""
    path = os.path.join(three_shards.folder, "train-000001.tar")
    whole_bytes = os.path.getsize(path)
    second_chunk = int(three_shards.split("train").chunk_data_offset[5])
    border = second_chunk // 512 * 512 - 512 + extra_bytes  # before the header of the chunk's member
    os.truncate(path, border)
    expected = f"train-000001.tar: {border:,} bytes, expected {whole_bytes:,} (truncated); restore the file"
    assert expected in str(check_shards(three_shards, "train", range(3), hashes=False))
    with pytest.raises(UserError) as error:
        TokenStream(three_shards, "train").read(0, 1200)
    assert expected in str(error.value)


def test_a_flipped_byte_is_a_hash_error_that_names_the_shard(three_shards):
    path = os.path.join(three_shards.folder, "train-000002.tar")
    with open(path, "r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    assert check_shards(three_shards, "train", range(3), hashes=False) == []
    (problem,) = check_shards(three_shards, "train", range(3), hashes=True)
    assert "train-000002.tar: sha256" in problem


def test_a_missing_shard_is_named(three_shards):
    os.unlink(os.path.join(three_shards.folder, "train-000000.tar"))
    with pytest.raises(UserError, match=r"train-000000.tar: missing; restore the file, or prepare the dataset again"):
        TokenStream(three_shards, "train").read(0, 10)


def test_a_shard_of_zero_bytes_is_named(three_shards):
    os.truncate(os.path.join(three_shards.folder, "train-000001.tar"), 0)
    with pytest.raises(UserError, match=r"train-000001.tar: 0 bytes, expected [\d,]+ \(truncated\)"):
        TokenStream(three_shards, "train").read(500, 10)


def test_a_folder_in_the_place_of_a_shard_is_named(three_shards):
    path = os.path.join(three_shards.folder, "train-000001.tar")
    os.unlink(path)
    os.mkdir(path)
    with pytest.raises(UserError, match=r"train-000001.tar: "):
        TokenStream(three_shards, "train").read(500, 10)


def test_a_shard_truncated_while_training_reads_it_is_an_error_and_the_process_lives(three_shards):
    """The shard is open and was read from; a reader by mmap would be killed by SIGBUS."""
    program = (
        "import sys, os\n"
        "from data_prep.errors import UserError\n"
        "from data_prep.manifest import open_dataset\n"
        "from pipeline.data.loader import BatchLayout, BatchLoader\n"
        "from pipeline.data.samples import SampleSource\n"
        "source = SampleSource(open_dataset(sys.argv[1]), 'train', 10, 0)\n"
        "with BatchLoader(source, BatchLayout(4, 4, 1), 0, 0) as loader:\n"
        "    for _ in range(40):\n"
        "        next(loader)\n"
        "    os.truncate(os.path.join(sys.argv[1], 'train-000001.tar'), 700)\n"
        "    try:\n"
        "        for _ in range(100):\n"
        "            next(loader)\n"
        "    except UserError as error:\n"
        "        print(error)\n"
        "print('alive')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, three_shards.folder], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    line, alive = result.stdout.splitlines()
    assert "train-000001.tar: 700 bytes, expected" in line
    assert "(truncated); restore the file" in line
    assert alive == "alive"


def test_every_rank_meets_the_damage_and_none_hangs(three_shards):
    source = SampleSource(three_shards, "train", 10, 0)
    loaders = [BatchLoader(source, BatchLayout(4, 2, 2), rank, 0) for rank in range(2)]
    for loader in loaders:
        next(loader)
    os.truncate(os.path.join(three_shards.folder, "train-000002.tar"), 600)
    for loader in loaders:
        with pytest.raises(UserError, match=r"train-000002.tar: 600 bytes"):
            deque(loader, maxlen=0)  # reads on for ever, if nothing stops it
        with pytest.raises(RuntimeError, match="closed"):
            next(loader)


# ---- what the preparation writes


def test_prepared_text_comes_back_from_samples(tmp_path):
    """Text, through tokenizer, shards, order and batches, and back: the whole way, on WikiText if it is there."""
    real = Path(__file__).parents[3] / "shared" / "data" / "wikitext" / "wiki.test.raw"
    if not real.is_file():
        pytest.skip(f"no real text at {real}; put the folder `shared/data` beside the project")
    text = real.read_text(encoding="utf-8")[:200_000]
    (tmp_path / "text").mkdir()
    for number, start in enumerate(range(0, len(text), 20_000)):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(text[start : start + 20_000], encoding="utf-8")
    tokenizer = train_tokenizer([text], TokenizerSettings(vocab_size=1000))
    source = FilesSource(FilesSettings({"train": [f"{tmp_path}/text/*.txt"]}))
    settings = PrepareSettings(source, tokenizer, tmp_path / "dataset", chunk_tokens=3000, chunks_per_shard=3)
    prepare(settings)

    samples = SampleSource(open_dataset(tmp_path / "dataset"), "train", 128, 0)
    read = samples.samples(np.arange(samples.num_samples))
    by_place = read[np.argsort(samples.sample_indices(np.arange(samples.num_samples)))]
    rest = samples.stream.read(samples.num_samples * 128, samples.stream.tokens - samples.num_samples * 128)
    stream = np.concatenate([by_place[:, :-1].ravel(), rest])
    assert (by_place[:-1, -1] == by_place[1:, 0]).all()
    assert (stream == tokenizer.eos_id).sum() == 10
    documents = np.split(stream, np.flatnonzero(stream == tokenizer.eos_id) + 1)
    assert "".join(tokenizer.decode(document[:-1]) for document in documents[:-1]) == text
