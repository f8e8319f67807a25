"""Whether the model's blocks are compiled, and compiling them before the first step."""

import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch

from data_prep.errors import UserError

log = logging.getLogger("globallocal")

POLICIES_INSIDE_A_BLOCK = ("selective", "deepspeed")
"""Activation checkpointing that looks into a block while it runs; a compiled block is one piece."""


def keep_cache() -> None:
    """What is compiled once stays for later starts, unless the environment names a place of its own."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "globallocal"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(root / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(root / "triton"))


def resolve_compile(
    wanted: bool | Literal["auto"], device: torch.device, zero_stage: int, activation_checkpointing: str
) -> bool:
    """`auto` → true on a GPU, where nothing speaks against it.

    Raises:
        UserError: `true`, and something speaks against it.
    """
    problems = []
    if zero_stage == 3:
        problems.append(
            "training.compile = true does not go with ZeRO stage 3, which gathers each module's weights while the "
            "block runs; use stage 0, 1 or 2 (deepspeed.config), or training.compile=auto"
        )
    if activation_checkpointing in POLICIES_INSIDE_A_BLOCK:
        problems.append(
            f"training.compile = true does not go with model.activation_checkpointing = {activation_checkpointing}, "
            "which looks into a block while it runs; use none, full or every-N, or training.compile=auto"
        )
    if wanted is True and problems:
        raise UserError(problems)
    return wanted is True or (wanted == "auto" and device.type == "cuda" and not problems)


def compile_blocks(engine: Any, micro_batch_size: int, sequence_length: int) -> None:
    """Compile every block, forward and backward, on made-up tokens; no weight, gradient or random state changes.

    The compiler's choices depend on no timing (`deterministic`), so that every start computes the same bits.
    """
    module, device = engine.module, engine.device
    keep_cache()
    log.info("compiling the blocks: up to a few minutes at the first start on a machine, seconds later")
    begin = time.perf_counter()
    engine.compile(backend="inductor", compile_kwargs={"options": {"deterministic": True}})
    tokens = torch.zeros(micro_batch_size, sequence_length, dtype=torch.long, device=device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        module.train()
        loss = module(input_ids=tokens, shift_labels=tokens).loss
        # Not `backward()`: DeepSpeed's hooks wait for gradients that arrive at a parameter.
        torch.autograd.grad(loss, [parameter for parameter in module.parameters() if parameter.requires_grad])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    log.info(f"compiled in {time.perf_counter() - begin:.0f} s")
