"""Hosts on this machine: namespaces with a network address, processes, files and an sshd of their own.

python -m tests.cluster.hosts up FOLDER | down FOLDER | kill FOLDER NAME | start FOLDER NAME
python -m tests.cluster.hosts cut FOLDER NAME NAME | heal FOLDER NAME NAME | show FOLDER

A bridge is the switch between them; this machine has an address on it too, as the operator's would. Needs root.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]
HEAD, WORKERS = "head", ("worker-1", "worker-2")
NAMES = (HEAD, *WORKERS)
NEEDED = {
    "ip": "iproute2",
    "ss": "iproute2",
    "nft": "nftables",
    "unshare": "util-linux",
    "ssh": "openssh-client",
    "/usr/sbin/sshd": "openssh-server",
    "rsync": "rsync",
}
SSHD_CONFIG = """\
ListenAddress {address}
HostKey /etc/ssh/host_key
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 100
MaxSessions 100
"""


def absent() -> str:
    """Why this machine cannot have such hosts; empty if it can."""
    if os.geteuid() != 0:
        return "hosts as namespaces need root"
    missing = sorted({package for name, package in NEEDED.items() if shutil.which(name) is None})
    if missing:
        return f"no {', '.join(missing)} here: sudo apt-get install -y --no-install-recommends {' '.join(missing)}"
    # What a container forbids, it forbids at the first try.
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "bash", "-c"]
    tried = _run([*command, "mount --make-rprivate / && ip link add probe type veth && nft list ruleset"], check=False)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def _run(command: Sequence[str], check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
    return done


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass(frozen=True)
class Listener:
    """A port that a host has open."""

    port: int
    address: str
    process: str


@dataclass(frozen=True)
class Hosts:
    """Three of them, whose files lie in a folder."""

    folder: Path
    network: int
    """The third number of their addresses, free on this machine."""

    # --- names and addresses ---

    @property
    def bridge(self) -> str:
        """The switch, and what the names of all that belongs to it begin with."""
        return f"ms{self.network}"

    @property
    def operator(self) -> str:
        """This machine's address."""
        return f"10.77.{self.network}.1"

    def address(self, name: str) -> str:
        """A host's address."""
        return f"10.77.{self.network}.{10 + NAMES.index(name)}"

    @property
    def key(self) -> Path:
        """The private key that every host accepts."""
        return self.folder / "key"

    def disk(self, name: str) -> Path:
        """Where a host's files lie, as this machine sees them: `root`, `tmp`, `run`."""
        return self.folder / "hosts" / name

    def _namespace(self, name: str) -> str:
        return f"{self.bridge}-{name}"

    def _cable(self, name: str) -> str:
        return f"{self.bridge}v{NAMES.index(name)}"

    # --- their life ---

    @staticmethod
    def create(folder: Path) -> Hosts:
        """Make network and hosts, and wait until each answers over ssh."""
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("key", "host_key"):
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "mshnet-test", "-f", str(folder / name)])
        for network in range(10, 250):
            # Whoever makes the bridge has the network: several folders can be up at once.
            made = _run(["ip", "link", "add", f"ms{network}", "type", "bridge"], check=False)
            if made.returncode == 0:
                break
        else:
            raise RuntimeError(f"no free network for hosts: {made.stderr.strip()}")
        hosts = Hosts(folder, network)
        (folder / "network").write_text(str(network))
        _run(["ip", "addr", "add", f"{hosts.operator}/24", "dev", hosts.bridge])
        _run(["ip", "link", "set", hosts.bridge, "up"])
        for name in NAMES:
            hosts._plug_in(name)
            hosts._boot(name)
        for name in NAMES:
            hosts.wait_for_ssh(name)
        return hosts

    @staticmethod
    def of(folder: Path) -> Hosts:
        """Those that are up in a folder."""
        return Hosts(folder.resolve(), int((folder / "network").read_text()))

    def _plug_in(self, name: str) -> None:
        namespace, cable = self._namespace(name), self._cable(name)
        inside = ["ip", "-n", namespace]
        _run(["ip", "netns", "add", namespace])
        _run(["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", namespace])
        _run(["ip", "link", "set", cable, "master", self.bridge, "up"])
        _run([*inside, "addr", "add", f"{self.address(name)}/24", "dev", "eth0"])
        for link in ("lo", "eth0"):
            _run([*inside, "link", "set", link, "up"])
        _run([*inside, "route", "add", "default", "via", self.operator])

    def _boot(self, name: str) -> None:
        disk = self.disk(name)
        ssh = disk / "etc" / "ssh"
        ssh.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.folder / "host_key", ssh)
        (ssh / "sshd_config").write_text(SSHD_CONFIG.format(address=self.address(name)))
        authorized = disk / "root" / ".ssh" / "authorized_keys"
        if not authorized.exists():
            shutil.copytree("/etc/skel", disk / "root", dirs_exist_ok=True)
        authorized.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.copy(self.key.with_suffix(".pub"), authorized)
        arguments = [name, self.address(name), disk, REPOSITORY, sys.base_prefix]
        with open(disk / "boot.log", "a") as log:
            process = subprocess.Popen(
                [
                    *("ip", "netns", "exec", self._namespace(name)),
                    # With the first process the kernel ends all of the host's, as a power cut does.
                    *("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"),
                    *("bash", str(Path(__file__).with_name("host.sh")), *map(str, arguments)),
                ],
                env={"HOME": "/root", "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (disk / "pid").write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}")

    def _keeper(self, name: str) -> psutil.Process | None:
        """The process outside with which the host lives."""
        try:
            pid, created = (self.disk(name) / "pid").read_text().split()
            process = psutil.Process(int(pid))
            return process if process.create_time() == float(created) and process.status() != "zombie" else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None

    def runs(self, name: str) -> bool:
        """Whether the host is on."""
        return self._keeper(name) is not None

    def kill(self, name: str) -> None:
        """A power cut: every process of the host ends at once; what is on its disk stays, but for /dev/shm."""
        keeper = self._keeper(name)
        if keeper is None:
            return
        processes = self.processes(name)
        keeper.send_signal(signal.SIGKILL)
        until = time.monotonic() + 30
        # One whose parent does not ask for it stays as a zombie, so they are looked at and not waited for.
        while alive := [process for process in (keeper, *processes) if _is_alive(process)]:
            assert time.monotonic() < until, alive
            time.sleep(0.05)

    def start(self, name: str) -> None:
        """Power on: sshd alone, as after a boot; /tmp and /run are empty."""
        assert not self.runs(name), f"{name} is on"
        for emptied in ("tmp", "run"):
            shutil.rmtree(self.disk(name) / emptied, ignore_errors=True)
        self._boot(name)
        self.wait_for_ssh(name)

    def wait_for_ssh(self, name: str, timeout_s: float = 30) -> None:
        """Until the host answers."""
        until = time.monotonic() + timeout_s
        while (tried := self.ssh(name, "true", check=False)).returncode:
            log = self.disk(name) / "boot.log"
            assert time.monotonic() < until, f"{name} does not answer: {tried.stderr}\n{log.read_text()}"
            time.sleep(0.1)

    def remove(self) -> None:
        """Power off, and nothing is left of hosts, network and folder."""
        for name in NAMES:
            self.kill(name)
            _run(["ip", "link", "del", self._cable(name)], check=False)
            _run(["ip", "netns", "del", self._namespace(name)], check=False)
        _run(["ip", "link", "del", self.bridge], check=False)
        shutil.rmtree(self.folder)

    # --- the network between two ---

    def cut(self, name: str, other: str) -> None:
        """Nothing that one sends to the other arrives any more, and nobody is told: as with a switch gone dark."""
        for here, there in ((name, other), (other, name)):
            rules = (
                f"table ip cut_{there.replace('-', '_')} {{ chain arriving {{ type filter hook input priority 0; "
                f"ip saddr {self.address(there)} drop; }}; }}"
            )
            _run(["ip", "netns", "exec", self._namespace(here), "nft", rules])

    def heal(self, name: str, other: str) -> None:
        """Undo the cut."""
        for here, there in ((name, other), (other, name)):
            table = f"cut_{there.replace('-', '_')}"
            _run(["ip", "netns", "exec", self._namespace(here), "nft", "delete", "table", "ip", table])

    # --- looking in ---

    def ssh_command(self, name: str, *options: str) -> list[str]:
        """As the operator would type it."""
        return [
            *("ssh", "-i", str(self.key), "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"),
            *("-o", "LogLevel=ERROR", "-o", "ConnectTimeout=5", *options, f"root@{self.address(name)}"),
        ]

    def ssh(
        self, name: str, command: str, check: bool = True, timeout_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """A command on a host."""
        return _run([*self.ssh_command(name), command], check, timeout_s)

    def processes(self, name: str) -> list[psutil.Process]:
        """All of a host, its first one and sshd included."""
        keeper = self._keeper(name)
        first = keeper.children() if keeper else []
        if not first:
            return []
        namespace = os.readlink(f"/proc/{first[0].pid}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == namespace:
                    found.append(process)
            except OSError:  # ended meanwhile
                continue
        return found

    def running(self, name: str, word: str) -> list[psutil.Process]:
        """Those of a host's processes that have a word of their command line."""
        found = []
        for process in self.processes(name):
            with suppress(psutil.NoSuchProcess):  # ended meanwhile, or nobody has asked for its end yet
                if word in process.cmdline():
                    found.append(process)
        return found

    def listening(self, name: str) -> list[Listener]:
        """What a host has open, TCP and UDP."""
        found = []
        for protocol in ("-t", "-u"):
            lines = _run(["ip", "netns", "exec", self._namespace(name), "ss", "-Hln", "-p", protocol]).stdout
            for line in lines.splitlines():
                address, port = line.split()[3].rsplit(":", 1)
                process = re.search(r'"([^"]+)"', line)
                found.append(Listener(int(port), address.split("%")[0].strip("[]"), process[1] if process else "?"))
        return sorted(set(found), key=lambda one: (one.port, one.address))


@contextmanager
def up_in(folder: Path) -> Iterator[Hosts]:
    """Hosts for a block; at its end, also when this process is killed, nothing of them is left."""
    # It waits for the end of its input, which the kernel closes whatever becomes of this process.
    remove = f'cat; [ ! -f "{folder}/network" ] || "{sys.executable}" -m tests.cluster.hosts down "{folder}"'
    undertaker = subprocess.Popen(["bash", "-c", remove], stdin=subprocess.PIPE, cwd=REPOSITORY, start_new_session=True)
    try:
        yield Hosts.create(folder)
    finally:
        undertaker.communicate(timeout=120)
    assert undertaker.returncode == 0


def clean_environment(home: Path, **more: str) -> Mapping[str, str]:
    """For commands of an operator whose home is a folder: nothing of this machine's Ray, S3 and MLflow in it."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "AWS_", "MLFLOW_", "MSHNET_"))
    }
    for name in ("tmp", ".ssh"):
        (home / name).mkdir(parents=True, exist_ok=True, mode=0o700)
    path = f"{REPOSITORY / '.venv' / 'bin'}:{kept['PATH']}"
    mine = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "RAY_TMPDIR": str(home / "tmp"), "PATH": path}
    return kept | mine | {"PYTHONUNBUFFERED": "1"} | more


def main(argv: Sequence[str]) -> None:
    """By hand."""
    command, folder, *names = argv
    if command == "up":
        hosts = Hosts.create(Path(folder))
        print("\n".join(f"{name} {hosts.address(name)}" for name in NAMES))
        print(" ".join(hosts.ssh_command(HEAD)))
        return
    hosts = Hosts.of(Path(folder))
    if command == "show":
        for name in NAMES:
            print(name, hosts.address(name), "on" if hosts.runs(name) else "off")
            for listener in hosts.listening(name):
                print(f"  {listener.port:<6} {listener.address:<16} {listener.process}")
        return
    {
        "down": hosts.remove,
        "kill": hosts.kill,
        "start": hosts.start,
        "cut": hosts.cut,
        "heal": hosts.heal,
    }[command](*names)


if __name__ == "__main__":
    main(sys.argv[1:])
