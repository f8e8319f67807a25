"""`globallocal serve`: a trained model behind HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from launch.commands.model import ModelPath
from launch.commands.options import grouped, option
from launch.serve.limits import Limits

LIMITS = {
    "max_batch": option("Texts decoded at once.", min=1, max=65536),
    "max_waiting": option("Texts that may wait; further clients are told to come back (429).", min=0, max=1_000_000),
    "max_prompt_tokens": option("Longest prompt.", min=1, max=100_000_000),
    "max_new_tokens": option("Longest text that a client may ask for.", min=1, max=100_000_000),
}


def register(app: typer.Typer) -> None:
    app.command()(serve)


@grouped(limits=LIMITS)
def serve(
    path: ModelPath,
    limits: Limits,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a model: a page to try it, and OpenAI's completions (/v1/completions, /v1/models), /health, /metrics.

    Nothing asks for a password: whoever reaches the port may use it.

    Examples:

        globallocal serve runs/quickstart

        globallocal serve runs/quickstart/export --host 0.0.0.0 --port 80 --max-batch 64
    """
    from launch.serve.server import serve as run

    run(path, host, port, limits, typer.echo)
