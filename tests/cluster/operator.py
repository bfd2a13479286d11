"""The operator of a cluster: a home folder on this machine, the commands of the documentation, tunnels, submissions."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.hosts import HEAD, REPOSITORY, WORKERS, Hosts
from tests.object_store import free_port

YAML = REPOSITORY / "infra" / "on_premise.yaml"
SUCCEEDED = re.compile(r"Job '[^']+' succeeded")


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float, every_s: float = 0.5) -> Any:
    """The condition's value once it is true; errors of the network count as not yet."""
    until = time.monotonic() + timeout_s
    while True:
        found, error = None, None
        try:
            found = condition()
        except (OSError, subprocess.SubprocessError) as tried:
            error = tried
        if found:
            return found
        assert time.monotonic() < until, f"{what} not within {timeout_s} s{f' ({error})' if error else ''}"
        time.sleep(every_s)


@dataclass
class Operator:
    """Somebody who looks after the hosts from outside."""

    hosts: Hosts
    home: Path
    commands: list[str] = field(default_factory=list)
    """What was typed, without what only looks."""

    def __post_init__(self) -> None:
        foreign = ("RAY_", "AWS_", "MLFLOW_", "MSHNET_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
        (self.home / "tmp").mkdir(parents=True, mode=0o700)
        self.environment = kept | {
            "HOME": str(self.home),
            "TMPDIR": str(self.home / "tmp"),
            "RAY_TMPDIR": str(self.home / "tmp"),
            "PATH": f"{REPOSITORY / '.venv' / 'bin'}:{kept['PATH']}",
            # What the documentation has the operator export.
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.file = self.home / "on_premise.yaml"

    # --- files ---

    def edit(self) -> int:
        """The lines of the cluster's file that are the user's, as the user would change them; gives their number."""
        workers = ", ".join(self.hosts.address(name) for name in WORKERS)
        changes = {
            "head_ip": self.hosts.address(HEAD),
            "worker_ips": f"[{workers}]",
            "ssh_user": "root",
            "ssh_private_key": str(self.hosts.key),
        }
        text = YAML.read_text()
        for key, value in changes.items():
            text, found = re.subn(rf"^(  {key}:) \S.*?( +# <- yours.*)$", rf"\1 {value}\2", text, flags=re.MULTILINE)
            assert found == 1, key
        self.file.write_text(text)
        differing = [a for a, b in zip(YAML.read_text().splitlines(), text.splitlines(), strict=True) if a != b]
        return len(differing)

    @property
    def token(self) -> str:
        """Ray's."""
        return (self.home / ".ray" / "auth_token").read_text().strip()

    @property
    def secrets(self) -> dict[str, str]:
        """The nodes' environment."""
        lines = (self.home / ".mshnet" / "cluster.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    @property
    def hidden(self) -> dict[str, str]:
        """All that nobody may read anywhere."""
        closed = {key: value for key, value in self.secrets.items() if key.endswith(("PASSWORD", "KEY"))}
        return closed | {"Ray's token": self.token}

    # --- commands ---

    def run(self, *command: str, timeout_s: float = 300, counts: bool = True, **more: str) -> str:
        """A command that must succeed, in the repository; what it printed."""
        done = self.tried(*command, timeout_s=timeout_s, counts=counts, **more)
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stdout[-6000:]}"
        return done.stdout

    def tried(
        self, *command: str, timeout_s: float = 300, counts: bool = False, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """A command, however it ends."""
        if counts:
            self.commands.append(" ".join(command))
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )

    @contextmanager
    def tunnel(self, remote: str) -> Iterator[int]:
        """A port of this machine that leads to HOST:PORT as the head sees it."""
        port = free_port()
        process = subprocess.Popen(
            self.hosts.ssh_command(HEAD, "-N", "-o", "ExitOnForwardFailure=yes", "-L", f"127.0.0.1:{port}:{remote}"),
            env=self.environment,
        )
        try:
            wait_until(lambda: _accepts(port), "the tunnel", 30, 0.1)
            yield port
        finally:
            process.terminate()
            process.wait()

    @contextmanager
    def dashboard(self) -> Iterator[None]:
        """`ray dashboard`, which tunnels to it; the job commands then find it by the environment."""
        port = free_port()
        command = ["ray", "dashboard", "--port", str(port), str(self.file)]
        self.commands.append(" ".join(command))
        with open(self.home / "dashboard.log", "w") as log:
            process = subprocess.Popen(
                command, cwd=REPOSITORY, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        try:
            wait_until(lambda: _accepts(port), "ray dashboard", 60, 0.1)
            self.environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
            yield
        finally:
            self.environment.pop("RAY_API_SERVER_ADDRESS", None)
            os.killpg(process.pid, 15)
            process.wait()

    # --- what Ray says ---

    def ask(self, path: str, token: str | None = None) -> Any:
        """The answer of the dashboard's API, which is the job API too."""
        token = self.token if token is None else token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        address = self.environment["RAY_API_SERVER_ADDRESS"]
        with urllib.request.urlopen(urllib.request.Request(address + path, headers=headers), timeout=30) as answer:
            return json.load(answer)

    def refusal(self, path: str, token: str) -> int:
        """The status with which it refuses."""
        try:
            self.ask(path, token)
        except urllib.error.HTTPError as error:
            return error.code
        raise AssertionError(f"{path} was answered")

    def listed(self, what: str) -> list[dict[str, Any]]:
        """Ray's state API: nodes, actors, ..."""
        found: list[dict[str, Any]] = self.ask(f"/api/v0/{what}?detail=1&limit=1000")["data"]["result"]["result"]
        return found

    def nodes(self) -> dict[str, str]:
        """Names of the hosts whose Ray is alive, by node id."""
        names = {self.hosts.address(name): name for name in (HEAD, *WORKERS)}
        return {n["node_id"]: names[n["node_ip"]] for n in self.listed("nodes") if n["state"] == "ALIVE"}

    def wait_for_nodes(self, count: int = 3, timeout_s: float = 120) -> None:
        """Until so many are alive."""
        wait_until(lambda: len(self.nodes()) == count, f"{count} nodes", timeout_s)

    def training_workers(self) -> list[str]:
        """Hosts on which a Ray Train worker is alive, as Ray says it."""
        nodes = self.nodes()
        alive = [a for a in self.listed("actors") if a["state"] == "ALIVE" and "RayTrainWorker" in a["class_name"]]
        return sorted(nodes.get(actor["node_id"], "?") for actor in alive)


def _accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Submission:
    """`ray job submit`, and what it prints."""

    def __init__(self, operator: Operator, submission_id: str, entrypoint: Sequence[str]) -> None:
        self.operator, self.id = operator, submission_id
        command = ["ray", "job", "submit", "--working-dir", ".", "--submission-id", submission_id, "--", *entrypoint]
        operator.commands.append(" ".join(command))
        self.started = time.monotonic()
        self._process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=operator.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.said += line

    @property
    def runs(self) -> bool:
        """Whether `ray job submit` still waits."""
        return self._process.poll() is None

    def wait_for(self, condition: Callable[[], Any], what: str, timeout_s: float) -> Any:
        """The condition's value once it is true, which must be while the job runs."""

        def met() -> Any:
            assert self.runs, f"the job ended before {what}:\n{self.said[-4000:]}"
            return condition()

        try:
            return wait_until(met, what, timeout_s, 0.1)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said[-4000:]}") from None

    def end(self, timeout_s: float) -> int:
        """Wait; the exit code."""
        code = self._process.wait(timeout_s)
        self._reader.join(30)
        return code

    def result(self, timeout_s: float) -> dict[str, Any]:
        """The JSON line of a job that ends well."""
        try:
            code = self.end(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done within {timeout_s} s:\n{self.said[-6000:]}") from None
        assert code == 0, self.said[-6000:]
        assert SUCCEEDED.search(self.said)
        found: dict[str, Any] = json.loads([line for line in self.said.splitlines() if line.startswith("{")][-1])
        return found

    def give_up(self) -> None:
        """End the command; the job itself goes on."""
        if self.runs:
            self._process.kill()
        self._process.wait()
