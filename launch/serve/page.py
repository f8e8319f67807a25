"""The page at `/`: a person types, watches the text come, and sees of each token what the model read for it."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from data_prep.html import render

if TYPE_CHECKING:
    from launch.serve.protocol import Server


def page(server: Server) -> str:
    return render(
        "serve.html.jinja",
        "launch.serve",
        nonce=secrets.token_urlsafe(16),
        title=server.name,
        sections=[],
        limits=server.limits,
    )
