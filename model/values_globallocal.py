"""What each setting of a GlobalLocal model takes, looked at one by one."""

import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Any


def checkpointed_blocks(policy: str, num_layers: int) -> list[bool] | None:
    """Which blocks recompute their activations under `policy`; None if there is no such policy."""
    if policy in ("full", "selective", "deepspeed", "none"):
        return [policy != "none"] * num_layers
    every = re.fullmatch(r"every-([1-9][0-9]{0,8})", policy)
    return [layer % int(every[1]) == 0 for layer in range(num_layers)] if every else None


def value_wanted(name: str, value: Any, kind: Any, validators: Iterable[Callable[[Any], Any]]) -> str | None:
    """What the setting takes, where `value` is none of it; None where it is.

    Args:
        kind: the annotation of the setting.
        validators: they raise for a value of another kind.
    """
    try:
        for validator in validators:
            validator(value)
    except (ValueError, TypeError):
        return f"it must be {_KINDS[kind]}"
    truth = isinstance(value, bool) and kind is not bool  # a whole number to Python
    return f"it must be {_KINDS[kind]}" if truth else _range_wanted(name, value)


def _range_wanted(name: str, value: Any) -> str | None:
    """The bound that `value`, of the right kind, does not keep."""
    if name in RANGES:
        low, high = RANGES[name]
        if low <= value <= high or (value == 0 and name in DERIVED):  # NaN is in no range
            return None
        bound = f"at least {low}" if value < low else f"at most {high}" if value > high else f"from {low} to {high}"
        return f"it must be {bound}" + (f", or 0 for {DERIVED[name]}" if name in DERIVED else "")
    if name == "dropout":
        return None if 0.0 <= value < 1.0 else "it must be at least 0 and below 1"
    if name in CHOICES:
        return None if value in CHOICES[name] else f"it must be {' or '.join(map(repr, CHOICES[name]))}"
    if name == "conv_dilations":
        layers = value if value and isinstance(value[0], list) else [value]
        whole = all(layer and all(type(item) is int and 1 <= item <= LARGEST for item in layer) for layer in layers)
        return None if whole else f"every layer needs one dilation or more, each from 1 to {LARGEST}"
    if name == "activation_checkpointing" and checkpointed_blocks(value, 1) is None:
        return "it must be 'none', 'full', 'selective', 'deepspeed' or 'every-N' with N at least 1"
    return None


def short(value: Any) -> str:
    """As Python writes it, cut in the middle where it is long."""
    return _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlist = 20

LARGEST = 2**31 - 1
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "pool_size", "pool_dim",
    "conv_kernel_size", "router_top_k", "router_hidden_size", "summary_heads", "summary_key_size", "summary_key_heads",
)  # fmt: skip
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_SIZES, (1, LARGEST)),
    "num_hidden_layers": (1, 10_000),
    "pool_seed": (0, 2**63 - 1),
    "router_temperature": (0.1, 5),
    "router_balance": (0, 1000),
    "branch_gain": (0.1, 100),
    "diversity_loss_scale": (0, 1e6),
    "layer_norm_eps": (1e-12, 1),
    "initializer_range": (1e-6, 10),
    "logit_soft_cap": (1, 1e4),
    "z_loss": (0, 1),
}
"""Lowest and highest value of each number; what a model may cost is for the machine to say."""
DERIVED = {
    "intermediate_size": "4 · hidden_size",
    "pool_dim": "4 · hidden_size",
    "router_hidden_size": "min(1024, pool_size)",
    "summary_heads": "gcd(8, hidden_size)",
    "initializer_range": "0.5 / √hidden_size",
    "logit_soft_cap": "no cap",
}
"""What 0 stands for."""
CHOICES = {
    "router_scores": ("dense", "product_key"),
    "router_context": ("token", "summary"),
    "summary_rule": ("average", "delta"),
    "norm_placement": ("pre", "post"),
    "document_boundaries": ("carry", "reset"),
}
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float | int: "a number",
    str: "text",
    bool: "true or false",
    int | None: "a whole number or null",
    int | list[int] | None: "a whole number, a list of them, or null",
    list[int] | list[list[int]]: "a list of whole numbers, or a list of such lists",
}
"""How a person says what a setting takes."""
