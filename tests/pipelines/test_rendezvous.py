"""Workers meet on one address, with gloo, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from pipelines.rendezvous import interface
from tests.object_store import free_port

MEET = """
import json, os, sys, datetime, psutil, torch, torch.distributed as dist
from pipelines.rendezvous import listen_on_one_address
rank, world_size, ours = map(int, sys.argv[1:])
if ours:
    listen_on_one_address()
found = []
for again in range(2):
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=datetime.timedelta(minutes=3))
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    listening = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    found.append([total.item(), sorted(set(listening))])
    dist.destroy_process_group()
print(json.dumps(found))
"""


def meet(world_size: int, ours: bool) -> list[list[list[object]]]:
    """What each rank summed, and where it listened; twice, as after a restart."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(rank), str(world_size), str(int(ours))],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in processes]
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.timeout(300)
def test_no_worker_listens_on_every_address() -> None:
    assert meet(2, ours=True) == [[[3.0, ["127.0.0.1"]]] * 2] * 2


@pytest.mark.timeout(300)
def test_torch_by_itself_would() -> None:
    assert meet(1, ours=False) == [[[1.0, ["127.0.0.1", "::"]]] * 2]


def test_an_address_belongs_to_an_interface() -> None:
    assert interface("127.0.0.1") == "lo"
    assert interface("203.0.113.77") is None
