"""Datasets of any tokens with any chunk and shard sizes, shards written as the preparation writes them."""

import hashlib
from pathlib import Path

import numpy as np

from data_prep.hashing import hash_file
from data_prep.manifest import (
    SHARD_RECORD,
    Dataset,
    Manifest,
    SourceInfo,
    SplitInfo,
    TokenizerInfo,
    open_dataset,
)
from data_prep.packing import START, Chunk
from data_prep.shards import build_shard

Shards = list[list[np.ndarray]]  # tokens, by shard and chunk


def write_dataset(folder: Path, splits: dict[str, Shards], tokenizer_model: bytes = b"by hand") -> Dataset:
    """Writes and opens a dataset, `splits[name][shard][chunk]` its tokens; token 0 ends a document."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: _write_split(folder, name, shards) for name, shards in splits.items()}
    chunks = [chunk for shards in splits.values() for shard in shards for chunk in shard]
    chunks_per_shard = max(len(shard) for shards in splits.values() for shard in shards)
    return _write_manifest(folder, infos, max(map(len, chunks)), chunks_per_shard, tokenizer_model)


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
        records[number] = (len(shard.content), hashlib.sha256(shard.content).digest(), len(index), 0, b"")
        for chunk, offset in zip(chunks, shard.data_offsets, strict=True):
            index.append((chunk.token_start, chunk.document_start, number, offset))
    index.append((tokens, documents, len(shards), 0))
    return _save_index(folder, name, records, np.array(index, "<u8").T.copy(), shards[0][0].dtype.itemsize)


def write_hollow_dataset(folder: Path, num_shards: int, chunks_per_shard: int, chunk_tokens: int) -> Dataset:
    """The manifest and index of full shards that are not there; `fill_shards` makes some of them.

    All shards have one layout, so the index is made without the shards' content.
    """
    folder.mkdir(parents=True, exist_ok=True)
    empty = np.zeros(0, "<u4")
    chunks = [
        Chunk(number, np.zeros(chunk_tokens, "<u2"), empty, [], 0, 0, START, 0) for number in range(chunks_per_shard)
    ]
    shard = build_shard(chunks)
    records = np.zeros(num_shards, SHARD_RECORD)
    records["bytes"] = len(shard.content)
    records["first_chunk"] = np.arange(num_shards, dtype="<u8") * chunks_per_shard
    index = np.empty((4, num_shards * chunks_per_shard + 1), "<u8")
    index[0] = np.arange(index.shape[1]) * chunk_tokens
    index[1] = 0
    index[2] = np.arange(index.shape[1]) // chunks_per_shard
    index[3, :-1] = np.tile(shard.data_offsets, num_shards)
    index[3, -1] = 0
    info = _save_index(folder, "train", records, index, 2)
    return _write_manifest(folder, {"train": info}, chunk_tokens, chunks_per_shard, b"by hand")


def fill_shards(dataset: Dataset, shards: set[int]) -> None:
    """Sparse files of zeros, of the recorded size."""
    index = dataset.split("train")
    for shard in shards:
        with open(Path(dataset.folder) / index.shard_name(shard), "wb") as file:
            file.truncate(index.shard_bytes(shard))


def _write_manifest(
    folder: Path, infos: dict[str, SplitInfo], chunk_tokens: int, chunks_per_shard: int, tokenizer_model: bytes
) -> Dataset:
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
        chunk_tokens=chunk_tokens,
        chunks_per_shard=chunks_per_shard,
        filters={},
        splits=infos,
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return open_dataset(folder)


def _save_index(folder: Path, name: str, records: np.ndarray, index: np.ndarray, token_bytes: int) -> SplitInfo:
    return SplitInfo(
        shards=len(records),
        chunks=index.shape[1] - 1,
        tokens=int(index[0, -1]),
        documents=int(index[1, -1]),
        source_bytes=int(index[0, -1]),
        source_rows=0,
        words=0,
        lines=0,
        dtype="<u2" if token_bytes == 2 else "<u4",
        dropped={},
        changed={},
        round_trip_documents=0,
        shards_index_sha256=_save(folder / f"{name}.shards.npy", records),
        chunks_index_sha256=_save(folder / f"{name}.chunks.npy", index),
    )


def _save(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return hash_file(path)
