"""The local cluster, started for real in a process of its own."""

from __future__ import annotations

import ipaddress
import json
import os
import subprocess
import sys

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
