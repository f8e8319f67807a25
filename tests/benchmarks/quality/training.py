"""One run: a contender trained on the shared data order; its curve is kept as JSON, its weights beside it."""

import datetime
import json
import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.manifest import Dataset
from pipeline.data.loader import BatchLayout, BatchLoader, evaluation_batches
from pipeline.data.samples import SampleSource
from pipeline.data.token_stream import TokenStream
from pipeline.engine.optim import build_optimizer, learning_rate, parameter_groups, set_learning_rate
from pipeline.evaluation.figures import perplexities
from pipeline.settings.sections import OptimizerSection
from tests.benchmarks.quality.contenders import Contender
from tests.benchmarks.quality.text import CACHE

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the held-out split, for a point of the curve and at the end.
EVALUATION_TOKENS, FINAL_EVALUATION_TOKENS = (65_536, 393_216) if DEVICE.type == "cuda" else (4_096, 32_768)
EVALUATIONS = 6  # points of a curve
WARMUP_SHARE = 0.1


@dataclass(frozen=True)
class Run:
    """A training to be done: what, on how much, and how fast it learns."""

    name: str
    contender: Contender
    sequence_length: int
    batch_size: int
    steps: int
    learning_rate: float
    seed: int = 0
    base_hidden_size: int | None = None

    @property
    def path(self) -> Path:
        return CACHE / f"{self.name}.json"

    @property
    def weights(self) -> Path:
        return CACHE / f"{self.name}.pt"

    def result(self) -> dict[str, Any] | None:
        """What `train` measured; None where it has not run, or ran with other settings."""
        if not self.path.exists():
            return None
        result = json.loads(self.path.read_text())
        ran = {"base_hidden_size": None} | result["run"]  # earlier ones do not name it
        return result if ran == json.loads(json.dumps(asdict(self))) else None


def train(run: Run, dataset: Dataset) -> dict[str, Any]:
    """Trains and writes the result; a finished run is read instead.

    The curve is [optimizer steps, validation loss] over the first EVALUATION_TOKENS of the split.
    """
    if (done := run.result()) is not None:
        return done
    torch.manual_seed(run.seed)
    model = run.contender.build(run.sequence_length).train().to(DEVICE)
    rounded = DEVICE.type == "cuda" or run.contender.variant == "bfloat16"
    passes = rounded_copy(model) if rounded else model
    settings = OptimizerSection(
        learning_rate=run.learning_rate,
        warmup_steps=round(run.steps * WARMUP_SHARE),
        base_hidden_size=run.base_hidden_size,
    )
    optimizer = build_optimizer(parameter_groups(model.model, settings), settings, offload=False)
    source = SampleSource(dataset, "train", run.sequence_length, run.seed)
    layout = BatchLayout(run.batch_size, run.batch_size, 1)
    curve, start = [], time.perf_counter()
    with BatchLoader(source, layout, 0, 0) as batches:
        for step in range(run.steps):
            set_learning_rate(optimizer, learning_rate(step, run.steps, settings))
            train_step(model, optimizer, next(batches), settings.max_gradient_norm, passes)
            if (step + 1) % max(1, run.steps // EVALUATIONS) == 0:
                loss = held_out(passes, dataset, "valid", run, EVALUATION_TOKENS)["loss"]
                curve.append([step + 1, loss])
                say(f"{run.name}  step {step + 1}/{run.steps}  {loss:.4f}  {time.perf_counter() - start:.0f} s")
    result = {
        "run": asdict(run),
        "curve": curve,
        "valid": held_out(passes, dataset, "valid", run, FINAL_EVALUATION_TOKENS),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": model.flops_per_token(run.sequence_length),
        "seconds_under_load": time.perf_counter() - start,
        "machine": card() if DEVICE.type == "cuda" else "",
    }
    torch.save(model.state_dict(), run.weights)
    run.path.write_text(json.dumps(result))
    return result


def card() -> str:
    return f"{datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}"


def rounded_copy(model: Any) -> Any:
    """The model in bfloat16, for the passes; the optimizer moves the float32 one. Rotary frequencies stay float32."""
    copy = deepcopy(model)
    for tensor in copy.parameters():
        tensor.data = tensor.data.bfloat16()
    for name, buffer in copy.named_buffers():
        if "inv_freq" not in name:
            buffer.data = buffer.data.bfloat16()
    return copy


def train_step(model: Any, optimizer: Any, tokens: np.ndarray, max_gradient_norm: float, passes: Any = None) -> None:
    """Forward, backward, clip, update.

    Args:
        passes: the model that computes loss and gradients, where it is not `model` itself (`rounded_copy`).
    """
    passes = model if passes is None else passes
    ids = torch.from_numpy(tokens).to(DEVICE, non_blocking=True)
    loss, _ = passes(ids[:, :-1], ids[:, 1:].contiguous())
    loss.backward()
    if passes is not model:
        for exact, rounded in zip(model.parameters(), passes.parameters(), strict=True):
            exact.grad, rounded.grad = rounded.grad.float(), None
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad()
    if passes is not model:
        with torch.no_grad():
            torch._foreach_copy_(list(passes.parameters()), list(model.parameters()))


@torch.no_grad()
def held_out(model: Any, dataset: Dataset, split: str, run: Run, max_tokens: int | None) -> dict[str, float]:
    """Loss and perplexities over the first tokens of a split, without dropout."""
    model.eval()
    nats, targets = 0.0, 0
    for ids, goal in _batches(dataset, split, run, max_tokens):
        count = int((goal >= 0).sum())
        nats += float(model(ids, goal)[1]) * count
        targets += count
    model.train()
    return vars(perplexities(nats, targets, dataset.manifest.splits[split]))


def _batches(
    dataset: Dataset, split: str, run: Run, max_tokens: int | None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    length = run.sequence_length
    samples = None if max_tokens is None else max_tokens // length
    stream = TokenStream(dataset, split)
    for tokens, counted in evaluation_batches(stream, length, run.batch_size, 0, 1, samples):
        ids, kept = torch.from_numpy(tokens).to(DEVICE), torch.from_numpy(counted).to(DEVICE)
        yield ids[:, :-1], ids[:, 1:].masked_fill(~kept, -100)


def say(text: str) -> None:
    """Progress: standard output belongs to the result."""
    print(text, file=sys.stderr, flush=True)
