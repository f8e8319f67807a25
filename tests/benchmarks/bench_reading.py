"""Reading, as ratios over what people use instead, all in one run on the same tokens.

Contenders take turns, and the fastest turn of each counts, so that other work on the machine touches all.
Every contender hands over int64 batches [32, 2,049]: 32 samples of 2,048 tokens and their targets.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import itertools
import json
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from data_prep.manifest import Dataset, open_dataset
from data_prep.prepare_settings import CHUNK_TOKENS, CHUNKS_PER_SHARD
from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.data.samples import SampleSource
from tests.benchmarks import verifying
from tests.benchmarks.peers import PEERS, ask, peer, peer_environment, versions
from tests.benchmarks.turns import over, spread
from tests.pipeline.dataset_fixture import fill_shards, write_hollow_dataset, write_stream

TOKENS = 33_554_433
LENGTH, BATCH = 2048, 32
LAYOUT = BatchLayout(BATCH, BATCH, 1)
DOCUMENT_TOKENS = 3600  # the mean of wikitext-103's articles
TURN_SECONDS, TURNS = 0.4, 5
TARGETS = {
    "loader_over.nanogpt_get_batch": "≥ 3",
    "loader_over.webdataset_one_sequence_members": "≥ 20",
    "loader_over.mosaicml-streaming": "≥ 5",
    "loader_over.litdata": "≥ 5",
    "bytes_per_token_over_2": "≤ 1.001",
    "first_batch_at_90_percent_over_0": "≤ 1.1",
    "share_of_step_waiting": "≤ 0.005",
    "over_plain_reading.verify": "≥ 0.7",
    "over_plain_reading.hashes_at_the_start": "≥ 0.7",
}


def run() -> dict:
    """All ratios of reading; the peers are installed in an environment of their own at the first run."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder))


def measure(folder: Path) -> dict:
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 50_000, TOKENS, dtype=np.uint16)
    tokens[np.cumsum(generator.poisson(DOCUMENT_TOKENS, TOKENS // DOCUMENT_TOKENS - 100))] = 0  # ends of documents
    dataset = write_stream(folder / "dataset", tokens, CHUNK_TOKENS, CHUNKS_PER_SHARD)
    tokens.tofile(folder / "flat.bin")
    write_one_sequence_members(folder / "members", tokens)
    seconds, found = reading_seconds(dataset, folder)
    others = {name: turns for name, turns in seconds.items() if name not in ("loader", "in_process")}
    return {
        "tokens_per_second": {name: 1 / min(turns) for name, turns in seconds.items()},
        "loader_over": {name: over(seconds["loader"], turns) for name, turns in others.items()},
        "loader_over_by_turns": {name: spread(seconds["loader"], turns) for name, turns in others.items()},
        "in_process_over": {name: over(seconds["in_process"], turns) for name, turns in others.items()},
        "bytes_per_token_over_2": bytes_on_disk(dataset) / TOKENS / 2,
        "first_batch_at_90_percent_over_0": first_batch_ratio(dataset, LENGTH),
        "share_of_step_waiting": waiting_share(dataset),
        "over_plain_reading": verifying.measure(folder / "gigabyte"),
        "million_shards": million_shards(folder / "million"),
        "versions": found,
    }


# ---- tokens per second


def reading_seconds(dataset: Dataset, folder: Path) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per token of one process in each turn, by contender, and the contenders' versions."""
    source = SampleSource(dataset, "train", LENGTH, 0)
    found = {"torch": torch.__version__, "webdataset": importlib.metadata.version("webdataset")}
    with contextlib.ExitStack() as stack:
        loader = stack.enter_context(BatchLoader(source, LAYOUT, 0, 0))
        contenders: dict[str, Callable[[float], float]] = {
            "loader": turn(loader),  # what training reads from: a thread reads ahead
            "in_process": turn(in_process_batches(source)),  # the same without the thread, as the others read
            "nanogpt_get_batch": turn(memmap_batches(folder / "flat.bin")),
            "webdataset_one_sequence_members": turn(member_batches(folder / "members")),
        }
        python = peer_environment()
        if python:
            found |= versions(python)
            for name, package in PEERS.items():
                arguments = (name, folder / "flat.bin", folder / name, LENGTH, BATCH)
                process = stack.enter_context(peer(python, "peer_reading.py", *arguments))
                contenders[package] = functools.partial(ask, process)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(TURNS):
            for name, contender in contenders.items():
                seconds[name].append(1 / contender(TURN_SECONDS))
    return seconds, found


def turn(batches: Iterator) -> Callable[[float], float]:
    def read(seconds: float) -> float:
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            count += 1
        return count * BATCH * (LENGTH + 1) / (time.perf_counter() - start)

    return read


def in_process_batches(source: SampleSource) -> Iterator[np.ndarray]:
    for first in itertools.count(0, 4096):
        for indices in source.sample_indices(np.arange(first, first + 4096)).reshape(-1, BATCH):
            yield source.read(indices)


def memmap_batches(path: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """As nanoGPT's training reads: random places of a flat file, mapped anew each time, inputs and targets."""
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        places = torch.randint(len(data) - LENGTH, (BATCH,))
        inputs = torch.stack([torch.from_numpy(data[i : i + LENGTH].astype(np.int64)) for i in places])
        targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + LENGTH].astype(np.int64)) for i in places])
        yield inputs, targets


