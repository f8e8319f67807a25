"""One peer's preparation in an environment of its own, from a jsonl file to its format; done anew each time it is told.

Command: python peer_prepare.py streaming|litdata JSONL TOKENIZER_MODEL WORK_FOLDER
For each line on standard input it prints the seconds that one preparation took. One process encodes, as bare
sentencepiece would. Knows nothing of this project.
"""

import json
import shutil
import sys
import time
from collections.abc import Iterator

import numpy as np
import sentencepiece


def encoded(path: str, model: str) -> Iterator[np.ndarray]:
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield np.array([*processor.encode(json.loads(line)["text"]), processor.eos_id()], np.uint16)


def mosaicml_streaming(path: str, model: str, folder: str) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=folder, columns={"tokens": "ndarray:uint16"}) as writer:
        for tokens in encoded(path, model):
            writer.write({"tokens": tokens})


class Encode:
    """What litdata's `optimize` calls in its worker, with each file of text."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, path: str) -> Iterator:
        import torch

        for tokens in encoded(path, self.model):
            yield torch.from_numpy(tokens.astype(np.int32))


def litdata(path: str, model: str, folder: str) -> None:
    from litdata import TokensLoader, optimize

    optimize(Encode(model), [path], folder, chunk_bytes="64MB", num_workers=1, item_loader=TokensLoader())


def main() -> None:
    name, path, model, folder = sys.argv[1:]
    prepare = {"streaming": mosaicml_streaming, "litdata": litdata}[name]
    output, sys.stdout = sys.stdout, sys.stderr  # the peers print
    __import__(name)  # imports are not preparation
    print("ready", file=output, flush=True)
    for _ in sys.stdin:
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        prepare(path, model, folder)
        print(time.perf_counter() - start, file=output, flush=True)


if __name__ == "__main__":
    main()
