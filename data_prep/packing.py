"""Documents → one token stream → chunks. Pure functions: the same stream gives the same chunks, however
it was cut into pieces on the way here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Position(NamedTuple):
    """A task's place in its source: unit (a file, a stream) and part of the unit. Positions only grow."""

    unit: int
    part: int


START = Position(0, 0)
END = Position(-1, -1)  # there is nothing after this


@dataclass(frozen=True)
class Piece:
    """The encoded documents of one task.

    Attributes:
        position: of the task.
        tokens: [T] `<u2` or `<u4`, each document followed by eos.
        starts: [D] int64, offsets in `tokens` at which the documents start, increasing.
        ids: [D] the documents' ids.
    """

    position: Position
    tokens: np.ndarray
    starts: np.ndarray
    ids: list[str]

    def skip_tokens(self, count: int) -> Piece:
        """The piece without its first `count` tokens and without the documents that start in them."""
        first = int(np.searchsorted(self.starts, count))
        return Piece(self.position, self.tokens[count:], self.starts[first:] - count, self.ids[first:])


@dataclass(frozen=True)
class Chunk:
    """A run of the token stream, `chunk_tokens` long but for the last one.

    Attributes:
        number: of the chunk in its split.
        tokens: [n].
        document_starts: [d] `<u4`, offsets in the chunk at which documents start.
        ids: [d] of those documents.
        token_start: tokens of the split before the chunk.
        document_start: documents of the split that start before the chunk.
        next_position, next_offset: the task, and the token in it, with which the next chunk begins.
    """

    number: int
    tokens: np.ndarray
    document_starts: np.ndarray
    ids: list[str]
    token_start: int
    document_start: int
    next_position: Position
    next_offset: int


@dataclass
class ChunkCounters:
    """The counts of a stream of chunks: zero, or where an interrupted preparation left it."""

    chunk: int = 0
    token: int = 0
    document: int = 0
    position: Position = START
    offset: int = 0


def pack(
    pieces: Iterable[Piece], chunk_tokens: int, dtype: np.dtype, start: ChunkCounters | None = None
) -> Iterator[Chunk]:
    """Cuts the stream that `pieces` spell into chunks.

    Args:
        pieces: in stream order, the first one being that of `start.position` (or the next that holds
            documents, if that task holds none).
        chunk_tokens: tokens per chunk.
        dtype: of the chunks' tokens.
        start: counters of the first chunk to cut.
    """
    at = start or ChunkCounters()
    buffer = np.empty(chunk_tokens, dtype)
    filled = 0
    starts: list[np.ndarray] = []
    ids: list[str] = []

    def close(position: Position, offset: int) -> Chunk:
        nonlocal filled, starts, ids
        document_starts = np.concatenate(starts) if starts else np.empty(0, np.int64)
        chunk = Chunk(
            at.chunk, buffer[:filled].copy(), document_starts.astype("<u4"), ids,
            at.token, at.document, position, offset,
        )  # fmt: skip
        at.chunk, at.token, at.document = at.chunk + 1, at.token + filled, at.document + len(ids)
        filled, starts, ids = 0, [], []
        return chunk

    for whole in pieces:
        already = at.offset if whole.position == at.position else 0
        piece = whole.skip_tokens(already)
        taken = first = 0
        while taken < len(piece.tokens):
            count = min(chunk_tokens - filled, len(piece.tokens) - taken)
            buffer[filled : filled + count] = piece.tokens[taken : taken + count]
            last = int(np.searchsorted(piece.starts, taken + count))
            starts.append(piece.starts[first:last] - taken + filled)
            ids += piece.ids[first:last]
            taken, filled, first = taken + count, filled + count, last
            if filled == chunk_tokens:
                yield close(piece.position, already + taken)
    if filled:
        yield close(END, 0)
