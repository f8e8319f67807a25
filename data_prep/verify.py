"""Is a dataset whole, in a folder or at a URL? Every fault in one run, one line each."""

from __future__ import annotations

import hashlib
import re
import tarfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from data_prep.errors import UserError
from data_prep.hashing import Digest, check_file, check_hash, check_size, hasher
from data_prep.manifest import (
    HF_TOKENIZER_FILES,
    MANIFEST_NAME,
    MODEL_FILE,
    Dataset,
    Manifest,
    SplitIndex,
    index_files,
    opened,
    texts_name,
)
from data_prep.remote import UnreachableError
from data_prep.shards import read_array, read_members
from data_prep.store import FolderStore, Store
from data_prep.threads import in_threads
from data_prep.tokenizers.hf_tokenizer import differing_texts
from data_prep.tokenizers.tokenizer import MODEL_NAME, SELF_TEST_TEXTS, SPACE_MARK, load_tokenizer, segments

Depth = Literal["quick", "full", "deep"]


@dataclass
class VerifyReport:
    """The result of a check: `problems`, and `lines` that say what was checked."""

    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def verify_dataset(location: str | Path, depth: Depth = "full") -> VerifyReport:
    """Checks a dataset in a folder or at a URL. Raises UserError if it cannot be opened at all.

    Args:
        depth: "quick" looks at the presence and sizes of files; "full" also at every byte: hashes, the
            structure of the tars, counts, the range of ids, eos after each document; "deep" also decodes
            every document, and encodes it anew with sentencepiece itself.
    """
    report = VerifyReport()
    with opened(location) as dataset:
        try:
            listed = _check_all(dataset, depth, report)
        except UnreachableError as error:  # no fault of the dataset; each further file would be waited for as long
            report.problems += [f"{problem}; what comes after it was not checked" for problem in error.problems]
    if not report.problems:
        report.lines = [*summary(dataset.manifest), f"{dataset.store.where}: whole ({_what(depth)})"]
        if not listed:
            report.lines.append("extra files were not looked for: the server lists no files")
    return report


def _check_all(dataset: Dataset, depth: Depth, report: VerifyReport) -> bool:
    """Adds every problem to the report; returns whether there was a list of the files to look for extra ones in."""
    store = dataset.store
    sizes = store.sizes()
    listed = MANIFEST_NAME in sizes
    if listed:
        report.problems += _extra_files(dataset, sizes)
    report.problems += _check_counts(dataset)
    report.problems += _check_tokenizer(dataset, depth)
    for split, sha256 in dataset.manifest.source.texts.items():
        content = store.read(texts_name(split))
        where = f"{store.where}/{texts_name(split)}"
        actual = None if content is None else len(content)
        report.problems += check_size(where, actual, 0 if actual is None else actual)
        if content is not None and depth != "quick":
            report.problems += check_hash(where, hashlib.sha256(content).hexdigest(), Digest("sha256", sha256))
    for index in dataset.indexes.values():
        check = partial(_check_shard, dataset, sizes, depth, index)
        several = in_threads if isinstance(store, FolderStore) else map  # a server gets one request after another
        for problems in several(check, range(index.num_shards)):
            report.problems += problems
        if depth == "deep" and not report.problems:
            report.problems += _check_tokens(dataset, index)
    return listed


def _check_shard(
    dataset: Dataset, sizes: dict[str, int | None], depth: Depth, index: SplitIndex, shard: int
) -> list[str]:
    """Problems of a shard and of its documents' ids. Raises UnreachableError."""
    store, record, found = dataset.store, index.shards[shard], list[str]()
    for name, num_bytes, digest in (
        (index.shard_name(shard), int(record["bytes"]), index.shard_digest(shard)),
        (index.ids_name(shard), int(record["ids_bytes"]), index.ids_digest(shard)),
    ):
        problems = _check_size(store, sizes, name, num_bytes)
        if not problems and depth != "quick":
            try:
                content, actual = _read_hashed(store, name, num_bytes, digest)
            except UnreachableError:
                raise
            except UserError as error:
                problems = error.problems
            else:
                problems = check_hash(f"{store.where}/{name}", actual, digest)
                if not problems and name == index.shard_name(shard):
                    problems = _check_structure(dataset, index, shard, content)
        found += problems
    return found


_buffer = threading.local()


def _read_hashed(store: Store, name: str, num_bytes: int, digest: Digest) -> tuple[memoryview, str]:
    """A file of so many bytes, and its hash in hex digits.

    The thread's next file takes the place of this one: the pages of a new buffer would have to be made first.
    """
    if len(getattr(_buffer, "bytes", b"")) < num_bytes:
        _buffer.bytes = bytearray(num_bytes)
    content, hashed = memoryview(_buffer.bytes)[:num_bytes], hasher(digest.algorithm)
    store.read_into(name, content, hashed.update)
    return content, hashed.hexdigest()


def _check_size(store: Store, sizes: dict[str, int | None], name: str, expected: int) -> list[str]:
    """Sizes come with the listing; what is not in it is asked for."""
    where = f"{store.where}/{name}"
    actual = sizes.get(name)
    try:
        return check_size(where, store.size(name) if actual is None else actual, expected)
    except UnreachableError:
        raise
    except UserError as error:
        return error.problems


