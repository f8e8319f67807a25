"""Loading checkpoints with nothing but tensors and plain values."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.engine.internals import safe_globals


@contextmanager
def only_weights() -> Iterator[None]:
    """Inside, every `torch.load`, DeepSpeed's own included, refuses anything but tensors and plain values."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(safe_globals()):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
