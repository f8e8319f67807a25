"""A job of a thousand ranks gone through on one machine: every rank's settings, place, data and memory, and no start.

What is real: the merged DeepSpeed settings, read by DeepSpeed's own parser for each rank; the loader's own arithmetic,
for each rank and step; the memory forecast of `estimate`. What is not: no process but this one, no network, no device.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_prep.errors import UserError
from launch.preflight.estimate import Machine, estimate, gibibytes, model_of
from launch.preflight.memory import RankMemory
from pipeline.checkpoints.space import checkpoint_bytes
from pipeline.config import RunConfig
from pipeline.data.loader import BatchLayout, micro_batches
from pipeline.engine.engine import deepspeed_config, zero_stage
from pipeline.engine.internals import parse_settings
from pipeline.metrics.duration import duration
from pipeline.settings.section import counted

HEADROOM = 0.92
"""Part of a device's memory that may be forecast: the rest is the context, the kernels' workspace, fragmentation."""


@dataclass(frozen=True)
class Fleet:
    """The machines that a job is to run on; `device_memory_gib` is that of one device."""

    ranks: int
    gpus_per_node: int = 8
    device_memory_gib: float = 80.0


@dataclass(frozen=True)
class Rehearsal:
    """The result of a rehearsal, with the forecast for one rank (all ranks are alike); bytes, samples, seconds."""

    name: str
    ranks: int
    nodes: int
    zero_stage: int
    hpz_partition: int
    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    tokens_per_step: int
    steps: int
    samples: int
    memory: RankMemory
    device_bytes: int
    host_bytes_per_node: int
    checkpoint_bytes: int
    seconds: float

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}, indent=2)

    def lines(self) -> list[str]:
        """For a person."""
        memory, nodes = self.memory, self.nodes
        hpz = f", parameters also split over {self.hpz_partition} ranks (hpZ)" if self.hpz_partition > 1 else ""
        return [
            f"ranks: {self.ranks:,} on {nodes:,} nodes; each one's DeepSpeed settings read: "
            f"ZeRO stage {self.zero_stage}{hpz}, the same on all",
            f"batch: {self.global_batch_size:,} samples = {self.micro_batch_size} micro-batch × "
            f"{counted(self.ranks, 'rank')} × {counted(self.gradient_accumulation_steps, 'accumulation step')}; "
            f"{self.tokens_per_step:,} tokens per step",
            f"data: {self.steps:,} steps, {self.samples:,} positions over all ranks; every global batch is "
            "shared out exactly, each sample to one rank",
            f"memory: {gibibytes(memory.total)} GiB per rank of {gibibytes(self.device_bytes)} GiB (weights "
            f"{gibibytes(memory.weights)}, gradients {gibibytes(memory.gradients)}, optimizer "
            f"{gibibytes(memory.optimizer)}, buffers {gibibytes(memory.buffers)}, activations "
            f"{gibibytes(memory.activations)})",
            *([f"host memory or NVMe: {gibibytes(self.host_bytes_per_node)} GiB per node"] * bool(memory.offloaded)),
            f"checkpoint: {gibibytes(self.checkpoint_bytes)} GiB, {gibibytes(self.checkpoint_bytes // nodes)} per node",
            f"rehearsed in {duration(self.seconds)}",
        ]


def rehearse(config: RunConfig, fleet: Fleet, steps: int = 1000, say: Callable[[str], None] = print) -> Rehearsal:
    """Go through the first `steps` steps of a job on `fleet`.

    Raises:
        UserError: everything that does not fit together, one line each.
    """
    started = time.monotonic()
    problems = _fleet_problems(fleet)
    try:
        layout = BatchLayout.of(config.training, fleet.ranks)
    except UserError as error:
        raise UserError([*problems, *error.problems]) from None
    precision = "bf16" if config.training.precision == "auto" else config.training.precision
    settings = deepspeed_config(config, layout, precision)
    hpz = int(settings.get("zero_optimization", {}).get("zero_hpz_partition_size", 1))
    problems += _partition_problems(hpz, fleet) + _settings_problems(settings, fleet.ranks)
    say(f"settings of {counted(fleet.ranks, 'rank')} read")
    result = estimate(config, Machine(ranks=fleet.ranks))
    memory, stage = result.memory[result.zero_stage], zero_stage(settings)
    device_bytes = round(fleet.device_memory_gib * 2**30)
    if memory.total > HEADROOM * device_bytes:
        problems.append(
            f"a rank needs {gibibytes(memory.total)} GiB, more than {HEADROOM:.0%} of the device's "
            f"{gibibytes(device_bytes)} GiB; a smaller training.micro_batch_size, "
            "model.activation_checkpointing=full, a higher ZeRO stage or offloading"
        )
    if problems:
        raise UserError(problems)
    say(f"data positions of {steps:,} steps, {layout.first_sample(steps):,} samples")
    check_positions(layout, steps)
    return Rehearsal(
        name=config.run.name,
        ranks=fleet.ranks,
        nodes=-(-fleet.ranks // fleet.gpus_per_node),
        zero_stage=stage,
        hpz_partition=hpz,
        global_batch_size=layout.global_batch_size,
        micro_batch_size=layout.micro_batch_size,
        gradient_accumulation_steps=layout.gradient_accumulation_steps,
        tokens_per_step=result.tokens_per_step,
        steps=steps,
        samples=layout.first_sample(steps),
        memory=memory,
        device_bytes=device_bytes,
        host_bytes_per_node=memory.offloaded * min(fleet.gpus_per_node, fleet.ranks),
        checkpoint_bytes=checkpoint_bytes(model_of(config), config.optimizer.name, stage, precision, fleet.ranks),
        seconds=time.monotonic() - started,
    )


def _fleet_problems(fleet: Fleet) -> list[str]:
    if fleet.ranks <= fleet.gpus_per_node or fleet.ranks % fleet.gpus_per_node == 0:
        return []
    low = fleet.ranks // fleet.gpus_per_node * fleet.gpus_per_node
    return [
        f"--ranks {fleet.ranks} leaves a node partly filled with --gpus-per-node {fleet.gpus_per_node}; "
        f"nearest: {low} or {low + fleet.gpus_per_node}"
    ]


def _partition_problems(hpz: int, fleet: Fleet) -> list[str]:
    """Problems of hpZ groups, which gather parameters inside a node.

    A partition that crosses nodes defeats its purpose; one that is cut cannot run.
    """
    if hpz <= 1:
        return []
    groups = np.arange(fleet.ranks) // hpz
    nodes = np.arange(fleet.ranks) // fleet.gpus_per_node
    crossing = any(np.unique(nodes[groups == group]).size > 1 for group in range(groups[-1] + 1))
    if fleet.ranks % hpz == 0 and not crossing:
        return []
    return [
        f"zero_hpz_partition_size ({hpz}) must divide the {min(fleet.gpus_per_node, fleet.ranks)} ranks of a node "
        f"and all {fleet.ranks} ranks; set it to the ranks of a node"
    ]


def _settings_problems(settings: dict[str, Any], ranks: int) -> list[str]:
    """DeepSpeed's own parser on the settings, as every rank of the job would call it."""
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    read = set()
    try:
        for rank in range(ranks):
            parsed = parse_settings(settings, rank, ranks)
            sizes = parsed.train_batch_size, parsed.train_micro_batch_size_per_gpu, parsed.gradient_accumulation_steps
            read.add((*sizes, parsed.zero_config.model_dump_json()))
    except (AssertionError, ValueError) as error:
        return [f"DeepSpeed refuses the settings of rank {rank}: {' '.join(str(error).split())}"]
    return [] if len(read) == 1 else ["DeepSpeed reads different settings on different ranks"]


class _Positions:
    """A source whose samples are their own positions: what the loader of a rank would read."""

    num_samples, sequence_length = 1, 0

    def sample_indices(self, positions: np.ndarray) -> np.ndarray:
        return positions

    def read(self, indices: np.ndarray) -> np.ndarray:
        return indices

    def locate(self, sample: int) -> dict[str, Any]:
        return {"sample": sample}

    def ahead(self, position: int) -> None:
        return None


def check_positions(layout: BatchLayout, steps: int) -> None:
    """Run every rank's loader over `steps` steps; each global batch must be shared out exactly.

    Raises:
        AssertionError: a position is read twice or not at all.
    """
    loaders = [micro_batches(_Positions(), layout, rank, 0, ()) for rank in range(layout.world_size)]
    for step in range(steps):
        first, end = layout.first_sample(step), layout.first_sample(step + 1)
        share = (end - first) // (layout.micro_batch_size * layout.world_size)
        read = np.concatenate([next(loader) for loader in loaders for _ in range(share)])
        if not np.array_equal(np.sort(read.ravel()), np.arange(first, end)):
            raise AssertionError(f"step {step} is not shared out exactly over the ranks")
