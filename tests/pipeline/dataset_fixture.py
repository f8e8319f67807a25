"""Datasets written by hand in the folder's layout, with any chunk and shard sizes and any tokens."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np

from data_prep.manifest import (
    SHARD_RECORD,
    Dataset,
    Manifest,
    SourceInfo,
    SplitInfo,
    TokenizerInfo,
    open_dataset,
)


def write_dataset(
    folder: Path, splits: dict[str, list[list[np.ndarray]]], tokenizer_sha256: str = "0" * 64
) -> Dataset:
    """Writes shards of chunks of tokens, `splits[name][shard][chunk]`, and the manifest, and opens it."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: _write_split(folder, name, shards) for name, shards in splits.items()}
    manifest = Manifest(
        format_version=1,
        source=SourceInfo(name="by-hand", settings={}, fingerprint="0" * 64),
        tokenizer=TokenizerInfo(
            sha256=tokenizer_sha256,
            sentencepiece_version="0.2.1",
            model_type="bpe",
            vocab_size=1 << 16,
            eos_token_id=0,
            bos_token_id=1,
            pad_token_id=2,
            unk_token_id=3,
        ),
        chunk_tokens=max(len(c) for shards in splits.values() for s in shards for c in s),
        chunks_per_shard=max(len(s) for shards in splits.values() for s in shards),
        filters={},
        splits=infos,
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return open_dataset(folder)


def write_stream(folder: Path, tokens: np.ndarray, chunk_tokens: int, chunks_per_shard: int) -> Dataset:
    """A dataset with one split `train` of equal chunks, the last one shorter."""
    chunks = [tokens[i : i + chunk_tokens] for i in range(0, len(tokens), chunk_tokens)]
    shards = [chunks[i : i + chunks_per_shard] for i in range(0, len(chunks), chunks_per_shard)]
    return write_dataset(folder, {"train": shards})


def _write_split(folder: Path, name: str, shards: list[list[np.ndarray]]) -> SplitInfo:
    dtype = np.dtype(shards[0][0].dtype.newbyteorder("<"))
    records = np.zeros(len(shards), SHARD_RECORD)
    columns: list[list[int]] = [[], [], [], []]
    tokens = 0
    for number, chunks in enumerate(shards):
        records["first_chunk"][number] = len(columns[0])
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for chunk in chunks:
                npy = io.BytesIO()
                np.save(npy, chunk.astype(dtype))
                member = tarfile.TarInfo(f"{len(columns[0]):08d}.tokens.npy")
                member.size = len(npy.getvalue())
                header_bytes = member.size - chunk.nbytes
                data_offset = buffer.tell() + tarfile.BLOCKSIZE + header_bytes
                tar.addfile(member, io.BytesIO(npy.getvalue()))
                for column, value in zip(columns, (tokens, 0, number, data_offset), strict=True):
                    column.append(value)
                tokens += len(chunk)
        (folder / f"{name}-{number:06d}.tar").write_bytes(buffer.getvalue())
        records["bytes"][number] = len(buffer.getvalue())
        records["sha256"][number] = hashlib.sha256(buffer.getvalue()).digest()
    for column, value in zip(columns, (tokens, 0, len(shards), 0), strict=True):
        column.append(value)
    hashes = {}
    for suffix, array in (("shards", records), ("chunks", np.array(columns, "<u8"))):
        np.save(folder / f"{name}.{suffix}.npy", array)
        hashes[suffix] = hashlib.sha256((folder / f"{name}.{suffix}.npy").read_bytes()).hexdigest()
    return SplitInfo(
        shards=len(shards),
        chunks=len(columns[0]) - 1,
        tokens=tokens,
        documents=0,
        source_bytes=tokens,
        source_rows=0,
        words=0,
        lines=0,
        dtype="<u2" if dtype.itemsize == 2 else "<u4",
        dropped={},
        changed={},
        round_trip_documents=0,
        shards_index_sha256=hashes["shards"],
        chunks_index_sha256=hashes["chunks"],
    )
