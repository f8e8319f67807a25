"""Train, load and fingerprint a sentencepiece model, so that decode(encode(text)) == text.

The flags that make it lossless: identity normalisation, extra white space kept, no dummy prefix, and bytes
for characters outside the vocabulary. Text is trained on line by line, so no piece holds a newline.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, AnyStr, Literal

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_prep.errors import UserError
from data_prep.manifest import TokenizerInfo

MODEL_NAME = "tokenizer.model"
SPACE_MARK = "\u2581"  # what sentencepiece writes for a space: such a character in the text becomes a space
UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
PIECE_NORMAL, PIECE_USER_DEFINED, PIECE_BYTE = 1, 4, 6
SEGMENT_LENGTH = 1 << 20
LARGEST_VOCABULARY = 1 << 20

SELF_TEST_TEXTS = [
    "", " ", "  ", " a", "a ", "a  b   c", "\n", "\n\n", "a\n\n  b ", "\ta\r\nb\r", " = Title = \n \n text \n",
    "</s>", "<s>a</s>b<unk><pad>", "a </s> b", "<0x41>", "½ ﬁ … Å Å", "日本語の文 العربية עברית हिन्दी",
    "👩\u200d👩\u200d👧 🏳️\u200d🌈 e\u0301", "\u00a0nbsp\u3000wide\u200bzero", "\x00\x01\x7f\ufeff\ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaa ==== ---- ....", "1234567890 3.14159 1,000,000", "don't @-@ @,@ \"quoted\" <b>",
]  # fmt: skip


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of a tokenizer's training.

    Attributes:
        vocab_size: pieces, the four special ones and the 256 bytes included.
        model_type: "bpe" trains in seconds, and its ids do not depend on how text is cut; "unigram" may
            compress a little better.
        training_bytes: how much text to learn from, at most; `train.spread_texts` says which.
    """

    vocab_size: int = 8192
    model_type: Literal["bpe", "unigram"] = "bpe"
    training_bytes: int = 100_000_000


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings, log: bool = False) -> Tokenizer:
    """Trains on documents; the same texts and settings give the same model.

    Args:
        log: let sentencepiece tell standard error what it does.

    Raises UserError, with the largest possible vocabulary, if the text is too small for `vocab_size`.
    """
    smallest = 256 + 4 + 1
    if settings.vocab_size < smallest:
        raise UserError(f"vocab_size is {settings.vocab_size}; the least is {smallest} (256 bytes, 4 special pieces)")
    if settings.vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"vocab_size is {settings.vocab_size:,}; the most is {LARGEST_VOCABULARY:,}")
    if settings.training_bytes < 1:
        raise UserError(f"training_bytes is {settings.training_bytes}; it must be 1 or more")
    model = io.BytesIO()
    lines = training_lines(texts, settings.training_bytes)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type=settings.model_type,
            vocab_size=settings.vocab_size,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            byte_fallback=True,
            max_sentence_length=1 << 30,
            shuffle_input_sentence=False,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=PAD_ID,
            num_threads=1 if settings.model_type == "unigram" else 16,  # unigram's pieces depend on it
            minloglevel=0 if log else 2,
        )
    except RuntimeError as error:
        raise UserError(_training_advice(str(error), settings)) from None
    return Tokenizer(model.getvalue(), "the tokenizer just trained")


LINE = re.compile(r"[^\n]+")


