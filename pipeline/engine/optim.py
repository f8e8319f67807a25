"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

import math
from typing import Any, cast

import torch
from torch import nn

from pipeline.engine.muon import MATRICES, Muon
from pipeline.settings.sections import OptimizerSection

ALIGNED_ELEMENTS = 8  # 16 bytes of half precision


NO_MATRICES = (
    *("embed_tokens.weight", "lm_head.weight"),  # tables: a row per token
    *("keys_weight", "left_weight", "right_weight", "pool"),  # tables: a row per row of the pool
    *(".gate.weight", ".taps"),  # vectors, one beside the other
)
"""How the names end of what has two dimensions and is no map from one hidden state to another: AdamW moves it."""


def is_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon moves the parameter, where it is the optimizer."""
    return parameter.requires_grad and parameter.ndim == 2 and not name.endswith(NO_MATRICES)


NOT_OVER_WIDTH = ("embed_tokens.weight", ".taps", "pool")
"""How the names end of what has two dimensions or more and adds up no hidden state: a step of it moves what comes out
as far at any width. An embedding that is the head too counts as an embedding, as docs/quality.md measured it."""


def matrix_rate(model: nn.Module, settings: OptimizerSection) -> float:
    """The learning rate of what adds up a hidden state, over `learning_rate`: μP's for AdamW (arXiv:2203.03466)."""
    base = settings.base_hidden_size
    return 1.0 if base is None else base / cast(Any, model).config.hidden_size


def parameter_groups(model: nn.Module, settings: OptimizerSection) -> list[dict[str, Any]]:
    """What has two dimensions or more decays; norms, biases and scalars do not. Muon has its own group of matrices.

    A group's `rate` is its learning rate over the schedule's. Rate times decay is the same for all that decays, as μP
    needs it (arXiv:2510.19093).

    ZeRO lays a group's parameters one behind the other. Those whose size is no multiple of `ALIGNED_ELEMENTS` come
    last, so that all before them begin where a GPU reads 16 bytes at once: products with a misaligned weight or bias
    took three times as long.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    trained.sort(key=lambda item: item[1].numel() % ALIGNED_ELEMENTS != 0)
    decay, rate = settings.weight_decay, matrix_rate(model, settings)

    def kind(name: str, parameter: torch.Tensor) -> str:
        if settings.name == "muon" and is_matrix(name, parameter):
            return MATRICES
        if parameter.ndim < 2:
            return "no_decay"
        return "over_width" if rate != 1 and not name.endswith(NOT_OVER_WIDTH) else "decay"

    groups = [
        {"name": MATRICES, "weight_decay": decay, "rate": 1.0},
        {"name": "over_width", "weight_decay": decay / rate, "rate": rate},
        {"name": "decay", "weight_decay": decay, "rate": 1.0},
        {"name": "no_decay", "weight_decay": 0.0, "rate": 1.0},
    ]
    for group in groups:
        group["params"] = [parameter for name, parameter in trained if kind(name, parameter) == group["name"]]
    return [group for group in groups if group["params"]]


def describe_groups(groups: list[dict[str, Any]]) -> list[str]:
    """One line a group, for the log."""
    return [
        f"{group['name']}: {len(group['params'])} tensors, "
        f"{sum(parameter.numel() for parameter in group['params']):,} parameters, "
        f"weight_decay {group['weight_decay']:g}"
        + (f", learning rate × {group['rate']:g}" if group["rate"] != 1 else "")
        for group in groups
    ]


def build_optimizer(groups: list[dict[str, Any]], settings: OptimizerSection, offload: bool) -> torch.optim.Optimizer:
    """AdamW in one pass, with Muon for matrices where it is chosen; DeepSpeed's CPU version of AdamW where optimizer
    states live in host memory."""
    shared: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas, "eps": settings.epsilon}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        offloaded: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True, **shared)
        return offloaded
    if settings.name == "muon":
        groups = [{**group, "momentum": settings.momentum} for group in groups]
        return Muon(groups, fused=True, **shared)
    return torch.optim.AdamW(groups, fused=True, **shared)


def learning_rate(step: int, max_steps: int, settings: OptimizerSection) -> float:
    """Learning rate of optimizer step `step` (the first is 0): linear warm-up, then what `settings.schedule` says.

    cosine: a half cosine (arXiv:1608.03983, without restarts). linear: a straight line. wsd, warm-up, steady, decay
    (arXiv:2404.06395): the peak, and over the last `decay_steps` a fall by the square root of their share
    (arXiv:2405.18392). All end at `min_learning_rate_ratio` with the last step.
    """
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    low = settings.min_learning_rate_ratio
    return settings.learning_rate * (low + (1 - low) * _above_the_floor(step, max_steps, settings))


def _above_the_floor(step: int, max_steps: int, settings: OptimizerSection) -> float:
    """From 1 at the peak to 0 at the last step."""
    if settings.schedule == "wsd":
        decayed = step + 1 - (max_steps - (settings.decay_steps or 0))
        return 1.0 if decayed <= 0 else 1 - math.sqrt(min(1.0, decayed / (settings.decay_steps or 1)))
    progress = min(1.0, (step - settings.warmup_steps) / max(1, max_steps - 1 - settings.warmup_steps))
    return 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: Any, value: float) -> None:
    """The schedule's value, in each group times the group's `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["rate"]
