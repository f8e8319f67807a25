"""The fast encoder: gigatoken, for as long as it gives the ids that sentencepiece gives, which rules.

gigatoken gets a model's pieces and merges and nothing else: no special tokens (their spellings in a text are
text) and no cuts ahead of encoding. It is compared with sentencepiece before every preparation; a single
difference, and sentencepiece encodes all of it.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from itertools import chain, islice

import numpy as np

from data_prep.manifest import EncoderInfo
from data_prep.sources.documents import ReadCounts, TextSource
from data_prep.tokenizers.tokenizer import PIECE_BYTE, SELF_TEST_TEXTS, SPACE_MARK, Tokenizer

_log = logging.getLogger(__name__)

SAMPLE_CHARACTERS = 1 << 18  # of each split, compared before every preparation
HOSTILE_TEXTS = 1000
RENEW_BYTES = 1 << 27  # gigatoken remembers the words it has met: 35 MB of English ones in so much text, at worst 1 GB


class FastEncoder:
    """gigatoken with one model; pickles as its definition.

    Args:
        definition: the content of the model's tokenizer.json.
    """

    def __init__(self, definition: bytes) -> None:
        content = json.loads(definition)
        content["pre_tokenizer"], content["added_tokens"] = None, []
        self._definition = definition
        self._bare = json.dumps(content)
        self._renew()

    def __reduce__(self) -> tuple[type[FastEncoder], tuple[bytes]]:
        return FastEncoder, (self._definition,)

    def _renew(self) -> None:
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_json(self._bare)
        self._met_bytes = 0

    def encode(self, content: bytes) -> np.ndarray:
        """Ids of UTF-8, [n] uint32, without eos."""
        if self._met_bytes > RENEW_BYTES:
            self._renew()
        self._met_bytes += len(content)
        return self._tokenizer.encode(content)


def encode_each(
    contents: Sequence[bytes], tokenizer: Tokenizer, fast: FastEncoder | None
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of UTF-8 texts, each followed by eos, [T], and how many belong to each, [D].

    Args:
        fast: encodes in sentencepiece's place: all texts at once, with a NUL behind each, which becomes eos.
    """
    if fast and tokenizer.separator_id is not None:
        tokens = fast.encode(b"\0".join([*contents, b""])).astype(tokenizer.dtype)
        ends = np.flatnonzero(tokens == tokenizer.separator_id)
        if len(ends) == len(contents):  # no NUL in the texts
            tokens[ends] = tokenizer.eos_id
            return tokens, np.diff(ends, prepend=-1)
    encode = (fast or tokenizer).encode
    eos = np.array([tokenizer.eos_id])
    each = [np.append(encode(content), eos).astype(tokenizer.dtype) for content in contents]
    return np.concatenate([*each, eos[:0].astype(tokenizer.dtype)]), np.array(list(map(len, each)), np.int64)


def choose_encoder(
    tokenizer: Tokenizer, definition: bytes, texts: Iterable[str]
) -> tuple[FastEncoder | None, EncoderInfo]:
    """The fast encoder, or None where sentencepiece has to encode, which a line in the log explains.

    Args:
        definition: the content of the model's tokenizer.json.
        texts: to compare the two on, beside hostile ones.
    """
    version = metadata.version("sentencepiece")
    if tokenizer.info.model_type != "bpe" or not tokenizer.proto.trainer_spec.byte_fallback:
        _log.warning("sentencepiece encodes: the fast encoder knows only BPE models with byte fallback")
        return None, EncoderInfo(name="sentencepiece", version=version)
    try:
        fast = FastEncoder(definition)
    except Exception as error:  # not installed, or of no use on this machine or for this model
        reason = " ".join(str(error).split())[:200]
        _log.warning("sentencepiece encodes, some ten times as slowly: gigatoken cannot be used (%s)", reason)
        return None, EncoderInfo(name="sentencepiece", version=version)
    contents = [text.encode() for text in chain(hostile_texts(tokenizer), texts)]
    compared, differences = len(contents), _differences(contents, tokenizer, fast)
    if differences:
        _log.warning(
            "sentencepiece encodes, some ten times as slowly: gigatoken %s gives other ids for %s of %s texts",
            metadata.version("gigatoken"), f"{differences:,}", f"{compared:,}",
        )  # fmt: skip
        return None, EncoderInfo(name="sentencepiece", version=version, compared=compared, differences=differences)
    return fast, EncoderInfo(name="gigatoken", version=metadata.version("gigatoken"), compared=compared)


def _differences(contents: list[bytes], tokenizer: Tokenizer, fast: FastEncoder) -> int:
    """How many texts the two encode otherwise: alone, or with the others, as far as they hold no NUL."""
    together = [content for content in contents if b"\0" not in content]
    tokens, sizes = encode_each(together, tokenizer, fast)
    joined = iter(np.split(tokens, np.cumsum(sizes)))
    differences = 0
    for content in contents:
        ids = tokenizer.encode(content)
        same = np.array_equal(fast.encode(content), ids)
        if b"\0" not in content:
            same &= np.array_equal(next(joined)[:-1], ids)
        differences += not same
    return differences


def sample_texts(source: TextSource) -> Iterator[str]:
    """The beginning of each split: texts of its first task."""
    for split in source.splits:
        left = SAMPLE_CHARACTERS
        for task in islice(source.tasks(split), 1):
            for document in task.documents(ReadCounts()):
                yield document.text[:left]
                left -= len(document.text)
                if left <= 0:
                    break


def hostile_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts that tell tokenizers apart, the same ones every time."""
    rng = random.Random(0)
    pieces: list[str] = [piece.piece.replace(SPACE_MARK, " ") for piece in tokenizer.proto.pieces]
    spellings: list[str] = [piece.piece for piece in tokenizer.proto.pieces if piece.type not in (1, PIECE_BYTE)] + [
        "<0x41>"
    ]
    bits = [
        *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\0", SPACE_MARK, f" {SPACE_MARK}", "\ufffd", "\ufeff", "\u200d"),
        *(
            "e\u0301",
            "ﬁ",
            "½",
            "日本",
            "한국어",
            "العربية",
            "हिन्दी",
            "👩\u200d👧",
            "🏳️\u200d🌈",
            "🙂",
            "a",
            "the",
            "1",
            "=",
            "\x7f",
        ),
        *("\u00a0", "\u3000", "\u2028"),
    ]

    def bit() -> str:
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(pieces)
        if kind < 0.8:
            return rng.choice(bits)
        if kind < 0.9:
            return rng.choice(spellings)
        return chr(rng.choice((rng.randrange(0x250), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))))

    yield from SELF_TEST_TEXTS
    for _ in range(HOSTILE_TEXTS):
        yield "".join(bit() for _ in range(rng.randint(1, 16)))
    for text in (*bits, *spellings, "ab", "=-"):
        yield text * rng.randint(500, 1500)
