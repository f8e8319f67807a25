"""Shards are plain tars of plain arrays, and the same chunks give the same bytes."""

import hashlib
import io
import subprocess
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.packing import END, Chunk
from data_prep.shards import build_shard, npy_header


def make_chunk(number: int, tokens: list[int], starts: list[int], dtype: str = "<u2") -> Chunk:
    ids = [str(start) for start in starts]
    return Chunk(number, np.array(tokens, dtype), np.array(starts, "<u4"), ids, 0, 0, END, 0)


def test_bytes_never_change():
    """A change of these bytes is a new format: every dataset would get another id."""
    shard = build_shard([make_chunk(0, list(range(1000)), [0, 10]), make_chunk(1, [5], [])])
    assert (
        hashlib.sha256(shard.content).hexdigest() == "6695f72a620d669a152fcc836308731cf5f26a5d3587f5658045ade0cafe27f7"
    )


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_data_offsets_point_at_the_tokens(dtype):
    chunks = [make_chunk(i, list(range(i, i + 100 * i + 1)), [0], dtype) for i in range(5)]
    shard = build_shard(chunks)
    for chunk, offset in zip(chunks, shard.data_offsets, strict=True):
        tokens = np.frombuffer(shard.content, dtype, len(chunk.tokens), offset)
        assert np.array_equal(tokens, chunk.tokens)
        assert offset % 64 == 0


def test_python_and_gnu_tar_read_it(tmp_path):
    shard = build_shard([make_chunk(7, [1, 2, 3], [0, 2])])
    path = tmp_path / "s.tar"
    path.write_bytes(shard.content)
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == ["00000007.tokens.npy", "00000007.docs.npy"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        docs = tar.extractfile(members[1])
        assert docs is not None
        assert np.load(io.BytesIO(docs.read())).tolist() == [0, 2]
    listing = subprocess.run(["tar", "-tf", str(path)], capture_output=True, text=True, check=True)
    assert (listing.stdout.split(), listing.stderr) == (["00000007.tokens.npy", "00000007.docs.npy"], "")


def test_webdataset_reads_it(tmp_path):
    import webdataset

    chunks = [make_chunk(i, [i, i + 1], [1]) for i in range(3)]
    (tmp_path / "s.tar").write_bytes(build_shard(chunks).content)
    samples = list(webdataset.WebDataset(str(tmp_path / "s.tar"), shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == ["00000000", "00000001", "00000002"]
    assert [sample["tokens.npy"].tolist() for sample in samples] == [[0, 1], [1, 2], [2, 3]]
    assert all(sample["docs.npy"].tolist() == [1] for sample in samples)


def test_hugging_face_webdataset_builder_reads_it(tmp_path):
    import datasets

    (tmp_path / "s.tar").write_bytes(build_shard([make_chunk(i, [i, i + 1], [0]) for i in range(3)]).content)
    rows = list(
        datasets.load_dataset(
            "webdataset", data_files={"train": str(tmp_path / "s.tar")}, split="train", streaming=True
        )
    )
    assert [row["__key__"] for row in rows] == ["00000000", "00000001", "00000002"]
    assert [list(row["tokens.npy"]) for row in rows] == [[0, 1], [1, 2], [2, 3]]


@given(st.integers(0, 1 << 33), st.sampled_from(["<u2", "<u4"]))
def test_header_is_numpys(count, dtype):
    class Shape:  # an array of that length, without the memory
        def __len__(self):
            return count

    shape = Shape()
    shape.dtype = np.dtype(dtype)  # type: ignore[attr-defined]
    header = npy_header(shape)
    assert len(header) % 64 == 0
    file = io.BytesIO(header)
    assert np.lib.format.read_magic(file) == (1, 0)
    assert np.lib.format.read_array_header_1_0(file) == ((count,), False, np.dtype(dtype))
    assert file.read() == b""
