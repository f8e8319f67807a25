"""Options that come in groups: a dataclass becomes options of a command, each written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import wraps
from typing import Annotated, Any, get_type_hints

import typer.models

Options = Mapping[str, typer.models.OptionInfo]
"""The `typer.Option` of each field of a group, by the field's name."""


def option(help: str, **more: Any) -> typer.models.OptionInfo:
    """An option with a help text; `more` is as of `typer.Option`."""
    made: typer.models.OptionInfo = typer.Option(help=help, **more)
    return made


def grouped(**groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replaces parameters of a command, each a dataclass, by one option per field.

    Names, types and defaults are those of the dataclass; the group adds help.

    Args:
        groups: the options of a parameter, by the parameter's name.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command).parameters.items():
            if name in groups:
                parameters += _of_fields(hints[name], groups[name])
            else:
                parameters.append(parameter.replace(annotation=hints[name]))

        @wraps(command)
        def called(**values: Any) -> None:
            parts = {name: hints[name](**{item: values.pop(item) for item in group}) for name, group in groups.items()}
            command(**values, **parts)

        keyword = [item.replace(kind=inspect.Parameter.KEYWORD_ONLY) for item in parameters]
        vars(called)["__signature__"] = inspect.Signature(keyword)
        called.__annotations__ = {item.name: item.annotation for item in keyword}
        return called

    return decorate


def _of_fields(group: type[Any], options: Options) -> list[inspect.Parameter]:
    hints = get_type_hints(group)
    found = []
    for item in fields(group):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        found.append(
            inspect.Parameter(
                item.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=Annotated[hints[item.name], options[item.name]],
            )
        )
    return found
