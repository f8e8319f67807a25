"""Where kernels run, how large temporary blocks are, and functions that `torch.compile` calls whole."""

import functools
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # no GPU here: plain torch does everything
    triton = None
GPU_BLOCK_FACTOR = 32
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # the kernels, step by step on the CPU: for tests

_LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as its library
Function = TypeVar("Function", bound=Callable[..., Any])


def has_kernels(x: Tensor) -> bool:
    """Whether Triton kernels can serve tensors like this one; float64 is plain torch's, which decides what is right."""
    on_gpu = x.is_cuda and torch.version.cuda is not None
    return triton is not None and (on_gpu or INTERPRETED) and x.dtype != torch.float64 and not exporting()


def exporting() -> bool:
    """Whether `torch.export` is tracing, also for ONNX: then a plain form stands in, without sorts, blocks, sums for
    training and choices by length, so that one graph serves every batch and every length."""
    return torch.compiler.is_exporting()


def block_rows(elements: int, table: Tensor, num_rows: int) -> int:
    """How many of `num_rows` tokens to compare with a table [N, c] at a time; at least one.

    Args:
        elements: of the largest temporary on a CPU; a GPU takes GPU_BLOCK_FACTOR times as many.
    """
    elements *= GPU_BLOCK_FACTOR if table.is_cuda else 1
    return max(1, min(num_rows, elements // table.shape[0]))


def opaque(shapes: Callable[..., Any]) -> Callable[[Function], Function]:
    """Registers a function of tensors and numbers with torch's library, for compiled callers; others call it directly.

    Its arguments are annotated (the operator's schema is read off), it changes none of them, and what it returns shares
    no memory with them. The operator bears the module's name: an exported copy of these files has operators of its own.
    https://docs.pytorch.org/docs/stable/library.html

    Args:
        shapes: with the same arguments, empty tensors of the results' shapes, dtypes and device.
    """

    def register(function: Function) -> Function:
        namespace, name = re.sub(r"\W", "_", function.__module__), function.__name__
        while hasattr(getattr(torch.ops, namespace), name):  # the module is loaded anew
            namespace += "_"
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(name + torch.library.infer_schema(function, mutates_args=()))
        # `custom_op` does the same, with checks at every call that cost more than a kernel's launch.
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", shapes, lib=library)
        _LIBRARIES.append(library)
        operator = getattr(getattr(torch.ops, namespace), name)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            whole = torch.compiler.is_compiling() and not exporting()
            return operator(*arguments) if whole else function(*arguments)

        return call  # type: ignore[return-value]

    return register
