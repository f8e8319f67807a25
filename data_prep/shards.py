"""Chunks → WebDataset tars.

A shard is a plain USTAR file: per chunk the members `00000007.tokens.npy` and `00000007.docs.npy`, mtime 0,
no owner. Its bytes depend on nothing but the chunks in it.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.packing import Chunk

BLOCK_BYTES = 512
END_OF_TAR = bytes(2 * BLOCK_BYTES)


@dataclass(frozen=True)
class Shard:
    """The bytes of a shard, and the offset in them of each chunk's first token."""

    content: bytes
    data_offsets: list[int]


def build_shard(chunks: Sequence[Chunk]) -> Shard:
    """The tar of `chunks`, in memory (32 MiB at the default sizes)."""
    parts: list[bytes] = []
    offsets: list[int] = []
    size = 0
    for chunk in chunks:
        for kind, array in (("tokens", chunk.tokens), ("docs", chunk.document_starts)):
            header = npy_header(array)
            member_bytes = len(header) + array.nbytes
            padding = -member_bytes % BLOCK_BYTES
            if kind == "tokens":
                offsets.append(size + BLOCK_BYTES + len(header))
            name = f"{chunk.number:08d}.{kind}.npy"
            parts += [_tar_header(name, member_bytes), header, array.tobytes(), bytes(padding)]
            size += BLOCK_BYTES + member_bytes + padding
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


def read_members(content: memoryview) -> Iterator[tuple[str, memoryview]]:
    """(Name, content) of each member of a tar, without a copy. Raises tarfile.TarError."""
    offset = 0
    while any(header := bytes(content[offset : offset + BLOCK_BYTES])):
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        begin = offset + BLOCK_BYTES
        yield info.name, content[begin : begin + info.size]
        offset = begin + info.size + -info.size % BLOCK_BYTES


def read_array(member: memoryview) -> np.ndarray:
    """The array of a version 1.0 .npy file, as a view of it. Raises ValueError for anything else."""
    file = io.BytesIO(member[: 1 << 10])
    if (version := np.lib.format.read_magic(file)) != (1, 0):
        raise ValueError(f"version {version} of .npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    return np.frombuffer(member[file.tell() :], dtype).reshape(shape)
