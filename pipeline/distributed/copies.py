"""Copies between host and device that neither waits for."""

from collections.abc import Callable

import numpy as np
import torch


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device. A GPU fetches it from pinned memory when it comes to it: a copy from any other memory
    would first wait until all that was launched before is done."""
    host = torch.from_numpy(array)
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def on_its_way(values: torch.Tensor) -> Callable[[], list[float]]:
    """The copy of a vector to the host begins; what is returned waits for it, and for nothing launched later."""
    if values.device.type != "cuda":
        numbers: list[float] = values.tolist()
        return lambda: numbers
    host = values.to("cpu", non_blocking=True)  # into pinned memory
    arrived = torch.cuda.Event()
    arrived.record()

    def read() -> list[float]:
        arrived.synchronize()
        return list(host.tolist())

    return read
