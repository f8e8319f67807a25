"""A tokenizer folder from a source: trained, tested, written for both libraries, reused by the same command."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from data_prep.engines import ProcessEngine
from data_prep.errors import UserError
from data_prep.sources.documents import ReadCounts, TextSource
from data_prep.store import FolderStore, explained_write_errors, sync_folder
from data_prep.tokenizers.hf_tokenizer import UNIGRAM_NOTE, tokenizer_files
from data_prep.tokenizers.tokenizer import (
    Tokenizer,
    TokenizerSettings,
    load_tokenizer,
    train_tokenizer,
    training_lines,
    vocabulary_advice,
)
from data_prep.tokenizers.training_progress import Pace, heard

RECORD_NAME = "training.json"  # what the tokenizer was trained on


def make_tokenizer(source: TextSource, settings: TokenizerSettings, output: Path) -> Iterator[str]:
    """Trains and writes a tokenizer folder, or finds it there; yields lines to show.

    The work is done in a process of its own, which Ctrl-C ends whatever it is at.

    Raises UserError if the folder holds another tokenizer, or the text cannot be read or is too small.
    """
    store = FolderStore(output)
    content = store.read(RECORD_NAME)
    if content is None and (strangers := store.names()):
        raise UserError(
            f"{output}: the folder holds other files ({', '.join(strangers[:3])}); choose a new or empty folder"
        )
    with ProcessEngine(1).start(_Job(settings, train=content is None)) as run:
        if content is None:
            yield f"training a {settings.model_type} tokenizer of {settings.vocab_size:,} pieces on {source.name} …"
        (done,) = run([source])  # type: ignore[list-item]
    record = {"source": _described(source), "settings": asdict(settings), "texts_sha256": done.texts_sha256}
    record = json.loads(json.dumps(record))
    if content is not None:
        _compare(output, content, record)
        yield f"{output}: this tokenizer is already there; left as it is"
        yield _summary(load_tokenizer(output))
        return
    tokenizer = Tokenizer(done.model, "the tokenizer just trained")
    if lossy := tokenizer.lossy_texts():
        raise UserError(f"the tokenizer does not give back {lossy[0]!r}; report this as a fault of the program")
    _write(output, {**tokenizer_files(tokenizer), RECORD_NAME: json.dumps(record, indent=2).encode() + b"\n"})
    yield _summary(tokenizer)
    if settings.model_type == "unigram":
        yield f"note: {UNIGRAM_NOTE}"
    if advice := vocabulary_advice(settings.vocab_size, done.trained_bytes):
        yield f"note: {advice}"


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """The whole folder or none of it: what lies there is nobody else's, however the writing ends."""
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, content in files.items():
        FolderStore(partial).publish(name, content)
    with explained_write_errors(folder):
        partial.rename(folder)
        sync_folder(folder.parent)


def _described(source: TextSource) -> dict[str, Any]:
    return {"name": source.name, "settings": source.settings, "fingerprint": source.fingerprint()}


def _compare(output: Path, content: bytes, record: dict[str, Any]) -> None:
    """Raises UserError, naming what differs, unless the tokenizer there was made of this text with these settings."""
    try:
        there = json.loads(content)
        differing = [key for key in record if there.get(key) != record[key]]
    except (ValueError, AttributeError):
        raise UserError(f"{output}/{RECORD_NAME}: damaged; choose another folder, or delete this one") from None
    if "texts_sha256" not in there:
        raise UserError(
            f"{output}: holds a tokenizer whose record does not say what text it was made of (an earlier version wrote "
            "it); use it as it is, or choose another folder"
        )
    if differing:
        names = {"source": "source options", "settings": "settings", "texts_sha256": "text"}
        raise UserError(
            f"{output}: holds a tokenizer made with another {' and another '.join(names[key] for key in differing)}; "
            "choose another folder, or delete this one"
        )


def spread_texts(source: TextSource, training_bytes: int, pace: Pace) -> Iterator[str]:
    """The texts to learn from: of a train split larger than `training_bytes`, spread evenly over it.

    The rule: a task (about a mebibyte in a row) is taken if the texts taken so far are no more than its place in the
    split asks for, `training_bytes` · bytes before it / bytes of the split. So the choice depends on the text alone.
    Where nobody knows how large the split is, as behind the hub's streams, its first texts are taken.
    """
    total = source.total_bytes("train")
    before = taken = 0
    for task in source.tasks("train"):
        if not total or total <= training_bytes or taken <= training_bytes * before / total:
            for document in task.documents(ReadCounts()):
                taken += len(document.text.encode("utf-8", "replace"))
                yield document.text
        before += task.source_bytes
        words = f"{before / 1e9:.2f}{f' of {total / 1e9:.2f}' if total else ''} GB, {taken / 1e6:,.0f} MB to learn from"
        pace(words, before / total if total else taken / training_bytes)


@dataclass(frozen=True)
class _Done:
    model: bytes
    texts_sha256: str
    trained_bytes: int


@dataclass(frozen=True)
class _Job:
    """Reads what a tokenizer is trained on, and trains it if `train`; pickles to the process that does it."""

    settings: TokenizerSettings
    train: bool

    def __call__(self, source: TextSource) -> _Done:
        sha256 = hashlib.sha256()
        trained_bytes = 0

        def lines(out: TextIO) -> Iterator[str]:
            nonlocal trained_bytes
            texts = spread_texts(source, self.settings.training_bytes, Pace("reading", out))
            for line in training_lines(texts, self.settings.training_bytes):
                content = line.encode("utf-8", "replace") + b"\n"
                sha256.update(content)
                trained_bytes += len(content) - 1
                yield line

        model = b""
        if self.train:
            with heard(self.settings) as out:
                model = train_tokenizer(lines(out), self.settings, log=True).model
        else:
            for _ in lines(sys.stderr):
                pass
        if changed := source.changed("train"):
            raise UserError([f"{name}: changed while it was read; run the same command again" for name in changed])
        return _Done(model, sha256.hexdigest(), min(trained_bytes, self.settings.training_bytes))


def _summary(tokenizer: Tokenizer) -> str:
    info = tokenizer.info
    return (
        f"{info.model_type} tokenizer, {info.vocab_size:,} pieces, sha256 {info.sha256[:16]}; "
        f"unk {info.unk_token_id}, bos {info.bos_token_id}, eos {info.eos_token_id}, pad {info.pad_token_id}"
    )
