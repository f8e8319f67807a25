"""A real Slurm on the loopback: munged, slurmctld and two slurmd, in a folder of their own.

Each daemon has a process namespace, so that jobs, which outlive their slurmd by design, end with it here.
"""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.pipeline.servers_fixture import free_ports

MARK = "GLOBALLOCAL_TEST_SLURM"
"""Variable of every process of this Slurm, by which a later test run finds what a killed one has left."""
NEEDED = {
    "sbatch": "slurm-wlm",
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "unshare": "util-linux",
}
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", '"$@" & wait', "first")
"""Its first process is a shell, which has orphans to bury."""
SETTINGS = """
ClusterName=gl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A job that is queued again waits until its old credential has expired.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
ReturnToService=2
# Time to save after scancel, on a busy machine.
KillWait=240
SlurmdTimeout=20
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5,bf_interval=5
NodeName=s0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=s1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=s[0-1] Default=YES State=UP MaxTime=INFINITE
"""


def why_not() -> tuple[str, str] | None:
    """(Packages that are missing to start a Slurm here, the remedy); None if none is."""
    missing = sorted({package for program, package in NEEDED.items() if _program(program) is None})
    return (" ".join(missing), f"apt-get install {' '.join(missing)}") if missing else None


def _program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")


@dataclass
class Slurm:
    folder: Path
    environment: dict[str, str]
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def run(self, *command: str, check: bool = True) -> str:
        environment = os.environ | self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"
        return done.stdout

    def start(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground, its output in a file of its name."""
        with open(self.folder / f"{name}.log", "ab") as log:
            self.processes[name] = subprocess.Popen(
                [*NAMESPACE, str(_program(command[0])), *command[1:]],
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def wait_for(self, states: str, seconds: float = 120) -> None:
        """Until both nodes are in the state, as `sinfo` says it."""
        deadline = time.monotonic() + seconds
        while (said := self.run("sinfo", "--noheader", "--Node", "--format", "%T").split()) != states.split():
            assert time.monotonic() < deadline, f"nodes are {said}, not {states}\n{self.logs()}"
            time.sleep(0.2)

    def empty_queue(self) -> None:
        """End what a test has left, a job that is queued again included."""
        deadline = time.monotonic() + 120
        while self.run("squeue", "--noheader").strip():
            assert time.monotonic() < deadline, self.logs()
            self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
            self.run("scancel", "--user=root", check=False)
            time.sleep(1)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))


@contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Two nodes, s0 and s1, that wait for jobs."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    ports = free_ports(3)
    (folder / "slurm.conf").write_text(SETTINGS.format(host=platform.node(), folder=folder, ports=ports))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    cluster = Slurm(folder, {"SLURM_CONF": str(folder / "slurm.conf"), MARK: "1"})
    files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    _kill_all()
    try:
        cluster.start("munged", "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        _wait_for(folder / "munge.socket")
        cluster.start("slurmctld", "slurmctld", "-D")
        for name in ("s0", "s1"):
            cluster.start_node(name)
        deadline = time.monotonic() + 60
        while subprocess.run(["sinfo"], env=os.environ | cluster.environment, capture_output=True).returncode:
            assert time.monotonic() < deadline, cluster.logs()
            time.sleep(0.2)
        cluster.wait_for("idle idle")
        yield cluster
    finally:
        _kill_all()
        for process in cluster.processes.values():
            process.wait(60)


def _kill_all() -> None:
    """End every process of a Slurm of ours, also of one that a killed test run has left."""
    deadline = time.monotonic() + 60
    while (left := _marked()) and time.monotonic() < deadline:
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(0.2)


def _marked() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK):
                found.append(process)
    return found


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.1)
