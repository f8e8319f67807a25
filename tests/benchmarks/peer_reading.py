"""One peer's reader in an environment of its own: prepares its format, then reads for a while when told to.

Command: python peer_reading.py streaming|litdata FLAT_FILE WORK_FOLDER SEQUENCE_LENGTH BATCH
For each line on standard input, a number of seconds, it prints the tokens per second that it read, as int64
batches [BATCH, SEQUENCE_LENGTH + 1] like everyone else. Knows nothing of this project.
"""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def mosaicml_streaming(flat: np.ndarray, folder: Path, block: int, batch: int) -> Iterator:
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{block}"}) as writer:
        for start in range(0, len(flat) - block + 1, block):
            writer.write({"tokens": flat[start : start + block]})
    dataset = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    while True:
        for sample in dataset:
            yield sample["tokens"]


class Blocks:
    """What litdata's `optimize` calls in its worker."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, span: tuple[int, int]):
        import torch

        flat = np.fromfile(self.path, np.uint16, count=span[1] - span[0], offset=2 * span[0])
        yield torch.from_numpy(flat.astype(np.int32))


def litdata(flat: np.ndarray, folder: Path, block: int, batch: int) -> Iterator:
    from litdata import StreamingDataset, TokensLoader, optimize

    piece = 512 * block
    spans = [(start, min(start + piece, len(flat))) for start in range(0, len(flat), piece)]
    loader = TokensLoader(block_size=block)
    optimize(Blocks(sys.argv[2]), spans, str(folder), chunk_size=piece, num_workers=1, item_loader=loader)
    dataset = StreamingDataset(str(folder), item_loader=TokensLoader(block_size=block), shuffle=True)
    while True:
        for sample in dataset:
            yield sample.numpy()


def main() -> None:
    name, flat_file, folder, length, batch = sys.argv[1], sys.argv[2], Path(sys.argv[3]), *map(int, sys.argv[4:])
    shutil.rmtree(folder, ignore_errors=True)
    flat = np.fromfile(flat_file, np.uint16)
    reader = {"streaming": mosaicml_streaming, "litdata": litdata}[name]
    output, sys.stdout = sys.stdout, sys.stderr  # the peers print
    samples = reader(flat, folder, length + 1, batch)
    next(samples)
    print("ready", file=output, flush=True)
    for line in sys.stdin:
        deadline = time.perf_counter() + float(line)
        start, tokens = time.perf_counter(), 0
        while time.perf_counter() < deadline:
            rows = np.stack([next(samples) for _ in range(batch)]).astype(np.int64)
            tokens += rows.size
        print(tokens / (time.perf_counter() - start), file=output, flush=True)


if __name__ == "__main__":
    main()
