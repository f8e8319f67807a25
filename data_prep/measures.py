"""What is counted of documents, and whether tokens decode to them: of many at once, no object per word or token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_prep.tokenizers.tokenizer import SPACE_MARK, Tokenizer

MARK = SPACE_MARK.encode()
END = b"\xff"  # behind each text where many are looked at together: in no UTF-8, and what eos is spelled

# What `str.split()` cuts at, as UTF-8: characters of one byte; (the bytes as a number) those of two and of three.
SPACES = [chr(code).encode() for code in range(0x3001) if chr(code).isspace()]
_ONE = bytes(bytes([byte]) in (*SPACES, END) for byte in range(256))
_TWO, _THREE = (
    np.array([int.from_bytes(space, "big") for space in SPACES if len(space) == size], np.uint32) for size in (2, 3)
)
_FIRST_OF_MORE = bytes(any(space[0] == byte and len(space) > 1 for space in SPACES) for byte in range(256))


def lossy(tokenizer: Tokenizer, texts: Sequence[bytes], tokens: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Which of the UTF-8 texts their tokens do not decode to: [D] bool.

    Args:
        tokens: [T], those of each text followed by eos.
        sizes: [D], how many of them belong to each, eos included.
    """
    if tokenizer.splits_at_spaces:
        joined = END.join([*texts, b""])
        if tokenizer.spells(tokens, joined.replace(MARK, b" ")):
            return np.zeros(len(texts), bool)
    ends = np.cumsum(sizes)
    parts = (tokens[end - size : end - 1] for size, end in zip(sizes, ends, strict=True))
    pairs = zip(texts, parts, strict=True)
    return np.array([expected(text) != tokenizer.decode(part) for text, part in pairs], bool)


def expected(text: bytes) -> str:
    """What a text decodes to: sentencepiece has no way to write U+2581 but as a space."""
    return text.replace(MARK, b" ").decode()


def words_and_newlines(texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Words, as `str.split()` has them, and newlines of each UTF-8 text: [D] int64 each."""
    joined = END.join([b"", *texts, b""])
    bounds = np.cumsum([0, *(len(text) + 1 for text in texts)])
    newlines = np.flatnonzero(np.frombuffer(joined, np.uint8) == ord("\n"))
    space = _spaces(joined)
    words = np.flatnonzero(space[:-1] > space[1:])  # the space before each
    counted_words, counted_newlines = (np.diff(np.searchsorted(places, bounds)) for places in (words, newlines))
    return counted_words, counted_newlines


def _spaces(content: bytes) -> np.ndarray:
    """Whether each byte belongs to a white space or is `END`: bool [n]. The last byte has to be one."""
    space = np.frombuffer(bytearray(content.translate(_ONE)), bool)
    places = np.flatnonzero(np.frombuffer(content.translate(_FIRST_OF_MORE), bool))
    places = places[places + 2 < len(content)]
    first, second, third = (np.frombuffer(content, np.uint8)[places + i].astype(np.uint32) for i in range(3))
    two = places[np.isin(first << 8 | second, _TWO)]
    three = places[np.isin(first << 16 | second << 8 | third, _THREE)]
    for position in (two, two + 1, three, three + 1, three + 2):
        space[position] = True
    return space
