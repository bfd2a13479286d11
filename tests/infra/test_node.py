"""infra/node.sh with a `ray` and a `services.sh` that write down what they are given, and infra/on_premise.yaml.

What they do with it is seen on real hosts in tests/cluster/test_on_premise.py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
YAML = REPOSITORY / "infra" / "on_premise.yaml"
WRITE_DOWN = """#!/bin/bash
printf '%s ' "$(basename "$0")" "$@" >>"$HOME/asked"
echo >>"$HOME/asked"
env >"$HOME/$(basename "$0").env"
exit "$(cat "$HOME/exit_code" 2>/dev/null || echo 0)"
"""


@dataclass
class Node:
    """A home folder with the repository's part in it."""

    home: Path

    def run(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """The script, as Ray's ssh command would run it."""
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
        script = str(self.home / "mshnet" / "infra" / "node.sh")
        return subprocess.run([script, *arguments], env=environment | more, capture_output=True, text=True, timeout=60)

    @property
    def asked(self) -> list[str]:
        """What the programs were called with, a line each."""
        return (self.home / "asked").read_text().splitlines()

    def environment_of(self, program: str) -> dict[str, str]:
        """That a program found."""
        lines = (self.home / f"{program}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    infra, programs = tmp_path / "mshnet" / "infra", tmp_path / "mshnet" / ".venv" / "bin"
    infra.mkdir(parents=True)
    programs.mkdir(parents=True)
    for name in ("node.sh", "packages.sh"):
        shutil.copy(REPOSITORY / "infra" / name, infra)
    (programs / "python").symlink_to(REPOSITORY / ".venv" / "bin" / "python")
    for program in (programs / "ray", infra / "services.sh"):
        program.write_text(WRITE_DOWN)
        program.chmod(0o755)
    for file, text in ((".mshnet/cluster.env", "MLFLOW_TRACKING_PASSWORD=abc\n"), (".ray/auth_token", "0" * 64)):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(text)
    (tmp_path / "ray_bootstrap_config.yaml").write_text("provider: {type: local, head_ip: 127.0.0.5}\n")
    return Node(tmp_path)


def test_a_head_starts_the_services_then_ray_closed(node: Node) -> None:
    done = node.run("head", "--num-gpus=0")
    assert done.returncode == 0, done.stderr
    services, ray = node.asked
    assert services == "services.sh start "
    assert {"--node-ip-address=127.0.0.5", "--dashboard-host=127.0.0.1", "--num-cpus=0"} <= set(ray.split())
    assert ray.split()[-1] == "--num-gpus=0"
    assert node.environment_of("services.sh")["SERVICES_HOST"] == "127.0.0.5"
    assert node.environment_of("services.sh")["SERVICES"] == "database tracker monitoring"
    found = node.environment_of("ray")
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["MLFLOW_TRACKING_URI"] == "http://127.0.0.5:5000"
    assert found["MLFLOW_TRACKING_PASSWORD"] == "abc"
    assert "AWS_ENDPOINT_URL" not in found
    assert "OMP_NUM_THREADS" not in found, "every training of the cluster would have one thread"
    closed = [".mshnet", ".mshnet/cluster.env", ".ray", ".ray/auth_token"]
    assert [(node.home / path).stat().st_mode & 0o777 for path in closed] == [0o700, 0o600, 0o700, 0o600]


def test_a_worker_finds_the_own_object_store_on_the_head(node: Node) -> None:
    with open(node.home / ".mshnet" / "cluster.env", "a") as file:
        file.write("MSHNET_OWN_OBJECT_STORE=1\nOMP_NUM_THREADS=3\n")
    assert node.run("worker", RAY_HEAD_IP="192.0.2.10").returncode == 0
    (ray,) = node.asked
    assert "--address=192.0.2.10:6379" in ray.split()
    found = node.environment_of("ray")
    assert found["AWS_ENDPOINT_URL"] == "http://192.0.2.10:7480"
    assert found["OMP_NUM_THREADS"] == "3"


def test_a_worker_that_ray_does_not_start_on_is_left_to_the_next_try(node: Node) -> None:
    (node.home / "exit_code").write_text("1")
    done = node.run("worker", RAY_HEAD_IP="192.0.2.10")
    assert done.returncode == 0
    assert "the head tries again" in done.stderr
    assert node.run("head").returncode != 0


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        (".mshnet/cluster.env", "infra/secrets.sh"),
        (".ray/auth_token", "infra/secrets.sh"),
        ("mshnet/.venv/bin/ray", "make -C .*/mshnet setup"),
    ],
)
def test_what_is_missing_is_named(node: Node, removed: str, expected: str) -> None:
    (node.home / removed).unlink()
    done = node.run("worker", RAY_HEAD_IP="192.0.2.10")
    assert done.returncode == 1
    assert re.search(expected, done.stderr), done.stderr
    assert not (node.home / "asked").exists()


def test_a_login_finds_ray_and_its_token_whatever_often_it_is_prepared(node: Node) -> None:
    for _ in range(2):
        assert node.run("login").returncode == 0
    lines = (node.home / ".bashrc").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2
    assert "RAY_AUTH_MODE=token" in lines[1]


def test_the_cluster_file_is_what_ray_takes_and_four_lines_of_it_are_the_users() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = YAML.read_text()
    yours = [line.split(":")[0].strip() for line in text.splitlines() if "<- yours" in line]
    assert yours == ["head_ip", "worker_ips", "ssh_user", "ssh_private_key"]
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    (kind,) = config["available_node_types"].values()
    assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])


def test_the_nodes_get_all_that_setup_and_start_need_and_no_data() -> None:
    mounts = yaml.safe_load(YAML.read_text())["file_mounts"]
    mine = {place: source for place, source in mounts.items() if place.startswith("~/mshnet/")}
    assert all(place == f"~/mshnet/{source}" and (REPOSITORY / source).exists() for place, source in mine.items())
    assert {"Makefile", "infra", "pyproject.toml", "requirements.lock", "mshnet", "pipelines"} <= set(mine.values())
    files = [path for source in mine.values() for path in sorted((REPOSITORY / source).rglob("*")) if path.is_file()]
    size = sum(path.stat().st_size for path in files if "__pycache__" not in path.parts)
    assert size < 2 * 2**20


def test_an_upload_has_the_code_and_the_lock_and_neither_data_nor_environment_nor_history(tmp_path: Path) -> None:
    from zipfile import ZipFile

    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(REPOSITORY), package, include_gitignore=True)
    with ZipFile(package) as opened:
        names = [name for name in opened.namelist() if not name.endswith("/")]
    assert {name.split("/")[0] for name in names if "/" in name} == {"mshnet", "pipelines"}
    assert {"requirements.lock", "pyproject.toml", "pipelines/cross_validate.py"} <= set(names)
    assert not [name for name in names if name.endswith((".pyc", ".arrow", ".db", ".safetensors"))]
    assert package.stat().st_size < 2 * 2**20
