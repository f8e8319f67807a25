"""Jobs over several hosts, by DeepSpeed's pdsh runner: they train, they come back, or they say in a line why not."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from tests.cluster.hosts import NETWORK, Cluster
from tests.cluster.hosts import run as command
from tests.cluster.jobs import SECONDS, Run, words
from tests.conftest import ROOT
from tests.pipeline.mlflow_server import Server
from tests.pipeline.servers_fixture import s3_server, wait_until
from tests.variants import some_of

AWKWARD = "a b  (c) $HOME `id` \"quoted\" 'single' \\ back % %h * ; & | < > é\tend"


def test_a_crashed_host_costs_no_sample(
    three_hosts: Cluster, run: Run, unbroken: dict[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step has the loss of the unbroken run: the same samples, none lost and none twice.

    Also: an awkward environment, a master port that is taken, secrets, MLflow over the network.
    """
    taker = subprocess.Popen(
        ["ip", "netns", "exec", "n0", "python3", "-m", "http.server", "29500"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    (tmp_path / "server").mkdir()
    server = Server(tmp_path / "server", f"{NETWORK}.1")
    try:
        server.start()
        run.launch(
            *three_hosts.options(2),
            *("--env", "AWKWARD", "tracking.enabled=true", f"tracking.uri={server.uri}"),
            AWKWARD=AWKWARD,
            MLFLOW_TRACKING_USERNAME="someone",
            MLFLOW_TRACKING_PASSWORD="hunter2",
        )
        run.wait_until(run.steps_saved)
        ranks = run.ranks()
        assert len(ranks) == 2
        for rank in ranks:
            environment = rank.environ()
            assert environment["AWKWARD"] == AWKWARD
            assert environment["GLOO_SOCKET_IFNAME"] == "eth0"
            assert environment["MLFLOW_TRACKING_PASSWORD"] == "hunter2"
        assert "hunter2" not in run.log + run.output
        assert not any("hunter2" in " ".join(words(process)) for process in psutil.process_iter())
        assert "port 29500 of 10.77.0.11 is taken; " in run.output

        run.wait_until(run.warm_runners)
        (warm,) = run.warm_runners()
        crashed = time.time()
        three_hosts.hosts[1].crash()
        run.wait_until(lambda: "waiting for 10.77.0.12" in run.output)
        three_hosts.restart(1)
        back = time.time()
        run.wait_until(lambda: any("pdsh" in words(child) for child in warm.children()))
        run.wait_until(lambda: len(run.warm_runners()) == 2)
        _, following = sorted(run.warm_runners(), key=lambda process: process != warm)
        run.finish()
        assert not following.is_running()
        step, again = run.first_step_after(back)
        with capsys.disabled():
            print(
                f"\na crashed host: step {step} is done {again - crashed:.0f} s after the crash, "
                f"{again - back:.0f} s after the host was back"
            )
        cause = "node 10.77.0.12 failed (exit code "  # 255 or 137: ssh heard of it, or did not
        assert f"globallocal: {cause}" in run.output
        assert "; restart 1 of at most 3, from the checkpoint of step" in run.output
        assert run.losses() == unbroken
        assert run.ranks() == []
        client = MlflowClient(server.uri)
        (tracked,) = client.search_runs([client.get_experiment_by_name("globallocal").experiment_id])
        assert tracked.info.status == "FINISHED"
        assert tracked.data.tags["globallocal.restarts"] == "1"
        assert cause in tracked.data.tags["globallocal.restart.001"]
        points = client.get_metric_history(tracked.info.run_id, "loss/train")
        assert sorted(point.step for point in points) == sorted(unbroken)
    finally:
        server.kill()
        taker.kill()
        taker.wait()


def test_a_cut_cable_ends_the_job_and_it_comes_back_and_reads_s3_into_every_hosts_own_cache(
    three_hosts: Cluster, run: Run, unbroken: dict[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s3").mkdir()
    with s3_server(tmp_path / "s3", f"{NETWORK}.1") as (endpoint, credentials):
        environment = {**credentials, "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        wait_until(lambda: uploaded(run.dataset), SECONDS)
        cache = {"XDG_CACHE_HOME": str(three_hosts.private)}
        run.launch(*three_hosts.options(2), "--env", "XDG_CACHE_HOME", "data.dataset=s3://corpus/tiny", **cache)
        try:
            run.wait_until(run.steps_saved)
            run.wait_until(run.warm_runners)
            run.warm_runners()[0].kill()  # the job is started again as at first
            three_hosts.hosts[1].link("down")
            run.wait_until(lambda: "waiting for 10.77.0.12" in run.output)
        finally:
            three_hosts.hosts[1].link("up")
        run.finish()
    assert run.losses() == unbroken
    assert run.ranks() == []
    for index in (0, 1):
        inside = ["nsenter", "-t", str(sshd(three_hosts, index).pid), "--mount", "--pid"]
        assert "globallocal" in command(*inside, "ls", str(three_hosts.private)).split()


def uploaded(dataset: Path) -> bool:
    """False until the server's parts have found each other."""
    import s3fs

    system = s3fs.S3FileSystem(skip_instance_cache=True)
    with contextlib.suppress(OSError, PermissionError):
        if not system.exists("corpus"):
            system.mkdir("corpus")
        system.put(str(dataset), "corpus/tiny", recursive=True)
        return True
    return False


def test_a_stop_saves_on_all_hosts(three_hosts: Cluster, run: Run) -> None:
    run.launch(*three_hosts.options(2), "training.max_steps=999")
    run.wait_until(lambda: "step 2/999" in run.log)
    run.launches[-1].send_signal(signal.SIGTERM)
    run.finish(expect=75)
    assert run.steps_saved()
    assert "stopped on request (exit code 75); start it again to go on" in run.output
    assert run.ranks() == []


@pytest.mark.parametrize("vanished", some_of(["launcher"], ["us"]))
def test_nobody_is_left_when_a_launcher_is_killed(three_hosts: Cluster, run: Run, vanished: str) -> None:
    """On one remote host of the hostfile, and not on this machine, where DeepSpeed alone would start it."""
    include = ("--include", three_hosts.hosts[1].address)
    store = f"sqlite:///{run.folder}/mlflow.db"
    tracking = ("tracking.enabled=true", f"tracking.uri={store}")
    restarts = ("--max-restarts", int(vanished == "us"))
    job = run.launch(*three_hosts.options(3), *include, *restarts, "training.max_steps=999", *tracking)
    run.wait_until(lambda: "step 2/999" in run.log)
    warm = run.warm_runners()
    assert len(warm) == restarts[1]
    (rank,) = run.ranks()
    assert Path(f"/proc/{rank.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink()
    if vanished == "us":
        job.kill()
        job.wait()
    else:
        next(p for p in psutil.Process(job.pid).children() if any("deepspeed" in word for word in words(p))).kill()
        run.finish(expect=137)
        client = MlflowClient(store)
        (tracked,) = client.search_runs([client.get_experiment_by_name("globallocal").experiment_id])
        assert tracked.info.status == "FAILED"
    deadline = time.monotonic() + SECONDS
    while run.ranks() or any(process.is_running() for process in warm):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_what_cannot_start_is_said_in_plain_lines(three_hosts: Cluster, run: Run) -> None:
    """A wrong name, too many slots, an ssh that refuses, another version, wrong files: exit code 2, no rank."""
    hostfile = run.folder / "hosts"
    first, second = three_hosts.hosts[0].address, three_hosts.hosts[1].address

    def refused(text: str | None, *options: str, ssh: str = three_hosts.ssh) -> str:
        hostfile.unlink(missing_ok=True)
        if text is not None:
            hostfile.write_text(text)
        run.launch("--hostfile", hostfile, "--ssh", ssh, *options)
        run.finish(expect=2)
        assert "Traceback" not in run.output
        return run.output

    said = refused(f"{first} slots=1\nno-such-host slots=1\n")
    assert "error: no-such-host: ssh: Could not resolve hostname no-such-host" in said
    assert "error: 1 of 2 hosts answer, 2 are needed (--min-nodes)" in said

    said = refused(f"{first} slots=999\n")
    assert re.search(rf"error: {first}: the hostfile gives it 999 slots, it has \d+ cores; write slots=\d+\n", said)

    refusing = three_hosts.ssh.replace("-i ", "-o IdentitiesOnly=yes -i /dev/null -i no")
    said = refused(f"{first} slots=1\n", ssh=refusing)
    assert f"error: {first}: root@{first}: Permission denied (publickey)" in said
    assert "must work without a password" in said

    assert f"error: {hostfile}:2: 'n1 lots=2' is not HOST slots=N (N ≥ 1)" in refused(f"{first} slots=1\nn1 lots=2\n")
    assert f"error: hostfile {hostfile}: No such file or directory; write one line per machine" in refused(None)
    assert "error: n9 is not in the hostfile, which names" in refused(f"{first} slots=1\n", "--include", "n9")

    changed = run.folder / "changed.py"
    changed.write_text((ROOT / "launch" / "__init__.py").read_text() + "\n# changed\n")
    inside = ["nsenter", "-t", str(sshd(three_hosts, 1).pid), "--mount", "--pid"]
    command(*inside, "mount", "--bind", str(changed), str(ROOT / "launch" / "__init__.py"))
    try:
        said = refused(f"{first} slots=1\n{second} slots=1\n")
    finally:
        command(*inside, "umount", str(ROOT / "launch" / "__init__.py"))
    assert re.search(
        rf"error: the project's code differs between nodes: \w{{16}} on {first}; \w{{16}} on {second};", said
    )


def sshd(cluster: Cluster, index: int) -> psutil.Process:
    """The first process of a host."""
    marker = f"{cluster.folder}/n{index}/sshd_config"
    return next(p for p in psutil.process_iter() if p.name() == "sshd" and marker in " ".join(words(p)))


def test_a_job_over_three_hosts_goes_on_with_the_two_that_are_left(
    three_hosts: Cluster, run: Run, unbroken: dict[int, str]
) -> None:
    """The checkpoint of three ranks is loaded by two; no sample is lost, and the losses agree to rounding."""
    run.launch(*three_hosts.options(3), "--min-nodes", 2)
    try:
        run.wait_until(run.steps_saved)
        three_hosts.hosts[2].crash()
        run.finish()
    finally:
        three_hosts.restart(2)
    (entry,) = [json.loads(line) for line in (run.run_folder / "restarts.jsonl").read_text().splitlines()]
    assert entry["node"] == "10.77.0.13"
    assert "left out: 10.77.0.13: " in run.output
    assert "hosts: 10.77.0.11 × 1, 10.77.0.12 × 1" in run.output
    expected = {step: float(loss) for step, loss in unbroken.items()}
    assert {step: float(loss) for step, loss in run.losses().items()} == pytest.approx(expected, abs=1e-3)


def test_the_doctor_looks_at_every_host(three_hosts: Cluster, run: Run) -> None:
    """Two hosts are well; of three, one is gone and the others have a run folder each for itself."""

    def examine(count: int, *overrides: str) -> dict[str, str]:
        options = ("--config", run.file, *three_hosts.options(count), "--skip-step", "--json", *overrides)
        done = subprocess.run(
            [sys.executable, "-m", "launch", "doctor", *map(str, options)],
            cwd=run.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.stdout.startswith("{"), done.stdout + done.stderr
        said = json.loads(done.stdout)
        assert done.returncode == said["exit_code"]
        return {f"{item['check']} {item['level']}": item["found"] for item in said["findings"]}

    well = examine(2)
    assert not [name for name in well if name.endswith("problem")], well
    assert well["ssh ok"] == "2 of 2 hosts answer"
    assert well["ssh back ok"] == "every host reaches 10.77.0.11"
    assert well["shared folder ok"].endswith("written on 10.77.0.11, read on all")
    assert well["nodes ok"].startswith("the same code (")
    assert re.match(r"all-reduce [\d.]+ Gbit/s \(gloo\), between pairs ", well["bandwidth ok"])

    three_hosts.hosts[2].crash()
    try:
        ill = examine(3, f"run.output_dir={three_hosts.private}/runs/tiny")
    finally:
        three_hosts.restart(2)
    assert ill["ssh problem"].startswith("10.77.0.13: ")
    assert ill["ssh ok"] == "2 of 3 hosts answer"
    assert ill["shared folder problem"].endswith("what 10.77.0.11 writes there, 10.77.0.12 cannot read")
