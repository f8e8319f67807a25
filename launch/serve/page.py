"""The page at `/`: a person types, watches the text come, and sees of each token what the model read for it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from data_prep.html import render
from pipeline.generation.sampling import Sampling

if TYPE_CHECKING:
    from launch.serve.protocol import Server

SECTIONS = [("write", "Write"), ("reading", "What there is to see"), ("program", "From a program")]


def page(server: Server, address: str) -> str:
    """`address` is how the browser names the server."""
    return render(
        "serve.html.jinja",
        "launch.serve",
        nonce=secrets.token_urlsafe(16),
        title=server.name,
        sections=SECTIONS,
        limits=server.limits,
        sampling=Sampling(),
        address=address,
    )
