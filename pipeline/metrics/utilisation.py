"""How much of its devices a run uses: tokens and operations per second and device, MFU, peak memory."""

import re
from dataclasses import dataclass

import torch

PEAK_TERAFLOPS = {
    "A10": 125.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A100 PCIE": 312.0,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "H100": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIE": 756.0,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "GH200": 989.4,
    "B200": 2250.0,
}
"""Peak rate of bf16 and fp16 products with fp32 sums, dense, in 10^12 operations per second, by `card`.

From NVIDIA's data sheets of these cards (from L4 on they print rates with sparsity, which are twice these), those of
GeForce cards from NVIDIA's papers "Ampere GA102 GPU Architecture" and "Ada GPU Architecture".
"""

PEAK_TERAFLOPS_FP16 = {"T4": 65.0, "V100": 125.0, "V100 PCIE": 112.0}
"""Likewise, of cards that multiply fp16 and not bf16: NVIDIA's data sheets "T4" and "V100"."""

_INDISTINCT = re.compile(r"NVIDIA|TESLA|GEFORCE|SXM\d?|HBM\w+|\d+GB")
"""Words of a driver's name for a card that change nothing about its rate."""


def card(name: str) -> str:
    """A driver's name in short: "NVIDIA H100 80GB HBM3" is H100, "NVIDIA A100-PCIE-40GB" is A100 PCIE.

    Words that may mean another rate stay, so that a MIG slice or a laptop's card is none of the tables above.
    """
    return " ".join(word for word in re.split(r"[\s-]+", name.upper()) if word and not _INDISTINCT.fullmatch(word))


def peak_teraflops(name: str, precision: str) -> float | None:
    """Peak rate of a card in a precision; None where the tables do not know it."""
    known = {"bf16": PEAK_TERAFLOPS, "fp16": PEAK_TERAFLOPS | PEAK_TERAFLOPS_FP16}
    return known.get(precision, {}).get(card(name))


@dataclass(frozen=True)
class Utilisation:
    """What tokens per second mean for the devices.

    Attributes:
        flops_per_token: operations of training per token, as the model's configuration counts them.
        devices: ranks.
        peak_teraflops: of one device in the run's precision; None where it is not known, and MFU is left out.
    """

    flops_per_token: float
    devices: int
    peak_teraflops: float | None

    def metrics(self, tokens_per_second: float, peak_memory_bytes: float) -> dict[str, float]:
        """What all devices do, and one of them; `peak_memory_bytes` is 0 where nobody counts it."""
        rate = tokens_per_second / self.devices
        teraflops = rate * self.flops_per_token / 1e12
        values = {
            "throughput/tokens_per_second": tokens_per_second,
            "throughput/tokens_per_second_per_device": rate,
            "throughput/teraflops_per_device": teraflops,
        }
        if self.peak_teraflops:
            values["throughput/mfu"] = teraflops / self.peak_teraflops
        if peak_memory_bytes:
            values["memory/device_peak_gib"] = peak_memory_bytes / 2**30
        return values


def describe(metrics: dict[str, float]) -> str:
    """The same of one device, for the log line: "345,000 per device, 87 TFLOP/s, MFU 0.0879, peak 16.1 GiB"."""
    parts = [
        f"{metrics['throughput/tokens_per_second_per_device']:,.0f} per device",
        f"{metrics['throughput/teraflops_per_device']:.3g} TFLOP/s",
    ]
    if "throughput/mfu" in metrics:
        parts.append(f"MFU {metrics['throughput/mfu']:.3g}")
    if "memory/device_peak_gib" in metrics:
        parts.append(f"peak {metrics['memory/device_peak_gib']:.1f} GiB")
    return ", ".join(parts)


def peak_memory_bytes(device: torch.device) -> int:
    """Most that tensors of this process took of its GPU since it began; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
