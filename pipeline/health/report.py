"""What a bad global batch was: computed once more, every local number measured, and written down.

Rare, and as slow as it must be; every function here is a collective unless it says otherwise.
"""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch

from data_prep.store import publish_file
from pipeline.data.loader import BatchLayout
from pipeline.data.samples import Source
from pipeline.engine.internals import Engine, StepState, loss_scale
from pipeline.health.state import plain_number

TEXTS_MICRO_BATCHES = 8
"""Decoded samples are written of so many micro-batches, the worst first."""

ROUTER_STATISTICS = ("gate_mean", "pool_entropy_nats", "pool_hit_rate")


def layer_of(name: str) -> str:
    """Where a parameter belongs: `layers.3`, `embed_tokens`, `norm`, `lm_head`."""
    if found := re.search(r"layers\.\d+", name):
        return found[0]
    return name.removeprefix("model.").split(".")[0]


def micro_batches(source: Source, layout: BatchLayout, rank: int, batch: int) -> Iterable[np.ndarray]:
    """Sample numbers, int64 [M], of a rank's micro-batches of one global batch. No collective."""
    for micro_step in range(layout.size(batch) // (layout.micro_batch_size * layout.world_size)):
        start = layout.position(batch, micro_step, rank, 0)
        yield source.sample_indices(np.arange(start, start + layout.micro_batch_size))


def measure(engine: Engine, batches: Iterable[np.ndarray], device: torch.device) -> list[dict[str, Any]]:
    """One more pass over a global batch; for each micro-batch of this rank its losses, gradient norms by layer (its
    own gradients, before they are averaged) and router statistics.

    Each gradient is measured as it arrives, and DeepSpeed is given NaN in its place: so its own check drops the step,
    at every stage and precision, and the weights, the optimizer and its moments stay as they are. So do the random
    state, the counters and the loss scale.

    Args:
        batches: int64 [M, S+1], this rank's micro-batches of the global batch, all of them.
    """
    squares: dict[str, torch.Tensor] = {}

    def hook(layer: str) -> Any:
        def note(gradient: torch.Tensor) -> torch.Tensor:
            square = gradient.detach().double().square().sum()
            squares[layer] = squares[layer] + square if layer in squares else square
            return torch.full_like(gradient, math.nan)

        return note

    before = StepState(engine)
    scale = loss_scale(engine)
    hooks = [
        parameter.register_hook(hook(layer_of(name)))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    ]
    measured = []
    try:
        for tokens in batches:
            squares.clear()
            ids = torch.from_numpy(tokens).to(device)
            output = engine(input_ids=ids[:, :-1], shift_labels=ids[:, 1:])
            # A tensor of its own: DeepSpeed takes a model's output itself for a loss of ours, and divides it (stage 0).
            engine.backward(output.loss.clone(), scale_wrt_gas=False)
            engine.step()
            measured.append(
                {
                    "language_loss": plain_number(output.language_loss.item()),
                    "diversity_loss": plain_number(output.diversity_loss.item()),
                    "gradient_norms": {
                        layer: plain_number(square.sqrt().item() / scale) for layer, square in squares.items()
                    },
                    "router_statistics": {
                        name: [plain_number(item) for item in output.router_statistics[name].flatten().tolist()]
                        for name in ROUTER_STATISTICS
                    },
                }
            )
    finally:
        for handle in hooks:
            handle.remove()
        before.restore()
    return measured


@torch.no_grad()
def weight_norms(module: torch.nn.Module) -> dict[str, float | str]:
    """By layer; under ZeRO-3 each parameter is gathered, one after the other."""
    squares: dict[str, float] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            square = parameter.detach().double().square().sum().item()
        squares[layer_of(name)] = squares.get(layer_of(name), 0.0) + square
    return {layer: plain_number(math.sqrt(square)) for layer, square in squares.items()}


def is_bad(measured: dict[str, Any]) -> bool:
    """A micro-batch with a loss or gradient that is not finite. No collective."""
    numbers = [measured["language_loss"], measured["diversity_loss"], *measured["gradient_norms"].values()]
    return any(isinstance(number, str) for number in numbers)


def badness(measured: dict[str, Any]) -> float:
    """Orders micro-batches, the worst highest: inf where a number is not finite, else the loss. No collective."""
    return math.inf if is_bad(measured) else float(measured["language_loss"])


def culprit(report: dict[str, Any]) -> str:
    """Which rank, micro-batch and samples a number that is not finite came from, in one line. No collective."""
    batch = f"global batch {report['global_batch']:,}"
    then = [item for item in report["micro_batches"] if isinstance(_loss(item), str)]
    again = [item for item in report["micro_batches"] if is_bad(item)]
    if not then and not again:
        return (
            f"the gradient of {batch} is not finite, every loss is; computed once more it is finite on every rank: not "
            "the data, but a fault of a device or of the network"
        )
    item = (then or again)[0]
    what = f"the loss is {_loss(item)}" if then else "the gradient is not finite, every loss is,"
    fault = "" if is_bad(item) else "; computed once more it is finite: not the data, but a fault of that device"
    places = name_places(item["samples"])
    return f"{what} on rank {item['rank']}, micro-batch {item['micro_batch']} of {batch} ({places}){fault}"


def _loss(item: dict[str, Any]) -> float | str:
    """Of the step itself; the diversity loss where that one is to blame."""
    language, diversity = item["language_loss_then"], item["diversity_loss_then"]
    return diversity if isinstance(diversity, str) and not isinstance(language, str) else language


def write_report(
    folder: Path, name: str, report: dict[str, Any], source: Source, tokenizer: Any
) -> list[tuple[str, str]]:
    """`NAME.json` and, decoded, `NAME.txt` into `folder`; returns their names and texts. Rank 0 alone. Raises OSError,
    and UserError where a shard cannot be read."""
    worst = sorted(report["micro_batches"], key=badness, reverse=True)
    texts = [
        f"=== rank {item['rank']}, micro-batch {item['micro_batch']}, {describe_sample(sample)}\n"
        + tokenizer.decode(source.read(np.array([sample["sample"]]))[0].tolist())
        for item in worst[:TEXTS_MICRO_BATCHES]
        for sample in item["samples"]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    files = [(f"{name}.json", json.dumps(report, indent=1) + "\n"), (f"{name}.txt", "\n\n".join(texts) + "\n")]
    for file, text in files:
        publish_file(folder / file, text.encode())
    return files


def describe_sample(place: dict[str, Any]) -> str:
    """One line for a person: where in the data a sample lies."""
    document = f"document {place['document']:,}" + (f" ({place['document_id']})" if place.get("document_id") else "")
    where = f"split {place['split']}" + (f" of {place['dataset']}" if "dataset" in place else "")
    return f"sample {place['sample']:,} of {where}, from token {place['token_offset']:,}, {document}"


def name_places(places: Sequence[dict[str, Any]], most: int = 4) -> str:
    """A few samples in words. No collective."""
    shown = "; ".join(describe_sample(place) for place in places[:most])
    return shown + (f"; and {len(places) - most} more" if len(places) > most else "")
