"""A forecast of what a rank needs of its device, and for how long, said before the ranks start."""

import psutil
import torch

from launch.preflight.measured import expected
from launch.preflight.memory import measure, rank_memory
from pipeline.checkpoints.space import readable
from pipeline.config import RunConfig
from pipeline.fitting import Fitted
from pipeline.introduce import LABEL_WIDTH
from pipeline.metrics.duration import duration
from pipeline.metrics.utilisation import card, device_name, peak_teraflops


def forecast(config: RunConfig, fitted: Fitted, ranks: int, precision: str, device: torch.device) -> list[str]:
    """Memory and time, as the first of the lines that rank 0 will print; none where the model is not known here."""
    found = [memory_line(config, fitted, ranks, precision, device)]
    name = device_name(device)
    peak = config.training.peak_teraflops_per_device or peak_teraflops(name, precision)
    if peak:
        found.append(time_line(config, fitted, ranks, name, peak))
    return [line for line in found if line]


def time_line(config: RunConfig, fitted: Fitted, ranks: int, device: str, peak: float) -> str | None:
    """The time that training takes at the share of the devices' peak rate that was measured, or is guessed.

    Args:
        peak: of one device, in 10^12 operations per second.
    """
    if fitted.model is None or fitted.steps is None:
        return None
    length = config.data.sequence_length
    flops = fitted.model.flops_per_token(length)
    share = expected(config.model.preset, flops, card(device))
    tokens = config.training.samples(fitted.steps) * length
    seconds = tokens * flops / (ranks * peak * 1e12 * share.mfu)
    return f"{'time':<{LABEL_WIDTH}}about {duration(seconds)} at an MFU of {share.mfu:.3g} ({share.source})"


def memory_line(config: RunConfig, fitted: Fitted, ranks: int, precision: str, device: torch.device) -> str | None:
    if fitted.model is None:
        return None
    size = measure(
        fitted.model, config.training.micro_batch_size, config.data.sequence_length, precision, config.optimizer.name
    )
    zero = fitted.deepspeed.get("zero_optimization", {})
    accumulates = fitted.layout is not None and fitted.layout.gradient_accumulation_steps > 1
    needed = rank_memory(size, int(zero.get("stage", 0)), ranks, precision, zero, accumulates=accumulates)
    if device.type == "cpu":
        there = f"this machine has {readable(psutil.virtual_memory().total)} for {ranks} rank{'s' * (ranks > 1)}"
    else:
        there = f"the device has {readable(torch.cuda.get_device_properties(device).total_memory)}"
    parts = {
        "weights": needed.weights,
        "gradients": needed.gradients,
        "optimizer": needed.optimizer,
        "buffers": needed.buffers,
        "activations": needed.activations,
    }
    listed = ", ".join(f"{name} {readable(count)}" for name, count in parts.items())
    return f"{'memory':<{LABEL_WIDTH}}about {readable(needed.total)} per rank ({listed}); {there}"
