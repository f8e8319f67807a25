"""Functions that `torch.compile` calls whole: their inside is a kernel, or would only break the graph."""

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def opaque(shapes: Callable[..., Any]) -> Callable[[Function], Function]:
    """Registers a function of tensors and numbers with torch's library, for compiled callers; others call it directly.

    Its arguments are annotated (the operator's schema is read off), it changes none of them, and what it returns shares
    no memory with them. The operator bears the module's name: an exported copy of these files has operators of its own.
    https://docs.pytorch.org/docs/stable/library.html

    Args:
        shapes: with the same arguments, empty tensors of the results' shapes, dtypes and device.
    """

    def register(function: Function) -> Function:
        module = re.sub(r"\W", "_", function.__module__)
        operator = torch.library.custom_op(f"{module}::{function.__name__}", function, mutates_args=())
        operator.register_fake(shapes)

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return operator(*arguments) if torch.compiler.is_compiling() else function(*arguments)

        return call  # type: ignore[return-value]

    return register
