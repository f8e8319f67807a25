"""What is said of memory and time before the ranks start."""

from dataclasses import replace
from pathlib import Path

import torch

from launch.preflight.estimate import preset_config
from launch.preflight.forecast import forecast, time_line
from pipeline.fitting import Fitted, fit
from tests.pipeline.ranks import TINY


def fitted_for(dataset: Path) -> tuple[Fitted, object]:
    config = preset_config("small", [f"data.dataset={dataset}", *TINY])
    return fit(config, 2, "fp32", torch.device("cpu")), config


def test_memory_is_said_on_a_cpu_and_time_is_not_guessed(small_dataset: Path) -> None:
    fitted, config = fitted_for(small_dataset)
    (line,) = forecast(config, fitted, 2, "fp32", torch.device("cpu"))
    assert line.startswith("memory  about ")
    assert " per rank (weights " in line
    assert line.endswith(" for 2 ranks")


def test_time_is_that_of_the_rate_measured() -> None:
    config = preset_config("small")
    model = config.model.build()
    nothing = Fitted(None, None, model, None, 1000, {}, False)
    line = time_line(config, nothing, 1, "NVIDIA H200", 989.4)
    assert line is not None
    tokens = 1000 * config.training.global_batch_size * config.data.sequence_length
    seconds = tokens * model.flops_per_token(config.data.sequence_length) / (989.4e12 * 0.2316)
    assert f"about {seconds:.0f} s at an MFU of 0.232 (measured on 2026-11-27" in line
    assert time_line(config, replace(nothing, model=None), 1, "NVIDIA H200", 989.4) is None
