"""Where Ceph is absent: installed in CI as root, asked for by everybody else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "infra" / "setup.sh"
PACKAGES = "radosgw ceph-mon ceph-osd ceph-common"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A PATH with everything of this machine but Ceph; its apt-get writes down what it is asked for."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in map(Path, ("/usr/bin", "/bin")):
        for program in folder.iterdir():
            if not program.name.startswith(("ceph", "rados", "monmaptool", "apt-get", "id")):
                (programs / program.name).unlink(missing_ok=True)
                (programs / program.name).symlink_to(program)
    put_program(programs / "apt-get", f'echo "$@" >>"{tmp_path}/asked"')
    return tmp_path


def put_program(path: Path, script: str) -> None:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def run(machine: Path, script: Path, command: str, user: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """A script's command on that machine, as that user."""
    put_program(machine / "bin" / "id", f"echo {user}")
    environment = os.environ | {"PATH": str(machine / "bin"), "OBJECT_STORE_DIR": str(machine / "store")}
    return subprocess.run(
        [str(script), command], env=environment | variables, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(("user", "ci"), [(0, ""), (1000, ""), (1000, "true")])
def test_the_tests_go_on_without_and_say_what_to_run(machine: Path, user: int, ci: str) -> None:
    done = run(machine, SETUP, "servers", user, CI=ci)
    assert done.returncode == 0
    assert f"run: sudo apt-get install -y --no-install-recommends {PACKAGES}" in done.stderr
    assert "skipped" in done.stderr
    assert not (machine / "asked").exists()


def test_ci_as_root_installs_them(machine: Path) -> None:
    assert run(machine, SETUP, "servers", 0, CI="true").returncode == 0
    update, install = (machine / "asked").read_text().splitlines()
    assert update.split()[0] == "update"
    assert install.endswith(PACKAGES)


def test_ci_as_root_does_not_go_on_where_they_cannot_be_installed(machine: Path) -> None:
    put_program(machine / "bin" / "apt-get", "exit 100")
    assert run(machine, SETUP, "servers", 0, CI="true").returncode != 0


def test_start_asks_and_touches_nothing(machine: Path) -> None:
    done = run(machine, SETUP.parent / "object_store.sh", "start", 0, CI="")
    assert done.returncode == 1
    assert f"run: sudo apt-get install -y --no-install-recommends {PACKAGES}" in done.stderr
    assert not (machine / "store").exists()
