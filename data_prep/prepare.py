"""The stage: text in, a whole dataset folder out, on any number of workers, from wherever it stopped.

Workers encode tasks; this process takes their results in order, packs them into chunks, publishes shards,
and writes a journal line for each. Nothing depends on who encoded what, or when: the bytes are the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import takewhile
from typing import Any

import numpy as np

from data_prep.encode import Encoder, digest_task
from data_prep.engines import OrderedMap
from data_prep.errors import UserError
from data_prep.journal import Journal
from data_prep.manifest import (
    BLAKE3_RECORD,
    FORMAT_VERSION,
    MANIFEST_NAME,
    SHARD_RECORD,
    TEXT_RECORD,
    TOKENIZER_FOLDER,
    Manifest,
    SplitInfo,
    parse_manifest,
    texts_name,
)
from data_prep.packing import END, START, Position
from data_prep.prepare_settings import PrepareProgress, PrepareSettings, in_order_of_work
from data_prep.split_writer import Digests, SplitWriter, other_text
from data_prep.store import WORK_FOLDER, Store, open_store
from data_prep.tokenizers.fast_encoder import choose_encoder, sample_texts
from data_prep.tokenizers.hf_tokenizer import tokenizer_files


def prepare(settings: PrepareSettings, progress: Callable[[PrepareProgress], None] = lambda _: None) -> Manifest:
    """Makes the dataset folder, or goes on making it; returns its manifest.

    The same settings and the same text give the same bytes, whatever the engine, and however often the
    work was interrupted. Where the folder already holds this very dataset, it is left as it is.

    Raises UserError if the folder holds something else or is in use, the source cannot be read or holds
    no document, a document does not survive encoding, or the target cannot be written.
    """
    store = open_store(settings.output)
    if manifest := finished(settings):
        if WORK_FOLDER in store.names():  # killed between the manifest and the end
            store.remove_work_folder()
        return manifest
    subject = settings.subject()
    with closing(Journal(store, subject)) as journal:
        if manifest := finished(settings):  # another process was faster
            return manifest
        _compare_with_journal(settings, journal)
        settings.engine.begin()
        files = tokenizer_files(settings.tokenizer)
        known: dict[str, Digests] = {}  # of the splits done so far
        definition = files["tokenizer.json"]
        fast, encoder = choose_encoder(settings.tokenizer, definition, sample_texts(settings.source))
        with settings.engine.start(Encoder(settings.tokenizer, settings.filters, fast)) as encode:
            for split in in_order_of_work(settings.source.splits):
                writer = SplitWriter(settings, store, journal, split, known, progress)
                if split not in journal.finished_splits:
                    writer.run(encode)
                known[split] = writer.digests
        splits = {split: _write_indexes(settings, store, journal, split) for split in settings.source.splits}
        if settings.source.fingerprint() is None:
            subject["source"]["texts"] = {split: _write_texts(store, journal, split) for split in splits}
        for name, content in files.items():
            store.publish(f"{TOKENIZER_FOLDER}/{name}", content)
        manifest = Manifest(**{**subject, "splits": splits, "encoder": encoder})
        store.publish(MANIFEST_NAME, manifest.to_json())
        store.remove_work_folder()
    return manifest


def finished(settings: PrepareSettings) -> Manifest | None:
    """The manifest of a finished dataset of the same text and settings; None if there is none.

    The text is read, where nothing else names it, and compared with what was read then.

    Raises UserError if the folder holds a finished dataset of something else.
    """
    store = open_store(settings.output)
    content = store.read(MANIFEST_NAME)
    if content is None:
        return None
    manifest = parse_manifest(content, f"{settings.output}/{MANIFEST_NAME}")
    id = manifest.dataset_id[:16]
    if manifest.format_version == 1:
        raise UserError(
            f"{settings.output}: holds a dataset of format version 1 (id {id}), which does not "
            "say what text it was made of; use it as it is, or choose another folder"
        )
    there = json.loads(json.dumps(manifest.model_dump(exclude={"source": {"texts"}})))
    there |= {"splits": list(there["splits"]), "format_version": FORMAT_VERSION}  # 2 has the same bytes
    subject = settings.subject()
    if changed := [key for key in subject if there[key] != subject[key]]:
        raise UserError(
            f"{settings.output}: already holds a dataset with another {', '.join(changed)} (id {id}); "
            "choose another folder, or delete this one"
        )
    if manifest.source.texts:
        with settings.engine.start(digest_task) as digests:
            for split, sha256 in manifest.source.texts.items():
                recorded = _read_texts(store, split, sha256)
                if other := _differing_task(settings, digests, split, recorded, END):
                    raise UserError(
                        f"{settings.output}: already holds the dataset of another text (id {id}): {other} has changed "
                        "since; choose another folder, or delete this one"
                    )
    return manifest


def _compare_with_journal(settings: PrepareSettings, journal: Journal) -> None:
    """Reads again what an earlier attempt has read: half of one text and half of another is no dataset."""
    if settings.source.fingerprint() is not None or not journal.entries:
        return
    with settings.engine.start(digest_task) as digests:
        for split, entries in journal.entries.items():
            stop = END if split in journal.finished_splits else entries[-1].next_position
            if other := _differing_task(settings, digests, split, journal.texts[split], stop):
                raise UserError(other_text(settings, other))


def _differing_task(
    settings: PrepareSettings, digests: OrderedMap, split: str, recorded: dict[Position, str], stop: Position
) -> str | None:
    """The name of the first task before `stop` that does not hold what was recorded; None if all do."""
    left = {position for position in recorded if stop == END or position < stop}
    tasks: Iterator[Any] = settings.source.tasks(split, START)
    if stop != END:
        tasks = takewhile(lambda task: task.position < stop, tasks)
    for position, name, digest in digests(tasks):
        if recorded.get(position) != digest:
            return str(name)
        left.discard(position)
    return f"split '{split}' (some of its files are gone)" if left else None


def _write_indexes(settings: PrepareSettings, store: Store, journal: Journal, split: str) -> SplitInfo:
    """Writes a split's index files from its journal entries, after a look at the shards' sizes."""
    entries, totals = journal.entries[split], journal.finished_splits[split]
    problems: list[str] = []
    shards, blake3 = np.zeros(len(entries), SHARD_RECORD), np.zeros(len(entries), BLAKE3_RECORD)
    rows: list[list[int]] = []
    for entry in entries:
        for name, expected in (("tar", entry.bytes), ("ids.jsonl", entry.ids_bytes)):
            actual = store.size(f"{split}-{entry.shard:06d}.{name}")
            if actual != expected:
                problems.append(
                    f"{store.where}/{split}-{entry.shard:06d}.{name}: {actual or 0:,} bytes, written were "
                    f"{expected:,}; something else changed it: delete the folder and prepare again"
                )
        sha256, ids_sha256 = bytes.fromhex(entry.sha256), bytes.fromhex(entry.ids_sha256)
        shards[entry.shard] = (entry.bytes, sha256, len(rows), entry.ids_bytes, ids_sha256)
        blake3[entry.shard] = (bytes.fromhex(entry.blake3), bytes.fromhex(entry.ids_blake3))
        rows += [[start, document, entry.shard, offset] for start, document, offset in entry.chunks]
    if problems:
        raise UserError(problems)
    last = entries[-1]
    rows.append([last.tokens_end, last.documents_end, len(entries), 0])
    hashes = {}
    chunks = np.ascontiguousarray(np.array(rows, "<u8").T)
    for name, array in (("shards", shards), ("chunks", chunks), ("blake3", blake3)):
        content = io.BytesIO()
        np.save(content, array, allow_pickle=False)
        store.publish(f"{split}.{name}.npy", content.getvalue())
        hashes[name] = hashlib.sha256(content.getvalue()).hexdigest()
    return SplitInfo(
        shards=len(entries),
        chunks=len(rows) - 1,
        tokens=last.tokens_end,
        documents=last.documents_end,
        source_bytes=totals["source_bytes"],
        source_rows=totals["rows"],
        words=totals["words"],
        lines=totals["lines"],
        dtype="<u2" if settings.tokenizer.dtype.itemsize == 2 else "<u4",
        dropped=totals["dropped"],
        changed=totals["changed"],
        round_trip_documents=totals["round_trip_documents"],
        also_in=totals["also_in"],
        shards_index_sha256=hashes["shards"],
        chunks_index_sha256=hashes["chunks"],
        blake3_index_sha256=hashes["blake3"],
    )


def _write_texts(store: Store, journal: Journal, split: str) -> str:
    """Writes what was read for a split, per task; returns the file's sha256."""
    texts = journal.texts[split]
    records = np.array([(*position, bytes.fromhex(digest)) for position, digest in sorted(texts.items())], TEXT_RECORD)
    content = io.BytesIO()
    np.save(content, records, allow_pickle=False)
    store.publish(texts_name(split), content.getvalue())
    return hashlib.sha256(content.getvalue()).hexdigest()


def _read_texts(store: Store, split: str, sha256: str) -> dict[Position, str]:
    content = store.read(texts_name(split)) or b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{store.where}/{texts_name(split)}: missing or changed; restore it, or choose another folder")
    records = np.load(io.BytesIO(content), allow_pickle=False)
    return {Position(int(r["unit"]), int(r["part"])): bytes(r["digest"]).hex() for r in records}