def _what(depth: Depth) -> str:
    checked = "manifest, indexes, presence and sizes of all files"
    if depth != "quick":
        checked += ", hashes, tar structure, counts, ids, eos"
    return checked + (", every document decoded and encoded anew" if depth == "deep" else "")


def summary(manifest: Manifest) -> list[str]:
    """A few lines that say what a dataset holds, losses and changes included."""
    lines = [f"dataset {manifest.dataset_id[:16]} from {manifest.source.name}"]
    for name, info in manifest.splits.items():
        lines.append(
            f"{name}: {info.documents:,} documents, {info.source_bytes:,} bytes, {info.tokens:,} tokens "
            f"({info.source_bytes / info.tokens:.3f} bytes per token) in {info.shards:,} shards; "
            f"{info.round_trip_documents:,} of {info.documents:,} documents decoded and compared"
        )
        if lossy := info.documents - info.round_trip_documents:
            lines.append(f"{name}: {lossy:,} documents that decoding does not give back (--allow-lossy)")
        for split, count in info.also_in.items():
            lines.append(f"{name}: {count:,} documents also stand in {split}; --drop-duplicates works within a split")
        for reason, count in info.dropped.items():
            lines.append(f"{name}: {count:,} documents dropped: {reason}")
        for reason, count in info.changed.items():
            lines.append(f"{name}: {count:,} characters changed: {reason}")
    return lines


def _extra_files(dataset: Dataset, names: Iterable[str]) -> list[str]:
    known = {*index_files(dataset.manifest), *map(texts_name, dataset.manifest.source.texts)}
    for index in dataset.indexes.values():
        known |= {name(i) for i in range(index.num_shards) for name in (index.shard_name, index.ids_name)}
    return [
        f"{dataset.store.where}/{name}: belongs to no split of the manifest; move it away"
        for name in sorted(names)
        if name not in known and re.search(r"\.(tar|npy|jsonl)$", name)
    ]


def _check_counts(dataset: Dataset) -> list[str]:
    """Do the manifest's figures agree, with each other and with the indexes?

    Every row is a document or was dropped, and every document came back.
    """
    where = f"{dataset.store.where}/{MANIFEST_NAME}"
    problems = []
    for split, info in dataset.manifest.splits.items():
        index = dataset.indexes[split]
        counted = {
            "documents": int(index.document_start[-1]),
            "tokens": int(index.token_start[-1]),
            "chunks": len(index.chunk_shard),
            "shards": index.num_shards,
        }
        problems += [
            f"{where}: split '{split}' has {getattr(info, unit):,} {unit} here, but {count:,} in its index files; "
            "restore the manifest, or prepare the dataset again"
            for unit, count in counted.items()
            if getattr(info, unit) != count
        ]
        accounted = info.documents + sum(info.dropped.values())
        if accounted != info.source_rows:
            problems.append(
                f"{where}: split '{split}' was made of {info.source_rows:,} rows, but has {info.documents:,} documents "
                f"and {accounted - info.documents:,} dropped; the text changed while it was prepared: prepare it again"
            )
        lossy = info.documents - info.round_trip_documents
        if lossy and not dataset.manifest.filters.get("allow_lossy"):
            problems.append(
                f"{where}: split '{split}' has {lossy:,} documents that decoding did not give back, and --allow-lossy "
                "was not given; prepare it again"
            )
    return problems


def _check_tokenizer(dataset: Dataset, depth: Depth) -> list[str]:
    where = dataset.store.where
    hashes = {MODEL_FILE: dataset.manifest.tokenizer.sha256, **dict.fromkeys(HF_TOKENIZER_FILES)}
    problems = []
    for name, sha256 in hashes.items():
        digest = Digest("sha256", sha256) if sha256 else None
        problems += check_file(Path(dataset.folder) / name, None, digest, f"{where}/{name}")
    if problems or depth == "quick":
        return problems
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    try:
        hf_tokenizer = tokenizers.Tokenizer.from_file(str(dataset.tokenizer_folder / "tokenizer.json"))
        hf_tokenizer.encode_special_tokens = True  # not in the file: transformers has it from tokenizer_config.json
        same = hf_tokenizer.get_vocab_size() == tokenizer.vocab_size and not differing_texts(
            tokenizer, hf_tokenizer, SELF_TEST_TEXTS
        )
    except Exception:  # the library raises nothing more precise for a damaged file
        same = False
    if same or tokenizer.info.model_type != "bpe":
        return []
    return [
        f"{where}/{HF_TOKENIZER_FILES[0]}: not the Hugging Face form of {MODEL_NAME}; "
        "restore the file, or prepare the dataset again"
    ]


