"""DeepSpeed's operators that a run needs: compiled once per machine, which a signal may interrupt."""

import logging
import threading
from pathlib import Path

import psutil
from deepspeed.accelerator import get_accelerator

from pipeline.distributed.stop import Stopped, StopRequest
from pipeline.files import locked

log = logging.getLogger("globallocal")


def load_operator(builder_name: str, stop: StopRequest | None = None) -> None:
    """Compile or load one of DeepSpeed's operators, one process of a node at a time.

    A process that is killed while it compiles leaves torch's lock file behind, and every later start would wait for
    it for ever. Our own lock dies with its holder; whoever holds it knows that a lock file standing there is stale.

    Raises:
        Stopped: asked to stop before it was done; compiling takes longer than many a grace.
    """
    from torch.utils.cpp_extension import _get_build_directory  # which imports setuptools

    builder = get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))

    def load() -> None:
        with locked(folder / ".globallocal.lock"):
            (folder / "lock").unlink(missing_ok=True)
            if not (folder / f"{builder.name}.so").exists():
                log.info(f"compiling DeepSpeed's {builder.NAME}, once per machine: a minute or more; kept in {folder}")
            if stop is None or not stop.received:
                builder.load(verbose=False)

    if stop is None:
        load()
        return
    failed: list[BaseException] = []

    def load_and_tell() -> None:
        try:
            load()
        except BaseException as error:
            failed.append(error)

    worker = threading.Thread(target=load_and_tell, name="compiler", daemon=True)
    worker.start()
    while worker.is_alive() and not stop.received:
        worker.join(timeout=0.2)
    if stop.received:
        for child in psutil.Process().children(recursive=True):  # ninja and the compiler
            child.kill()
        raise Stopped
    if failed:
        raise failed[0]
