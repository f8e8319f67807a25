"""How fast preparation is, against what it cannot do without and against what others do. Prints ratios.

    python -m tests.benchmarks.bench_prepare [MEGABYTES]

All contenders encode the same documents with the same tokenizer in this one run, in turns, each the best of
`ROUNDS`; so a busy machine slows all of them. The text is `../shared/data/enwiki2019`.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.engines import ProcessEngine
from data_prep.files import FilesSettings, FilesSource
from data_prep.prepare import PrepareSettings, prepare
from data_prep.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

TEXT = Path(__file__).parents[3] / "shared" / "data" / "enwiki2019"
ROUNDS = 3


def run(megabytes: int = 24) -> dict[str, float]:
    """Ratios over 1 mean that preparation is faster; `bytes_per_token_over_two` is a size."""
    if not TEXT.is_dir():
        raise SystemExit(f"no text at {TEXT}; put the folder `shared/data` beside the project")
    with tempfile.TemporaryDirectory() as folder:
        return _run(Path(folder), megabytes)


def _run(folder: Path, megabytes: int) -> dict[str, float]:
    documents = _documents(megabytes * 1_000_000)
    tokenizer = train_tokenizer(documents, TokenizerSettings(16_384, training_bytes=4_000_000))
    path = folder / "text.jsonl"
    _write(path, documents)
    contenders: dict[str, Callable[[], object]] = {
        "prepare": lambda: _prepare(path, tokenizer, folder / "dataset", 1),
        "sentencepiece": lambda: [tokenizer.processor.encode(text) for text in documents],
        "datasets": lambda: _datasets(path, tokenizer, folder / "arrow"),
    }
    contenders.update(_peers(path, tokenizer, folder))
    if (os.cpu_count() or 1) > 1:
        contenders["prepare_2"] = lambda: _prepare(path, tokenizer, folder / "dataset", 2)
        contenders["sentencepiece_2"] = lambda: tokenizer.processor.encode(documents, num_threads=2)
    seconds = {name: float("inf") for name in contenders}
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    size = path.stat().st_size
    for name, value in seconds.items():
        print(f"{name:<16} {value:8.2f} s {size / value / 1e6:8.2f} MB/s")
    return _ratios(seconds, folder / "dataset")


def _ratios(seconds: dict[str, float], dataset: Path) -> dict[str, float]:
    from data_prep.manifest import open_dataset

    index = open_dataset(dataset).split("train")
    disk_bytes = sum(index.shard_bytes(shard) for shard in range(index.num_shards))
    result = {
        f"prepare_over_{name}": value / seconds["prepare"]
        for name, value in seconds.items()
        if not name.startswith("prepare") and not name.endswith("_2")
    }
    if "prepare_2" in seconds:
        result["prepare_over_sentencepiece_two_threads"] = seconds["sentencepiece_2"] / seconds["prepare_2"]
    result["bytes_per_token_over_two"] = disk_bytes / index.tokens / 2
    return result


def _documents(limit_bytes: int) -> list[str]:
    documents: list[str] = []
    size = 0
    for path in sorted(TEXT.glob("train_*.txt")):
        for text in path.read_text(encoding="utf-8").split("\n= "):
            documents.append(text)
            size += len(text)
            if size >= limit_bytes:
                return documents
    return documents


def _write(path: Path, documents: list[str]) -> None:
    import json

    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))


def _prepare(path: Path, tokenizer: Tokenizer, output: Path, workers: int) -> None:
    shutil.rmtree(output, ignore_errors=True)
    fresh = Tokenizer(tokenizer.model, "benchmark")  # no words known from the last round
    source = FilesSource(FilesSettings({"train": [str(path)]}))
    prepare(PrepareSettings(source, fresh, output, engine=ProcessEngine(workers)))


def _datasets(path: Path, tokenizer: Tokenizer, output: Path) -> None:
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    shutil.rmtree(output, ignore_errors=True)
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(output / "cache"))
    encoded = rows.map(lambda row: {"ids": tokenizer.processor.encode(row["text"])}, remove_columns=["text"])
    encoded.save_to_disk(str(output / "saved"))


def _encode_lines(path: Path, tokenizer: Tokenizer):
    import json

    with open(path) as lines:
        for line in lines:
            ids = tokenizer.processor.encode(json.loads(line)["text"])
            yield np.array([*ids, tokenizer.eos_id], tokenizer.dtype)


def _peers(path: Path, tokenizer: Tokenizer, folder: Path) -> dict[str, Callable[[], object]]:
    """litdata and mosaicml-streaming, where they are installed."""
    peers: dict[str, Callable[[], object]] = {}
    try:
        from streaming import MDSWriter

        def mds() -> None:
            shutil.rmtree(folder / "mds", ignore_errors=True)
            with MDSWriter(out=str(folder / "mds"), columns={"tokens": "ndarray"}) as writer:
                for tokens in _encode_lines(path, tokenizer):
                    writer.write({"tokens": tokens})

        peers["mosaicml_mds"] = mds
    except ImportError:
        print("mosaicml-streaming is not installed: left out")
    try:
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter  # what `optimize` writes with, in one process

        def litdata() -> None:
            import torch

            shutil.rmtree(folder / "litdata", ignore_errors=True)
            (folder / "litdata").mkdir()
            writer = BinaryWriter(str(folder / "litdata"), chunk_bytes="64MB", item_loader=TokensLoader())
            for number, tokens in enumerate(_encode_lines(path, tokenizer)):
                writer[number] = torch.from_numpy(tokens.astype(np.int32))
            writer.done()

        peers["litdata"] = litdata
    except ImportError:
        print("litdata is not installed: left out")
    return peers


if __name__ == "__main__":
    for name, ratio in run(*(int(argument) for argument in sys.argv[1:])).items():
        print(f"{name:<42} {ratio:.3f}")
