"""A worker's part, from a task to its tokens: read, filter, encode, check that nothing was lost."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.measures import Measures
from data_prep.packing import Piece, Position
from data_prep.sources.documents import ReadCounts, Task
from data_prep.tokenizers.fast_encoder import FastEncoder
from data_prep.tokenizers.tokenizer import Tokenizer

# Per document: tokens (eos included); UTF-8 bytes, words and newlines of its text; whether decoding gave
# the text back; the first 16 bytes of the text's sha256.
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
    """Documents to leave out; none by default. Whatever is left out is counted, with its reason.

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

    def __post_init__(self) -> None:
        if self.minimum_characters < 0:
            raise UserError(f"minimum_characters is {self.minimum_characters}; it must be 0 or more")

    def settings(self) -> dict[str, Any]:
        """The filters as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Encoded:
    """The result of a task.

    Attributes:
        position, name, task_bytes: the task's.
        digest: of its documents, as `TextDigest` has it.
        tokens: [T], each document followed by eos.
        documents: [D] records of `DOCUMENT_RECORD`; their tokens add up to T.
        ids: [D].
        counts: what reading and the worker's filters met.
    """

    position: Position
    name: str
    task_bytes: int
    digest: str
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
        return replace(self, tokens=tokens, documents=self.documents[~dropped], ids=ids)


class TextDigest:
    """The hash of a task's documents, as 32 hex digits: ids and texts, in order, before any filter."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, id: str, content: bytes) -> None:
        self._sha256.update(b"%d %d %b" % (len(id), len(content), id.encode()))
        self._sha256.update(content)

    def hex(self) -> str:
        return self._sha256.hexdigest()[:32]


def digest_task(task: Task) -> tuple[Position, str, str]:
    """A task's position and name, and the digest of its documents as they are now."""
    digest = TextDigest()
    for document in task.documents(ReadCounts()):
        digest.add(document.id, document.text.encode())
    return task.position, task.name, digest.hex()


class Encoder:
    """Encodes tasks; pickles to workers.

    Raises UserError, naming the document, for one that decoding does not give back.

    Args:
        fast: encodes in sentencepiece's place.
    """

    def __init__(self, tokenizer: Tokenizer, filters: Filters, fast: FastEncoder | None = None) -> None:
        self.tokenizer = tokenizer
        self.filters = filters
        self.fast = fast

    def __call__(self, task: Task) -> Encoded:
        encode = (self.fast or self.tokenizer).encode
        counts, digest = ReadCounts(), TextDigest()
        eos = np.array([self.tokenizer.eos_id], self.tokenizer.dtype)
        tokens = [eos[:0]]
        ids: list[str] = []
        digests: list[bytes] = []
        measures = Measures(self.tokenizer, self.filters.allow_lossy)
        for document in task.documents(counts):
            content = document.text.encode()
            digest.add(document.id, content)
            if len(document.text) < self.filters.minimum_characters:
                counts.drop("too_short")
                continue
            ids.append(document.id)
            digests.append(hashlib.sha256(content).digest()[:16])
            measures.begin(document.id, content)
            for part in self.tokenizer.parts(content):
                tokens.append(encode(part).astype(self.tokenizer.dtype, copy=False))  # uint32 would be twice as much
                measures.add(part, tokens[-1])
            tokens.append(eos)
        documents = np.zeros(len(ids), DOCUMENT_RECORD)
        documents["digest"] = np.frombuffer(b"".join(digests), "V16")
        for name, values in measures.per_document().items():
            documents[name] = values
        if marks := measures.space_marks:
            counts.change("u2581_to_space", marks)
        stream = np.concatenate(tokens, dtype=self.tokenizer.dtype, casting="same_kind")
        return Encoded(task.position, task.name, task.source_bytes, digest.hex(), stream, documents, ids, counts)
