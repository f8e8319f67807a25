"""The hosts of a job asked over ssh, all at once: are they there, and do they run the same thing?"""

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from launch.hosts import node

CONNECT_SECONDS = 10
ANSWER_SECONDS = 60
SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}")
CLOCK_SKEW_SECONDS = 5.0
"""More than that makes logs and checkpoints of different nodes hard to put in order."""


@dataclass(frozen=True)
class Answer:
    """The answer of a host, or the reason why there is none."""

    text: str = ""
    error: str = ""


def ask(
    hosts: Sequence[str], arguments: Sequence[str], ssh: str = "", seconds: float = ANSWER_SECONDS
) -> dict[str, Answer]:
    """Run `node.py ARGUMENTS` on every host over ssh; `ssh` holds options for it (`-p 2222 -i KEY`)."""
    command = [sys.executable, node.__file__, *arguments]
    return ask_each(dict.fromkeys(hosts, command), ssh, seconds)


def ask_each(
    commands: Mapping[str, Sequence[str]], ssh: str = "", seconds: float = ANSWER_SECONDS
) -> dict[str, Answer]:
    """Run each host's command there, all at once."""

    def one(host: str) -> Answer:
        try:
            done = subprocess.run(
                ["ssh", *SSH_OPTIONS, *shlex.split(ssh), host, shlex.join(commands[host])],
                capture_output=True,
                text=True,
                stdin=subprocess.DEVNULL,
                timeout=seconds,
            )
        except FileNotFoundError:
            return Answer(error="ssh is not installed here (Debian: openssh-client)")
        except subprocess.TimeoutExpired:
            return Answer(error=f"no answer within {seconds:.0f} s")
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            return Answer(error=lines[-1] if lines else f"ssh ended with code {done.returncode}")
        return Answer(text=done.stdout.strip())

    with ThreadPoolExecutor(max_workers=max(1, len(commands))) as pool:
        return dict(zip(commands, pool.map(one, commands), strict=True))


@dataclass(frozen=True)
class Elsewhere:
    """The processes of a job on other hosts."""

    hosts: tuple[str, ...]
    job_id: str
    ssh: str = ""

    def stop(self, number: signal.Signals) -> int:
        """Signal the job's ranks (SIGKILL: all its processes) on every host that answers; returns how many."""
        name = number.name.removeprefix("SIG")
        answers = ask(self.hosts, ["stop", self.job_id, name], self.ssh, seconds=2 * CONNECT_SECONDS)
        return sum(int(answer.text or 0) for answer in answers.values() if not answer.error)

    def to_json(self) -> str:
        return json.dumps([self.hosts, self.job_id, self.ssh])

    @classmethod
    def from_json(cls, text: str) -> "Elsewhere":
        hosts, job_id, ssh = json.loads(text)
        return cls(tuple(hosts), job_id, ssh)


def gather_facts(
    hosts: Sequence[str], port: int, ssh: str = "", failed_job: str = ""
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The facts of the hosts that answered, and of the others a line that says why not, with a remedy.

    Args:
        failed_job: id of a job; what is left of it on the hosts is ended.
    """
    facts: dict[str, dict[str, Any]] = {}
    unreachable: dict[str, str] = {}
    for host, answer in ask(hosts, ["facts", str(port), *filter(None, [failed_job])], ssh).items():
        if answer.error:
            command = shlex.join(["ssh", *shlex.split(ssh), host, "true"])
            unreachable[host] = f"{host}: {answer.error}; `{command}` must work without a password"
        else:
            facts[host] = json.loads(answer.text.splitlines()[-1])
    return facts, unreachable


def differences(facts: Mapping[str, Mapping[str, Any]], slots: Mapping[str, int]) -> list[str]:
    """Differences that would make a job over these hosts fail, one line each, naming the hosts."""
    problems = []
    labels = {"code": "the project's code", "python": "Python"}
    for key in ("code", "python"):
        problems += _disagreement(labels[key], {host: str(item[key]) for host, item in facts.items()})
    for package in node.PACKAGES:
        problems += _disagreement(package, {host: str(item["versions"][package]) for host, item in facts.items()})
    kinds = {host: "accelerators" if item["devices"] else "CPU only" for host, item in facts.items()}
    problems += _disagreement("the kind of device", kinds)
    for host, item in facts.items():
        room, unit = (item["devices"], "devices") if item["devices"] else (item["cores"], "cores")
        if slots[host] > room:
            problems.append(
                f"{host}: the hostfile gives it {slots[host]} slots, it has {room} {unit}; write slots={room}"
            )
    return problems


def clock_skew(facts: Mapping[str, Mapping[str, Any]]) -> float:
    """Seconds between the earliest and the latest clock, as far as asking at about the same time can tell."""
    times = [float(item["time"]) for item in facts.values()]
    return max(times) - min(times) if times else 0.0


def _disagreement(what: str, values: Mapping[str, str]) -> list[str]:
    if len(set(values.values())) < 2:
        return []
    groups: dict[str, list[str]] = {}
    for host, value in values.items():
        groups.setdefault(value, []).append(host)
    said = "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in groups.items())
    return [f"{what} differs between nodes: {said}; install the same on all"]
