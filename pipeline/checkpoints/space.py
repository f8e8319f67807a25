"""How much room checkpoints take, and whether the disk has it."""

import shutil
from pathlib import Path

import torch

from model.configuration_globallocal import GlobalLocalConfig
from model.modeling_globallocal import GlobalLocalForCausalLM
from pipeline.checkpoints.folder import list_checkpoints, read_listing
from pipeline.engine.optim import is_matrix
from pipeline.settings.sections import Retention

_WIDTH_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_RANK_BYTES = 1 << 16
"""Random state, names and numbers of one rank, about."""


def checkpoint_bytes(model: GlobalLocalConfig, optimizer: str, stage: int, precision: str, ranks: int) -> int:
    """Bytes of one checkpoint of DeepSpeed 0.19, all ranks together.

    Weights in the training precision (stage 3 writes none), fp32 master weights (none where stage 0 trains in
    fp32), fp32 moments; the tensor pool once, at stage 3 from every rank.

    Args:
        optimizer: `optimizer.name` of the run.
    """
    width, parameters = _WIDTH_BYTES[precision], sum(model.parameter_counts().values())
    weights = 0 if stage == 3 else width
    master = 0 if stage == 0 and precision == "fp32" else 4
    pools = width * model.pool_size * model.pool_dim * (ranks if stage == 3 else 1)
    return parameters * (weights + master) + 4 * moments(model, optimizer) + pools + ranks * _RANK_BYTES


def moments(model: GlobalLocalConfig, optimizer: str) -> int:
    """Elements of all moments: AdamW has two per parameter, Muon one per parameter that it moves itself."""
    twice = 2 * sum(model.parameter_counts().values())
    if optimizer != "muon":
        return twice
    with torch.device("meta"):
        parameters = GlobalLocalForCausalLM(model).named_parameters()
    return twice - sum(item.numel() for name, item in parameters if is_matrix(name, item))


def copy_bytes(model: GlobalLocalConfig, optimizer: str, stage: int, precision: str, ranks: int) -> int:
    """Host memory that the rank which writes most holds for saving in the background (`snapshot.HostBuffers`).

    At stage 0 rank 0 writes all; above it every rank writes its share of the optimizer's states, and rank 0 the weights
    too. Arguments as of `checkpoint_bytes`.
    """
    if stage == 0:
        return checkpoint_bytes(model, optimizer, stage, precision, ranks)
    width, parameters = _WIDTH_BYTES[precision], sum(model.parameter_counts().values())
    weights = 0 if stage == 3 else width * parameters
    states = 4 * (parameters + moments(model, optimizer)) // ranks
    return weights + states + width * model.pool_size * model.pool_dim + _RANK_BYTES


def retained(retention: Retention, max_steps: int, interval_steps: int) -> int:
    """The most checkpoints that stand at once, the one being written included."""
    written = -(-max_steps // interval_steps)
    for_ever = max_steps // retention.keep_every_steps if retention.keep_every_steps else 0
    return min(written, retention.keep_last + retention.keep_best + for_ever) + (written > retention.keep_last)


def start_problems(root: Path, one_bytes: int, count: int) -> list[str]:
    """Before step 0: is there room for `count` checkpoints, those that stand included?"""
    standing = sum(size_bytes(folder) for folder in list_checkpoints(root))
    free, needed = free_bytes(root), max(one_bytes, count * one_bytes - standing)
    if free >= needed:
        return []
    return [
        f"{root}: {readable(free)} free, but the run keeps up to {count} checkpoints of about {readable(one_bytes)}, "
        f"{readable(needed)} more than stands there now; free {readable(needed - free)}, lower checkpoint.keep_last, "
        "keep_best or keep_every_steps, or move run.output_dir to a larger disk"
    ]


def save_problems(root: Path, one_bytes: int) -> list[str]:
    """Before a save: is there room for one more? It is tried again at the next interval."""
    free = free_bytes(root)
    if free >= one_bytes:
        return []
    return [
        f"{root}: {readable(free)} free, a checkpoint takes about {readable(one_bytes)}; free "
        f"{readable(one_bytes - free)} (`globallocal checkpoints prune`, a smaller checkpoint.keep_last)"
    ]


def size_bytes(folder: Path) -> int:
    """Bytes of a checkpoint by its own listing; 0 where it has none."""
    return sum(item["bytes"] for item in read_listing(folder)[0].values())


def free_bytes(folder: Path) -> int:
    """Free on the disk that `folder` is on, or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def readable(count: float) -> str:
    """1,234,567 → 1.2 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
