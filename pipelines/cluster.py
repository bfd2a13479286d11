"""Joining a Ray cluster, or starting a local one: the only module that calls `ray.init`."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20  # results are small JSON; pixels never pass through it


def _quiet() -> None:
    # Ray Train's watcher asks the dashboard every second, and a local cluster has none.
    watcher = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(watcher).setLevel(logging.ERROR)


@contextmanager
def connected(address: str = "") -> Iterator[dict[str, float]]:
    """A connection to Ray for the time of a block; gives the cluster's resources (CPU, GPU, ...).

    An address, or RAY_ADDRESS in the environment (as a submitted job has it), joins that cluster; else
    a local one with this machine's cores is started on loopback and ended with the block.
    """
    # Before the import: Ray reads them once.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # it prints every line twice
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # it takes the epochs of a fold for repetitions
    target = address or os.environ.get("RAY_ADDRESS", "")
    if not target:
        # Despite its name, what makes a local cluster on any system listen on loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is not on loan
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if target:
        options["address"] = target
    else:
        options |= {
            "address": "local",  # or it would join whatever cluster somebody has on this machine
            "include_dashboard": False,
            "object_store_memory": _LOCAL_OBJECT_STORE_BYTES,
            "runtime_env": {"worker_process_setup_hook": _quiet},
        }
    ray.init(**options)
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
