"""The stage: nothing lost, nothing doubled, the same bytes on any workers."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.encode import Filters
from data_prep.engines import ProcessEngine
from data_prep.errors import UserError
from data_prep.manifest import canonical_json, open_dataset
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.sources.sample import SampleArticles
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.verify import documents_of, verify_dataset
from tests.data_prep.conftest import TEXTS, folder_bytes, small, write_texts


def test_every_document_is_there_once_and_in_order(whole: Path, tokenizer: Tokenizer):
    dataset = open_dataset(whole)
    index = dataset.split("train")
    assert [tokenizer.decode(tokens) for tokens in documents_of(dataset, index)] == TEXTS
    info = dataset.manifest.splits["train"]
    assert (info.documents, info.source_rows, info.round_trip_documents) == (len(TEXTS),) * 3
    assert info.source_bytes == sum(len(text.encode()) for text in TEXTS)
    assert info.words == sum(len(text.split()) for text in TEXTS)
    assert info.lines == sum(text.count("\n") for text in TEXTS)
    assert index.num_shards == info.shards > 10
    ids = [json.loads(line) for i in range(index.num_shards) for line in (whole / index.ids_name(i)).open()]
    assert ids == [f"doc-{i}" for i in range(len(TEXTS))]
    assert verify_dataset(whole, "deep").problems == []


def test_tokens_are_sentencepieces_own(whole: Path, tokenizer: Tokenizer):
    dataset = open_dataset(whole)
    expected = [token for text in TEXTS for token in [*tokenizer.processor.encode(text), tokenizer.eos_id]]
    tokens = np.concatenate([*(np.append(d, 2) for d in documents_of(dataset, dataset.split("train")))])
    assert tokens.tolist() == expected


def test_manifest_names_no_place_and_no_time(whole: Path, source: FilesSource, tokenizer: Tokenizer, tmp_path: Path):
    """The same text elsewhere, prepared later, is the same dataset to the last byte."""
    elsewhere = write_texts(tmp_path / "texts", TEXTS)
    prepare(small(elsewhere, tokenizer, tmp_path / "dataset"))
    assert folder_bytes(tmp_path / "dataset") == folder_bytes(whole)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(workers, source, tokenizer, whole, tmp_path):
    prepare(replace(small(source, tokenizer, tmp_path / "dataset"), engine=ProcessEngine(workers)))
    assert folder_bytes(tmp_path / "dataset") == folder_bytes(whole)


def test_finished_dataset_is_left_as_it_is(whole, source, tokenizer):
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    manifest = prepare(small(source, tokenizer, whole))
    assert manifest == open_dataset(whole).manifest
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times


def test_other_settings_are_refused_on_a_finished_dataset(whole, source, tokenizer):
    before = folder_bytes(whole)
    with pytest.raises(UserError, match=r"already holds a dataset with another filters .* choose another folder"):
        prepare(replace(small(source, tokenizer, whole), filters=Filters(minimum_characters=3)))
    assert folder_bytes(whole) == before


def test_datasets_of_the_first_format_still_load_under_their_ids(whole, tmp_path):
    manifest = json.loads((whole / "manifest.json").read_bytes())
    del manifest["dataset_id"], manifest["source"]["texts"], manifest["encoder"]
    manifest["format_version"], manifest["source"]["fingerprint"] = 1, "0" * 64
    manifest["source"]["settings"]["paths"] = {"train": ["/some/where/*.txt"]}
    for split in manifest["splits"].values():
        del split["also_in"], split["blake3_index_sha256"]
    id = hashlib.sha256(canonical_json(manifest)).hexdigest()
    shutil.copytree(whole, tmp_path / "old")
    for file in ("train.texts.npy", *(f"{split}.blake3.npy" for split in manifest["splits"])):
        (tmp_path / "old" / file).unlink()
    (tmp_path / "old" / "manifest.json").write_text(json.dumps({"dataset_id": id, **manifest}))
    assert open_dataset(tmp_path / "old").dataset_id == id
    assert verify_dataset(tmp_path / "old", "deep").problems == []


def test_a_dataset_of_the_second_format_has_the_id_of_the_third_and_is_checked_by_sha256(
    whole, source, tokenizer, tmp_path
):
    manifest = json.loads((whole / "manifest.json").read_bytes())
    manifest["format_version"] = 2
    shutil.copytree(whole, tmp_path / "old")
    for split, info in manifest["splits"].items():
        del info["blake3_index_sha256"]
        (tmp_path / "old" / f"{split}.blake3.npy").unlink()
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(manifest))
    assert open_dataset(tmp_path / "old").dataset_id == open_dataset(whole).dataset_id
    assert verify_dataset(tmp_path / "old", "deep").problems == []
    assert prepare(small(source, tokenizer, tmp_path / "old")).format_version == 2  # left as it is
    shard = tmp_path / "old" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    (problem,) = verify_dataset(tmp_path / "old").problems
    assert problem.startswith(f"{shard}: sha256 ")


def test_split_without_documents_is_refused(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    source = FilesSource(FilesSettings({"train": [str(tmp_path / "empty.jsonl")]}))
    with pytest.raises(UserError, match="files: split 'train' has no document; check the source's path"):
        prepare(small(source, tokenizer, tmp_path / "dataset"))
    assert not (tmp_path / "dataset" / "manifest.json").exists()


def test_one_empty_document_is_a_dataset(tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    source = FilesSource(FilesSettings({"train": [str(tmp_path / "empty.txt")]}))
    info = prepare(small(source, tokenizer, tmp_path / "dataset")).splits["train"]
    assert (info.documents, info.tokens, info.source_bytes) == (1, 1, 0)
    assert verify_dataset(tmp_path / "dataset", "deep").problems == []


def test_sample_source_is_106_articles(tokenizer, tmp_path):
    settings = PrepareSettings(SampleArticles(), tokenizer, tmp_path / "dataset", engine=ProcessEngine(2))
    splits = prepare(settings).splits
    assert {name: info.documents for name, info in splits.items()} == {"train": 94, "valid": 6, "test": 6}
    assert splits["train"].source_bytes == 2_843_290


def test_progress_is_told_as_it_goes(source, tokenizer, tmp_path):
    states = []
    prepare(small(source, tokenizer, tmp_path / "dataset"), states.append)
    assert [state.documents for state in states] == sorted(state.documents for state in states)
    assert states[-1].done_bytes == states[-1].total_bytes
    assert states[-1].documents == len(TEXTS)
