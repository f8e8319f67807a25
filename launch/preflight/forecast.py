"""What a rank will need of its device, said before the ranks start."""

import psutil
import torch

from launch.preflight.memory import measure, rank_memory
from pipeline.checkpoints.space import readable
from pipeline.config import RunConfig
from pipeline.fitting import Fitted
from pipeline.introduce import LABEL_WIDTH


def memory_line(config: RunConfig, fitted: Fitted, ranks: int, precision: str, device: torch.device) -> str | None:
    """The memory forecast, as the first of the lines that rank 0 will print; None where the model is not known here."""
    if fitted.model is None:
        return None
    size = measure(fitted.model, config.training.micro_batch_size, config.data.sequence_length, precision)
    zero = fitted.deepspeed.get("zero_optimization", {})
    accumulates = fitted.layout is not None and fitted.layout.gradient_accumulation_steps > 1
    cpu = device.type == "cpu"
    needed = rank_memory(size, int(zero.get("stage", 0)), ranks, precision, zero, cpu=cpu, accumulates=accumulates)
    if cpu:
        there = f"this machine has {readable(psutil.virtual_memory().total)} for {ranks} ranks"
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
