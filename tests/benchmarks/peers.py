"""The peers, mosaicml-streaming and litdata, in an environment of their own: they ask for other versions than we do."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from pathlib import Path

import torch

PEERS = {"streaming": "mosaicml-streaming", "litdata": "litdata"}
ENVIRONMENT = Path(".cache/bench-peers")


def peer_environment() -> Path | None:
    """Python of an environment with the peers; None, with a line that says why, where it cannot be made."""
    python = ENVIRONMENT / "bin" / "python"
    sentencepiece = f"sentencepiece=={importlib.metadata.version('sentencepiece')}"
    if not (ENVIRONMENT / "ready").exists():
        print(f"installing {', '.join(PEERS.values())} into {ENVIRONMENT} …", file=sys.stderr)
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        venv.create(ENVIRONMENT, with_pip=True)
        for packages in ([f"torch=={torch.__version__.partition('+')[0]}"], [*PEERS.values(), sentencepiece]):
            command = [python, "-m", "pip", "install", "--quiet", *packages]
            if subprocess.run(command, check=False).returncode:
                print("the peers could not be installed; the run goes on without them", file=sys.stderr)
                return None
        (ENVIRONMENT / "ready").touch()
    return python


def versions(python: Path) -> dict[str, str]:
    program = f"import importlib.metadata as m; print(*(m.version(name) for name in {list(PEERS.values())}))"
    found = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(PEERS.values(), found, strict=True))


@contextlib.contextmanager
def peer(python: Path, script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """A script of this folder in the peers' environment, once it has said that it is ready."""
    command = [str(python), str(Path(__file__).with_name(script)), *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                process.wait()
                said.seek(0)
                raise RuntimeError(f"{script} {arguments[0]} did not start:\n{said.read()[-2000:]}")
            yield process
        finally:
            process.kill()
            process.wait()


def ask(process: subprocess.Popen[str], question: object) -> float:
    """Sends a line, and waits for the number that answers it."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(question, file=process.stdin, flush=True)
    return float(process.stdout.readline())
