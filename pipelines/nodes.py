"""Looking at every node of a cluster before anything expensive runs there: packages, code, store, source, tracker."""

from __future__ import annotations

import logging
import posixpath
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mshnet.data.filesystem import is_local
from mshnet.errors import InputError
from pipelines import environment, scan, storage, tracking_server
from pipelines.config import CrossValidationConfig
from pipelines.tracking_uri import SQLITE, sqlite_file

LOG = logging.getLogger(__name__)
LOOK_S = 180.0
"""How long a node may take: to fetch the upload, start a process, and import."""


@dataclass(frozen=True, kw_only=True)
class Demands:
    """What the driver wants of a node."""

    config: CrossValidationConfig
    lock: str
    """Of the driver; empty: any packages and code will do."""
    code: str
    trains: bool
    """Whether the tracker is going to be told anything."""
    marks: tuple[tuple[str, str, str], ...]
    """Places that all nodes must share: the URI of a file that the driver has just put there, what the place is in
    words, and what to do for a node that has another one."""


def check(config: CrossValidationConfig, trains: bool) -> None:
    """One small task on each node that is alive. Raises InputError that names all nodes' problems."""
    import ray

    locked = "" if config.compute.any_versions else environment.lock()
    alive = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}
    with _marked(config, trains) as marks:
        demands = Demands(config=config, lock=locked, code=environment.identity(locked), trains=trains, marks=marks)
        problems = _asked(demands, alive)
    if problems:
        concerned = {address for addresses in problems.values() for address in addresses}
        lines = "\n".join(f"  {', '.join(sorted(addresses))}: {text}" for text, addresses in problems.items())
        raise InputError(f"{len(concerned)} of {len(alive)} node(s) cannot take part:\n{lines}")
    LOG.info("%d node(s) looked at: %s", len(alive), ", ".join(sorted(alive.values())))


def look(demands: Demands) -> list[str]:
    """The task's body: what is wrong on this node, in words."""
    config = demands.config
    if demands.lock:
        if environment.identity(demands.lock) != demands.code:
            return [f"expected the code and the Python of the job's driver, found others; {environment.MEND}"]
        if problem := environment.packages_problem(demands.lock):
            return [problem]  # whatever else is found may come of that
    problems = []
    for uri, place, advice in demands.marks:
        if not storage.exists(uri):
            problems.append(f"expected {place} that all nodes reach, found another one or none here; {advice}")
    if not problems:
        problems += _caught(storage.check_writable, config.store)
        if demands.trains:
            problems += _caught(tracking_server.check, config.tracking_uri)
    return problems + _caught(_check_sources, config)


def _check_sources(config: CrossValidationConfig) -> None:
    storage.check_readable(config.source)
    scan.opened(config).check()
    weights = "" if config.backbone_weights in ("imagenet", "random") else config.backbone_weights
    models = [("a model of --trained", storage.join(folder, "config.json")) for folder in config.trained]
    for what, place in (("split lists", config.split_lists), ("the backbone's weights", weights), *models):
        if place and not storage.exists(place):
            raise InputError(f"expected {what} at {place!r}, found nothing there; put them where all nodes reach them")


def _caught(look_at: Callable[..., None], *arguments: Any) -> list[str]:
    try:
        look_at(*arguments)
    except (InputError, OSError) as error:
        return [str(error)]
    return []


@contextmanager
def _marked(config: CrossValidationConfig, trains: bool) -> Iterator[tuple[tuple[str, str, str], ...]]:
    """Files for the time of a block, in the places that every node must have in common with this process."""
    name = f".nodes-{uuid.uuid4().hex}"
    advice = "give one such as s3://BUCKET/store, or a folder that is mounted on all of them"
    if not is_local(config.store):
        advice = "is AWS_ENDPOINT_URL the same there?"
    marks = [(storage.join(config.store, name), f"the store {config.store!r} to be a place", advice)]
    file = sqlite_file(config.tracking_uri) if trains else None
    if file is not None:
        advice = "start an MLflow server and set MLFLOW_TRACKING_URI to its address, such as http://HEAD:5000"
        place = f"the tracker {SQLITE}{file} to be a file"
        marks.append((posixpath.join(str(file.parent), name), place, advice))
    try:
        for uri, _, _ in marks:
            storage.write_bytes(uri, b"")
        yield tuple(marks)
    finally:
        for uri, _, _ in marks:
            with suppress(OSError):
                storage.remove(uri)


def _asked(demands: Demands, alive: dict[str, str]) -> dict[str, list[str]]:
    """What each node finds: addresses by problem. A node that is lost meanwhile is none."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=1)(look)
    nodes = {
        task.options(
            name="look at the node", scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(demands): node
        for node in alive
    }
    ready, late = ray.wait(list(nodes), num_returns=len(nodes), timeout=LOOK_S)
    problems: dict[str, list[str]] = {}
    answers = {ref: [f"expected an answer in {LOOK_S:g} s, found none; look at its log in ~/ray"] for ref in late}
    for ref in ready:
        try:
            answers[ref] = ray.get(ref)
        except ray.exceptions.RayError as error:
            answers[ref] = [f"expected a Python that runs this code, found {_last_line(error)}; {environment.MEND}"]
    still = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for ref, found in answers.items():
        for problem in found if nodes[ref] in still else []:
            problems.setdefault(problem, []).append(alive[nodes[ref]])
    return problems


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
