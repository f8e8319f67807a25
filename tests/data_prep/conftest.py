"""A small tokenizer and small sources that the tests of this folder share."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.tokenizers.hf_tokenizer import write_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer, TokenizerSettings, load_tokenizer, train_tokenizer

REAL_TEXT = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def real_text() -> Path:
    """The folder of real text; tests that need it are skipped, by name, where it is absent."""
    if not REAL_TEXT.is_dir():
        pytest.skip(f"no real text at {REAL_TEXT}; put the folder `shared/data` beside the project")
    return REAL_TEXT


def sentences(seed: int, count: int) -> list[str]:
    """Documents of made-up words, 0 to 60 each, with odd white space and some characters of many bytes."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 8))) for _ in range(300)]
    words += ["naïve", "日本", "🙂", "a  b", "x\ny", "\n\n", "½", "</s>"]
    return [" ".join(rng.choices(words, k=rng.randint(0, 60))) for _ in range(count)]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A byte-fallback BPE model of 400 pieces."""
    return train_tokenizer(sentences(0, 400), TokenizerSettings(vocab_size=400))


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tokenizer)
    return folder


@pytest.fixture(scope="session")
def real_tokenizer(real_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """2,048 pieces, trained on WikiText's validation split."""
    text = (real_text / "wikitext" / "wiki.valid.raw").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("real-tokenizer")
    write_tokenizer(folder, train_tokenizer([text], TokenizerSettings(vocab_size=2048)))
    return load_tokenizer(folder)


def write_texts(folder: Path, texts: list[str]) -> FilesSource:
    """A files source of one jsonl file per 40 texts, with ids."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, len(texts), 40):
        lines = [
            json.dumps({"text": text, "id": f"doc-{start + i}"}) for i, text in enumerate(texts[start : start + 40])
        ]
        (folder / f"part-{start:06d}.jsonl").write_text("\n".join(lines) + "\n")
    return FilesSource(FilesSettings({"train": [f"{folder}/part-*.jsonl"]}, id_column="id"))


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


TEXTS = [*sentences(1, 300), "", " ", "\n"]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> FilesSource:
    """What `whole` is made of."""
    return write_texts(tmp_path_factory.mktemp("texts"), TEXTS)


def small(source: FilesSource, tokenizer: Tokenizer, output: Path) -> PrepareSettings:
    """Many chunks and shards out of little text."""
    return PrepareSettings(source, tokenizer, output, chunk_tokens=512, chunks_per_shard=4)


@pytest.fixture(scope="session")
def whole(source: FilesSource, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of an unbroken run; no test changes it."""
    folder = tmp_path_factory.mktemp("whole") / "dataset"
    prepare(small(source, tokenizer, folder))
    return folder


class Interrupted(Exception):
    pass


def stop_after(documents: int):
    def progress(state):
        if state.documents >= documents:
            raise Interrupted

    return progress
