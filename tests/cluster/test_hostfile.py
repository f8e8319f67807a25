"""Jobs over two hosts, by DeepSpeed's pdsh runner: they train, they come back, or they say in a line why not."""

import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import launch, output
from tests.cluster.hosts import Cluster, run, start_host
from tests.conftest import ROOT

AWKWARD = "a b  (c) $HOME `id` \"quoted\" 'single' \\ back % %h * ; & | < > é\tend"


def wait_until(
    condition: Callable[[], bool], job: "subprocess.Popen[str]", run_file: Path, seconds: float = 240
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, output(run_file)
        assert time.monotonic() < deadline, output(run_file)
        time.sleep(0.1)


def ranks(run_file: Path) -> list[psutil.Process]:
    """The training processes of a run, on all hosts: their process namespaces are inside ours."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if str(ROOT / "pipeline" / "train.py") in words[:3] and str(run_file) in words:
            found.append(process)
    return found


def losses(text: str) -> dict[int, str]:
    """The last loss printed for each step."""
    return {int(step): loss for step, loss in re.findall(r"step (\d+)/40 +loss ([\d.]+)", text)}


def checkpoint_steps(run_file: Path) -> list[int]:
    return sorted(int(p.parent.name[5:]) for p in run_file.parent.glob("runs/tiny/checkpoints/*/integrity.json"))


def test_a_crashed_host_costs_no_sample(two_hosts: Cluster, run_file: Path) -> None:
    """Also: awkward environment, a master port that is taken, two hosts against two local ranks, bit for bit."""
    job = launch(run_file, "--local", 2, "run.name=unbroken")
    assert job.wait(timeout=300) == 0, output(run_file)
    unbroken = losses(output(run_file))
    assert sorted(unbroken) == list(range(1, 41))

    taker = subprocess.Popen(
        ["ip", "netns", "exec", "n0", "python3", "-m", "http.server", "29500"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        job = launch(
            run_file,
            *("--hostfile", two_hosts.hostfile(), "--ssh", two_hosts.ssh, "--env", "AWKWARD"),
            AWKWARD=AWKWARD,
            MLFLOW_TRACKING_PASSWORD="hunter2",
        )
        wait_until(lambda: bool(checkpoint_steps(run_file)), job, run_file)
        for rank in ranks(run_file):
            environment = rank.environ()
            assert environment["AWKWARD"] == AWKWARD
            assert environment["GLOO_SOCKET_IFNAME"] == "eth0"
            assert environment["MLFLOW_TRACKING_PASSWORD"] == "hunter2"
        assert len(ranks(run_file)) == 2
        said = (run_file.parent / "runs/tiny/logs/launch.log").read_text() + output(run_file)
        assert "hunter2" not in said
        assert not any("hunter2" in " ".join(words(process)) for process in psutil.process_iter())
        assert "port 29500 of 10.77.0.11 is taken; " in said

        two_hosts.hosts[1].crash()
        wait_until(lambda: "waiting for 10.77.0.12" in output(run_file), job, run_file)
        two_hosts.hosts[1] = start_host(two_hosts.folder, 1)
        assert job.wait(timeout=300) == 0, output(run_file)
    finally:
        taker.kill()
        taker.wait()
    assert "node 10.77.0.12 failed" in output(run_file)
    assert "restart 1 of at most 3, from the checkpoint of step" in output(run_file)
    assert losses(output(run_file)) == unbroken
    assert ranks(run_file) == []


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def test_a_cut_cable_ends_the_job_and_it_comes_back(two_hosts: Cluster, run_file: Path) -> None:
    job = launch(run_file, "--hostfile", two_hosts.hostfile(), "--ssh", two_hosts.ssh)
    try:
        wait_until(lambda: bool(checkpoint_steps(run_file)), job, run_file)
        two_hosts.hosts[1].link("down")
        wait_until(lambda: "waiting for 10.77.0.12" in output(run_file), job, run_file)
    finally:
        two_hosts.hosts[1].link("up")
    assert job.wait(timeout=300) == 0, output(run_file)
    assert checkpoint_steps(run_file)[-1] == 40
    assert ranks(run_file) == []


def test_a_stop_saves_on_all_hosts(two_hosts: Cluster, run_file: Path) -> None:
    job = launch(run_file, "--hostfile", two_hosts.hostfile(), "--ssh", two_hosts.ssh, "training.max_steps=4000")
    wait_until(lambda: "step 2/4000" in output(run_file), job, run_file)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 75, output(run_file)
    assert checkpoint_steps(run_file)
    assert "stopped on request (exit code 75); start it again to go on" in output(run_file)
    assert ranks(run_file) == []


@pytest.mark.parametrize("vanished", ["launcher", "us"])
def test_nobody_is_left_when_a_launcher_is_killed(two_hosts: Cluster, run_file: Path, vanished: str) -> None:
    options = ("--hostfile", two_hosts.hostfile(), "--ssh", two_hosts.ssh, "--max-restarts", 0)
    job = launch(run_file, *options, "training.max_steps=4000")
    wait_until(lambda: "step 2/4000" in output(run_file), job, run_file)
    if vanished == "us":
        job.kill()
    else:
        next(p for p in psutil.Process(job.pid).children() if any("deepspeed" in word for word in words(p))).kill()
        assert job.wait(timeout=60) == 137
    deadline = time.monotonic() + 60
    while ranks(run_file):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    job.wait()


def test_what_cannot_start_is_said_in_plain_lines(two_hosts: Cluster, run_file: Path) -> None:
    """A wrong name, too many slots, an ssh that refuses, another version of the project: exit code 2, no rank."""
    hostfile = run_file.parent / "hosts"
    address = two_hosts.hosts[0].address

    def refused(text: str, ssh: str = two_hosts.ssh) -> str:
        hostfile.write_text(text)
        job = launch(run_file, "--hostfile", hostfile, "--ssh", ssh)
        assert job.wait(timeout=120) == 2, output(run_file)
        assert "Traceback" not in output(run_file)
        return output(run_file)

    said = refused(f"{address} slots=1\nno-such-host slots=1\n")
    assert "error: no-such-host: ssh: Could not resolve hostname no-such-host" in said
    assert "error: 1 of 2 hosts answer, 2 are needed (--min-nodes)" in said

    assert f"error: {address}: slots=999 in the hostfile, but it has" in refused(f"{address} slots=999\n")

    said = refused(f"{address} slots=1\n", ssh=two_hosts.ssh.replace("-i ", "-o IdentitiesOnly=yes -i /dev/null -i no"))
    assert f"error: {address}: root@{address}: Permission denied (publickey)" in said
    assert "must work without a password" in said

    other = run_file.parent / "other.py"
    other.write_text((ROOT / "launch" / "__init__.py").read_text() + "\n# changed\n")
    init = ROOT / "launch" / "__init__.py"
    inside = ["nsenter", "-t", str(sshd(two_hosts, 1).pid), "--mount"]
    run(*inside, "mount", "--bind", str(other), str(init))
    try:
        said = refused("".join(f"{host.address} slots=1\n" for host in two_hosts.hosts))
    finally:
        run(*inside, "umount", str(init))
    assert re.search(
        r"error: the project's code differs between nodes: \w{16} on 10.77.0.11; \w{16} on 10.77.0.12;", said
    )


def sshd(cluster: Cluster, index: int) -> psutil.Process:
    """The first process of a host."""
    marker = f"{cluster.folder}/n{index}/sshd_config"
    return next(p for p in psutil.process_iter() if p.name() == "sshd" and marker in " ".join(words(p)))


def test_one_remote_host_of_a_hostfile_is_used_and_not_this_machine(two_hosts: Cluster, run_file: Path) -> None:
    options = ("--hostfile", two_hosts.hostfile(), "--ssh", two_hosts.ssh, "--include", two_hosts.hosts[1].address)
    job = launch(run_file, *options, "training.max_steps=4000")
    wait_until(lambda: "step 2/4000" in output(run_file), job, run_file)
    (rank,) = ranks(run_file)
    here = Path("/proc/self/ns/net").readlink()
    assert Path(f"/proc/{rank.pid}/ns/net").readlink() != here
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) == 75