def training_lines(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    """The lines to learn from: those that are not blank, up to a number of bytes."""
    seen_bytes = 0
    for text in texts:
        for match in LINE.finditer(text):  # one at a time: a text may be large
            line = match[0]
            if line.strip():
                seen_bytes += len(line.encode("utf-8", "replace"))
                yield line
            if seen_bytes >= limit_bytes:
                return


def _training_advice(error: str, settings: TokenizerSettings) -> str:
    if limit := re.search(r"set it to a value <= (\d+)", error):
        return (
            f"vocab_size is {settings.vocab_size:,}, but this text has pieces for at most {int(limit[1]):,}; "
            f"set vocab_size to {int(limit[1]):,} or less, or give more text"
        )
    if least := re.search(r"smaller than required_chars\.? *(\d+) vs (\d+)", error):
        return (
            f"vocab_size is {settings.vocab_size:,}, but the characters of this text alone need "
            f"{int(least[2]):,}; set vocab_size to more than {int(least[2]):,}"
        )
    if "sentences_.empty" in error or "Input is empty" in error:
        return "the source has no text to train a tokenizer on; check its path and its text column"
    return f"sentencepiece could not train: {error.strip()}"


def vocabulary_advice(vocab_size: int, training_bytes: int) -> str | None:
    """A line of advice if the text is small for the vocabulary, else None.

    The rarest pieces of a vocabulary of V follow Zipf's law: over n pieces of text the last one is met
    about n / (V ln V) times. Under some 20 meetings its embedding learns little.
    """
    pieces = training_bytes / 4
    meetings = pieces / (vocab_size * float(np.log(vocab_size)))
    if meetings >= 20:
        return None
    size = 512
    while pieces / (2 * size * float(np.log(2 * size))) >= 20:
        size *= 2
    return (
        f"vocab_size {vocab_size:,} is large for {training_bytes / 1e6:,.1f} MB of text: its rarest pieces are "
        f"met about {meetings:.1f} times; {size:,} would suit it (advice only: the tokenizer is complete)"
    )


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer folder or a `.model` file.

    Raises UserError if there is none, or it is not a sentencepiece model, or it has no eos piece.
    """
    path = Path(path)
    model = path / MODEL_NAME if path.is_dir() else path
    if not model.is_file():
        raise UserError(f"{model}: no such tokenizer; train one with `globallocal tokenizer --output FOLDER`")
    return Tokenizer(model.read_bytes(), str(model))


class Tokenizer:
    """A sentencepiece model in memory; `where` names it in errors. Pickles as its bytes."""

    def __init__(self, model: bytes, where: str) -> None:
        self.model = model
        self.where = where
        self.proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        try:
            self.proto.ParseFromString(model)
            if not self.proto.pieces:
                raise ValueError("no pieces")
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except Exception:
            raise UserError(f"{where}: not a sentencepiece model; give the .model file itself") from None
        if self.processor.eos_id() < 0:
            raise UserError(f"{where}: the model has no eos piece, which ends every document; train one that has it")

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.model, self.where)

    @cached_property
    def sha256(self) -> str:
        """Hex sha256 of the model file."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def vocab_size(self) -> int:
        return self.processor.vocab_size()

    @property
    def eos_id(self) -> int:
        return self.processor.eos_id()

    @cached_property
    def dtype(self) -> np.dtype:
        """The smallest type that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    @cached_property
    def info(self) -> TokenizerInfo:
        processor = self.processor
        return TokenizerInfo(
            sha256=self.sha256,
            sentencepiece_version=metadata.version("sentencepiece"),
            model_type=MODEL_TYPES[self.proto.trainer_spec.model_type],
            vocab_size=self.vocab_size,
            eos_token_id=processor.eos_id(),
            bos_token_id=processor.bos_id(),
            pad_token_id=processor.pad_id(),
            unk_token_id=processor.unk_id(),
        )

    @cached_property
    def splits_at_spaces(self) -> bool:
        """Whether a text's ids are the ids of its space-led words, one after another.

        True of BPE when no piece reaches across a space, and nothing is done to the text as a whole: a
        merge across the cut would need a piece that holds a space mark after its first character.
        """
        spec = self.proto.normalizer_spec
        return (
            self.proto.trainer_spec.model_type == 2
            and spec.name == "identity"
            and not spec.add_dummy_prefix
            and not spec.remove_extra_whitespaces
            and not any(SPACE_MARK in piece.piece[1:] for piece in self.proto.pieces)
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Ids of a text or its UTF-8, [n] of `dtype`, without eos, as sentencepiece itself gives them."""
        return np.array(self.processor.encode(text), self.dtype)

    def parts(self, content: bytes) -> Iterator[bytes]:
        """A text's UTF-8 in parts whose ids, one after another, are the text's: bounds the memory for long ones."""
        return segments(content) if self.splits_at_spaces else iter([content])

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """The text of ids."""
        text: str = self.processor.decode(ids.tolist() if isinstance(ids, np.ndarray) else list(ids))
        return text

    @cached_property
    def separator_id(self) -> int | None:
        """The id of NUL where texts joined by it have the ids of each, joined by this one; None if there is none.

        No merge reaches across a character that is in no piece, and NUL then is always spelled as a byte.
        """
        if not self.splits_at_spaces or any("\0" in piece.piece for piece in self.proto.pieces):
            return None
        id: int = self.processor.piece_to_id("<0x00>")
        return id if self.proto.pieces[id].type == PIECE_BYTE else None

    def spells(self, ids: np.ndarray, content: bytes) -> bool:
        """Whether what ids [T] stand for, one after another, is this UTF-8.

        True of models that split at spaces, which do nothing but put pieces one after another: many times as
        fast as `decode`. A piece that stands for no text, eos among them, is spelled 0xff, which is in no text.
        """
        words, masks, lengths = self._spellings
        sizes = lengths[ids]
        places = np.cumsum(sizes)
        if (places[-1] if len(places) else 0) != len(content):
            return False
        places -= sizes
        padded = content + bytes(words.nbytes // words.shape[1])
        windows = np.ndarray(len(content) + 1, "<u8", padded, strides=(1,))  # the eight bytes from each place on
        for at, (word, mask) in enumerate(zip(words, masks, strict=True)):
            if at:
                longer = np.flatnonzero(sizes > 8 * at)
                sizes, ids, places = sizes[longer], ids[longer], places[longer] + 8
            if ((windows[places] ^ word[ids]) & mask[ids]).any():
                return False
        return True

    @cached_property
    def _spellings(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each piece stands for: eight bytes a word [W, V], which of their bits count [W, V], bytes in all [V]."""

        def spelling(piece: Any) -> bytes:
            if piece.type == PIECE_BYTE:
                return bytes([int(piece.piece[3:5], 16)])
            if piece.type in (PIECE_NORMAL, PIECE_USER_DEFINED):
                return bytes(piece.piece.replace(SPACE_MARK, " ").encode())
            return b"\xff"

        spellings = [spelling(piece) for piece in self.proto.pieces]
        spellings[self.eos_id] = b"\xff"
        lengths = np.array([len(spelling) for spelling in spellings])
        width = -(-int(lengths.max()) // 8) * 8
        words, masks = (
            np.ascontiguousarray(np.frombuffer(b"".join(rows), "<u8").reshape(len(spellings), -1).T)
            for rows in (
                [spelling.ljust(width, b"\0") for spelling in spellings],
                [(b"\xff" * len(spelling)).ljust(width, b"\0") for spelling in spellings],
            )
        )
        return words, masks, lengths

    def lossy_texts(self, texts: Iterable[str] = SELF_TEST_TEXTS) -> list[str]:
        """The texts among `texts` that encode and decode do not give back."""
        return [text for text in texts if self.decode(self.encode(text)) != text]


def segments(text: AnyStr) -> Iterator[AnyStr]:
    """A text, or its UTF-8, cut before spaces, about every `SEGMENT_LENGTH`: very long ones take bounded memory."""
    space: AnyStr = " " if isinstance(text, str) else b" "
    begin = 0
    while len(text) - begin > SEGMENT_LENGTH and (end := text.find(space, begin + SEGMENT_LENGTH)) > 0:
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text
