"""Is a dataset folder whole? Every fault in one run, one line each."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tokenizers

from data_prep.manifest import Dataset, Manifest, SplitIndex, check_file, check_shards, open_dataset
from data_prep.tokenizer import MODEL_NAME, SELF_TEST_TEXTS, SPACE_MARK, load_tokenizer
from data_prep.twin import differing_texts

Depth = Literal["quick", "full", "deep"]


@dataclass
class VerifyReport:
    """What was found: `problems`, and `lines` that say what was checked."""

    problems: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def verify_dataset(folder: Path, depth: Depth = "full") -> VerifyReport:
    """Checks a dataset folder. Raises UserError if it cannot be opened at all.

    Args:
        depth: "quick" looks at the presence and sizes of files; "full" also at every byte: hashes, the
            structure of the tars, counts, the range of ids, eos after each document; "deep" also decodes
            every document, and encodes it anew with sentencepiece itself.
    """
    dataset = open_dataset(folder)
    report = VerifyReport()
    report.problems += _extra_files(dataset)
    report.problems += _check_tokenizer(dataset, depth)
    for split, index in dataset.indexes.items():
        shards = range(index.num_shards)
        report.problems += check_shards(dataset, split, shards, hashes=depth != "quick")
        damaged = {shard for shard in shards if any(index.shard_name(shard) in p for p in report.problems)}
        for shard in shards:
            ids_sha256 = bytes(index.shards["ids_sha256"][shard]).hex() if depth != "quick" else None
            ids = Path(dataset.folder) / index.ids_name(shard)
            report.problems += check_file(ids, int(index.shards["ids_bytes"][shard]), ids_sha256)
            if depth != "quick" and shard not in damaged:
                report.problems += _check_structure(dataset, index, shard)
        if depth == "deep" and not report.problems:
            report.problems += _check_tokens(dataset, index)
    if not report.problems:
        report.lines = [*summary(dataset.manifest), f"{folder}: whole ({_what(depth)})"]
    return report


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
            f"({info.source_bytes / info.tokens:.3f} bytes a token) in {info.shards:,} shards; "
            f"{info.round_trip_documents:,} of {info.documents:,} documents decoded and compared"
        )
        for reason, count in info.dropped.items():
            lines.append(f"{name}: {count:,} documents dropped: {reason}")
        for reason, count in info.changed.items():
            lines.append(f"{name}: {count:,} characters changed: {reason}")
    return lines


def _extra_files(dataset: Dataset) -> list[str]:
    known = {"manifest.json", "tokenizer"}
    for split, index in dataset.indexes.items():
        known |= {f"{split}.shards.npy", f"{split}.chunks.npy"}
        known |= {name(i) for i in range(index.num_shards) for name in (index.shard_name, index.ids_name)}
    return [
        f"{path}: belongs to no split of the manifest; move it away"
        for path in sorted(Path(dataset.folder).iterdir())
        if path.name not in known and re.search(r"\.(tar|npy|jsonl)$", path.name)
    ]


def _check_tokenizer(dataset: Dataset, depth: Depth) -> list[str]:
    folder = dataset.tokenizer_folder
    problems = check_file(folder / MODEL_NAME, None, dataset.manifest.tokenizer.sha256)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        problems += check_file(folder / name, None, None)
    if problems or depth == "quick":
        return problems
    tokenizer = load_tokenizer(folder)
    try:
        twin = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        twin.encode_special_tokens = True  # not in the file: transformers has it from tokenizer_config.json
        same = twin.get_vocab_size() == tokenizer.vocab_size and not differing_texts(tokenizer, twin, SELF_TEST_TEXTS)
    except Exception:  # the library raises nothing more precise for a damaged file
        same = False
    if same or tokenizer.info.model_type != "bpe":
        return []
    return [f"{folder}/tokenizer.json: not the twin of {MODEL_NAME}; restore the file, or prepare the dataset again"]


def _check_structure(dataset: Dataset, index: SplitIndex, shard: int) -> list[str]:
    """Reads a shard as a tar; compares its members with the index, and their content with the contract."""
    path = Path(dataset.folder) / index.shard_name(shard)
    problems: list[str] = []
    chunks = np.flatnonzero(index.chunk_shard == shard)
    try:
        with tarfile.open(path) as tar:
            members = {member.name: member for member in tar}
            expected = [f"{chunk:08d}.{kind}.npy" for chunk in chunks for kind in ("tokens", "docs")]
            if list(members) != expected:
                return [f"{path}: its members are not those of chunks {chunks[0]} to {chunks[-1]}"]
            for chunk in chunks:
                arrays = []
                for kind in ("tokens", "docs"):
                    member = tar.extractfile(members[f"{chunk:08d}.{kind}.npy"])
                    assert member is not None
                    arrays.append(np.load(io.BytesIO(member.read()), allow_pickle=False))
                problems += _check_chunk(dataset, index, int(chunk), path, *arrays)
    except (tarfile.TarError, ValueError, OSError) as error:
        problems.append(f"{path}: not a readable tar of arrays ({error})")
    return problems


def _check_chunk(
    dataset: Dataset, index: SplitIndex, chunk: int, path: Path, tokens: np.ndarray, docs: np.ndarray
) -> list[str]:
    info = dataset.manifest.tokenizer
    where = f"{path}: chunk {chunk}"
    count = int(index.token_start[chunk + 1] - index.token_start[chunk])
    documents = int(index.document_start[chunk + 1] - index.document_start[chunk])
    problems = []
    if tokens.dtype != index.dtype or tokens.shape != (count,):
        return [f"{where}: holds {tokens.dtype} {tokens.shape}, the index says {index.dtype} ({count},)"]
    if len(docs) != documents:
        problems.append(f"{where}: {len(docs):,} documents start in it, the index says {documents:,}")
    if count and int(tokens.max()) >= info.vocab_size:
        problems.append(f"{where}: has the id {int(tokens.max()):,}; the vocabulary ends at {info.vocab_size - 1:,}")
    ends = np.flatnonzero(tokens == info.eos_token_id) + 1
    starts = ends[ends < count]
    if int(index.token_start[chunk]) == 0 or (len(docs) and docs[0] == 0):
        starts = np.concatenate([[0], starts])
    if not np.array_equal(starts, docs):
        problems.append(f"{where}: its document starts do not follow its eos tokens")
    return problems


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


def read_chunk(dataset: Dataset, index: SplitIndex, chunk: int) -> np.ndarray:
    """The tokens of a chunk."""
    path = Path(dataset.folder) / index.shard_name(int(index.chunk_shard[chunk]))
    count = int(index.token_start[chunk + 1] - index.token_start[chunk])
    return np.fromfile(path, index.dtype, count, offset=int(index.chunk_data_offset[chunk]))


def _check_tokens(dataset: Dataset, index: SplitIndex) -> list[str]:
    """Decodes every document and encodes the text with sentencepiece alone; ids must be the same."""
    tokenizer = load_tokenizer(dataset.tokenizer_folder)
    problems = []
    source_bytes = 0
    for number, tokens in enumerate(documents_of(dataset, index)):
        text = tokenizer.decode(tokens)
        source_bytes += len(text.encode())
        if not np.array_equal(tokenizer.processor.encode(text), tokens):
            problems.append(f"{index.name}: document {number}: encoding its text gives other ids than are stored")
    info = dataset.manifest.splits[index.name]
    marks = info.changed.get("u2581_to_space", 0) * (len(SPACE_MARK.encode()) - 1)
    if not info.changed.get("lossy_documents") and source_bytes + marks != info.source_bytes:
        problems.append(f"{index.name}: decodes to {source_bytes:,} bytes, the manifest says {info.source_bytes:,}")
    return problems
