"""The settings and the progress of a preparation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.encode import Filters
from data_prep.engines import Engine, InProcess
from data_prep.manifest import FORMAT_VERSION, SourceInfo
from data_prep.sources.documents import TextSource
from data_prep.tokenizers.tokenizer import Tokenizer

# 8 MiB per member and 32 MiB per shard: a chunk costs about 1,900 bytes of tar and .npy headers and padding, and
# 4 bytes per document, in all less than a thousandth of its tokens at the lengths of Wikipedia's articles.
CHUNK_TOKENS = 1 << 22
CHUNKS_PER_SHARD = 4


@dataclass(frozen=True)
class PrepareSettings:
    """The settings of a preparation.

    Attributes:
        source: where the text comes from.
        tokenizer: what makes it tokens.
        output: the dataset folder, or an fsspec URL.
        filters: what to leave out; nothing by default.
        engine: who encodes; this process alone by default.
        chunk_tokens: tokens per chunk.
        chunks_per_shard: chunks per tar.
    """

    source: TextSource
    tokenizer: Tokenizer
    output: str | Path
    filters: Filters = field(default_factory=Filters)
    engine: Engine = field(default_factory=InProcess)
    chunk_tokens: int = CHUNK_TOKENS
    chunks_per_shard: int = CHUNKS_PER_SHARD

    def subject(self) -> dict[str, Any]:
        """The text and the settings that decide the dataset's bytes, as JSON values: a rerun needs the same."""
        source = self.source
        info = SourceInfo(name=source.name, settings=source.settings, fingerprint=source.fingerprint())
        subject = {
            "format_version": FORMAT_VERSION,
            "source": info.model_dump(exclude={"texts"}),
            "splits": source.splits,
            "tokenizer": self.tokenizer.info.model_dump(),
            "chunk_tokens": self.chunk_tokens,
            "chunks_per_shard": self.chunks_per_shard,
            "filters": self.filters.settings(),
        }
        plain: dict[str, Any] = json.loads(json.dumps(subject))
        return plain


@dataclass(frozen=True)
class PrepareProgress:
    """The progress of a preparation, told after every task. `total_bytes` is None where nobody knows it;
    everything counts from the start of the split, what an earlier attempt did included."""

    split: str
    done_bytes: int
    total_bytes: int | None
    documents: int
    tokens: int
    shards: int


def in_order_of_work(splits: list[str]) -> list[str]:
    """Train comes last: of the others, which are small, the digests of all documents are kept to compare with."""
    return sorted(splits, key=lambda split: split == "train")
