"""DeepSpeed's own knobs, as a JSON file holds them: read, checked, `"auto"` filled in, and what a machine lacks."""

import difflib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.errors import UserError
from pipeline.config import DEEPSPEED_FILES, PROJECT, find_shipped

# DeepSpeed ignores a misspelt key at the top level, so the ones it knows are listed here (0.19 documentation).
_KEYS = """
train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler
communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor
sparse_gradients fp16 bf16 torch_autocast amp data_types gradient_clipping zero_optimization
zero_allow_untested_optimizer zero_force_ds_cpu_optimizer disable_allgather steps_per_print
wall_clock_breakdown memory_breakdown dump_state flops_profiler activation_checkpointing comms_logger
compile aio checkpoint timers use_data_before_expert_parallelism
"""
KNOWN_KEYS = frozenset(_KEYS.split())

AUTO = {
    "reduce_bucket_size": 200_000_000,
    "allgather_bucket_size": 200_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": 100_000,
}
"""What `"auto"` stands for under `zero_optimization`: the values of ds_configs/, in elements."""
AUTO_STAGE_3 = {**AUTO, "reduce_bucket_size": 50_000_000}


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is absent, is no JSON object or holds a key that DeepSpeed does not know."""
    try:
        values = json.loads(find_shipped(path, DEEPSPEED_FILES, ".json").read_text())
    except FileNotFoundError:
        known = sorted(f"{DEEPSPEED_FILES}/{item.name}" for item in (PROJECT / DEEPSPEED_FILES).glob("*.json"))
        raise UserError(f"deepspeed.config: {path}: no such file; there are: {', '.join(known)}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config: {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed.config: {path}: must hold a JSON object, holds a {type(values).__name__}")
    problems = [f"deepspeed.config: {path}: {_unknown(key, KNOWN_KEYS)}" for key in values.keys() - KNOWN_KEYS]
    if problems:
        raise UserError(sorted(problems))
    return values


def _unknown(key: str, known: frozenset[str], prefix: str = "") -> str:
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"nearest: {', '.join(prefix + item for item in near)}" if near else f"known: {', '.join(sorted(known))}"
    return f"unknown key {prefix}{key}; {hint}"


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
    """What DeepSpeed would stop at with a traceback, or pass over in silence: one line each."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = knobs.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        return [f"zero_optimization must hold an object, holds {zero!r}"]
    problems = []
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        fields = DeepSpeedZeroConfig.model_fields.items()
        known = frozenset(name for key, field in fields for name in (field.alias or key,))
        for item in error.errors():
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
                problems.append(_unknown(key, known, "zero_optimization."))
            else:
                message = item["msg"][0].lower() + item["msg"][1:]
                problems.append(f"zero_optimization.{key} = {item['input']!r}: {message}")
    stage = zero.get("stage", 0)
    for key, lowest in (("offload_optimizer", 1), ("offload_param", 3)):
        if device(zero, key) != "none" and stage != "auto" and int(stage) < lowest:
            problems.append(f"zero_optimization.{key} does nothing at stage {stage}; set stage to {lowest} or more")
    if device(zero, "offload_optimizer") == "nvme" and stage != 3:
        problems.append(f"zero_optimization.offload_optimizer.device = nvme needs stage 3, the file has stage {stage}")
    if (knobs.get("compile") or {}).get("deepcompile"):
        problems.append("compile.deepcompile = true: training does not use DeepCompile; remove it")
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
            f"{' and '.join(quantized)} need CUDA kernels, this machine has CPU cores only; "
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
