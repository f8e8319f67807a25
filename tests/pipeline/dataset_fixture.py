"""Datasets of any tokens with any chunk and shard sizes, shards written as the preparation writes them."""

import hashlib
import io
from pathlib import Path

import numpy as np

from data_prep.manifest import SHARD_RECORD, Dataset, Manifest, SourceInfo, SplitInfo, TokenizerInfo, open_dataset
from data_prep.packing import START, Chunk
from data_prep.shards import build_shard

Shards = list[list[np.ndarray]]  # tokens, by shard and chunk


def write_dataset(folder: Path, splits: dict[str, Shards], tokenizer_model: bytes = b"by hand") -> Dataset:
    """Writes and opens a dataset, `splits[name][shard][chunk]` its tokens; token 0 ends a document."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: _write_split(folder, name, shards) for name, shards in splits.items()}
    chunks = [chunk for shards in splits.values() for shard in shards for chunk in shard]
    tokenizer = TokenizerInfo(
        sha256=hashlib.sha256(tokenizer_model).hexdigest(),
        sentencepiece_version="0.2.1",
        model_type="bpe",
        vocab_size=1 << 16,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=2,
        unk_token_id=3,
    )
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(tokenizer_model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_text("{}")
    manifest = Manifest(
        format_version=1,
        source=SourceInfo(name="by-hand", settings={}, fingerprint="0" * 64),
        tokenizer=tokenizer,
        chunk_tokens=max(map(len, chunks)),
        chunks_per_shard=max(len(shard) for shards in splits.values() for shard in shards),
        filters={},
        splits=infos,
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return open_dataset(folder)


def cut(tokens: np.ndarray, chunk_tokens: int, chunks_per_shard: int) -> Shards:
    """Equal chunks in equal shards, the last ones shorter."""
    chunks = [tokens[i : i + chunk_tokens] for i in range(0, len(tokens), chunk_tokens)]
    return [chunks[i : i + chunks_per_shard] for i in range(0, len(chunks), chunks_per_shard)]


def write_stream(folder: Path, tokens: np.ndarray, chunk_tokens: int, chunks_per_shard: int) -> Dataset:
    """A dataset with the one split `train`."""
    return write_dataset(folder, {"train": cut(tokens, chunk_tokens, chunks_per_shard)})


def _write_split(folder: Path, name: str, shards: Shards) -> SplitInfo:
    records = np.zeros(len(shards), SHARD_RECORD)
    index: list[tuple[int, int, int, int]] = []  # rows as in CHUNK_ROWS
    tokens = documents = 0
    for number, arrays in enumerate(shards):
        chunks = []
        for array in arrays:
            starts = np.flatnonzero(array == 0).astype("<u4") + 1
            chunks.append(Chunk(len(index) + len(chunks), array, starts, [], tokens, documents, START, 0))
            tokens, documents = tokens + len(array), documents + int((array == 0).sum())
        shard = build_shard(chunks)
        (folder / f"{name}-{number:06d}.tar").write_bytes(shard.content)
        records[number] = (len(shard.content), bytes.fromhex(shard.sha256), len(index), 0, b"")
        for chunk, offset in zip(chunks, shard.data_offsets, strict=True):
            index.append((chunk.token_start, chunk.document_start, number, offset))
    index.append((tokens, documents, len(shards), 0))
    return SplitInfo(
        shards=len(shards),
        chunks=len(index) - 1,
        tokens=tokens,
        documents=documents,
        source_bytes=tokens,
        source_rows=0,
        words=0,
        lines=0,
        dtype="<u2" if shards[0][0].dtype.itemsize == 2 else "<u4",
        dropped={},
        changed={},
        round_trip_documents=0,
        shards_index_sha256=_save(folder / f"{name}.shards.npy", records),
        chunks_index_sha256=_save(folder / f"{name}.chunks.npy", np.array(index, "<u8").T.copy()),
    )


def _save(path: Path, array: np.ndarray) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()
