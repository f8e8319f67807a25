"""DeepSpeed's own knobs, as a JSON file holds them: read, checked, `"auto"` filled in, and what a machine lacks."""

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from pipeline.settings.shipped import DEEPSPEED_FILES, PROJECT, find_shipped

AUTO = {
    "reduce_bucket_size": 200_000_000,
    "allgather_bucket_size": 200_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""What `"auto"` stands for under `zero_optimization`: the values of ds_configs/, in elements."""
AUTO_STAGE_3 = {**AUTO, "reduce_bucket_size": 50_000_000}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is absent, is no JSON object or holds a key twice."""
    try:
        text = find_shipped(path, DEEPSPEED_FILES, ".json").read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_once)
    except FileNotFoundError:
        known = sorted(f"{DEEPSPEED_FILES}/{item.name}" for item in (PROJECT / DEEPSPEED_FILES).glob("*.json"))
        raise UserError(f"deepspeed.config: {path}: no such file; there are: {', '.join(known)}") from None
    except (OSError, ValueError, RecursionError) as error:
        said = (error.strerror if isinstance(error, OSError) else " ".join(str(error).split())) or type(error).__name__
        raise UserError(
            f"deepspeed.config: {str(path)[:200]}: {said[:300]}; see ds_configs/zero2.json for the form"
        ) from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed.config: {path}: must hold a JSON object, holds a {type(values).__name__}")
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; the last of two equal keys would win in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        twice = sorted({key for key in names if names.count(key) > 1})
        raise ValueError(f"{', '.join(twice)[:200]} stands twice in one object; remove one")
    return values


def fill_autos(zero: Mapping[str, Any]) -> dict[str, Any]:
    """`zero_optimization` with the bucket sizes that are "auto" filled in; other autos are left for `autos` to find."""
    sizes = AUTO_STAGE_3 if zero.get("stage") == 3 else AUTO
    return {key: sizes.get(key, value) if value == "auto" else value for key, value in zero.items()}


def autos(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose value is still "auto"."""
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found


def faults(knobs: Mapping[str, Any]) -> list[str]:
    """Knobs that contradict each other, each of the right kind: one line each."""
    zero = knobs.get("zero_optimization", {})
    problems = []
    stage = zero.get("stage", 0)
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        if device(zero, key) != "none" and stage < lowest:
            problems.append(f"zero_optimization.{key} does nothing at stage {stage}; set stage to {lowest} or more")
    if device(zero, "offload_optimizer") == "nvme" and stage != 3:
        problems.append(f"zero_optimization.offload_optimizer.device = nvme needs stage 3, the file has stage {stage}")
    if (knobs.get("compile") or {}).get("deepcompile"):
        problems.append("compile.deepcompile = true: training does not use DeepCompile; remove it")
    bf16 = knobs.get("bf16", {})
    if bf16.get("bf16_optimizer_states") and not bf16.get("bf16_master_weights_and_grads"):
        problems.append(
            "bf16.bf16_optimizer_states = true needs bf16.bf16_master_weights_and_grads; set both, or remove it"
        )
    checkpointing = knobs.get("activation_checkpointing", {})
    if checkpointing.get("contiguous_memory_optimization") and not (
        checkpointing.get("partition_activations") and checkpointing.get("number_checkpoints")
    ):
        problems.append(
            "activation_checkpointing.contiguous_memory_optimization = true needs partition_activations and "
            "number_checkpoints; set both, or remove it"
        )
    return problems


def device(zero: Mapping[str, Any], key: str) -> str:
    """`cpu`, `nvme` or `none`: where `offload_optimizer` or `offload_param` puts what it holds."""
    return (zero.get(key) or {}).get("device") or "none"


def lacks(knobs: Mapping[str, Any], ranks: int, cuda: bool) -> list[str]:
    """What keeps this machine from training with the knobs: `REASON; REMEDY`, one line each."""
    zero = knobs.get("zero_optimization", {})
    problems = []
    partition = zero.get("zero_hpz_partition_size", 1)
    if ranks % max(1, partition):
        fitting = [size for size in range(1, ranks + 1) if ranks % size == 0]
        problems.append(
            f"zero_hpz_partition_size ({partition}) must divide the ranks ({ranks}); "
            f"set it to the ranks of a node, one of {', '.join(map(str, fitting))}"
        )
    quantized = [key for key, value in zero.items() if key.startswith("zero_quantized") and value]
    if quantized and not cuda:
        problems.append(
            f"{' and '.join(f'{key} = true' for key in quantized)} need CUDA kernels, this machine has CPU cores only; "
            "take ds_configs/zero3_hpz.json, which communicates unquantized"
        )
    for name in operators(zero):
        if not _compilable(name):
            problems.append(
                f"DeepSpeed's {name.removesuffix('Builder')} cannot be built here; run ds_report for the reason, or "
                "keep the optimizer states on the device"
            )
    if "nvme" in (device(zero, "offload_optimizer"), device(zero, "offload_param")):
        # Tried with 0.19: it copies its swap files past the checkpoint engine, and a resumed model has other logits.
        problems.append(
            f"DeepSpeed {version('deepspeed')} does not bring back what lies on NVMe when it loads a checkpoint: the "
            "run could not be resumed; take ds_configs/zero3_offload.json"
        )
    return problems


def operators(zero: Mapping[str, Any]) -> list[str]:
    """The compiled operators that offloading needs, by the names of their builders."""
    return ["CPUAdamBuilder"] * (device(zero, "offload_optimizer") != "none")


def _compilable(builder: str) -> bool:
    from deepspeed.accelerator import get_accelerator

    made = get_accelerator().create_op_builder(builder)
    return made is not None and bool(made.is_compatible(verbose=False))
