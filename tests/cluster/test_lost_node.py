"""An elastic fold on a two-node Ray cluster of this machine, of which one node is lost, and another one comes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipelines import train
from tests import tolerances
from tests.e2e.conftest import REPOSITORY
from tests.e2e.test_resume import Chance, EndedBeforeTheKillError, newest, newest_update, redone
from tests.training_process import EPOCHS, UPDATES, UPDATES_EACH, losses, small_fold

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
DEADLINE_S = 400.0
LONG_EPOCHS = 500
"""Of a training that is ended by the test."""


class TwoNodes:
    """Raylets of one CPU each on loopback, and a driver that is connected to the first."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._node: dict[str, Any] = {
            "num_cpus": 1,
            "node_ip_address": "127.0.0.1",
            "object_store_memory": 80 * 2**20,
        }
        self.cluster = Cluster()

    def start(self) -> None:
        """What it started before something went wrong, `cluster.shutdown` ends too."""
        self.cluster.add_node(**self._node, include_dashboard=False)
        self.add()

    def lose(self, drivers: str) -> None:
        """SIGKILL to everything of the second node, which is not the driver's own."""
        assert self.second.node_id != drivers
        self.cluster.remove_node(self.second, allow_graceful=False)

    def add(self) -> None:
        self.second = self.cluster.add_node(**self._node)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoNodes]:
    """With files of their own: another cluster of this machine, and what it says of itself, is none of theirs."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # loopback only
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    # Not pytest's folder: a socket's path has room for 107 characters.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        nodes = TwoNodes()
        try:
            nodes.start()
            yield nodes
        finally:
            nodes.cluster.shutdown()


class Driver:
    """A training of two workers that may be one, and what it says."""

    def __init__(self, address: str, folder: Path, epochs: int) -> None:
        command = [
            sys.executable,
            "-m",
            "tests.training_process",
            str(folder.parent),
            str(folder),
            "2",
            "1",
            str(epochs),
        ]
        self.process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"RAY_ADDRESS": address, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def wait_for(self, condition: Any, what: str) -> None:
        until = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.said[-3000:]
            assert time.monotonic() < until, f"{what} not within {DEADLINE_S} s:\n{self.said[-3000:]}"
            time.sleep(0.05)

    def wait_for_words(self, words: str) -> None:
        self.wait_for(lambda: words in self.said, words)

    @property
    def node_id(self) -> str:
        """Of the node that it is connected to."""
        found = re.search(r"driver's node: (\w+)", self.said)
        assert found, self.said[-3000:]
        return found[1]

    def end(self) -> None:
        assert self.process.wait(DEADLINE_S) == 0, self.said[-3000:]


@contextmanager
def driver(nodes: TwoNodes, folder: Path, epochs: int = EPOCHS) -> Iterator[Driver]:
    driver = Driver(nodes.cluster.address, folder, epochs)
    try:
        yield driver
    finally:
        driver.process.kill()
        driver.process.wait()
        driver._reader.join()


def lose_a_node(nodes: TwoNodes, driver: Driver, folder: Path, chance: Chance, updates: int = UPDATES) -> None:
    update = chance.update()
    driver.wait_for(lambda: newest_update(folder) >= update, f"update {update}")
    time.sleep(chance.moment_s())
    if newest_update(folder) == updates:
        raise EndedBeforeTheKillError
    nodes.lose(driver.node_id)


def assert_same_losses(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for epoch, other in zip(found, expected, strict=True):
        assert epoch[0] == other[0]
        assert epoch[1:4] == pytest.approx(other[1:4], rel=tolerances.SAME_TRAINING.bound)


def test_a_fold_goes_on_with_one_worker_when_a_node_is_lost(nodes: TwoNodes, undisturbed: Path) -> None:
    chance = Chance()

    def lost(folder: Path) -> tuple[Path, str]:
        with driver(nodes, folder) as training:
            lose_a_node(nodes, training, folder, chance)
            training.end()
            return folder, training.said

    folder, said = redone(lost, undisturbed.with_name("node-lost"))
    assert "with 1 worker(s)" in said
    found = newest(folder).progress
    assert found.step == UPDATES
    assert_same_losses(losses(found), losses(newest(undisturbed).progress))


def test_a_fold_grows_when_a_node_comes(nodes: TwoNodes, undisturbed: Path) -> None:
    chance, folder = Chance(), undisturbed.with_name("node-came")
    config, drawn = small_fold(folder.parent, epochs=LONG_EPOCHS)
    with driver(nodes, folder, LONG_EPOCHS) as training:
        lose_a_node(nodes, training, folder, chance, LONG_EPOCHS * UPDATES_EACH)
        training.wait_for_words("with 1 worker(s)")
        nodes.add()
        training.wait_for_words("with 2 worker(s)")
        enough = max(newest_update(folder), UPDATES)
        training.wait_for(lambda: newest_update(folder) > enough, "another update")
    found = train.progress(config, drawn, str(folder))
    # Up to there another number of epochs changes nothing.
    assert_same_losses(losses(found)[:EPOCHS], losses(newest(undisturbed).progress))
