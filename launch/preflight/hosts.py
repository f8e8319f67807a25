"""Preflight of the hosts of a hostfile: there, alike, in time, on one shared folder, and fast between each other."""

import json
import secrets
import shlex
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from launch.hosts.hostfile import read_hostfile
from launch.hosts.ssh import CLOCK_SKEW_SECONDS, ask, ask_each, clock_skew, differences, gather_facts
from launch.jobs.environment import DEFAULT_PORT
from launch.jobs.over_hosts import master_address
from launch.preflight import bandwidth
from launch.preflight.doctor import Finding, problems

BANDWIDTH_SECONDS = 180
SLOW = 0.5
"""A host whose best rate is less than this part of the median host's is named."""


def host_findings(hostfile: Path, ssh: str, run_folder: Path | None) -> Iterator[Finding]:
    """Every check of the hosts; `run_folder` is the one that all of them must share."""
    try:
        slots = read_hostfile(hostfile)
    except UserError as error:
        yield from problems("hostfile", error)
        return
    yield Finding("hostfile", "ok", f"{len(slots)} hosts, {sum(slots.values())} slots")
    facts, unreachable = gather_facts(list(slots), DEFAULT_PORT, ssh)
    yield from problems("ssh", UserError(list(unreachable.values()))) if unreachable else ()
    if not facts:
        return
    yield Finding("ssh", "ok", f"{len(facts)} of {len(slots)} hosts answer")
    faults = differences(facts, slots)
    yield from problems("nodes", UserError(faults)) if faults else ()
    if not faults:
        first = next(iter(facts.values()))
        yield Finding("nodes", "ok", f"the same code ({first['code']}), Python and packages on all")
    yield skew(facts)
    hosts = list(facts)
    if run_folder is not None:
        yield shared_folder(hosts, ssh, run_folder)
    if len(hosts) > 1:
        yield from ssh_back(hosts, ssh)
        yield from rates(hosts, facts, ssh)


def skew(facts: Mapping[str, Mapping[str, Any]]) -> Finding:
    """The clocks, as far apart as asking at about the same time can tell."""
    seconds = clock_skew(facts)
    text = f"clocks are within {seconds:.1f} s"
    if seconds <= CLOCK_SKEW_SECONDS:
        return Finding("clock", "ok", text)
    times = {host: float(item["time"]) for host, item in facts.items()}
    middle = statistics.median(times.values())
    off = max(times, key=lambda host: abs(times[host] - middle))
    return Finding("clock", "warning", f"{text}; {off} is farthest off", "start an NTP client there (chrony)")


def shared_folder(hosts: Sequence[str], ssh: str, run_folder: Path) -> Finding:
    """Write on the first host, read on every other one."""
    folder = run_folder.absolute().parent
    probe, text = folder / f".doctor-{secrets.token_hex(4)}", secrets.token_hex(8)
    written = ask(hosts[:1], ["write", str(probe), text], ssh)[hosts[0]]
    remedy = "run.output_dir must be in a folder that all hosts mount at the same path"
    if written.error:
        return Finding("shared folder", "problem", f"{hosts[0]} cannot write to {folder}: {written.error}", remedy)
    try:
        answers = ask(hosts, ["read", str(probe)], ssh)
    finally:
        ask(hosts[:1], ["remove", str(probe)], ssh)
    blind = [host for host, answer in answers.items() if answer.text != text]
    if blind:
        found = f"{folder}: what {hosts[0]} writes there, {', '.join(blind)} cannot read"
        return Finding("shared folder", "problem", found, remedy)
    return Finding("shared folder", "ok", f"{folder}: written on {hosts[0]}, read on all")


def ssh_back(hosts: Sequence[str], ssh: str) -> Iterator[Finding]:
    """Checks ssh from every host to the first one: pdsh does without, MPI runners and people do not."""
    answers = ask(hosts[1:], ["ssh", hosts[0], *shlex.split(ssh)], ssh)
    failed = {host: answer.error for host, answer in answers.items() if answer.error}
    for host, error in failed.items():
        remedy = f"let {host} log in to {hosts[0]} with a key; only MPI runners need it"
        yield Finding("ssh back", "warning", f"{host} → {hosts[0]}: {error}", remedy)
    if not failed:
        yield Finding("ssh back", "ok", f"every host reaches {hosts[0]}")


def rates(hosts: Sequence[str], facts: Mapping[str, Mapping[str, Any]], ssh: str) -> Iterator[Finding]:
    """All-reduce over all hosts, and point to point between pairs of them."""
    address = master_address(hosts[0], facts[hosts[0]]["addresses"])
    port = str(facts[hosts[0]]["free_port"])
    commands = {
        host: [sys.executable, bandwidth.__file__, str(rank), str(len(hosts)), address, port]
        for rank, host in enumerate(hosts)
    }
    answers = ask_each(commands, ssh, BANDWIDTH_SECONDS)
    failed = {host: answer.error for host, answer in answers.items() if answer.error}
    if failed:
        found = "; ".join(f"{host}: {error}" for host, error in failed.items())
        remedy = f"open the ports between the hosts: they must reach {hosts[0]} at {address}, and each other"
        yield Finding("bandwidth", "problem", found, remedy)
        return
    measured = json.loads(answers[hosts[0]].text.splitlines()[-1])
    pairs = [(hosts[low], hosts[high], rate) for low, high, rate in measured["pairs"]]
    text = f"all-reduce {measured['all_reduce']:.2f} Gbit/s ({measured['backend']}), between pairs " + spread(pairs)
    slow = slow_hosts(pairs)
    if slow:
        names = ", ".join(f"{host} ({rate:.2f} Gbit/s)" for host, rate in slow.items())
        yield Finding("bandwidth", "warning", f"{text}; slow: {names}", "look at its link, or leave it out (--exclude)")
    else:
        yield Finding("bandwidth", "ok", text)


def spread(pairs: Sequence[tuple[str, str, float]]) -> str:
    worst = min(pairs, key=lambda pair: pair[2])
    best = max(pair[2] for pair in pairs)
    return f"{worst[2]:.2f} ({worst[0]}, {worst[1]}) to {best:.2f} Gbit/s"


def slow_hosts(pairs: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Host → best rate, of the hosts that are slow with every partner: of two hosts, neither can be blamed."""
    best: dict[str, float] = {}
    for one, other, rate in pairs:
        for host in (one, other):
            best[host] = max(rate, best.get(host, 0.0))
    middle = statistics.median(best.values())
    return {host: rate for host, rate in best.items() if rate < SLOW * middle}
