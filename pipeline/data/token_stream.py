"""A split read as one flat array of tokens, straight from the shards.

`os.pread` rather than `mmap`: when a file shrinks under a reader, the first returns fewer bytes, which is an
error that can be named, and the second kills the process.
"""

from __future__ import annotations

import os
import resource
import threading
from pathlib import Path
from typing import Protocol

import numpy as np

from data_prep.errors import UserError
from data_prep.manifest import Dataset, SplitIndex
from pipeline.data.remote import RemoteDataset

_NONE_OPEN = -1  # the number of no shard


class ShardOpener(Protocol):
    """Where shards come from; `max_open` bounds how many of them are held open."""

    @property
    def max_open(self) -> int: ...

    def open(self, shard: int) -> int:
        """A new file descriptor, for the caller to close. Raises UserError naming the shard."""

    def where(self, shard: int) -> str:
        """The shard's path or URL, for messages."""


class FolderShards:
    """Shards that lie in the dataset's folder."""

    max_open = 256

    def __init__(self, folder: str | Path, index: SplitIndex) -> None:
        self._folder = Path(folder)
        self._index = index

    def where(self, shard: int) -> str:
        return str(self._folder / self._index.shard_name(shard))

    def open(self, shard: int) -> int:
        try:
            return os.open(self.where(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UserError(f"{self.where(shard)}: missing; restore the file, or prepare the dataset again") from None
        except OSError as error:
            raise UserError(f"{self.where(shard)}: cannot be opened ({error.strerror})") from None


class TokenStream:
    """One split's tokens: document, eos, document, eos, … addressed by their place in the stream.

    Safe to use from several threads. Holds a bounded number of open shards, the first opened out.

    Args:
        dataset: an opened dataset.
        split: its name. Raises UserError, with the known ones, if there is no such split.
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        self._open_shards: dict[int, int] = {}
        self._lock = threading.Lock()
        self.index = dataset.split(split)
        # Plain views of the memory-mapped index: the memmap type makes each access several times slower.
        self._token_start, self._chunk_shard, self._chunk_data_offset = (
            np.asarray(column)
            for column in (self.index.token_start, self.index.chunk_shard, self.index.chunk_data_offset)
        )
        self.shards: ShardOpener = (
            dataset.shards(split) if isinstance(dataset, RemoteDataset) else FolderShards(dataset.folder, self.index)
        )
        soft_limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._max_open = max(1, min(self.shards.max_open, soft_limit // 4))

    @property
    def tokens(self) -> int:
        return self.index.tokens

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as a read-only array [count] of the dtype on disk.

        Raises UserError if a shard is missing, shorter than recorded, or cannot be read, and IndexError for
        tokens outside the stream.
        """
        row: np.ndarray = self.read_rows(np.array([start]), count)[0]
        return row

    def read_rows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Tokens [start, start + count) of each start, read-only [len(starts), count]; raises as `read`."""
        tokens = np.asarray(starts).astype(self._token_start.dtype)  # numpy would convert the index otherwise
        chunks = np.searchsorted(self._token_start, tokens, side="right") - 1
        width = self.index.dtype.itemsize
        num_bytes = count * width
        offsets = (self._chunk_data_offset[chunks] + (tokens - self._token_start[chunks]) * width).tolist()
        shards = self._chunk_shard[chunks].tolist()
        crossing = np.flatnonzero(tokens + count > self._token_start[chunks + 1]).tolist()
        for row in crossing:
            shards[row] = _NONE_OPEN
        parts = []
        with self._lock:
            for row, (shard, offset) in enumerate(zip(shards, offsets, strict=True)):
                try:  # nearly every row: this loop is what reading costs
                    part = os.pread(self._open_shards[shard], num_bytes, offset)
                except (KeyError, OSError):
                    part = b""
                if len(part) < num_bytes:  # not open yet, a fault, or a row that runs into the next chunk
                    part = self._read_across(int(tokens[row]), count, int(chunks[row]))
                parts.append(part)
        return np.frombuffer(b"".join(parts), self.index.dtype).reshape(len(tokens), count)

    def shards_of(self, start: int, stop: int) -> range:
        """The shards that hold tokens [start, stop), which must not be empty."""
        ends = np.array([start, stop - 1]).astype(self._token_start.dtype)
        first, last = np.searchsorted(self._token_start, ends, side="right") - 1
        return range(int(self._chunk_shard[first]), int(self._chunk_shard[last]) + 1)

    def close(self) -> None:
        with self._lock:
            while self._open_shards:
                os.close(self._open_shards.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def _read_across(self, start: int, count: int, chunk: int) -> bytes:
        """The tokens [start, start + count), which begin in `chunk`, over as many chunks as it takes."""
        width = self.index.dtype.itemsize
        parts = []
        while count:
            skip = start - int(self._token_start[chunk])
            taken = min(int(self._token_start[chunk + 1]) - start, count)
            offset = int(self._chunk_data_offset[chunk]) + skip * width
            parts.append(self._read_bytes(int(self._chunk_shard[chunk]), offset, taken * width))
            start, count, chunk = start + taken, count - taken, chunk + 1
        return b"".join(parts)

    def _read_bytes(self, shard: int, offset: int, count: int) -> bytes:
        descriptor = self._descriptor(shard)
        try:
            data = os.pread(descriptor, count, offset)
            while len(data) < count:  # a signal or a network file system may split a read
                more = os.pread(descriptor, count - len(data), offset + len(data))
                if not more:
                    raise UserError(self._size_problem(shard, os.fstat(descriptor).st_size))
                data += more
        except OSError as error:
            raise UserError(
                f"{self.shards.where(shard)}: cannot be read at byte {offset:,} ({error.strerror})"
            ) from None
        return data

    def _descriptor(self, shard: int) -> int:
        descriptor = self._open_shards.get(shard)
        if descriptor is not None:
            return descriptor
        descriptor = self.shards.open(shard)
        actual_bytes = os.fstat(descriptor).st_size
        if actual_bytes != self.index.shard_bytes(shard):
            os.close(descriptor)
            raise UserError(self._size_problem(shard, actual_bytes))
        self._open_shards[shard] = descriptor
        if len(self._open_shards) > self._max_open:
            os.close(self._open_shards.pop(next(iter(self._open_shards))))
        return descriptor

    def _size_problem(self, shard: int, actual_bytes: int) -> str:
        expected_bytes = self.index.shard_bytes(shard)
        kind = "truncated" if actual_bytes < expected_bytes else "changed"
        return (
            f"{self.shards.where(shard)}: {actual_bytes:,} bytes, expected {expected_bytes:,} ({kind}); "
            "restore the file, or prepare the dataset again"
        )
