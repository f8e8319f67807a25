"""Small inputs that broke products of this kind in public, where no other test holds them already.

docs/data.md lists all of them with the test of each.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast, TextStreamer

from data_prep.manifest import open_dataset
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.tokenizers.hf_tokenizer import build_hf_tokenizer, write_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer
from data_prep.verify import verify_dataset
from pipeline.data.samples import SampleSource
from tests.data_prep.conftest import write_texts
from tests.pipeline.dataset_fixture import write_stream


@pytest.mark.parametrize("text", ["a\n\n  b ", "… ½ ﬁ"])
def test_text_that_normalisation_would_change_comes_back(tokenizer: Tokenizer, text: str) -> None:
    """sentencepiece#520, #650, #329, #766."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert build_hf_tokenizer(tokenizer).decode(ids.tolist(), skip_special_tokens=False) == text


def test_five_lines_of_10_kb_are_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """sentencepiece#214, #517: its default drops lines of more than 4,192 bytes."""
    texts = [f"{number} " + "unmistakable " * 790 for number in range(5)]
    assert all(len(text) > 10_000 for text in texts)
    source = write_texts(tmp_path / "texts", texts)
    info = prepare(PrepareSettings(source, tokenizer, tmp_path / "dataset")).splits["train"]
    assert (info.documents, info.source_bytes) == (5, sum(map(len, texts)))
    assert info.dropped == {}
    assert verify_dataset(tmp_path / "dataset", "deep").problems == []


class Written(TextStreamer):
    """What a person sees while a model writes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def test_a_newline_and_an_emoji_written_token_by_token_are_real_characters(tokenizer_folder: Path) -> None:
    """fairseq#4603. The emoji is four byte pieces, and none of them alone is a character."""
    twin = PreTrainedTokenizerFast.from_pretrained(tokenizer_folder, local_files_only=True)
    text = "one line,\nthe next: 🙂🦜 done\n"
    written = Written(twin)
    for token in twin(text, add_special_tokens=False).input_ids:
        written.put(np.array([token]))
    written.end()
    assert written.text == text


def test_ids_with_dots_merge_no_samples(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """webdataset#237: keys `a.1` and `a.2` are one sample to a reader. Keys are counted here, ids kept beside."""
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": f"a.{n}", "text": f"text {n}"}) + "\n" for n in (1, 2)))
    source = FilesSource(FilesSettings({"train": [str(path)]}, id_column="id"))
    prepare(PrepareSettings(source, tokenizer, tmp_path / "dataset", chunk_tokens=4))
    ids = (tmp_path / "dataset" / "train-000000.ids.jsonl").read_text()
    assert [json.loads(line) for line in ids.splitlines()] == ["a.1", "a.2"]
    with tarfile.open(tmp_path / "dataset" / "train-000000.tar") as tar:
        names = tar.getnames()
    assert names == [f"{n:08d}.{kind}.npy" for n in range(len(names) // 2) for kind in ("tokens", "docs")]


def test_a_thousand_short_documents_lose_less_than_one_sequence(tmp_path: Path) -> None:
    """transformers#23424: 1,000 documents of 70 tokens, S = 128."""
    documents = np.ones((1000, 71), np.uint16)
    documents[:, -1] = 0  # eos
    source = SampleSource(write_stream(tmp_path, documents.ravel(), 4096, 4), "train", 128, 0)
    read = source.num_samples * 128 + 1
    assert 0 <= 71_000 - read < 128
    assert len(np.unique(source.sample_indices(np.arange(source.num_samples)))) == source.num_samples


LARGE = """
import resource, sys
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.tokenizers.tokenizer import load_tokenizer
folder = sys.argv[1]
source = FilesSource(FilesSettings({"train": [f"{folder}/large.txt", f"{folder}/small.txt"]}))
prepare(PrepareSettings(source, load_tokenizer(f"{folder}/tokenizer"), f"{folder}/dataset"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def test_a_document_of_200_mb_is_one_document_in_a_few_times_its_memory(tmp_path: Path) -> None:
    line = "the same words again and again, naïve and ½, for a very long time\n"
    write_tokenizer(tmp_path / "tokenizer", train_tokenizer([line] * 100, TokenizerSettings(320)))
    count = 200_000_000 // len(line.encode()) + 1
    (tmp_path / "large.txt").write_text(line * count, encoding="utf-8")
    (tmp_path / "small.txt").write_text("after it", encoding="utf-8")
    job = subprocess.run([sys.executable, "-c", LARGE, tmp_path], capture_output=True, text=True, check=True)
    assert int(job.stdout) < 1_500_000_000
    dataset = open_dataset(tmp_path / "dataset")
    info = dataset.manifest.splits["train"]
    assert (info.documents, info.lines, info.round_trip_documents) == (2, count, 2)
    assert info.words == count * len(line.split()) + 2
    assert info.source_bytes == count * len(line.encode()) + len("after it")
    assert dataset.split("train").tokens == info.tokens > count * 10


def test_every_test_that_the_page_names_exists() -> None:
    root = Path(__file__).parents[2]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (root / "docs" / "data.md").read_text())
    assert len(named) > 40
    missing = [f"{file}::{test}" for file, test in named if f"def {test}(" not in (root / file).read_text()]
    assert missing == []
