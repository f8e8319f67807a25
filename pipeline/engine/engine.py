"""Run settings and a DeepSpeed JSON become one DeepSpeed configuration and one engine."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger as deepspeed_logger
from torch import nn

from data_prep.errors import UserError
from pipeline.config import RunConfig
from pipeline.data.loader import BatchLayout
from pipeline.distributed.stop import StopRequest
from pipeline.distributed.world import World
from pipeline.engine.deepspeed_json import autos, device, faults, fill_autos, lacks, operators, read_deepspeed_json
from pipeline.engine.internals import (
    Engine,
    clip_by_the_norm_that_is_checked,
    let_the_loss_scale_fall,
    let_zero_take,
    look_at_all_gradients_at_once,
    parts_of,
    wait_once_a_step,
)
from pipeline.engine.muon import Muon
from pipeline.engine.operators import load_operator
from pipeline.engine.optim import build_optimizer, is_matrix, parameter_groups
from pipeline.engine.schema import OWNED, knob_problems
from pipeline.settings.section import counted, short
from pipeline.settings.sections import OptimizerSection


def resolve_precision(wanted: str, world: World) -> str:
    """`auto` → bf16 where every rank's hardware multiplies it, else fp32."""
    if wanted != "auto":
        return wanted
    return "bf16" if all(world.gather(has_bf16(world.device))) else "fp32"


def has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def deepspeed_config(config: RunConfig, layout: BatchLayout | None, precision: str) -> dict[str, Any]:
    """Merge the run's settings with DeepSpeed's own knobs.

    The run owns batch sizes, precision, optimizer, schedule and clipping. The JSON may repeat one of them as
    "auto" or with the same value. `layout` is None where the ranks are not known yet: nothing is said of batch sizes.

    Raises:
        UserError: every contradiction, naming both sides; every knob that DeepSpeed would refuse or ignore.
    """
    path = config.deepspeed.config
    knobs, misspelt = read_knobs(path)
    if isinstance(knobs.get("zero_optimization"), dict):
        knobs["zero_optimization"] = fill_autos(knobs["zero_optimization"])
    problems = misspelt + _batch_clash(knobs, layout) + _optimizer_clashes(knobs, config.optimizer)
    owned = {**_batch_sizes(layout), "gradient_clipping": config.optimizer.max_gradient_norm}
    clipping = knobs.pop("gradient_clipping", "auto")
    if clipping not in ("auto", owned["gradient_clipping"]):
        problems.append(
            _clash("gradient_clipping", clipping, "optimizer.max_gradient_norm", owned["gradient_clipping"])
        )
    for key in ("bf16", "fp16"):
        wanted, given = precision == key, knobs.pop(key, "auto")
        given = given if isinstance(given, dict) else {}
        owned[key] = {**given, "enabled": wanted}
        if given.get("enabled", wanted) not in ("auto", wanted):
            problems.append(_clash(f"{key}.enabled", given["enabled"], "training.precision", wanted))
    left = autos({**knobs, **owned})
    problems += [f'{key} = "auto" cannot be filled in by the run; give a value' for key in left]
    problems += _muon_offloaded(knobs) if config.optimizer.name == "muon" else []
    problems += [] if left or misspelt else faults({**knobs, **owned}) + _unchecked({**knobs, **owned})
    if problems:
        raise UserError([f"{path}: {problem}" for problem in problems])
    settings = {"steps_per_print": 2**31, **knobs, **owned}
    if precision != "fp32":
        # The tensor pool, a buffer, is multiplied with 16-bit weights. Gradients are summed in fp32, but for stage 0,
        # where DeepSpeed keeps them in the weights' own type.
        defaults = {"buffer_dtype": precision} | ({"grad_accum_dtype": "fp32"} if zero_stage(settings) else {})
        settings["data_types"] = {**defaults, **knobs.get("data_types", {})}
    return settings


