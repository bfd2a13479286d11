"""Where a fold's workers meet: on the addresses that Ray knows their nodes by and no others.

By itself torch lets rank 0's key-value store listen on every address of its machine, of a laptop on a strange network,
too; and gloo takes the address that the machine's own name has in /etc/hosts, which on Debian no other machine reaches.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import os
import socket
import struct
from datetime import timedelta
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

_SIOCGIFADDR = 0x8915  # Linux: an interface's address


class OneAddressTorchConfig(TorchConfig):  # type: ignore[misc]  # Ray is untyped here
    """Ray Train's, with a store that listens on one address."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """Of whose making Ray Train asks here."""
        return _Backend


class _Backend(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_stay_on_the_nodes_address)
        super().on_start(worker_group, backend_config)


def _stay_on_the_nodes_address() -> None:
    import ray

    listen_on_one_address()
    if name := interface(ray.util.get_node_ip_address()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface(address: str) -> str | None:
    """The network interface of this machine that has an IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                request = struct.pack("256s", name.encode()[:15])
                if socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24]) == address:
                    return name
    return None


def listen_on_one_address() -> None:
    """From now on, in this process, for the store that `init_process_group` makes."""
    # `torch.distributed.rendezvous` is a function as well.
    module: Any = importlib.import_module("torch.distributed.rendezvous")
    if not hasattr(module, "_create_c10d_store"):
        raise RuntimeError("expected torch to make its store by _create_c10d_store, found none; use the lock's torch")
    module._create_c10d_store = _store


def _store(host: str, port: int, rank: int, world_size: int, timeout: timedelta, use_libuv: bool = True) -> Any:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    options: dict[str, Any] = {"timeout": timeout, "multi_tenant": True, "use_libuv": use_libuv}
    if rank:
        return TCPStore(host, port, world_size, False, **options)
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.create_server(address[:2], family=family, backlog=1024)
    # Whose end is the store's own.
    return TCPStore(host, port, world_size, True, master_listen_fd=listening.detach(), **options)
