"""A file at a URL, to read and seek in as in one on a disk."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from data_prep.remote import BLOCK_BYTES, stream


class _RemoteFile(io.RawIOBase):
    """A file at a URL: what is read in a row comes from one request."""

    def __init__(self, url: str, num_bytes: int, ahead: int | None) -> None:
        self._url, self._num_bytes, self._ahead = url, num_bytes, ahead
        self._at = 0
        self._blocks: Iterator[bytes] = iter(())
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        if place != self._at:
            self._at, self._rest, self._blocks = place, memoryview(b""), iter(())
        return place

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._num_bytes - self._at)
        if wanted <= 0:
            return 0
        if not self._rest and not (block := next(self._blocks, b"")):
            ahead = self._num_bytes if self._ahead is None else max(self._ahead, wanted)
            stop = min(self._at + ahead, self._num_bytes)
            self._blocks = stream(self._url, self._at, stop, self._num_bytes)
            block = next(self._blocks)
        if not self._rest:
            self._rest = memoryview(block)
        taken = self._rest[:wanted]
        buffer[: len(taken)] = taken
        self._rest, self._at = self._rest[len(taken) :], self._at + len(taken)
        return len(taken)


def open_file(url: str, num_bytes: int, ahead: int | None = None) -> io.BufferedReader:
    """A file of known size to read and seek in; raises as `remote.download`, while it is read.

    Args:
        ahead: how many bytes to ask for at once; None where all of it will be read from front to back.
    """
    return io.BufferedReader(_RemoteFile(url, num_bytes, ahead), min(BLOCK_BYTES, ahead or BLOCK_BYTES))
