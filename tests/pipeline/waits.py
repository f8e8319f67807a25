"""`python -m tests.pipeline.waits FOLDER`: a plan of `ranks`, in which it is noted where a step would wait for a GPU.

On a CPU nothing waits, so what is noted are the calls that on a GPU would: a number or truth value read from a tensor,
a copy to the host, a tensor made on the device from numbers of the host. What has come to the host already is free.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.trainer import Trainer
from tests.pipeline import ranks

READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__contains__")
SIZED_BY_VALUES = ("nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave.Tensor", "bincount")
FREE = ("pipeline/distributed/copies.py", "pipeline/distributed/world.py", "model/ops_convolution_globallocal.py")
"""Copies that nobody waits for; what ranks agree on, and dilations, which are on the host everywhere."""


def place(frame: Any) -> str:
    """The innermost line that is not of torch."""
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "?"


class Reads(TorchFunctionMode):
    """What Python asks of tensors."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits
        self.on_host: dict[int, torch.Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Iterable[type], arguments: Any = (), keywords: Any = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        name = getattr(function, "__name__", "")
        tensors = [item for item in arguments if isinstance(item, torch.Tensor)]
        host = bool(tensors) and all(id(item) in self.on_host for item in tensors)
        made = name == "tensor" and (keywords or {}).get("device") is not None
        where = place(sys._getframe(1))
        if ((name in READS and not host) or made) and not where.rpartition(":")[0].endswith(FREE):
            self.waits.append(f"{name} {where}")
        if (host or name == "cpu") and isinstance(result, torch.Tensor):
            self.on_host[id(result)] = result
        return result


class Sizes(TorchDispatchMode):
    """Operators whose results' sizes are known to the device alone."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(
        self, function: Any, types: Iterable[type], arguments: Any = (), keywords: Any = None
    ) -> Any:
        if str(function).removeprefix("aten.").removesuffix(".default") in SIZED_BY_VALUES:
            self.waits.append(f"{function} {place(sys._getframe(1))}")
        return function(*arguments, **(keywords or {}))


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Inside, every step's waits go to FOLDER/RUN.json: a list a step."""
    take: Callable[[Trainer], Any] = Trainer.train_step

    def step(self: Trainer) -> Any:
        waits: list[str] = []
        with Reads(waits), Sizes(waits):
            verdict = take(self)
        file = folder / f"{self.context.config.run.name}.json"
        steps = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps([*steps, waits]))
        return verdict

    Trainer.train_step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.train_step = take  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    with noted(Path(sys.argv[1])):
        ranks.main(Path(sys.argv[1]))
