"""The real S3 server of infra/object_store.sh in a folder of its own, for tests to use, stop, start and kill."""

from __future__ import annotations

import itertools
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "infra" / "object_store.sh"
DAEMONS = ("client.rgw", "osd.0", "mon.a")
NEEDED = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph")
ABSENT = "no Ceph here: sudo apt-get install -y --no-install-recommends radosgw ceph-mon ceph-osd ceph-common"


def installed() -> bool:
    """Whether this machine has what the server is made of."""
    return all(shutil.which(name) for name in NEEDED)


_PLACES = itertools.cycle(random.sample(range(250), 250))
"""Each comes once before any comes again: what is given stays free until its server has started."""


def free_port() -> int:
    """A port below those that the kernel gives to clients, so that it is still free when a killed server comes back."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 30000 + 8 * next(_PLACES) + worker % 8  # no two of pytest's workers are given the same
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


@dataclass(frozen=True)
class ObjectStore:
    """One server: its folder and the port of S3."""

    folder: Path
    port: int
    bucket: str = "mshnet"

    @property
    def endpoint(self) -> str:
        """Where S3 answers."""
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def environment(self) -> dict[str, str]:
        """What `object_store.sh env` sets, for processes and monkeypatch; no secret is in it."""
        return dict(setting.split("=", 1) for setting in self._words("export"))

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lead this process and its children to this server."""
        for name in self._words("unset"):
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)

    def _words(self, command: str) -> list[str]:
        lines = map(shlex.split, self.run("env").stdout.splitlines())
        return [word for first, *words in lines if first == command for word in words]

    @property
    def _variables(self) -> dict[str, str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("OBJECT_STORE_", "AWS_"))}
        mine = {"DIR": str(self.folder), "PORT": str(self.port), "GIB": "4"}
        return clean | {f"OBJECT_STORE_{key}": value for key, value in mine.items()}

    def run(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """One command of the script, whatever its exit code."""
        return subprocess.run(
            [str(SCRIPT), command], env=self._variables | variables, capture_output=True, text=True, timeout=300
        )

    def start(self) -> None:
        """Start what does not run; returns once S3 answers."""
        self._must("start")

    def stop(self) -> None:
        """End each daemon in order; the data stays."""
        self._must("stop")

    def _must(self, command: str) -> None:
        done = self.run(command)
        assert done.returncode == 0, f"object_store.sh {command} failed:\n{done.stderr}"

    def process(self, daemon: str) -> psutil.Process | None:
        """The daemon's process, if it runs."""
        try:
            process = psutil.Process(int((self.folder / "run" / f"{daemon}.pid").read_text()))
            return process if str(self.folder / "ceph.conf") in process.cmdline() else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None

    def kill(self, *daemons: str) -> None:
        """SIGKILL, as a power cut would: by default to all daemons. `start` brings them back."""
        killed = [process for daemon in daemons or DAEMONS if (process := self.process(daemon))]
        for process in killed:
            process.send_signal(signal.SIGKILL)
        psutil.wait_procs(killed, timeout=30)


@contextmanager
def running_in(folder: Path) -> Iterator[ObjectStore]:
    """A server in an empty folder. At the end, also when this process is killed, it is ended and its folder removed."""
    store = ObjectStore(folder, free_port())
    # It waits for the end of its input, which the kernel closes whatever becomes of this process.
    keeper = subprocess.Popen(
        ["bash", "-c", f'cat; "{SCRIPT}" stop && rm -rf "$OBJECT_STORE_DIR"'],
        stdin=subprocess.PIPE,
        env=store._variables,
        start_new_session=True,
    )
    try:
        store.start()
        yield store
    finally:
        keeper.communicate(timeout=120)
    assert keeper.returncode == 0