def read_knobs(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The JSON, and what is wrong with it whatever the run. Raises UserError as `read_deepspeed_json`."""
    knobs = read_deepspeed_json(path)
    for key in ("bf16", "fp16"):
        if isinstance(knobs.get(key), bool):
            knobs[key] = {"enabled": knobs[key]}
    return knobs, knob_problems(knobs)


def check_knobs(path: Path) -> None:
    """Raises UserError as `deepspeed_config` does, for what needs no setting of the run to be seen."""
    problems = read_knobs(path)[1]
    if problems:
        raise UserError([f"{path}: {problem}" for problem in problems])


def _clash(key: str, given: Any, setting: str, value: Any) -> str:
    return f'{key} = {short(given)}, but {setting} gives {value}; remove it from the JSON, or write "auto"'


def _batch_sizes(layout: BatchLayout | None) -> dict[str, Any]:
    if layout is None:
        return {}
    return {
        "train_batch_size": layout.global_batch_size,
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.gradient_accumulation_steps,
    }


def _batch_clash(knobs: dict[str, Any], layout: BatchLayout | None) -> list[str]:
    """Takes the batch sizes out of `knobs`; one line with all four numbers where one contradicts the run."""
    given = {key: knobs.pop(key, "auto") for key in OWNED[:3]}
    if layout is None:
        return []
    values = _batch_sizes(layout)
    wrong = [f"{key} = {short(given[key])}" for key, value in values.items() if given[key] not in ("auto", value)]
    if not wrong:
        return []
    return [
        f"{', '.join(wrong)}, but the run gives training.global_batch_size {layout.global_batch_size} = "
        f"training.micro_batch_size {layout.micro_batch_size} × {counted(layout.world_size, 'rank')} × "
        f'{counted(layout.gradient_accumulation_steps, "accumulation step")}; remove it from the JSON, or write "auto"'
    ]


def _optimizer_clashes(knobs: dict[str, Any], section: OptimizerSection) -> list[str]:
    """Takes `optimizer` and `scheduler` out of `knobs`: the run's may be repeated there, another one not."""
    problems = []
    if (scheduler := knobs.pop("scheduler", "auto")) != "auto":
        problems.append(
            f"scheduler = {short(scheduler)} is set there, and by optimizer.warmup_steps and "
            "optimizer.min_learning_rate_ratio in the run file (linear warm-up, cosine decay); remove it from the JSON"
        )
    given = knobs.pop("optimizer", "auto")
    if given == "auto":
        return problems
    name = given.get("type") if isinstance(given, dict) else given
    if str(name).lower() != section.name:
        return [
            *problems,
            f"optimizer.type = {str(name)[:60]}, but optimizer.name in the run file is {section.name}; remove it from "
            "the JSON",
        ]
    owned = {
        "lr": ("learning_rate", section.learning_rate),
        "betas": ("betas", list(section.betas)),
        "eps": ("epsilon", section.epsilon),
        "weight_decay": ("weight_decay", section.weight_decay),
    }
    if section.name == "muon":
        owned["momentum"] = "momentum", section.momentum
        owned |= dict.fromkeys(("muon_lr", "adam_lr"), owned["lr"])
    parameters = given.get("params", {}) if isinstance(given, dict) else {}
    if not isinstance(parameters, dict):
        return [*problems, f"optimizer.params = {short(parameters)}: must be an object; remove it from the JSON"]
    for key, value in parameters.items():
        if key not in owned:
            problems.append(f"optimizer.params.{key} = {short(value)}: the run file has no such setting; remove it")
        elif value not in ("auto", owned[key][1]):
            setting, ours = owned[key]
            problems.append(_clash(f"optimizer.params.{key}", value, f"optimizer.{setting}", ours))
    return problems


def _muon_offloaded(knobs: dict[str, Any]) -> list[str]:
    zero = knobs.get("zero_optimization")
    if not isinstance(zero, dict) or not isinstance(zero.get("offload_optimizer"), dict):
        return []
    where = device(zero, "offload_optimizer")
    if where == "none":
        return []
    return [
        f"zero_optimization.offload_optimizer.device = {where}, but optimizer.name = muon, whose products of whole "
        "matrices want the device; remove the one, or set optimizer.name to adamw"
    ]


def _unchecked(knobs: dict[str, Any]) -> list[str]:
    """Knobs that would let a step be taken with gradients that are not finite."""
    return [
        f"{section}.{key} = false would let inf and NaN into the weights; remove it from the JSON"
        for section, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm"))
        if isinstance(knobs.get(section), dict) and not knobs[section].get(key, True)
    ]


def check_machine(config: RunConfig, settings: dict[str, Any], ranks: int, cuda: bool) -> None:
    """Raises UserError with everything that keeps this machine from training with the DeepSpeed JSON."""
    problems = [f"{config.deepspeed.config}: {problem}" for problem in lacks(settings, ranks, cuda)]
    if problems:
        raise UserError(problems)
    check_precision("fp16" if settings["fp16"]["enabled"] else "")


def check_precision(precision: str) -> None:
    """Raises UserError where DeepSpeed does not train in it on this machine."""
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError(
            "training.precision = fp16, which DeepSpeed does not train in here: it takes a GPU, or a CPU with "
            "AVX512-FP16 or AMX-FP16; set training.precision to auto, bf16 or fp32"
        )


def zero_stage(settings: dict[str, Any]) -> int:
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def initialize(
    model: nn.Module, config: RunConfig, settings: dict[str, Any], stop: StopRequest | None = None
) -> Engine:
    """The DeepSpeed engine around `model`, with the run's optimizer over its groups of parameters.

    Raises:
        Stopped: asked to stop while an operator was compiled.
    """
    deepspeed_logger.setLevel("WARNING")
    zero = settings.get("zero_optimization", {})
    for operator in operators(zero):
        load_operator(operator, stop)  # compiled under our lock, which a killed process does not leave behind
    offload = device(zero, "offload_optimizer")
    groups = parameter_groups(model, config.optimizer)
    optimizer = build_optimizer(groups, config.optimizer, offload != "none")
    shapes = {name: tuple(item.shape) for name, item in model.named_parameters() if is_matrix(name, item)}
    let_zero_take(Muon)
    engine: Engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    deepspeed.checkpointing.configure(None, deepspeed_config=settings)  # its activation_checkpointing section
    clip_by_the_norm_that_is_checked(engine)
    let_the_loss_scale_fall(engine)
    wait_once_a_step(engine)
    look_at_all_gradients_at_once(engine)
    if isinstance(optimizer, Muon):
        dtype = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
        optimizer.attach(parts_of(engine, shapes), cut_up=zero_stage(settings) > 0, dtype=dtype)
    return engine
