"""The random state of this process: every generator that training may draw from."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator


def random_state() -> dict[str, Any]:
    """Every generator that training may draw from, in types that `weights_only` reads back."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }
    if get_accelerator().device_name() != "cpu":
        state["device"] = get_accelerator().get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "device" in state:
        get_accelerator().set_rng_state(state["device"])


def seed_generators(run_seed: int, step: int, rank: int) -> None:
    """Every generator that training may draw from, as a function of run, step and rank alone.

    The random states of a checkpoint belong to its ranks; with another number of ranks each begins a stream of its
    own, the same one at every start.
    """
    digest = hashlib.sha256(f"{run_seed} {step} {rank}".encode()).digest()
    seed = int.from_bytes(digest[:8]) >> 1
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if get_accelerator().device_name() != "cpu":
        get_accelerator().manual_seed(seed)
