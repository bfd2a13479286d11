"""One at a time: of several jobs on one cluster that want the same thing done, one does it and the others wait."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMESPACE = "mshnet"
LOOK_S = 2.0
"""Between two tries to be the next."""
ANSWER_S = 10.0


class _Holder:
    """An actor whose name is what only one can have. Ray ends it with the process that made it."""

    def __init__(self, who: str) -> None:
        self._who = who

    def who(self) -> str:
        return self._who


@contextmanager
def turn(name: str, what: str) -> Iterator[bool]:
    """Hold a name for the time of a block; waits while another process holds it, and says so. Gives whether it waited.

    For processes that are connected to Ray; it counts among all jobs of a cluster.
    """
    import ray

    waited = False
    while (holder := _taken(ray, name)) is None:
        if not waited:
            waited = True
            print(f"{what}: {_holding(ray, name)} is at it already; waiting for its end", file=sys.stderr, flush=True)
        time.sleep(LOOK_S)
    try:
        yield waited
    finally:
        ray.kill(holder)


def _taken(ray: Any, name: str) -> Any:
    """The actor, if nobody else has the name."""
    context = ray.get_runtime_context()
    who = f"Ray's job {context.get_job_id()} (on {ray.util.get_node_ip_address()}, since {time.strftime('%H:%M:%S')})"
    # Nodes are lost; the name is not to be free before its holder ends.
    options = {"name": name, "namespace": NAMESPACE, "num_cpus": 0, "max_restarts": -1}
    try:
        return ray.remote(**options)(_Holder).remote(who)
    except ValueError:  # it is taken
        return None


def _holding(ray: Any, name: str) -> str:
    try:
        return str(ray.get(ray.get_actor(name, NAMESPACE).who.remote(), timeout=ANSWER_S))
    except (ValueError, ray.exceptions.RayError):  # just ended, or about to start
        return "another job"
