"""Several hosts on one machine: a network, process, mount and host-name namespace each, joined by a bridge.

Each host runs its own sshd, has its own /dev/shm and its own `private` folder, and shares everything else, as
hosts with a shared file system do. Killing a host's first process ends all of its processes, as a crash does.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

BRIDGE = "glbridge"
NETWORK = "10.77.0"
NEEDED = {
    "ip": "iproute2",
    "/usr/sbin/sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "unshare": "util-linux",
}


def why_not() -> tuple[str, str] | None:
    """(Programs that are missing to make hosts here, the remedy); None if none is."""
    missing = sorted({package for program, package in NEEDED.items() if shutil.which(program) is None})
    return (" ".join(missing), f"apt-get install {' '.join(missing)}") if missing else None


def forbidden() -> str:
    """What no installation can change; empty where hosts can be made."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(["ip", "netns", "add", "glprobe"], capture_output=True, text=True)
    if tried.returncode:
        return f"network namespaces are not permitted here: {tried.stderr.strip()}"
    run("ip", "netns", "delete", "glprobe")
    return ""


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@dataclass
class Host:
    name: str
    address: str
    process: "subprocess.Popen[bytes]"

    def crash(self) -> None:
        """All processes of the host are gone at once; its network stays."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def link(self, state: str) -> None:
        """`up` or `down`: the cable."""
        run("ip", "link", "set", f"gl-{self.name}", state)


@dataclass
class Cluster:
    folder: Path
    hosts: list[Host]
    ssh: str

    @property
    def private(self) -> Path:
        """A folder of this name stands on each host, its own everywhere."""
        return self.folder / "private"

    def options(self, count: int) -> tuple[object, ...]:
        """Those of `globallocal launch` for one rank on each of the first `count` hosts."""
        path = self.folder / f"hostfile-{count}"
        path.write_text("".join(f"{host.address} slots=1\n" for host in self.hosts[:count]))
        return "--hostfile", path, "--ssh", self.ssh

    def restart(self, index: int) -> None:
        self.hosts[index] = start_host(self.folder, index)


@contextmanager
def cluster(folder: Path, count: int) -> Iterator[Cluster]:
    """`count` hosts n0, n1, … at 10.77.0.11, .12, …; this process is at 10.77.0.1."""
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "key"
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    _tear_down()
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    hosts: list[Host] = []
    try:
        for index in range(count):
            hosts.append(start_host(folder, index))
        known = f"-o UserKnownHostsFile={folder}/known_hosts -o StrictHostKeyChecking=accept-new"
        yield Cluster(folder, hosts, f"-i {key} {known}")
    finally:
        for host in hosts:
            host.crash()
        _tear_down()


def start_host(folder: Path, index: int) -> Host:
    """Make the namespaces of host `index`, or use those that stand, and start its sshd."""
    name, address = f"n{index}", f"{NETWORK}.{11 + index}"
    if name not in run("ip", "netns", "list").split():
        run("ip", "netns", "add", name)
        run("ip", "link", "add", f"gl-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", f"gl-{name}", "master", BRIDGE, "up")
        for command in (f"address add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            run("ip", "-n", name, *command.split())
    home = folder / name
    private = folder / "private"
    for path in (home, private):
        path.mkdir(exist_ok=True)
    if not (home / "host_key").exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / "host_key"))
    authorized = home / "authorized_keys"
    authorized.write_text((folder / "key.pub").read_text())
    settings = (
        f"Port 22\nListenAddress {address}\nHostKey {home}/host_key\nPidFile none\nUsePAM no\nStrictModes no\n"
        f"AuthorizedKeysFile {authorized}\nPermitRootLogin prohibit-password\nMaxStartups 100\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\n"
    )
    (home / "sshd_config").write_text(settings)
    inside = (
        f"hostname {name} && mount -t tmpfs none /dev/shm && mount -t tmpfs none {private} && "
        f"mkdir -p /run/sshd && exec /usr/sbin/sshd -D -e -f {home}/sshd_config"
    )
    with open(home / "sshd.log", "ab") as log:
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child",
             "--mount-proc", "sh", "-c", inside],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        )  # fmt: skip
    _wait_for_port(name, process)
    return Host(name, address, process)


def _wait_for_port(name: str, process: "subprocess.Popen[bytes]") -> None:
    for _ in range(100):
        if process.poll() is not None:
            raise RuntimeError(f"{name}: its sshd did not start")
        if ":22 " in run("ip", "netns", "exec", name, "ss", "-Hltn"):
            return
        time.sleep(0.1)
    raise RuntimeError(f"{name}: its sshd does not listen")


def _tear_down() -> None:
    """Remove what stands, also what a killed test run has left."""
    for name in run("ip", "-o", "link").split():
        if name.startswith("gl-n"):
            subprocess.run(["ip", "link", "delete", name.split("@")[0]], capture_output=True)
    for name in run("ip", "netns", "list").split():
        if name.startswith("n") and name[1:].isdigit():
            for pid in run("ip", "netns", "pids", name).split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "delete", name)
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True)
