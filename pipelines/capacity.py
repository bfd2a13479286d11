"""How many trainings a cluster has room for: on the nodes that it has, and on those that an autoscaler may bring."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mshnet.errors import InputError
from pipelines.config import ComputeConfig

LOG = logging.getLogger(__name__)
BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""What `ray up` leaves on the head for the autoscaler. Ray itself knows it only on Kubernetes."""
UNLIMITED = 10_000
Resources = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Nodes by what they have (CPU, GPU, ...)."""

    now: tuple[Resources, ...]
    later: tuple[tuple[Resources, int], ...] = ()
    """What an autoscaler may start, with how many of each at most; those that are there are among them."""
    most: int = UNLIMITED
    """Of those, all kinds together."""

    @property
    def grows(self) -> bool:
        """Whether more nodes may come."""
        return any(count for _, count in self.later) and self.most > 0

    @property
    def unsaid(self) -> bool:
        """Whether nodes may come of which nobody says what they have, such as one's own machines."""
        return self.grows and any(count and not resources for resources, count in self.later)

    def workers(self, compute: ComputeConfig) -> int:
        """How many have room now."""
        return sum(_fitting(node, compute) for node in self.now)

    def workers_later(self, compute: ComputeConfig) -> int:
        """How many have room once the autoscaler has started all that it may."""
        left, workers = self.most, 0
        for fitting, count in sorted(((_fitting(kind, compute), count) for kind, count in self.later), reverse=True):
            workers += fitting * min(count, left)
            left -= min(count, left)
        return workers

    def __str__(self) -> str:
        return f"{_sum(self.now, 'CPU'):g} CPU and {_sum(self.now, 'GPU'):g} GPU on {len(self.now)} node(s)"


def room(compute: ComputeConfig, capacity: Capacity) -> int:
    """How many trainings have room at once, nodes to come included. Raises InputError where none ever has."""
    workers = compute.min_workers or compute.workers
    now, later = capacity.workers(compute) // workers, capacity.workers_later(compute) // workers
    wanted = f"{workers} worker(s) of {compute.cpus_per_worker} CPU{' and a GPU' if compute.use_gpu else ''} each"
    if not now and not later and not capacity.unsaid:
        more = ", with all that the autoscaler may start" if capacity.grows else ""
        raise InputError(
            f"expected room for {wanted}, found {capacity}{more}; lower --workers or --cpus-per-worker, "
            "or get larger nodes or more of them"
        )
    if not now:
        LOG.info("no room yet for %s (%s): training waits for nodes to come", wanted, capacity)
    return max(now, later, 1)


def wait_or_refuse(capacity: Capacity) -> None:
    """Before the first task: say where it has to wait for a node. Raises InputError where none will come."""
    if _sum(capacity.now, "CPU") >= 1:
        return
    if not capacity.grows:
        raise InputError(
            f"expected a node with CPUs for the job's tasks, found {capacity}, and nothing that starts more; start "
            "workers (`ray up`, or `ray start --address=HEAD:6379` on them)"
        )
    LOG.info("no node with CPUs yet (%s): waiting for those to come", capacity)


def found() -> Capacity:
    """Of the cluster that this process is connected to."""
    import ray
    from ray._private.state import state

    alive = [node for node in ray.nodes() if node["Alive"]]
    now = tuple(dict(node["Resources"]) for node in alive)
    reported = state.get_cluster_config()
    if reported is not None and reported.node_group_configs:
        groups = reported.node_group_configs
        later = tuple((dict(g.resources), UNLIMITED if g.max_count < 0 else g.max_count) for g in groups)
        return Capacity(now=now, later=later)
    head = [node["NodeManagerAddress"] for node in alive if "node:__internal_head__" in node["Resources"]]
    file = Path(BOOTSTRAP).expanduser()
    # Another cluster's file may lie here, where this machine is not the head.
    if head != [ray.util.get_node_ip_address()] or not file.exists():
        return Capacity(now=now)
    import yaml

    return of_bootstrap(now, yaml.safe_load(file.read_text(encoding="utf-8")))


def trainings_waiting() -> int:
    """How many of this job's have asked for workers that there is no room for."""
    import ray

    # What Ray Train reserves for a fold's workers; the id of a group ends with that of its job.
    job = ray.get_runtime_context().get_job_id()
    groups = ray.util.placement_group_table().items()
    return sum(group["state"] == "PENDING" and name.endswith(job) for name, group in groups)


def ask_nodes(before: Sequence[Any]) -> list[Any]:
    """Have each node with CPUs run an empty task, unless those of `before` still wait for their turn; gives the tasks.

    Where a connection was cut while workers were being placed, Ray's control service (2.60) goes on taking a node for
    full that is not. It learns better when something changes there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    waiting = ray.wait(list(before), num_returns=len(before), timeout=0)[1] if before else []
    if waiting:
        return list(waiting)
    task = ray.remote(num_cpus=1, max_retries=0)(_nothing)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
    strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    return [task.options(name="say what is free", scheduling_strategy=strategy).remote() for strategy in strategies]


def _nothing() -> None:
    pass


def of_bootstrap(now: tuple[Resources, ...], config: Mapping[str, Any]) -> Capacity:
    """From what `ray up` put on the head."""
    kinds: Mapping[str, Any] = config.get("available_node_types") or {}
    most = int(config.get("max_workers") or 0)
    head = config.get("head_node_type")
    later = [
        (dict(kind.get("resources") or {}), int(kind.get("max_workers", 0 if name == head else most)))
        for name, kind in kinds.items()
    ]
    return Capacity(now=now, later=tuple(later), most=most)


def _fitting(node: Resources, compute: ComputeConfig) -> int:
    cpus = int(node.get("CPU", 0) // compute.cpus_per_worker)
    return min(cpus, int(node.get("GPU", 0))) if compute.use_gpu else cpus


def _sum(nodes: tuple[Resources, ...], name: str) -> float:
    return sum(node.get(name, 0) for node in nodes)
