"""Questions to one node, run by path, without this project being installed there: `python node.py ACTION …`.

facts PORT [JOB]    one JSON object: versions, code, clock, devices, memory, addresses, whether PORT is free; what
                    is left here of JOB, a job that has failed, is ended first
interface ADDRESS   the network interface that leads to ADDRESS, for GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME
stop JOB SIGNAL     send SIGNAL to the ranks of a job (KILL: to all its processes)
write FILE TEXT     put a line into a file of a folder that should be shared
read FILE           and read it
remove FILE         and take it away
ssh HOST OPTIONS…   log in to another host from this one
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

JOB_VARIABLE = "GLOBALLOCAL_JOB"
"""Every process of a job carries its id in this environment variable."""

PACKAGES = ("torch", "deepspeed", "transformers", "mlflow", "numpy")
ROOT = Path(__file__).resolve().parents[2]


def facts(port: int) -> dict[str, Any]:
    """The facts about this node as it is now."""
    return {
        "host": platform.node(),
        "time": time.time(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "code": code_hash(ROOT),
        "devices": _devices(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_free_bytes": psutil.virtual_memory().available,
        "addresses": addresses(),
        "port_free": port_is_free(port),
        "free_port": free_port(),
    }


def code_hash(root: Path) -> str:
    """The sha256 over the Python files of the project, as 16 hex digits: the same on nodes that run the same code."""
    digest = hashlib.sha256()
    for folder in ("data_prep", "launch", "model", "pipeline"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def addresses() -> dict[str, str]:
    """IPv4 address → interface."""
    return {
        entry.address: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }


def interface(address: str) -> str:
    """The interface by which this node reaches `address`, or owns it."""
    own = addresses()
    target = socket.gethostbyname(address)
    if target in own:
        return own[target]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((target, 9))  # sends nothing; the kernel chooses the way
        return own[probe.getsockname()[0]]


def stop(job: str, signal_name: str) -> int:
    """Signal the ranks of a job on this node, or with KILL all its processes; returns how many."""
    number = signal.Signals[f"SIG{signal_name}"]
    mine = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    members = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid not in mine and process.environ().get(JOB_VARIABLE) == job:
                members[process.pid] = process
    ranks = {pid for pid, process in members.items() if _is_rank(process)}
    count = 0
    for pid, process in members.items():
        with contextlib.suppress(psutil.Error):
            if number == signal.SIGKILL or (pid in ranks and process.ppid() not in ranks):
                process.send_signal(number)
                count += 1
    return count


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(word.endswith("pipeline/train.py") for word in process.cmdline()[:3])
    return False


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> int:
    """Accelerators; 0: DeepSpeed uses the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not Path("/dev/nvidiactl").exists():
        return 0
    import torch

    return torch.cuda.device_count()


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def main(arguments: list[str]) -> int:
    action, *rest = arguments
    if action == "facts":
        for job in rest[1:]:
            stop(job, "KILL")
        print(json.dumps(facts(int(rest[0]))))
    elif action == "interface":
        print(interface(rest[0]))
    elif action == "stop":
        print(stop(rest[0], rest[1]))
    elif action == "write":
        Path(rest[0]).parent.mkdir(parents=True, exist_ok=True)  # the first run's `runs/`
        Path(rest[0]).write_text(rest[1])
    elif action == "read":
        print(Path(rest[0]).read_text())
    elif action == "remove":
        Path(rest[0]).unlink(missing_ok=True)
    elif action == "ssh":
        host, *options = rest
        quiet = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        return subprocess.run(["ssh", *quiet, *options, host, "true"], stdin=subprocess.DEVNULL).returncode
    else:
        print(f"error: unknown action {action}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
