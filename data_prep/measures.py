"""What is counted of documents, and whether tokens decode to them: of many at once, no object per word or token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import SPACE_MARK, Tokenizer

BLOCK_BYTES = 1 << 20  # of text looked at together: bounds the memory, about 40 bytes per byte of it
MARK = SPACE_MARK.encode()

# What `str.split()` cuts at, as UTF-8: characters of one byte; (the bytes as a number) those of two and of three.
SPACES = [chr(code).encode() for code in range(0x3001) if chr(code).isspace()]
_ONE = bytes(bytes([byte]) in SPACES for byte in range(256))
_TWO, _THREE = (
    np.array([int.from_bytes(space, "big") for space in SPACES if len(space) == size], np.uint32) for size in (2, 3)
)
_FIRST_OF_MORE = bytes(any(space[0] == byte and len(space) > 1 for space in SPACES) for byte in range(256))


class Measures:
    """The measures of a task's documents, which are given part by part.

    Raises UserError, naming the document, if its tokens do not decode to it, unless `allow_lossy`. sentencepiece
    has no way to write U+2581 but as a space: `space_marks` counts them, all of them after `per_document`.
    """

    def __init__(self, tokenizer: Tokenizer, allow_lossy: bool) -> None:
        self._tokenizer, self._allow_lossy = tokenizer, allow_lossy
        self.space_marks = 0
        self._first_parts: list[int] = []  # of each document
        self._number = 0
        self._waiting_bytes = 0
        self._parts: list[bytes] = []
        self._tokens: list[np.ndarray] = []
        self._origins: list[tuple[str, bytes, int]] = []  # of each part: id and content of its document, bytes before
        self._measured: list[np.ndarray] = []

    def begin(self, id: str, content: bytes) -> None:
        """Begins a document; its parts follow."""
        self._first_parts.append(self._number)
        self._id, self._content, self._before = id, content, 0

    def add(self, part: bytes, tokens: np.ndarray) -> None:
        self._parts.append(part)
        self._tokens.append(tokens)
        self._origins.append((self._id, self._content, self._before))
        self._number += 1
        self._before += len(part)
        self._waiting_bytes += len(part)
        if self._waiting_bytes >= BLOCK_BYTES:
            self._measure()

    def per_document(self) -> dict[str, np.ndarray]:
        """`tokens` (eos included), `bytes`, `words`, `lines` and `round_trip` of each document, [D] each."""
        self._measure()
        parts = np.concatenate(self._measured, axis=1)
        sums = np.add.reduceat(parts, self._first_parts, axis=1) if self._first_parts else parts
        tokens, num_bytes, words, lines, lossy = sums
        return {"tokens": tokens + 1, "bytes": num_bytes, "words": words, "lines": lines, "round_trip": lossy == 0}

    def _measure(self) -> None:
        """Measures the parts that wait."""
        sizes = np.array([[len(array) for array in self._tokens], [len(part) for part in self._parts]], np.int64)
        lossy = self._lossy(sizes[0])
        self._measured.append(np.stack([*sizes, *words_and_newlines(self._parts), lossy]))
        self._parts, self._tokens, self._origins, self._waiting_bytes = [], [], [], 0

    def _lossy(self, sizes: np.ndarray) -> np.ndarray:
        """Which of the waiting parts their tokens do not decode to: [P] bool."""
        joined = b"".join(self._parts)
        texts = self._parts
        if marks := joined.count(MARK):
            self.space_marks += marks
            joined, texts = joined.replace(MARK, b" "), [part.replace(MARK, b" ") for part in texts]
        if texts and self._tokenizer.splits_at_spaces:
            spelled, ends = self._tokenizer.spelled(np.concatenate(self._tokens))
            part_ends = np.append(0, ends)[np.cumsum(sizes)]
            if np.array_equal(part_ends, np.cumsum([len(text) for text in texts])) and spelled.tobytes() == joined:
                return np.zeros(len(texts), bool)
        pairs = zip(texts, self._tokens, self._origins, strict=True)
        return np.array([self._is_lossy(*pair) for pair in pairs], bool)

    def _is_lossy(self, text: bytes, tokens: np.ndarray, origin: tuple[str, bytes, int]) -> bool:
        expected, back = text.decode(), self._tokenizer.decode(tokens)
        if expected == back or self._allow_lossy:
            return expected != back
        id, content, before = origin
        pairs = enumerate(zip(expected, back, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(expected), len(back)))
        raise UserError(
            f"document '{id}' does not survive the tokenizer: at character {len(content[:before].decode()) + place:,} "
            f"the text has {expected[place : place + 20]!r}, decoding gives {back[place : place + 20]!r}; use a "
            "tokenizer made by `globallocal tokenizer`, or accept the loss with --allow-lossy"
        )


def words_and_newlines(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Words, as `str.split()` has them, and newlines of each UTF-8 text: [D] int64 each."""
    joined = b"\n".join([b"", *texts, b""])
    bounds = np.cumsum([0, *(len(text) + 1 for text in texts)])
    newlines = np.flatnonzero(np.frombuffer(joined, np.uint8) == ord("\n"))
    space = _spaces(joined)
    words = np.flatnonzero(space[:-1] > space[1:])  # the space before each
    counted_words, counted_newlines = (np.diff(np.searchsorted(places, bounds)) for places in (words, newlines))
    return counted_words, counted_newlines - 1


def _spaces(content: bytes) -> np.ndarray:
    """Whether each byte belongs to a white space: bool [n]. The last byte has to be one."""
    space = np.frombuffer(bytearray(content.translate(_ONE)), bool)
    if not content.isascii():
        places = np.flatnonzero(np.frombuffer(content.translate(_FIRST_OF_MORE), bool))
        places = places[places + 2 < len(content)]
        first, second, third = (np.frombuffer(content, np.uint8)[places + i].astype(np.uint32) for i in range(3))
        two = places[np.isin(first << 8 | second, _TWO)]
        three = places[np.isin(first << 16 | second << 8 | third, _THREE)]
        for position in (two, two + 1, three, three + 1, three + 2):
            space[position] = True
    return space
