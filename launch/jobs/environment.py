"""A job over the hosts of a hostfile: DeepSpeed's pdsh runner, with everything that people trip over in place."""

import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_prep.errors import UserError
from launch.hosts import node
from launch.jobs.command import Job, cpu_environment, deepspeed_program
from launch.jobs.options import Reach
from launch.jobs.session import TRAIN_PROGRAM
from pipeline.settings.shipped import find_run_file

DEFAULT_PORT = 29500
KEEP_ALIVE = "-o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=4"
"""A host that has vanished ends its ssh within 20 s, and pdsh with it."""

FORWARDED = re.compile(
    r"^(NCCL_|GLOO_|UCX_|MLFLOW_|AWS_|HF_|TORCH_|CUDA_)|^(OMP_NUM_THREADS|DS_ACCELERATOR|DEEPSPEED_TIMEOUT)$"
)
"""Variables of this shell that every rank gets too, beside those asked for by name."""

EXPORTED_BY_DEEPSPEED = re.compile(r"^(MLFLOW|PYTHON(?!PATH)|MV2|UCX|NCCL)")
"""DeepSpeed puts the values of these on the command line of pdsh and into its log; ours go through a file."""

ENVIRONMENT = "environment.sh"
"""File of the run folder's `launch/` with what every rank gets."""

_PLAIN = re.compile(r"^[\w@%+=:,./-]+$")


@dataclass(frozen=True)
class ClusterJob:
    """Everything about a job over hosts that does not change when it is started again.

    Attributes:
        job_id: carried by each of its processes in GLOBALLOCAL_JOB.
        ssh: options for ssh, for example `-p 2222 -i ~/.ssh/cluster`.
        interface: network interface of the collectives; found on each node when empty.
        names: environment variables to hand on beside those of `FORWARDED`.
    """

    config: Path
    overrides: tuple[str, ...]
    run_folder: Path
    job_id: str
    ssh: str = ""
    interface: str = ""
    names: tuple[str, ...] = ()

    @classmethod
    def new(cls, config: Path, overrides: tuple[str, ...], run_folder: Path, reach: Reach) -> "ClusterJob":
        """A job with an id of its own."""
        return cls(config, overrides, run_folder, secrets.token_hex(8), reach.ssh, reach.interface, tuple(reach.env))

    @property
    def folder(self) -> Path:
        return self.run_folder.absolute() / "launch"


def hostfile_job(
    job: ClusterJob,
    hosts: Mapping[str, int],
    master_address: str,
    port: int,
    cpu: bool,
) -> tuple[Job, dict[Path, str]]:
    """The `deepspeed` command over `hosts`, and the files that it reads (path → content), not yet written.

    Raises:
        UserError: paths that DeepSpeed's launcher cannot carry, a variable asked for that is not set.
    """
    hostfile, script = job.folder / "hostfile", job.folder / ENVIRONMENT
    problems = [
        f"{path}: DeepSpeed's launcher does not quote it; use a path of letters, digits and _ . / - only"
        for path in (str(Path.cwd()), sys.executable, str(TRAIN_PROGRAM), str(job.folder))
        if not _PLAIN.match(path)
    ]
    if problems:
        raise UserError(problems)
    given = {"MASTER_ADDR": master_address} | (cpu_environment(max(hosts.values())) if cpu else {})
    files = {
        hostfile: "".join(f"{host} slots={slots}\n" for host, slots in hosts.items()),
        script: environment_script(job, given),
    }
    command = [
        str(deepspeed_program()),
        f"--hostfile={hostfile}",
        "--force_multi",  # DeepSpeed would start a single remote host's ranks here
        "--no_ssh_check",
        "--launcher=pdsh",
        f"--master_addr={master_address}",
        f"--master_port={port}",
        f"--venv_script={script}",  # sourced on every node
        str(TRAIN_PROGRAM),
        *(for_remote_shell(word) for word in ("--config", str(find_run_file(job.config).absolute()), *job.overrides)),
    ]
    return Job(command, {"PDSH_SSH_ARGS_APPEND": f"{KEEP_ALIVE} {job.ssh}".strip()}), files


def environment_script(job: ClusterJob, given: Mapping[str, str]) -> str:
    """Shell lines that every node sources: byte-exact values, and the interface found where it is needed.

    Args:
        given: variables of our own. MASTER_ADDR must be among them, or be set where the script is sourced.

    Raises:
        UserError: a variable asked for by name that is not set.
    """
    values = {name: value for name, value in os.environ.items() if FORWARDED.match(name)} | deepspeed_env()
    missing = [name for name in job.names if name not in os.environ]
    if missing:
        raise UserError([f"--env {name}: it is not set in this shell; export it first" for name in missing])
    values |= {name: os.environ[name] for name in job.names}
    values |= {**given, node.JOB_VARIABLE: job.job_id}
    lines = [f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in sorted(values.items())]
    if job.interface:
        found = shlex.quote(job.interface)
    else:
        found = f'"$({shlex.join([sys.executable, node.__file__, "interface"])} "$MASTER_ADDR")"'
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if name not in values or job.interface:
            lines.append(f"export {name}={found}")
    return "\n".join(lines) + "\n"


def for_remote_shell(word: str) -> str:
    """Escape a word so that it passes pdsh, DeepSpeed's own quoting and the remote shell unchanged.

    DeepSpeed puts words that hold a space into double quotes and escapes the quotes inside, no more.
    pdsh replaces %h, %u and %n, and %% by %.
    """
    word = word.replace("%", "%%")
    if " " in word:
        return re.sub(r"([\\$`])", r"\\\1", word)
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", word)


def write_files(files: Mapping[Path, str]) -> None:
    """Write what the job reads; only its owner may read it, since it can hold secrets."""
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text(text)


def runner_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's runner without what it would print."""
    plain = {name: value for name, value in environment.items() if not EXPORTED_BY_DEEPSPEED.match(name)}
    return {**plain, "DS_ENV_FILE": os.devnull}  # read by us already: DeepSpeed trips over comments and blank lines


def deepspeed_env() -> dict[str, str]:
    """The variables of DeepSpeed's own `.deepspeed_env` (at home, or here): NAME=value lines, comments, blank lines.

    Raises:
        UserError: another line.
    """
    values, problems = {}, []
    for folder in (Path.home(), Path.cwd()):
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
            name, equals, value = line.strip().removeprefix("export ").partition("=")
            if name.isidentifier() and equals:
                values[name] = value
            elif name and not name.startswith("#"):
                problems.append(f"{path}, line {number}: {line.strip()[:60]!r} is no NAME=value; correct or remove it")
    if problems:
        raise UserError(problems)
    return values


def hide_values(script: str) -> str:
    """The environment script as it may be shown: what is not ours to set by name only."""
    return re.sub(
        r"^(export (?!PATH|GLOO|NCCL|OMP|DS_|GLOBALLOCAL|MASTER_ADDR)\w+=).*$", r"\1…", script, flags=re.MULTILINE
    )


def shown(files: Mapping[Path, str]) -> str:
    """Files as `--dry-run` prints them, each under its name, as short as it can be written from here."""
    parts = []
    for path, text in files.items():
        name = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
        parts.append(f"# {name}\n{hide_values(text) if name.endswith(ENVIRONMENT) else text}")
    return "\n".join(parts)


def require_pdsh() -> None:
    if shutil.which("pdsh") is None:
        raise UserError("pdsh is not installed here; DeepSpeed starts hosts with it (Debian: apt install pdsh)")
