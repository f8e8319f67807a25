"""GlobalLocal against a well-tuned GPT: see docs/quality.md, which this writes.

Some three hours on two idle cores, and only when named: `make bench ARGS="quality"`. What is finished is kept in
`.cache/quality`, so it goes on where it was interrupted. `python -m tests.benchmarks.bench_quality --part NAME` does
a part alone: a run by its name, or the page from what is there (`page`); `list` shows the names.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.manifest import Dataset
from pipeline.engine.optim import parameter_groups
from pipeline.settings.sections import OptimizerSection
from tests.benchmarks.quality import page
from tests.benchmarks.quality.plan import BASES, SIZES, Size, ablations, candidates, finals, sweep, swept, widths
from tests.benchmarks.quality.text import CACHE, VOCAB_SIZE, dataset
from tests.benchmarks.quality.training import DEVICE, Run, held_out, rounded_copy, say, train, train_step


def run() -> dict[str, Any]:
    """Everything that is missing and fits this device, then the page. Returns the headline figures."""
    data = dataset()
    sizes = [size for size in SIZES.values() if size.on_gpu == torch.cuda.is_available()]
    for stage in stages(sizes):
        # Where other seeds learn badly at the first one's best rate, another rate is the best, and lacks seeds itself.
        while missing := [item for item in stage() if item.result() is None]:
            train(missing[0], data)
    for size in sizes:
        for seeds in finals(size).values():
            for item in seeds:
                test(item, data)
        speed(size)
    return write_page()


def stages(sizes: list[Size]) -> list[Callable[[], list[Run]]]:
    """In this order; what a later one trains depends on what the earlier ones found."""
    return [
        lambda: [item for size in sizes for runs in sweep(size).values() for item in runs],
        lambda: [item for size in sizes for runs in candidates(size).values() for item in runs],
        lambda: [item for size in sizes for seeds in finals(size).values() for item in seeds],
        lambda: [item for size in sizes for item in ablations(size).values()],
        lambda: [item for base in BASES for runs in widths(base).values() for item in runs if SIZES["A"] in sizes],
    ]


def write_page() -> dict[str, Any]:
    """The page from what is there: a size whose speed is not measured yet is left out."""
    speeds = {name: speed(size) for name, size in SIZES.items() if speed_path(size).exists()}
    return page.write(page.finished(), speeds)


def speed_path(size: Size) -> Path:
    """Sizes that train the same contenders share the measurement."""
    return CACHE / f"{swept(size).name}.speed.json"


def test(item: Run, data: Dataset) -> None:
    """Perplexities of a finished run over the whole WikiText-103 test split."""
    path = CACHE / f"{item.name}.test.json"
    if path.exists():
        return
    model = item.contender.build(item.sequence_length).to(DEVICE)
    model.load_state_dict(torch.load(item.weights))
    path.write_text(json.dumps(held_out(model, data, "test", item, None)))
    say(f"{path.name}  {path.read_text()}")


def speed(size: Size, rounds: int = 30) -> dict[str, float]:
    """Seconds of one training step, the contenders in turns in one process: their medians.

    On a CPU they are the processor's with one thread, and not the clock's, so that other work on the machine does
    not count.
    """
    path = speed_path(size)
    if path.exists():
        return json.loads(path.read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    prepared, seconds = {}, {}
    for name, seeds in finals(size).items():
        model = seeds[0].contender.build(size.sequence_length).train().to(DEVICE)
        passes = rounded_copy(model) if size.on_gpu else model
        prepared[name] = model, torch.optim.AdamW(parameter_groups(model, OptimizerSection()), fused=True), passes
        seconds[name] = []
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (size.batch_size, size.sequence_length + 1))
    for turn in range(rounds + 2):
        for name, (model, optimizer, passes) in prepared.items():
            start = now(size)
            train_step(model, optimizer, tokens, 1.0, passes)
            if turn > 1:
                seconds[name].append(now(size) - start)
    torch.set_num_threads(threads)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    path.write_text(json.dumps(medians))
    return medians


def now(size: Size) -> float:
    """Seconds, when what was begun is done."""
    if not size.on_gpu:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", default="all", help="all, page, list, or the name of a run")
    part = parser.parse_args().part
    known = {item.name: item for stage in stages(list(SIZES.values())) for item in stage()}
    if part == "list":
        for name, item in known.items():
            print(f"{'done ' if item.result() else 'to do'} {name}")
    elif part in known:
        train(known[part], dataset())
    elif part in ("all", "page"):
        print(json.dumps(run() if part == "all" else write_page(), indent=2))
    else:
        parser.error(f"no part {part!r}; known: all, page, list, {', '.join(known)}")


if __name__ == "__main__":
    main()
