"""Chunks → WebDataset tars, published whole or not at all.

A shard is a plain USTAR file: per chunk the members `00000007.tokens.npy` and `00000007.docs.npy`, mtime 0,
no owner. Its bytes depend on nothing but the chunks in it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.packing import Chunk

BLOCK_BYTES = 512
END_OF_TAR = bytes(2 * BLOCK_BYTES)


@dataclass(frozen=True)
class Shard:
    """The bytes of a shard, and the offset of each chunk's first token in them."""

    content: bytes
    data_offsets: list[int]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def build_shard(chunks: Sequence[Chunk]) -> Shard:
    """The tar of `chunks`, in memory (32 MiB at the default sizes)."""
    parts: list[bytes | memoryview] = []
    offsets: list[int] = []
    size = 0
    for chunk in chunks:
        key = f"{chunk.number:08d}"
        for suffix, array in (("tokens", chunk.tokens), ("docs", chunk.document_starts)):
            header = npy_header(array)
            member_bytes = len(header) + array.nbytes
            if suffix == "tokens":
                offsets.append(size + BLOCK_BYTES + len(header))
            parts += [_tar_header(f"{key}.{suffix}.npy", member_bytes), header, array.tobytes()]
            parts.append(bytes(-member_bytes % BLOCK_BYTES))
            size += BLOCK_BYTES + member_bytes + (-member_bytes % BLOCK_BYTES)
    return Shard(b"".join([*parts, END_OF_TAR]), offsets)


def npy_header(array: np.ndarray) -> bytes:
    """The header of a version 1.0 .npy file of a 1-D array, its length a multiple of 64 bytes.

    Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
    """
    text = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': ({len(array)},), }}"
    prefix_bytes = 10
    padding = -(prefix_bytes + len(text) + 1) % 64
    body = text.encode() + b" " * padding + b"\n"
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


def _tar_header(name: str, member_bytes: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = member_bytes
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def publish(path: Path, content: bytes) -> None:
    """Writes a file so that at any moment it is either absent (or the old one) or whole and on disk."""
    with explained_write_errors(path):
        temporary = path.with_name(f".{path.name}.partial")
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes renames and new files in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals into lines with a remedy."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.ENOSPC: "the disk is full: free some space",
            errno.EDQUOT: "the disk quota is used up: free some space",
            errno.EROFS: "the file system is read-only: choose another folder",
            errno.EACCES: "no permission to write there: choose another folder, or change its permissions",
            errno.EPERM: "no permission to write there: choose another folder, or change its permissions",
        }
        remedy = remedies.get(error.errno or 0, f"{error.strerror}: repair the disk, or choose another folder")
        raise UserError(
            f"{path}: cannot be written; {remedy}. What is finished stays; the same command goes on from there"
        ) from error
