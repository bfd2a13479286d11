"""The local cluster, started for real in a process of its own."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.object_store import free_port

PROBE = """
import json, psutil
from pipelines.cluster import connected
with connected() as resources:
    me = psutil.Process()
    listening = [
        connection.laddr.ip
        for process in [me, *me.children(recursive=True)]
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
print(json.dumps({"listening": listening, "cpus": resources["CPU"], "left": len(me.children(recursive=True))}))
"""


JOINING = """
import sys
from mshnet.errors import InputError
from pipelines.cluster import connected
try:
    with connected(sys.argv[1]):
        print("joined")
except InputError as error:
    print(error)
"""


def joining(address: str, **environment: str) -> str:
    """What is said in a process of its own; nothing else is."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", JOINING, address], env=ours, capture_output=True, text=True, timeout=120, check=True
    )
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert joining(address, RAY_AUTH_MODE="disabled") == (
        f"expected a Ray cluster at '{address}', found: [Errno 111] Connection refused. Correct --ray-address or "
        "RAY_ADDRESS, or leave both out for a local one"
    )
    assert joining("nonsense", RAY_AUTH_MODE="disabled").startswith("expected a Ray cluster at 'nonsense', found: ")


def test_a_token_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        said = joining(address, RAY_AUTH_MODE="token", HOME=str(tmp_path))
    assert said == (
        f"expected to be let into the Ray cluster at '{address}', found: Token authentication is enabled but no "
        "authentication token was found. Set RAY_AUTH_MODE=token, and have the cluster's token in ~/.ray/auth_token "
        "(or RAY_AUTH_TOKEN_PATH)"
    )


STRANGER = """
import ray, subprocess, sys
ray.init("local", num_cpus=1, object_store_memory=80_000_000, include_dashboard=False)
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""


def test_a_cluster_that_somebody_runs_on_this_machine_is_not_joined_unasked() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # loopback
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, PROBE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert json.loads(done.stdout.splitlines()[-1])["cpus"] == (os.cpu_count() or 1)


def test_a_local_cluster_listens_on_loopback_only_and_ends_with_its_block() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["listening"]) >= 3
    for address in found["listening"]:
        assert ipaddress.ip_address(address.removeprefix("::ffff:")).is_loopback
    assert 1 <= found["cpus"] <= (os.cpu_count() or 1)
    assert found["left"] == 0
