"""What `make gpu` measures passes with: sizes, models, and the device's seconds and bytes (the clock's on a CPU)."""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from model.configuration_globallocal import GlobalLocalConfig
from tests.benchmarks.quality.contenders import Contender
from tests.benchmarks.quality.plan import gpt
from tests.benchmarks.quality.training import rounded_copy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        name: of the folders in runs/ and data/.
        model, gpt: in place of the presets' own settings.
        length: the longest sequence, where it is not the preset's.
        long_tokens, lengths: of a pass, and of its sequences.
        new_tokens, sequences: of decoding.
        vocab_size, micro_batch, steps, settings: of the trainer.
    """

    name: str = "gpu"
    product: int = 8192
    model: dict[str, Any] = field(default_factory=dict)
    gpt: dict[str, Any] = field(default_factory=dict)
    length: int | None = None
    long_tokens: int = 65_536
    lengths: tuple[int, int, int] = (512, 4_096, 16_384)
    new_tokens: int = 512
    sequences: int = 16
    vocab_size: int = 32_000
    micro_batch: int = 64
    steps: int = 60
    settings: tuple[str, ...] = ()

    @property
    def sequence_length(self) -> int:
        return self.length or 1024


TINY = {
    **{"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 1_000, "pool_size": 64, "pool_dim": 16},
    **{"router_hidden_size": 16, "summary_heads": 2, "summary_key_size": 16, "conv_dilations": [1, 2]},
}
REHEARSAL = Sizes(
    name="gpu-rehearsal",
    product=64,
    model=TINY,
    gpt=gpt(64, 1, 32) | {"vocab_size": 1_000},
    length=64,
    long_tokens=256,
    lengths=(32, 64, 128),
    new_tokens=64,
    sequences=2,
    vocab_size=1_000,
    micro_batch=2,
    steps=30,
    settings=tuple(f"model.{name}={value}" for name, value in TINY.items() if name != "vocab_size"),
)


def median_seconds(functions: dict[str, Callable[[], Any]], rounds: int = 8) -> dict[str, float]:
    """The device's seconds for each function, in turns, after two warm-ups."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    warm_ups, rounds = (2, rounds) if DEVICE.type == "cuda" else (0, 1)  # a rehearsal's figures mean nothing
    for turn in range(warm_ups + rounds):
        for name, function in functions.items():
            taken = device_seconds(function)
            if turn >= warm_ups:
                seconds[name].append(taken)
    return {name: statistics.median(values) for name, values in seconds.items()}


def device_seconds(function: Callable[[], Any]) -> float:
    """Of one call; of the clock where there is no GPU."""
    if DEVICE.type == "cpu":
        begin = time.perf_counter()
        function()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(function: Callable[[], Any]) -> int:
    """Device memory that a call takes on top of what was taken."""
    if DEVICE.type == "cpu":
        function()
        return 1
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def build(contender: Contender, length: int) -> Any:
    torch.manual_seed(0)
    return rounded_copy(contender.build(length).train().to(DEVICE))


def globallocal(preset: str, **overrides: Any) -> Contender:
    """A preset, its own vocabulary included."""
    config = GlobalLocalConfig.from_preset(preset, **overrides)
    names = ("model_type", "transformers_version", "architectures", "max_position_embeddings")
    return Contender("globallocal", {k: v for k, v in config.to_diff_dict().items() if k not in names})


def passes(model: Any, batch: int, length: int, vocab_size: int) -> Callable[[], None]:
    """Forward and backward of one micro-batch."""
    ids, targets = torch.randint(0, vocab_size, (2, batch, length), device=DEVICE)

    def run() -> None:
        model(ids, targets)[0].backward()
        for parameter in model.parameters():
            parameter.grad = None

    return run


def compiled(model: Any) -> Any:
    """The same weights, every block compiled without graph breaks, as `training.compile` does it. Without a GPU the
    compiler goes all the way but for code in C++, which would take minutes; the trainer's rehearsal has that."""
    model = copy.deepcopy(model)
    how: dict[str, Any] = {"options": {"deterministic": True}} if DEVICE.type == "cuda" else {"backend": "aot_eager"}
    for layer in model.model.model.layers:
        layer.compile(fullgraph=True, dynamic=False, **how)
    return model