def _check_structure(dataset: Dataset, index: SplitIndex, shard: int, content: memoryview) -> list[str]:
    """Reads a shard as a tar; compares its members with the index, and their content with the contract."""
    where = f"{dataset.store.where}/{index.shard_name(shard)}"
    problems: list[str] = []
    chunks = np.arange(*np.searchsorted(index.chunk_shard, [shard, shard + 1]))
    try:
        names, members = zip(*read_members(content), strict=True)
        if list(names) != [f"{chunk:08d}.{kind}.npy" for chunk in chunks for kind in ("tokens", "docs")]:
            return [f"{where}: its members are not those of chunks {chunks[0]} to {chunks[-1]}"]
        for chunk, tokens, docs in zip(chunks, members[::2], members[1::2], strict=True):
            problems += _check_chunk(dataset, index, int(chunk), where, read_array(tokens), read_array(docs))
    except (tarfile.TarError, ValueError) as error:
        problems.append(f"{where}: not a readable tar of arrays ({error})")
    return problems


def _check_chunk(
    dataset: Dataset, index: SplitIndex, chunk: int, shard: str, tokens: np.ndarray, docs: np.ndarray
) -> list[str]:
    info = dataset.manifest.tokenizer
    where = f"{shard}: chunk {chunk}"
    count = int(index.token_start[chunk + 1] - index.token_start[chunk])
    documents = int(index.document_start[chunk + 1] - index.document_start[chunk])
    problems = []
    if tokens.dtype != index.dtype or tokens.shape != (count,):
        return [f"{where}: holds {tokens.dtype} {tokens.shape}, the index says {index.dtype} ({count},)"]
    if len(docs) != documents:
        problems.append(f"{where}: {len(docs):,} documents start in it, the index says {documents:,}")
    if count and int(tokens.max()) >= info.vocab_size:
        problems.append(f"{where}: has the id {int(tokens.max()):,}; the vocabulary ends at {info.vocab_size - 1:,}")
    at_the_front = int(index.token_start[chunk]) == 0 or (len(docs) and docs[0] == 0)
    if not _follow_eos(tokens, docs, info.eos_token_id, bool(at_the_front)):
        problems.append(f"{where}: its document starts do not follow its eos tokens")
    return problems


def _follow_eos(tokens: np.ndarray, starts: np.ndarray, eos: int, at_the_front: bool) -> bool:
    """Whether documents start behind each eos of `tokens` [n], and nowhere else but `at_the_front`.

    Counting takes half of the time of looking for the places.
    """
    if at_the_front:
        if not len(starts) or starts[0]:
            return False
        starts = starts[1:]
    ordered = np.concatenate([[0], starts.astype(np.int64), [len(tokens)]])
    if not (np.diff(ordered) > 0).all():
        return False
    return bool(
        (tokens[starts - 1] == eos).all() and np.count_nonzero(tokens == eos) == len(starts) + (tokens[-1] == eos)
    )


def documents_of(dataset: Dataset, index: SplitIndex) -> Iterator[np.ndarray]:
    """Tokens of each document of a split in order, without eos."""
    eos = dataset.manifest.tokenizer.eos_token_id
    rest = np.empty(0, index.dtype)
    for chunk in range(len(index.chunk_shard)):
        stream = np.concatenate([rest, read_chunk(dataset, index, chunk)])
        begin = 0
        for end in np.flatnonzero(stream == eos):
            yield stream[begin:end]
            begin = int(end) + 1
        rest = stream[begin:]


def read_chunk(dataset: Dataset, index: SplitIndex, chunk: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The tokens of a chunk, or those at [start, stop) in it; reads no more."""
    shard = int(index.chunk_shard[chunk])
    offset, width = int(index.chunk_data_offset[chunk]), index.dtype.itemsize
    if stop is None:
        stop = int(index.token_start[chunk + 1] - index.token_start[chunk])
    content = dataset.store.read_part(
        index.shard_name(shard), offset + start * width, offset + stop * width, index.shard_bytes(shard)
    )
    return np.frombuffer(content, index.dtype)


def _check_tokens(dataset: Dataset, index: SplitIndex) -> list[str]:
    """Decodes every document and encodes the text with sentencepiece alone; ids must be the same."""
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    problems = []
    info = dataset.manifest.splits[index.name]
    lossy = info.documents - info.round_trip_documents  # what these decode to may be encoded in another way
    counted = dict.fromkeys(("source_bytes", "words", "lines"), 0)
    for number, tokens in enumerate(documents_of(dataset, index)):
        text = tokenizer.decode(tokens)
        counted["source_bytes"] += len(text.encode())
        counted["words"] += sum(len(segment.split()) for segment in segments(text))
        counted["lines"] += text.count("\n")
        if not np.array_equal(tokenizer.processor.encode(text), tokens):
            problems.append(f"{index.name}: document {number}: encoding its text gives other ids than are stored")
    if len(problems) <= lossy:
        problems = []
    marks = info.changed.get("u2581_to_space", 0) * (len(SPACE_MARK.encode()) - 1)
    counted["source_bytes"] += marks
    if marks:
        del counted["words"]  # a mark is no space: what was one word decodes to two
    if not lossy:
        problems += [
            f"{index.name}: decodes to {count:,} {unit.removeprefix('source_')}, the manifest says "
            f"{getattr(info, unit):,}; restore the manifest, or prepare the dataset again"
            for unit, count in counted.items()
            if getattr(info, unit) != count
        ]
    return problems
