"""A server's life: load, listen, answer, and end cleanly on SIGTERM or Ctrl-C."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UserError
from launch.serve.limits import GRACE_SECONDS, Limits

if TYPE_CHECKING:
    from launch.serve.app import Service


def serve(path: Path, host: str, port: int, limits: Limits, say: Callable[[str], None]) -> None:
    """Answers until it is asked to stop; texts under way then have GRACE_SECONDS to end.

    Args:
        path: a run, a checkpoint or an exported folder.
        port: 0 takes a free one.
        say: is told the address when the server listens, and that it has ended.

    Raises:
        UserError: there is no model at `path`, or the address cannot be had.
    """
    with listen(host, port) as listening:
        import uvicorn

        service = ready_service(path, limits)
        config = uvicorn.Config(
            service.app(), log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
        )
        # uvicorn sends itself again what it has heard; to have ended cleanly is no failure.
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            address = f"[{host}]" if ":" in host else host
            port = listening.getsockname()[1]
            say(f"http://{address}:{port}  serves {service.server.name}; Ctrl-C or SIGTERM ends it")
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    say("ended: no text was under way, or its time was up")


def ready_service(path: Path, limits: Limits) -> Service:
    """The model in memory; what is made at the first step is made now."""
    from launch.serve.app import Service
    from launch.serve.metrics import Metrics
    from launch.serve.protocol import Server
    from pipeline.export.load import best_device, load_model
    from pipeline.generation.decoder import Decoder, Request
    from pipeline.generation.sampling import Sampling

    loaded = load_model(path)
    name = loaded.state.config["run"]["name"] if loaded.state else name_of(path)
    decoder = Decoder(loaded.model, loaded.tokenizer, best_device())
    decoder.join(Request([0], Sampling(max_new_tokens=2)))
    while decoder.rows:
        decoder.step()
    return Service(Server(name, loaded.tokenizer, decoder.model.config.vocab_size, limits), decoder, Metrics())


def listen(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        said = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise UserError(f"--host {host[:100]} --port {port}: {said}; give another one") from None


def name_of(export: Path) -> str:
    """The folder's name; of RUN/export that of the run."""
    folder = export.resolve()
    return (folder.parent if folder.name == "export" else folder).name or "model"
