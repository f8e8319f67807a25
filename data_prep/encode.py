"""What a worker does with a task: read, filter, encode, check that nothing was lost."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.documents import ReadCounts, Task
from data_prep.errors import UserError
from data_prep.packing import Piece, Position
from data_prep.tokenizer import SPACE_MARK, Tokenizer, segments

# Per document: tokens (eos included); UTF-8 bytes, words and newlines of its text; whether decoding gave
# the text back; the first 16 bytes of the text's sha256, where duplicates are to be dropped.
DOCUMENT_RECORD = np.dtype(
    [
        ("tokens", "<i8"),
        ("bytes", "<i8"),
        ("words", "<i8"),
        ("lines", "<i8"),
        ("round_trip", "?"),
        ("digest", "V16"),
    ]
)


@dataclass(frozen=True)
class Filters:
    """What to leave out; nothing by default. Whatever is left out is counted, with its reason.

    Attributes:
        minimum_characters: shorter documents are dropped ("too_short").
        drop_duplicates: of documents with equal text in a split the first is kept, the others are dropped
            ("duplicate"). Needs about 100 bytes of memory a document.
        allow_lossy: keep documents that decoding does not give back, instead of refusing: for tokenizers
            that normalise. They are those not counted in `round_trip_documents`.
    """

    minimum_characters: int = 0
    drop_duplicates: bool = False
    allow_lossy: bool = False

    def settings(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """What became of a task.

    Attributes:
        position, task_bytes: the task's.
        tokens: [T], each document followed by eos.
        documents: [D] records of `DOCUMENT_RECORD`; their tokens add up to T.
        ids: [D].
        counts: what reading and the worker's filters met.
    """

    position: Position
    task_bytes: int
    tokens: np.ndarray
    documents: np.ndarray
    ids: list[str]
    counts: ReadCounts

    def piece(self) -> Piece:
        ends = np.cumsum(self.documents["tokens"])
        return Piece(self.position, self.tokens, ends - self.documents["tokens"], self.ids)

    def without(self, dropped: np.ndarray, reason: str) -> Encoded:
        """Leaves out the documents where `dropped` [D] is true, counting them."""
        if not dropped.any():
            return self
        self.counts.drop(reason, int(dropped.sum()))
        tokens = self.tokens[np.repeat(~dropped, self.documents["tokens"])]
        ids = [id for id, drop in zip(self.ids, dropped, strict=True) if not drop]
        return Encoded(
            self.position, self.task_bytes, tokens, self.documents[~dropped], ids, self.counts
        )  # fmt: skip


class Encoder:
    """Encodes tasks; pickles to workers.

    Raises UserError, naming the document, for one that decoding does not give back.
    """

    def __init__(self, tokenizer: Tokenizer, filters: Filters) -> None:
        self.tokenizer = tokenizer
        self.filters = filters

    def __call__(self, task: Task) -> Encoded:
        counts = ReadCounts()
        eos = np.array([self.tokenizer.eos_id], self.tokenizer.dtype)
        parts = [eos[:0]]
        records: list[tuple[int, int, int, int, bool, bytes]] = []
        ids: list[str] = []
        for document in task.documents(counts):
            text = document.text
            if len(text) < self.filters.minimum_characters:
                counts.drop("too_short")
                continue
            tokens = self.tokenizer.encode(text)
            whole = self._round_trip(document.id, text, tokens, counts)
            content = text.encode()
            digest = hashlib.sha256(content).digest()[:16] if self.filters.drop_duplicates else bytes(16)
            words = sum(len(segment.split()) for segment in segments(text))
            records.append((len(tokens) + 1, len(content), words, text.count("\n"), whole, digest))
            parts += [tokens, eos]
            ids.append(document.id)
        documents = np.array(records, DOCUMENT_RECORD)
        return Encoded(task.position, task.source_bytes, np.concatenate(parts), documents, ids, counts)

    def _round_trip(self, id: str, text: str, tokens: np.ndarray, counts: ReadCounts) -> bool:
        """Whether decoding gives the text back; sentencepiece has no way to write U+2581 but as a space."""
        if marks := text.count(SPACE_MARK):
            counts.change("u2581_to_space", marks)
        if self.tokenizer.spells(tokens, text):
            return True
        if self.filters.allow_lossy:
            return False
        expected, back = text.replace(SPACE_MARK, " "), self.tokenizer.decode(tokens)
        pairs = enumerate(zip(expected, back, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(back)))
        raise UserError(
            f"document '{id}' does not survive the tokenizer: at character {place:,} the text has "
            f"{expected[place : place + 20]!r}, decoding gives {back[place : place + 20]!r}; use a tokenizer "
            "made by `globallocal tokenizer`, or accept the loss with --allow-lossy"
        )
