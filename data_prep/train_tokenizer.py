"""A tokenizer folder from a source: trained, tested, written with its twin, and reused by the same command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.documents import Source, read_documents
from data_prep.errors import UserError
from data_prep.store import FolderStore
from data_prep.tokenizer import (
    Tokenizer,
    TokenizerSettings,
    load_tokenizer,
    train_tokenizer,
    vocabulary_advice,
)
from data_prep.twin import UNIGRAM_NOTE, write_tokenizer

RECORD_NAME = "training.json"  # written last: what the tokenizer was trained on


def make_tokenizer(source: Source, settings: TokenizerSettings, output: Path) -> Iterator[str]:
    """Trains and writes a tokenizer folder, or finds it there; yields lines to show.

    Raises UserError if the folder holds another tokenizer, or the text cannot be read or is too small.
    """
    subject: dict[str, Any] = {
        "source": {"name": source.name, "settings": source.settings, "fingerprint": source.fingerprint()},
        "settings": asdict(settings),
    }
    subject = json.loads(json.dumps(subject))
    record = output / RECORD_NAME
    if record.exists():
        if json.loads(record.read_bytes()) != subject:
            raise UserError(
                f"{output}: holds a tokenizer made from another text or with other settings; "
                "choose another folder, or delete this one"
            )
        yield f"{output}: this tokenizer is already there; left as it is"
        yield _summary(load_tokenizer(output))
        return
    if output.exists() and any(output.iterdir()) and not (output / "tokenizer.model").exists():
        raise UserError(f"{output}: the folder holds other files; choose a new or empty folder")
    trained_bytes = 0

    def texts() -> Iterator[str]:
        nonlocal trained_bytes
        for document in read_documents(source, "train"):
            trained_bytes += len(document.text.encode())
            yield document.text

    yield f"training a {settings.model_type} tokenizer of {settings.vocab_size:,} pieces on {source.name} …"
    tokenizer = train_tokenizer(texts(), settings)
    if lossy := tokenizer.lossy_texts():
        raise UserError(f"the tokenizer does not give back {lossy[0]!r}; report this as a fault of the program")
    write_tokenizer(output, tokenizer)
    FolderStore(output).publish(RECORD_NAME, json.dumps(subject, indent=2, ensure_ascii=False).encode() + b"\n")
    yield _summary(tokenizer)
    if settings.model_type == "unigram":
        yield f"note: {UNIGRAM_NOTE}"
    if advice := vocabulary_advice(settings.vocab_size, min(trained_bytes, settings.training_bytes)):
        yield f"note: {advice}"


def _summary(tokenizer: Tokenizer) -> str:
    info = tokenizer.info
    return (
        f"{info.model_type} tokenizer, {info.vocab_size:,} pieces, sha256 {info.sha256[:16]}; "
        f"unk {info.unk_token_id}, bos {info.bos_token_id}, eos {info.eos_token_id}, pad {info.pad_token_id}"
    )
