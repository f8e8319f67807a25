"""A worker's part, from a task to its tokens: read, filter, encode, check that nothing was lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import compress
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.measures import MARK, expected, lossy, words_and_newlines
from data_prep.packing import Piece, Position
from data_prep.sources.documents import Document, ReadCounts, Task
from data_prep.tokenizers.fast_encoder import FastEncoder, encode_each
from data_prep.tokenizers.tokenizer import Tokenizer

BLOCK_CHARACTERS = 1 << 20  # of text encoded and looked at together: bounds the memory, about 40 bytes per byte of it

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
        self._sha256 = sha256()

    def add(self, documents: Sequence[Document], contents: Sequence[bytes]) -> None:
        update = self._sha256.update
        for document, content in zip(documents, contents, strict=True):
            update(f"{len(document.id)} {len(content)} {document.id}".encode())
            update(content)

    def hex(self) -> str:
        return self._sha256.hexdigest()[:32]


def digest_task(task: Task) -> tuple[Position, str, str]:
    """A task's position and name, and the digest of its documents as they are now."""
    digest = TextDigest()
    for block in blocks(task.documents(ReadCounts())):
        digest.add(block, [document.text.encode() for document in block])
    return task.position, task.name, digest.hex()


def blocks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in runs of at most `BLOCK_CHARACTERS`; a longer one is alone."""
    block: list[Document] = []
    size = 0
    for document in documents:
        size += len(document.text)
        if size > BLOCK_CHARACTERS and block:
            yield block
            block, size = [], len(document.text)
        block.append(document)
    if block:
        yield block


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
        counts, digest = ReadCounts(), TextDigest()
        tokens, records = [np.empty(0, self.tokenizer.dtype)], [np.empty(0, DOCUMENT_RECORD)]
        ids: list[str] = []
        marks, least = 0, self.filters.minimum_characters
        given = task.documents(counts)
        for block in blocks(_count_short(given, least, counts) if least else given):
            contents = [document.text.encode() for document in block]
            digest.add(block, contents)
            if least:
                long = [len(document.text) >= least for document in block]
                block, contents = list(compress(block, long)), list(compress(contents, long))
            if not block:
                continue
            for array, arrays in zip(self._encode(block, contents), (tokens, records), strict=True):
                arrays.append(array)
            ids += [document.id for document in block]
            marks += b"".join(contents).count(MARK)
        if marks:
            counts.change("u2581_to_space", marks)
        stream, documents = np.concatenate(tokens), np.concatenate(records)
        return Encoded(task.position, task.name, task.source_bytes, digest.hex(), stream, documents, ids, counts)

    def _encode(self, block: list[Document], contents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of documents, [T], each followed by eos, and their records, [D]."""
        records = np.zeros(len(block), DOCUMENT_RECORD)
        records["digest"] = np.frombuffer(b"".join([sha256(content).digest()[:16] for content in contents]), "V16")
        records["bytes"] = list(map(len, contents))
        if len(block) > 1:
            tokens = self._encode_texts(block, contents, records)
        else:
            tokens = self._encode_long(block, contents[0], records)
        return tokens, records

    def _encode_long(self, block: list[Document], content: bytes, record: np.ndarray) -> np.ndarray:
        """As `_encode_texts`, of one document in parts, which bounds the memory."""
        tokens, parts, before = [], [], 0
        for text in self.tokenizer.parts(content):
            parts.append(np.zeros(1, DOCUMENT_RECORD))
            tokens.append(self._encode_texts(block, [text], parts[-1], before))
            before += len(text.decode())
        for name in ("words", "lines"):
            record[name] = sum(part[name] for part in parts)
        record["round_trip"] = all(part["round_trip"] for part in parts)
        stream = np.concatenate([*(ids[:-1] for ids in tokens[:-1]), tokens[-1]])  # one eos, at the end
        record["tokens"] = len(stream)
        return stream

    def _encode_texts(
        self, block: list[Document], texts: list[bytes], records: np.ndarray, before: int = 0
    ) -> np.ndarray:
        """Tokens of texts, [T], each followed by eos; measures them into their records, [D].

        Args:
            block: the texts' documents.
            before: characters of the document before its text.
        """
        tokens, sizes = encode_each(texts, self.tokenizer, self.fast)
        lost = lossy(self.tokenizer, texts, tokens, sizes)
        if lost.any() and not self.filters.allow_lossy:
            number = int(np.argmax(lost))
            end = int(sizes[: number + 1].sum())
            back = self.tokenizer.decode(tokens[end - sizes[number] : end - 1])
            raise _refusal(block[number].id, expected(texts[number]), back, before)
        records["tokens"], records["round_trip"] = sizes, ~lost
        records["words"], records["lines"] = words_and_newlines(texts)
        return tokens


def _count_short(documents: Iterator[Document], least: int, counts: ReadCounts) -> Iterator[Document]:
    """The same documents; counts the short ones as they pass, so that reasons stand in the order of the text."""
    for document in documents:
        if len(document.text) < least:
            counts.drop("too_short")
        yield document


def _refusal(id: str, text: str, back: str, before: int) -> UserError:
    pairs = enumerate(zip(text, back, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
    return UserError(
        f"document '{id}' does not survive the tokenizer: at character {before + place:,} "
        f"the text has {text[place : place + 20]!r}, decoding gives {back[place : place + 20]!r}; use a "
        "tokenizer made by `globallocal tokenizer`, or accept the loss with --allow-lossy"
    )
