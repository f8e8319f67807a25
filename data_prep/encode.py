"""What a worker does with a task: read, filter, encode, check that nothing was lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.documents import ReadCounts, Task
from data_prep.errors import UserError
from data_prep.packing import Piece
from data_prep.tokenizer import SPACE_MARK, Tokenizer


@dataclass(frozen=True)
class Filters:
    """What to leave out; nothing by default. Whatever is left out is counted, with its reason.

    Attributes:
        minimum_characters: shorter documents are dropped ("too_short").
        drop_duplicates: of documents with equal text the first is kept, the others dropped ("duplicate").
        allow_lossy: keep documents that decoding does not give back, counting them ("lossy"), instead of
            refusing: for tokenizers that normalise.
    """

    minimum_characters: int = 0
    drop_duplicates: bool = False
    allow_lossy: bool = False

    def settings(self) -> dict[str, Any]:
        return dict(self.__dict__)


@dataclass
class Encoded:
    """A task's piece of the stream, and what was counted on the way."""

    piece: Piece
    task_bytes: int
    rows: int = 0
    source_bytes: int = 0
    words: int = 0
    lines: int = 0
    round_trip_documents: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)


class Encoder:
    """Encodes tasks; pickles to workers.

    Raises UserError, naming the document, for one that decoding does not give back.
    """

    def __init__(self, tokenizer: Tokenizer, filters: Filters) -> None:
        self.tokenizer = tokenizer
        self.filters = filters

    def __call__(self, task: Task) -> Encoded:
        tokenizer, counts = self.tokenizer, ReadCounts()
        eos = np.array([tokenizer.eos_id], tokenizer.dtype)
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        ids: list[str] = []
        result = Encoded(Piece(task.position, eos[:0], np.empty(0, np.int64), ids), task.source_bytes)
        for document in task.documents(counts):
            text = document.text
            if len(text) < self.filters.minimum_characters:
                counts.drop("too_short")
                continue
            tokens = tokenizer.encode(text)
            if marks := text.count(SPACE_MARK):
                counts.change("u2581_to_space", marks)
            self._check_round_trip(document.id, text, tokens, counts)
            result.round_trip_documents += 1
            result.source_bytes += len(text.encode())
            result.words += len(text.split())
            result.lines += text.count("\n")
            parts += [tokens, eos]
            lengths.append(len(tokens) + 1)
            ids.append(document.id)
        tokens = np.concatenate(parts) if parts else eos[:0]
        result.piece = Piece(task.position, tokens, np.array(lengths, np.int64), ids)
        result.rows, result.dropped, result.changed = counts.rows, counts.dropped, counts.changed
        return result

    def _check_round_trip(self, id: str, text: str, tokens: np.ndarray, counts: ReadCounts) -> None:
        expected = text.replace(SPACE_MARK, " ")
        back = self.tokenizer.decode(tokens)
        if back == expected:
            return
        if self.filters.allow_lossy:
            counts.change("lossy_documents", 1)
            return
        pairs = enumerate(zip(expected, back, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(back)))
        raise UserError(
            f"document '{id}' does not survive the tokenizer: at character {place:,} the text has "
            f"{expected[place : place + 20]!r}, decoding gives {back[place : place + 20]!r}; use a tokenizer "
            "made by `globallocal tokenizer`, or accept the loss with --allow-lossy"
        )
