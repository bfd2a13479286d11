"""Joining a Ray cluster, or starting a local one: the only module that calls `ray.init`."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from mshnet.errors import InputError
from pipelines.progress import WorkersLines

_LOCAL_OBJECT_STORE_BYTES = 256 * 2**20  # results are small JSON; pixels never pass through it
KNOCK_S = 10
_TOKEN = "Set RAY_AUTH_MODE=token, and have the cluster's token in ~/.ray/auth_token (or RAY_AUTH_TOKEN_PATH)"
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line twice
    "RAY_DEDUP_LOGS": "0",  # it takes the epochs of a fold for repetitions
}
"""In the environment of all of a job's processes, where nothing else is set."""
NOTHING: Mapping[str, str] = MappingProxyType({})


def _quiet() -> None:
    # Ray Train's watcher asks the dashboard every second, and a local cluster has none.
    watcher = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(watcher).setLevel(logging.ERROR)


def named(address: str = "") -> str:
    """Address of the cluster that `connected` joins; empty: it starts a local one."""
    found = address or os.environ.get("RAY_ADDRESS", "")
    return "" if found == "local" else found


@contextmanager
def connected(address: str = "", environment: Mapping[str, str] = NOTHING) -> Iterator[dict[str, float]]:
    """A connection to Ray for the time of a block; gives the cluster's resources (CPU, GPU, ...).

    An address, or RAY_ADDRESS in the environment (as a submitted job has it), joins that cluster; else
    a local one with this machine's cores is started on loopback and ended with the block. `environment`
    is added to that of the job's processes on a cluster.

    Raises InputError for a cluster that is not there, or does not let this process in.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)  # before the import: Ray reads them once
    settings = {name: os.environ[name] for name in SETTINGS}
    if not sys.stderr.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    target = named(address)
    if not target:
        # Despite its name, what makes a local cluster on any system listen on loopback only.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # this machine is not on loan
        # Ray Train's minute is soon over on a machine that is busy, and no other node will come.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    import ray

    if ray.is_initialized():
        yield ray.cluster_resources()
        return
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if target:
        options |= {"address": target, "runtime_env": {"env_vars": _not_submitted({**settings, **environment})}}
    else:
        options |= {
            "address": "local",  # or it would join whatever cluster somebody has on this machine
            "include_dashboard": False,
            "object_store_memory": _LOCAL_OBJECT_STORE_BYTES,
            "runtime_env": {"worker_process_setup_hook": _quiet},
        }
    with _own_sigterm():
        _join(target, options)
    if not sys.stderr.isatty():
        from ray.experimental import tqdm_ray

        tqdm_ray.instance().process_state_update = WorkersLines()
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def _join(target: str, options: Mapping[str, Any]) -> None:
    import ray

    try:
        _knock(target)
        ray.init(**options)
    except ray.exceptions.AuthenticationError as error:
        raise InputError(
            f"expected to be let into the Ray cluster at {target!r}, found: {_first_sentence(error)}. {_TOKEN}"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:
        if not target:
            raise
        advice = "Correct --ray-address or RAY_ADDRESS, or leave both out for a local one"
        if type(error) is ConnectionError:  # Ray's own, of a place that answers
            advice = f"Is it Ray's own port (6379)? Then the token is missing here, or another one. {_TOKEN}"
        raise InputError(f"expected a Ray cluster at {target!r}, found: {_first_sentence(error)}. {advice}") from None


def _knock(target: str) -> None:
    """Ray itself tries for minutes, and writes pages about it."""
    host, colon, port = target.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(getattr(error, "message", error)).split())
    return text.partition(". ")[0].rstrip(".")


def _not_submitted(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what `ray job submit` was given already: Ray refuses a variable that is named twice."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    return {name: value for name, value in environment.items() if name not in (submitted.get("env_vars") or {})}


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """SIGTERM does after the block what it did before: `ray.init` puts a handler of its own in place."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if own not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own)
