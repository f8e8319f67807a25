"""How fast preparation is, against what it cannot do without and against what others do.

    python -m tests.benchmarks.bench_prepare [MEGABYTES]

All contenders encode the same articles with the same tokenizer in this one run, in turns, each the best of
`ROUNDS`, with the spread of the turns; so a busy machine slows all of them. The text is `../shared/data/enwiki2019`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.engines import Engine, InProcess, ProcessEngine
from data_prep.manifest import open_dataset
from data_prep.prepare import prepare
from data_prep.prepare_settings import PrepareSettings
from data_prep.ray_engine import RayEngine
from data_prep.sources.files import FilesSettings, FilesSource
from data_prep.tokenizers.fast_encoder import FastEncoder
from data_prep.tokenizers.hf_tokenizer import tokenizer_files
from data_prep.tokenizers.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer
from tests.benchmarks import much_text
from tests.benchmarks.peers import PEERS, ask, peer, peer_environment, versions
from tests.benchmarks.turns import over, spread

TEXT = Path(__file__).parents[3] / "shared" / "data" / "enwiki2019"
ROUNDS = 2
LONG_MEGABYTES = 100
TARGETS = {
    "prepare_over.sentencepiece": "≥ 5",
    "prepare_over.sentencepiece_two_threads": "≥ 5",
    "prepare_over.datasets_map_and_save": "≥ 8",
    "prepare_over.litdata": "≥ 6",
    "prepare_over.mosaicml-streaming": "≥ 6",
    "two_workers_over_one": "≥ 1.8",
    "two_ray_nodes_over_two_workers": "≥ 0.8",
    "speed_over_that_of_articles.documents_of_40_bytes": "≥ 0.5",
}


def run(megabytes: int = 48) -> dict[str, Any]:
    """Ratios over 1 mean that preparation is faster."""
    if not TEXT.is_dir():
        raise SystemExit(f"no text at {TEXT}; put the folder `shared/data` beside the project")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        return _run(Path(folder), megabytes, stack)


def _run(folder: Path, megabytes: int, stack: contextlib.ExitStack) -> dict[str, Any]:
    trained = much_text.measure(folder / "much", TEXT)
    documents = _articles(megabytes * 1_000_000)
    tokenizer = train_tokenizer(documents, TokenizerSettings(16_384, training_bytes=4_000_000))
    path, model = _jsonl(folder / "text.jsonl", documents), folder / "tokenizer.model"
    text = "".join(documents)
    long = folder / "long.txt"
    long.write_text(text * (LONG_MEGABYTES // megabytes))
    short = _jsonl(folder / "short.jsonl", [text[i * 40 : i * 40 + 40] for i in range(megabytes * 1_000_000 // 48)])
    fresh = iter([FastEncoder(tokenizer_files(tokenizer)["tokenizer.json"]) for _ in range(ROUNDS)])  # it caches words
    model.write_bytes(tokenizer.model)
    contenders: dict[str, Callable[[], object]] = {
        "prepare": lambda: _prepare(path, tokenizer, folder / "dataset", ProcessEngine(1)),
        "in_process": lambda: _prepare(path, tokenizer, folder / "dataset", InProcess()),
        "encoder_alone": lambda: _encode(next(fresh), documents),
        "long": lambda: _prepare(long, tokenizer, folder / "other", ProcessEngine(1)),
        "short": lambda: _prepare(short, tokenizer, folder / "other", ProcessEngine(1)),
        "sentencepiece": lambda: [tokenizer.processor.encode(text) for text in documents],
        "datasets_map_and_save": lambda: _datasets(path, tokenizer, folder / "arrow"),
    }
    if (os.cpu_count() or 1) > 1:
        contenders["prepare_two_workers"] = lambda: _prepare(path, tokenizer, folder / "dataset", ProcessEngine(2))
        contenders["sentencepiece_two_threads"] = lambda: tokenizer.processor.encode(documents, num_threads=2)
    if importlib.util.find_spec("ray"):
        engine = stack.enter_context(two_ray_nodes())
        contenders["prepare_two_ray_nodes"] = lambda: _prepare(path, tokenizer, folder / "dataset", engine)
    others = {"long": long, "short": short}
    python = peer_environment()
    peers = {
        package: stack.enter_context(peer(python, "peer_prepare.py", name, path, model, folder / name))
        for name, package in PEERS.items()
        if python
    }
    seconds: dict[str, list[float]] = {name: [] for name in [*contenders, *peers]}
    for turn in range(ROUNDS):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(_told(turn, name, time.perf_counter() - start))
        for package, process in peers.items():
            seconds[package].append(_told(turn, package, ask(process, "again")))
    size = path.stat().st_size
    one, two = seconds.pop("prepare"), seconds.pop("prepare_two_workers", [float("nan")] * ROUNDS)
    ray = seconds.pop("prepare_two_ray_nodes", [float("nan")] * ROUNDS)
    encoder, in_process = seconds.pop("encoder_alone"), seconds.pop("in_process")
    speeds = {name: file.stat().st_size / min(seconds.pop(name)) / (size / min(one)) for name, file in others.items()}
    ours = {name: two if name.endswith("two_threads") else one for name in seconds}
    return {
        "megabytes_per_second": {"one_worker": size / min(one) / 1e6, "two_workers": size / min(two) / 1e6},
        "prepare_over": {name: over(ours[name], values) for name, values in seconds.items()},
        "prepare_over_by_turns": {name: spread(ours[name], values) for name, values in seconds.items()},
        "two_workers_over_one": over(two, one),
        "two_workers_over_one_by_turns": spread(two, one),
        "two_ray_nodes_over_two_workers": over(ray, two),
        "two_ray_nodes_over_two_workers_by_turns": spread(ray, two),
        "share_of_time_outside_the_encoder": 1 - over(in_process, encoder),
        "speed_over_that_of_articles": {
            f"one_document_of_{LONG_MEGABYTES}_mb": speeds["long"],
            "documents_of_40_bytes": speeds["short"],
        },
        "bytes_per_token_over_2": _sizes(folder / "dataset"),
        "tokenizer": trained,
        "versions": versions(python) if python else {},
    }


@contextlib.contextmanager
def two_ray_nodes() -> Iterator[RayEngine]:
    """A cluster on this machine: a head without CPUs, and two nodes of one each."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    try:
        yield RayEngine(cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _told(turn: int, name: str, seconds: float) -> float:
    print(f"turn {turn + 1} of {ROUNDS}: {name} {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds


def _jsonl(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents))
    return path


def _sizes(folder: Path) -> dict[str, Any]:
    """Of these articles, which are shorter than WikiText's; the section on reading has those at their length."""
    dataset = open_dataset(folder)
    info = dataset.manifest.splits["train"]
    shards = sum(path.stat().st_size for path in folder.glob("*.*") if not path.name.endswith(".ids.jsonl"))
    ids = sum(path.stat().st_size for path in folder.glob("*.ids.jsonl"))
    return {
        "shards_and_manifest": shards / info.tokens / 2,
        "with_document_ids": (shards + ids) / info.tokens / 2,
        "tokens_per_document": info.tokens / info.documents,
    }


def _articles(limit_bytes: int) -> list[str]:
    articles: list[str] = []
    size = 0
    for path in sorted(TEXT.glob("train_*.txt")):
        for text in re.split(r"(?m)^(?== [^=\n]+ =$)", path.read_text(encoding="utf-8")):
            articles += [text] if text else []
            size += len(text)
            if size >= limit_bytes:
                return articles
    return articles


def _encode(encoder: FastEncoder, documents: list[str]) -> None:
    for text in documents:
        encoder.encode(text.encode())


def _prepare(path: Path, tokenizer: Tokenizer, output: Path, engine: Engine) -> None:
    shutil.rmtree(output, ignore_errors=True)
    source = FilesSource(FilesSettings({"train": [str(path)]}))
    prepare(PrepareSettings(source, tokenizer, output, engine=engine))


def _datasets(path: Path, tokenizer: Tokenizer, output: Path) -> None:
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    shutil.rmtree(output, ignore_errors=True)
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(output / "cache"))
    encoded = rows.map(lambda row: {"ids": tokenizer.processor.encode(row["text"])}, remove_columns=["text"])
    encoded.save_to_disk(str(output / "saved"))


if __name__ == "__main__":
    print(json.dumps(run(*(int(argument) for argument in sys.argv[1:])), indent=2))
