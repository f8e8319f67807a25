"""The contract between preparing and training: what a dataset folder holds, and how to open it.

A dataset folder is one token stream per split, cut into chunks, packed into WebDataset shards:

    manifest.json            what this file describes; written last, so that it vouches for all the rest
    tokenizer/               tokenizer.model and its Hugging Face form
    SPLIT-000000.tar …       the shards
    SPLIT-000000.ids.jsonl … the ids of the documents that start in the shard, one JSON string per line
    SPLIT.shards.npy         per shard: bytes, sha256, first chunk (`SHARD_RECORD`)
    SPLIT.chunks.npy         <u8 [4, C + 1], rows as in `CHUNK_ROWS`; column C closes the last chunk
    SPLIT.blake3.npy         per shard: the blake3 of the tar and of the ids file (`BLAKE3_RECORD`), which are checked
    SPLIT.texts.npy          what was read, per task (`TEXT_RECORD`), where the source's text may change; no
                             reader needs it, it tells the same command whether the text is still the same

The index files are binary and memory-mapped, so that a million shards open in milliseconds, and the ranks
of a node share the pages. The manifest holds their sha256, and its own hash, but for what it says of the
source and the encoder, is the `dataset_id`: text, tokenizer and settings decide it, no path and no time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import BaseModel, Field

from data_prep.errors import UserError
from data_prep.hashing import Digest, check_file
from data_prep.store import FolderStore, Store, open_store
from data_prep.threads import in_threads

# What is written. Still read: 2, which has the same ids but no blake3, and 1, whose ids held the source's paths too.
FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
MODEL_FILE = f"{TOKENIZER_FOLDER}/tokenizer.model"
HF_TOKENIZER_FILES = (f"{TOKENIZER_FOLDER}/tokenizer.json", f"{TOKENIZER_FOLDER}/tokenizer_config.json")

SHARD_RECORD = np.dtype(
    [
        ("bytes", "<u8"),  # size of the tar
        ("sha256", "V32"),  # of the tar
        ("first_chunk", "<u8"),  # number of the first chunk in it
        ("ids_bytes", "<u8"),  # size of the ids file
        ("ids_sha256", "V32"),  # of the ids file
    ]
)
BLAKE3_RECORD = np.dtype([("shard", "V32"), ("ids", "V32")])
# A task's position, and 16 bytes of the sha256 of its documents' ids and texts.
TEXT_RECORD = np.dtype([("unit", "<u8"), ("part", "<u8"), ("digest", "V16")])
# token_start and document_start: how many tokens (documents) of the split come before the chunk.
# data_offset: bytes from the start of the tar to the chunk's first token.
CHUNK_ROWS = ("token_start", "document_start", "shard", "data_offset")


class TokenizerInfo(BaseModel, extra="forbid"):
    """The tokenizer that made the tokens; `sha256` is that of `tokenizer.model`."""

    sha256: str
    sentencepiece_version: str
    model_type: Literal["bpe", "unigram", "word", "char"]
    vocab_size: int
    eos_token_id: int
    bos_token_id: int
    pad_token_id: int
    unk_token_id: int
    encode_unit: Literal["document"] = "document"


class EncoderInfo(BaseModel, extra="forbid"):
    """The program that encoded: no part of the dataset's id, since the ids are sentencepiece's in any case.
    `differences`: of the texts `compared`, those that gigatoken had other ids for, and so was not used."""

    name: Literal["gigatoken", "sentencepiece"]
    version: str
    compared: int = 0
    differences: int = 0


class SourceInfo(BaseModel, extra="forbid"):
    """The origin of the text: `name` of the source, its `settings`, and `fingerprint`, which names the exact
    text (such as the hub's revision), or else `texts`, the sha256 of each split's `SPLIT.texts.npy`."""

    name: str
    settings: dict[str, Any]
    fingerprint: str | None
    texts: dict[str, str] = {}


class SplitInfo(BaseModel, extra="forbid"):
    """One split's counts. `tokens` includes one eos for each of `documents`."""

    shards: int
    chunks: int
    tokens: int
    documents: int
    source_bytes: int = Field(description="UTF-8 bytes of the documents kept: the bits-per-byte denominator")
    source_rows: int = Field(description="rows, lines or files read from the source for this split")
    words: int = Field(description="whitespace-separated words of the documents kept")
    lines: int = Field(description="newlines in the documents kept")
    dtype: Literal["<u2", "<u4"]
    dropped: dict[str, int] = Field(description="documents a filter left out, by reason")
    changed: dict[str, int] = Field(description="characters that a stated policy replaced, by reason")
    round_trip_documents: int = Field(description="documents for which decode(encode(text)) == text was checked")
    also_in: dict[str, int] = Field({}, description="documents whose text also stands in another split, by split")
    shards_index_sha256: str
    chunks_index_sha256: str
    blake3_index_sha256: str | None = Field(None, description="of `SPLIT.blake3.npy`; None before format 3")


class Manifest(BaseModel, extra="forbid"):
    """Everything that training has to know about a dataset, and nothing that changes between two
    preparations of the same text: no times, no paths, no host names."""

    format_version: int
    source: SourceInfo
    tokenizer: TokenizerInfo
    chunk_tokens: int
    chunks_per_shard: int
    filters: dict[str, Any]
    splits: dict[str, SplitInfo]
    encoder: EncoderInfo | None = None  # of datasets made before there were two

    @property
    def dataset_id(self) -> str:
        """The sha256 (hex) of the canonical JSON: it names these exact bytes, in format 2 as in 3."""
        content = self._content()
        content.pop("encoder", None)
        if self.format_version > 1:
            del content["source"]
        if self.format_version > 2:
            content["format_version"] = 2
            for split in content["splits"].values():
                del split["blake3_index_sha256"]
        return hashlib.sha256(canonical_json(content)).hexdigest()

    def _content(self) -> dict[str, Any]:
        content = self.model_dump(mode="json", exclude=None if self.encoder else {"encoder"})
        if self.format_version == 1:  # which knew less
            del content["source"]["texts"]
            for split in content["splits"].values():
                del split["also_in"]
        if self.format_version < 3:
            for split in content["splits"].values():
                del split["blake3_index_sha256"]
        return content

    def to_json(self) -> bytes:
        """The bytes of manifest.json, the dataset id included."""
        content = {"dataset_id": self.dataset_id, **self._content()}
        return json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass(frozen=True)
class SplitIndex:
    """The place of each token of a split. Arrays are views of memory-mapped files.

    Attributes:
        name: the split.
        tokens: tokens in the stream, one eos a document included.
        dtype: of the tokens on disk, `<u2` or `<u4`.
        token_start: `<u8` [C + 1], tokens before each chunk; the last entry is `tokens`.
        document_start: `<u8` [C + 1], documents that start before each chunk.
        chunk_shard: `<u8` [C], shard of each chunk.
        chunk_data_offset: `<u8` [C], byte offset in the tar of the chunk's first token.
        shards: [num_shards] records of `SHARD_RECORD`.
        blake3: [num_shards] records of `BLAKE3_RECORD`; None before format 3.
    """

    name: str
    tokens: int
    dtype: np.dtype
    token_start: np.ndarray
    document_start: np.ndarray
    chunk_shard: np.ndarray
    chunk_data_offset: np.ndarray
    shards: np.ndarray
    blake3: np.ndarray | None = None

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def shard_name(self, shard: int) -> str:
        return f"{self.name}-{shard:06d}.tar"

    def ids_name(self, shard: int) -> str:
        return f"{self.name}-{shard:06d}.ids.jsonl"

    def shard_bytes(self, shard: int) -> int:
        return int(self.shards["bytes"][shard])

    def shard_digest(self, shard: int) -> Digest:
        """What the tar's bytes are checked by."""
        return self._digest(shard, "shard", "sha256")

    def ids_digest(self, shard: int) -> Digest:
        """What the ids file's bytes are checked by."""
        return self._digest(shard, "ids", "ids_sha256")

    def _digest(self, shard: int, blake3: str, sha256: str) -> Digest:
        if self.blake3 is not None:
            return Digest("blake3", bytes(self.blake3[blake3][shard]).hex())
        return Digest("sha256", bytes(self.shards[sha256][shard]).hex())


@dataclass(frozen=True)
class Dataset:
    """An opened dataset whose manifest and index files are whole; they and the tokenizer lie in `folder`."""

    folder: str
    manifest: Manifest
    indexes: dict[str, SplitIndex]
    url: str | None = None  # where the shards are, if `folder` is a copy of the rest

    @property
    def store(self) -> Store:
        """The folder or URL of the shards."""
        return open_store(self.url or self.folder)

    @property
    def dataset_id(self) -> str:
        return self.manifest.dataset_id

    @property
    def tokenizer_folder(self) -> Path:
        return Path(self.folder) / TOKENIZER_FOLDER

    def split(self, name: str) -> SplitIndex:
        """Raises UserError, with the known splits, for an unknown one."""
        if name not in self.indexes:
            known = ", ".join(self.indexes)
            raise UserError(f"{self.folder}: no split '{name}'; it has {known}")
        return self.indexes[name]


def open_dataset(folder: str | Path, url: str | None = None) -> Dataset:
    """Opens a dataset folder; reads the manifest and hashes the index files, not the shards.

    Args:
        url: what the folder is a copy of, but for the shards.

    Raises UserError if the folder is missing or unfinished, the manifest is of another version or was
    changed by hand, or an index file is missing or damaged.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    problems: list[str] = []
    indexes = {}
    for name, sha256 in index_files(manifest).items():
        problems += check_file(root / name, None, Digest("sha256", sha256), f"{url or root}/{name}")
    if not problems:
        indexes = {name: _load_index(root, name, info) for name, info in manifest.splits.items()}
    if problems:
        raise UserError(problems)
    return Dataset(str(root), manifest, indexes, url)


def texts_name(split: str) -> str:
    return f"{split}.texts.npy"


def index_files(manifest: Manifest) -> dict[str, str]:
    """The index files of all splits, with their sha256."""
    hashes = {}
    for split, info in manifest.splits.items():
        hashes[f"{split}.shards.npy"] = info.shards_index_sha256
        hashes[f"{split}.chunks.npy"] = info.chunks_index_sha256
        if info.blake3_index_sha256:
            hashes[f"{split}.blake3.npy"] = info.blake3_index_sha256
    return hashes


@contextmanager
def opened(location: str | Path) -> Iterator[Dataset]:
    """A dataset in a folder, or at a URL: then all but the shards is copied to this machine for as long.

    Raises UserError as `open_dataset` does. A tokenizer file that is missing there is missing in the copy.
    """
    store = open_store(location)
    if isinstance(store, FolderStore):
        yield open_dataset(store.where)
        return
    content = store.read(MANIFEST_NAME)
    if content is None:
        raise UserError(
            f"{store.where}: no whole dataset ({MANIFEST_NAME} is missing, and it is written last); check the URL, "
            "or run the same `globallocal prepare` command again, it goes on where it stopped"
        )
    manifest = parse_manifest(content, f"{store.where}/{MANIFEST_NAME}")
    with TemporaryDirectory(prefix="globallocal-") as name:
        folder = Path(name)
        (folder / TOKENIZER_FOLDER).mkdir()
        (folder / MANIFEST_NAME).write_bytes(content)
        for file in (*index_files(manifest), MODEL_FILE, *HF_TOKENIZER_FILES):
            if (found := store.read(file)) is not None:
                (folder / file).write_bytes(found)
        yield open_dataset(folder, store.where)


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks manifest.json alone."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        if folder.is_file():
            raise UserError(f"{folder}: a file, not a dataset folder; give the folder that `globallocal prepare` made")
        if not folder.exists():
            raise UserError(f"{folder}: no such dataset folder; make one with `globallocal prepare`")
        raise UserError(
            f"{folder}: not a whole dataset ({MANIFEST_NAME} is missing, and it is written last); "
            "run the same `globallocal prepare` command again, it goes on where it stopped"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Checks version, schema and self-hash of the bytes of a manifest; `where` names them in errors."""
    try:
        fields = json.loads(content)
        version = fields["format_version"]
        recorded_id = fields.pop("dataset_id")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: not a dataset manifest (damaged, or of something else); prepare it again") from None
    if version not in range(1, FORMAT_VERSION + 1):
        raise UserError(
            f"{where}: format version {version}, this program reads 1 to {FORMAT_VERSION}; "
            "prepare the dataset again, or use the program version that made it"
        )
    try:
        manifest = Manifest.model_validate(fields)
    except pydantic.ValidationError as error:
        places = [".".join(map(str, e["loc"])) + ": " + e["msg"] for e in error.errors()]
        raise UserError(
            [f"{where}: {place}; the manifest was changed by hand, restore it" for place in places]
        ) from None
    if manifest.dataset_id != recorded_id:
        raise UserError(
            f"{where}: content has the id {manifest.dataset_id[:16]}…, recorded is {str(recorded_id)[:16]}…; "
            "the manifest was changed after it was written: restore it, or prepare the dataset again"
        )
    return manifest


def _load_index(root: Path, name: str, info: SplitInfo) -> SplitIndex:
    def load(what: str) -> np.ndarray:
        array: np.ndarray = np.load(root / f"{name}.{what}.npy", mmap_mode="r", allow_pickle=False)
        return array

    token_start, document_start, shard, data_offset = load("chunks")
    blake3 = load("blake3") if info.blake3_index_sha256 else None
    return SplitIndex(
        name, info.tokens, np.dtype(info.dtype), token_start, document_start, shard[:-1], data_offset[:-1],
        load("shards"), blake3,
    )  # fmt: skip


def check_shards(
    dataset: Dataset, split: str, shards: Iterable[int], hashes: bool, before: Callable[[], None] = lambda: None
) -> list[str]:
    """Checks shards against the manifest: sizes, and, if `hashes`, the hash of every byte, several files at once.

    Returns one line a fault: missing, truncated (expected and actual bytes), changed. `before` is called for each.
    """
    index = dataset.split(split)

    def check(shard: int) -> list[str]:
        before()
        digest = index.shard_digest(shard) if hashes else None
        return check_file(Path(dataset.folder) / index.shard_name(shard), index.shard_bytes(shard), digest)

    return [line for found in (in_threads if hashes else map)(check, shards) for line in found]
