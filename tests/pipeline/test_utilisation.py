"""Tokens and operations per second and device, and what part of a card's peak rate they are."""

import pytest
import torch

from pipeline.metrics.utilisation import Utilisation, card, describe, peak_memory_bytes, peak_teraflops


@pytest.mark.parametrize(
    ("name", "short", "bf16", "fp16"),
    [
        ("NVIDIA H200", "H200", 989.4, 989.4),
        ("NVIDIA H100 80GB HBM3", "H100", 989.4, 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIE", 756.0, 756.0),
        ("NVIDIA A100-SXM4-40GB", "A100", 312.0, 312.0),
        ("NVIDIA A100 80GB PCIe", "A100 PCIE", 312.0, 312.0),
        ("NVIDIA GeForce RTX 4090", "RTX 4090", 165.2, 165.2),
        ("Tesla V100-SXM2-16GB", "V100", None, 125.0),
        ("NVIDIA L40S", "L40S", 362.05, 362.05),
        ("NVIDIA L4", "L4", 121.0, 121.0),
    ],
)
def test_a_drivers_name_for_a_card_leads_to_its_peak_rate(
    name: str, short: str, bf16: float | None, fp16: float
) -> None:
    assert card(name) == short
    assert peak_teraflops(name, "bf16") == bf16
    assert peak_teraflops(name, "fp16") == fp16


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A10G",
        "AMD Instinct MI300X",
        "CPU",
    ],
)
def test_a_card_that_no_table_holds_has_no_peak_rate(name: str) -> None:
    assert peak_teraflops(name, "bf16") is None


def test_no_data_sheet_rate_stands_for_fp32() -> None:
    assert peak_teraflops("NVIDIA H200", "fp32") is None


def test_figures_are_those_of_one_device() -> None:
    use = Utilisation(flops_per_token=2.5e8, devices=4, peak_teraflops=1000.0)
    metrics = use.metrics(tokens_per_second=1_600_000, peak_memory_bytes=16.5 * 2**30)
    assert metrics == pytest.approx(
        {
            "throughput/tokens_per_second": 1_600_000,
            "throughput/tokens_per_second_per_device": 400_000,
            "throughput/teraflops_per_device": 100.0,
            "throughput/mfu": 0.1,
            "memory/device_peak_gib": 16.5,
        }
    )
    assert describe(metrics) == "400,000 per device, 100 TFLOP/s, MFU 0.1, peak 16.5 GiB"


def test_mfu_is_left_out_where_no_peak_rate_is_known_and_memory_where_nobody_counts_it() -> None:
    metrics = Utilisation(1.5e7, 2, None).metrics(4_000, peak_memory_bytes(torch.device("cpu")))
    assert metrics == {
        "throughput/tokens_per_second": 4_000,
        "throughput/tokens_per_second_per_device": 2_000,
        "throughput/teraflops_per_device": pytest.approx(0.03),
    }
    assert describe(metrics) == "2,000 per device, 0.03 TFLOP/s"