def write_one_sequence_members(folder: Path, tokens: np.ndarray) -> None:
    """WebDataset shards as most people write them: a sample, one .npy of 2,049 tokens, a member."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(2048):
                start = (shard * 2048 + number) * LENGTH
                content = BytesIO()
                np.save(content, tokens[start : start + LENGTH + 1])
                member = tarfile.TarInfo(f"{shard}{number:06d}.tokens.npy")
                member.size = content.tell()
                content.seek(0)
                tar.addfile(member, content)


def member_batches(folder: Path) -> Iterator[np.ndarray]:
    import webdataset

    urls = [str(path) for path in sorted(folder.iterdir())]
    while True:
        rows: list[np.ndarray] = []
        for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
            rows.append(sample["tokens.npy"])
            if len(rows) == BATCH:
                yield np.stack(rows).astype(np.int64)
                rows = []


# ---- disk, resume, waiting


def bytes_on_disk(dataset: Dataset) -> int:
    """Shards, indexes and manifest; not the tokenizer."""
    return sum(path.stat().st_size for path in Path(dataset.folder).iterdir() if path.is_file())


def first_batch_ratio(dataset: Dataset, length: int, trials: int = 15) -> float:
    """Seconds from nothing open to the first batch: the least at 90 % of the epoch over that at 0 %."""
    seconds: dict[float, list[float]] = {0.0: [], 0.9: []}
    for _ in range(trials):
        for share, measured in seconds.items():
            measured.append(first_batch_seconds(dataset, length, share))
    return min(seconds[0.9]) / min(seconds[0.0])


def first_batch_seconds(dataset: Dataset, length: int, share: float) -> float:
    start = time.perf_counter()
    source = SampleSource(dataset, "train", length, 0)
    consumed = int(source.num_samples * share) // BATCH * BATCH
    with contextlib.closing(source), BatchLoader(source, LAYOUT, 0, consumed) as loader:
        next(loader)
        return time.perf_counter() - start


def waiting_share(dataset: Dataset, steps: int = 20) -> float:
    """Of a real training step (forward, backward, update), the share that `next(loader)` takes."""
    config = GlobalLocalConfig.from_preset("quickstart", vocab_size=50_000)
    model = GlobalLocalForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters())
    waiting = 0.0
    with BatchLoader(SampleSource(dataset, "train", 256, 0), BatchLayout(8, 8, 1), 0, 0) as loader:
        next(loader)
        start = time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            batch = torch.from_numpy(next(loader))
            waiting += time.perf_counter() - asked
            model(batch[:, :-1], shift_labels=batch[:, 1:].contiguous()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return waiting / (time.perf_counter() - start)


# ---- scale


def million_shards(folder: Path) -> dict[str, float]:
    """A manifest of 1,000,000 shards of 64 MiB: 33.6 trillion tokens in 8,000,000 chunks."""
    dataset = write_hollow_dataset(folder, num_shards=1_000_000, chunks_per_shard=8, chunk_tokens=CHUNK_TOKENS)
    source = SampleSource(dataset, "train", LENGTH, 0)
    needed: set[int] = set()
    for share in (0.0, 0.9):
        consumed = int(source.num_samples * share) // BATCH * BATCH
        for start in (source.sample_indices(np.arange(consumed, consumed + 8 * BATCH)) * LENGTH).tolist():
            needed |= set(source.stream.shards_of(start, start + LENGTH + 1))
    fill_shards(dataset, needed)
    program = (
        "import json, sys; from tests.benchmarks.bench_reading import open_million; "
        "print(json.dumps(open_million(sys.argv[1])))"
    )
    output = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(output.stdout)


def open_million(folder: str) -> dict[str, float]:
    """In a process of its own: seconds and memory of opening, resuming and indexing."""
    before = anonymous_bytes()
    start = time.perf_counter()
    dataset = open_dataset(folder)
    opened = time.perf_counter() - start
    first = {share: first_batch_seconds(dataset, LENGTH, share) for share in (0.0, 0.9)}
    held = anonymous_bytes() - before
    source = SampleSource(dataset, "train", LENGTH, 0)
    seconds = []
    for start_position in range(0, 100 * 4096, 4096):
        positions = np.arange(start_position, start_position + 4096)
        start = time.perf_counter()
        source.sample_indices(positions)
        seconds.append(time.perf_counter() - start)
    return {
        "open_seconds": opened,
        "first_batch_seconds_at_0_percent": first[0.0],
        "first_batch_seconds_at_90_percent": first[0.9],
        "first_batch_at_90_percent_over_0": first_batch_ratio(dataset, LENGTH),
        "nanoseconds_per_index": min(seconds) / 4096 * 1e9,
        "memory_per_rank_bytes": held,
        "index_bytes_shared_by_a_node": sum(path.stat().st_size for path in Path(folder).glob("*.npy")),
    }


def anonymous_bytes() -> int:
    """Memory of this process alone; pages of memory-mapped files, which a node shares, are not in it."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Anonymous:"))


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
