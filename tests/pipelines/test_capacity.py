"""Room for trainings, on nodes that are there and on those that may come."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mshnet.errors import InputError
from pipelines.capacity import Capacity, ask_nodes, of_bootstrap, room, wait_or_refuse
from pipelines.config import ComputeConfig

HEAD = {"CPU": 0.0, "memory": 1e9}
GPU_NODE = {"CPU": 8.0, "GPU": 1.0}
BOOTSTRAP = """
max_workers: 5
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}, max_workers: 0}
  gpu_spot: {resources: {CPU: 8, GPU: 1}, min_workers: 0, max_workers: 4}
  gpu_on_demand: {resources: {CPU: 8, GPU: 1}, max_workers: 4}
  cpu: {resources: {CPU: 16}, max_workers: 2}
"""


def test_room_is_in_whole_trainings_on_whole_nodes() -> None:
    compute = ComputeConfig(workers=3, cpus_per_worker=2)
    assert room(compute, Capacity(now=({"CPU": 17.0},))) == 2
    assert room(compute, Capacity(now=({"CPU": 3.0},) * 7)) == 2  # one worker on each
    elastic = replace(compute, min_workers=1, use_gpu=True)
    assert room(elastic, Capacity(now=({"CPU": 17.0, "GPU": 5.0},))) == 5  # as many as can begin
    assert room(elastic, Capacity(now=({"CPU": 17.0}, {"CPU": 2.0, "GPU": 4.0}))) == 1


def test_nodes_that_an_autoscaler_may_start_count(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    empty = of_bootstrap((HEAD,), yaml.safe_load(BOOTSTRAP))
    compute = ComputeConfig(workers=2, cpus_per_worker=4, use_gpu=True)
    assert room(compute, empty) == 2  # five nodes with a GPU at most, of the eight that the kinds allow
    assert "no room yet for 2 worker(s) of 4 CPU and a GPU each (0 CPU and 0 GPU on 1 node(s))" in caplog.text
    assert room(ComputeConfig(cpus_per_worker=4), empty) == 2 * 4 + 3 * 2
    assert room(compute, replace(empty, now=(HEAD, GPU_NODE, GPU_NODE))) == 2
    with pytest.raises(InputError, match=r"expected room for 6 worker.* found 0 CPU .* with all that the autoscaler"):
        room(replace(compute, workers=6), empty)
    with pytest.raises(InputError, match=r"expected room for 1 worker.* of 9 CPU and a GPU"):
        room(replace(compute, workers=1, cpus_per_worker=9), empty)


def test_a_job_begins_on_a_head_alone_where_nodes_may_come(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    wait_or_refuse(of_bootstrap((HEAD,), yaml.safe_load(BOOTSTRAP)))
    assert "no node with CPUs yet (0 CPU and 0 GPU on 1 node(s)): waiting for those to come" in caplog.text
    caplog.clear()
    wait_or_refuse(Capacity(now=(HEAD, {"CPU": 1.0})))
    assert not caplog.text
    with pytest.raises(InputError, match=r"expected a node with CPUs .* found 0 CPU .* nothing that starts more"):
        wait_or_refuse(Capacity(now=(HEAD,)))


def test_machines_of_which_nobody_says_what_they_have_are_waited_for() -> None:
    """As Ray writes the file of a cluster of one's own machines."""
    local = {"max_workers": 2, "available_node_types": {"local.cluster.node": {"resources": {}, "max_workers": 2}}}
    capacity = of_bootstrap((HEAD,), {**local, "head_node_type": "local.cluster.node"})
    wait_or_refuse(capacity)
    assert room(ComputeConfig(workers=2), capacity) == 1


def test_rays_own_preparation_of_our_file_is_understood(tmp_path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config

    path = Path(__file__).resolve().parents[2] / "infra" / "on_premise.yaml"
    config = yaml.safe_load(path.read_text())
    config["provider"] |= {"head_ip": "192.0.2.1", "worker_ips": ["192.0.2.2", "192.0.2.3"]}
    capacity = of_bootstrap((HEAD,), prepare_config(config))
    assert capacity.grows
    assert room(ComputeConfig(workers=2), capacity) >= 1


@pytest.mark.cluster
def test_nodes_are_asked_again_only_once_they_have_answered() -> None:
    import ray

    from pipelines.cluster import connected

    with connected() as resources:
        asked = ask_nodes([])
        ray.get(asked, timeout=120)
        assert len(asked) == 1
        holder = ray.remote(num_cpus=resources["CPU"])(Busy).remote()
        ray.get(holder.there.remote(), timeout=120)
        again = ask_nodes(asked)
        assert again != asked
        assert ask_nodes(again) == again
        ray.kill(holder)
        ray.get(again, timeout=120)


class Busy:
    def there(self) -> None:
        """Answers once it has its place."""
