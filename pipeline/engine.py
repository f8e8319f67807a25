"""Run settings and a DeepSpeed JSON become one DeepSpeed configuration and one engine."""

import difflib
import json
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.data import BatchLayout
from pipeline.distributed import World
from pipeline.optim import build_optimizer, parameter_groups

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


def resolve_precision(wanted: str, world: World) -> str:
    """`auto` → bf16 where every rank's hardware multiplies it, else fp32."""
    if wanted != "auto":
        return wanted
    return "bf16" if all(world.gather(_has_bf16(world.device))) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is absent, is no JSON object or holds a key that DeepSpeed does not know."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(str(item) for item in Path("ds_configs").glob("*.json")))
        raise UserError(
            f"deepspeed.config: {path}: no such file" + (f"; there are: {known}" if known else "")
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"deepspeed.config: {path}: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"deepspeed.config: {path}: must hold a JSON object, holds a {type(values).__name__}")
    problems = []
    for key in values.keys() - KNOWN_KEYS:
        near = difflib.get_close_matches(key, KNOWN_KEYS, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else f"known: {', '.join(sorted(KNOWN_KEYS))}"
        problems.append(f"deepspeed.config: {path}: unknown key {key}; {hint}")
    if problems:
        raise UserError(sorted(problems))
    return values


def deepspeed_config(config: RunConfig, layout: BatchLayout, precision: str) -> dict[str, Any]:
    """Merge the run's settings with DeepSpeed's own knobs.

    The run owns batch sizes, precision, optimizer, schedule and clipping. The JSON may repeat one of them as
    "auto" or with the same value.

    Raises:
        UserError: every contradiction, naming both sides.
    """
    path = config.deepspeed.config
    knobs = read_deepspeed_json(path)
    owned: dict[str, tuple[Any, str]] = {
        "train_batch_size": (layout.global_batch_size, "training.global_batch_size"),
        "train_micro_batch_size_per_gpu": (layout.micro_batch_size, "training.micro_batch_size"),
        "gradient_accumulation_steps": (
            layout.gradient_accumulation_steps,
            "training.global_batch_size / (training.micro_batch_size × world size)",
        ),
        "gradient_clipping": (config.optimizer.max_gradient_norm, "optimizer.max_gradient_norm"),
        "bf16": ({"enabled": precision == "bf16"}, "training.precision"),
        "fp16": ({"enabled": precision == "fp16"}, "training.precision"),
    }
    problems = []
    for key in ("optimizer", "scheduler"):
        if knobs.pop(key, "auto") != "auto":
            problems.append(f"{path}: {key} is set there, and by `optimizer` in the run file; remove it from the JSON")
    for key, (value, setting) in owned.items():
        given = knobs.pop(key, "auto")
        if given == "auto":
            continue
        if isinstance(value, dict) and isinstance(given, dict):
            enabled = given.get("enabled", False)
            if enabled in ("auto", value["enabled"]):
                owned[key] = ({**given, **value}, setting)
                continue
            given, value = f"enabled: {enabled}", f"enabled: {value['enabled']}"
        elif given == value:
            continue
        problems.append(
            f'{path}: {key} = {given}, but {setting} gives {value}; remove it from the JSON, or write "auto"'
        )
    problems += [f'{path}: {key} = "auto" cannot be filled in by the run; give a value' for key in _autos(knobs)]
    if problems:
        raise UserError(problems)
    settings = {"steps_per_print": 2**31, **knobs, **{key: value for key, (value, _) in owned.items()}}
    if precision != "fp32":
        # Gradients are summed in fp32; the tensor pool, a buffer, is multiplied with 16-bit weights.
        defaults = {"grad_accum_dtype": "fp32", "buffer_dtype": precision}
        settings["data_types"] = {**defaults, **knobs.get("data_types", {})}
    return settings


def _autos(values: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found


def zero_stage(settings: dict[str, Any]) -> int:
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def initialize(model: nn.Module, config: RunConfig, settings: dict[str, Any]) -> Any:
    """The DeepSpeed engine around `model`, with AdamW over its decay and no-decay groups."""
    deepspeed_logger.setLevel("WARNING")
    offload = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    groups = parameter_groups(model, config.optimizer.weight_decay)
    optimizer = build_optimizer(groups, config.optimizer, offload in ("cpu", "nvme"))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def clip() -> None:
        norm = torch.nn.utils.clip_grad_norm_(engine.module.parameters(), engine.gradient_clipping())
        engine._global_grad_norm = norm

    engine.clip_fp32_gradients = clip  # used at stage 0 in fp32; DeepSpeed's own forgets the norm
    return engine
