"""Records loss and gradient norm, step by step, of healthy runs: small models in one process, real text.

    python -m tests.pipeline.record_curves DATASET [WORKER WORKERS]

Writes `healthy_curves/NAME.csv` beside this file; `test_alarms.py` asks the spike detector about them. Batches,
optimizer and schedule are the runs' own; DeepSpeed and ranks, which change no number, are left out.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.data.corpus import open_corpus
from pipeline.data.loader import BatchLayout, BatchLoader
from pipeline.engine.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from pipeline.settings.sections import DataSection, ModelSection, OptimizerSection

CURVES = Path(__file__).with_name("healthy_curves")
TINY = {
    **{"hidden_size": 64, "pool_size": 256, "pool_dim": 16, "router_hidden_size": 16},
    **{"conv_dilations": [[1, 2], [4, 8]], "summary_heads": 2},
}


@dataclass(frozen=True)
class Settings:
    """One healthy run; `samples` is its global batch."""

    name: str
    samples: int
    rate: float
    seed: int
    model: dict[str, Any]
    steps: int = 300
    sequence_length: int = 64
    warmup_steps: int = 20


def settings() -> list[Settings]:
    """Every batch size at two or three learning rates, and quickstart's own model at its own settings."""
    tiny = [
        Settings(f"tiny-batch{samples}-rate{rate:g}", samples, rate, seed, TINY)
        for seed, (samples, rate) in enumerate(
            [(samples, rate) for samples in (1, 2, 4, 8, 16) for rate in (1e-3, 3e-3, 1e-2)]
        )
    ]
    quick = [
        Settings(f"quickstart-batch{samples}-seed{seed}", samples, 3e-3, seed, {}, sequence_length=256)
        for samples, seed in ((8, 0), (4, 1), (2, 2))
    ]
    cold = Settings("tiny-batch4-nowarmup", 4, 3e-3, 20, TINY, warmup_steps=0)
    deep = Settings("tiny-batch4-six-layers", 4, 3e-3, 21, TINY | {"num_hidden_layers": 6})
    return [*quick, cold, deep, *tiny]


def record(run: Settings, dataset: str) -> list[tuple[float, float]]:
    """Loss in nats and the gradient norm before clipping, of each step."""
    corpus = open_corpus(DataSection(dataset=dataset, sequence_length=run.sequence_length))
    source = corpus.source("train", run.sequence_length, run.seed)
    tokenizer = corpus.tokenizer
    transformers.set_seed(run.seed)
    config = ModelSection.model_validate({"preset": "quickstart", **run.model}).build(vocab_size=tokenizer.vocab_size)
    model = GlobalLocalForCausalLM(config)
    section = OptimizerSection(learning_rate=run.rate, warmup_steps=run.warmup_steps)
    optimizer = build_optimizer(parameter_groups(model, section), section, offload=False)
    curve = []
    with BatchLoader(source, BatchLayout(run.samples, run.samples, 1), 0, 0) as batches:
        for step in range(run.steps):
            set_learning_rate(optimizer, learning_rate(step, run.steps, section))
            tokens = torch.from_numpy(next(batches))
            output = model(input_ids=tokens[:, :-1], shift_labels=tokens[:, 1:])
            output.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), section.max_gradient_norm)
            optimizer.step()
            optimizer.zero_grad()
            curve.append((output.language_loss.item(), norm.item()))
    return curve


def main(dataset: str, worker: int = 0, workers: int = 1) -> None:
    torch.set_num_threads(1)
    CURVES.mkdir(exist_ok=True)
    for run in settings()[worker::workers]:
        with (CURVES / f"{run.name}.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["loss", "gradient_norm"])
            writer.writerows([f"{loss:.4f}", f"{norm:.4g}"] for loss, norm in record(run, dataset))
        print(run.name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
