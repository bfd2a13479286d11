"""`ray job submit` and `ray job stop` on a real cluster of one node: the script by itself, its log, two at once."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from ray.job_submission import JobSubmissionClient

from mshnet.data.shapes import write_voc
from pipelines.checkpoints import CHECKPOINTS
from pipelines.sources import git_tree
from tests.object_store import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
REPOSITORY = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
DEADLINE_S = 600.0
JOB = (
    "--image-size-px 33 --min-object-px 50 --backbone resnet18 --backbone-weights random --folds 0 --epochs 3 "
    "--episodes-per-epoch 64 --checkpoint-every-steps 4 --selection last --protocol balanced "
    "--evaluation-episodes 8 --threshold-episodes 4 --panels-each 1 --feature-cache-gib 1"
)


@dataclass(frozen=True)
class Head:
    """A cluster of one node, as from outside."""

    folder: Path
    environment: dict[str, str]

    @property
    def jobs(self) -> JobSubmissionClient:
        return JobSubmissionClient(self.environment["RAY_API_SERVER_ADDRESS"])

    def ray(self, *arguments: str) -> str:
        """A command that must succeed; what it said."""
        done = subprocess.run(
            [RAY, *arguments], cwd=REPOSITORY, env=self.environment, capture_output=True, text=True, timeout=DEADLINE_S
        )
        assert done.returncode == 0, f"ray {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, name: str) -> None:
        """The script as the executable itself; returns at once."""
        places = ["--source", str(self.folder / "shapes"), "--store", str(self.folder / "store")]
        command = ["pipelines/cross_validate.py", *shlex.split(JOB), *places]
        self.ray("job", "submit", "--no-wait", "--submission-id", name, "--working-dir", ".", "--", *command)

    def ends(self, name: str) -> str:
        """Wait for a job's end; its status."""
        wait_until(lambda: self.jobs.get_job_status(name).is_terminal(), f"{name} ended")
        return str(self.jobs.get_job_status(name))

    def result(self, name: str) -> dict[str, Any]:
        """The JSON line of a job that must end well."""
        assert self.ends(name) == "SUCCEEDED", self.jobs.get_job_logs(name)[-4000:]
        lines = self.jobs.get_job_logs(name).splitlines()
        found: dict[str, Any] = json.loads([line for line in lines if line.startswith("{")][-1])
        return found

    def runs(self) -> list[Any]:
        """All of MLflow's."""
        client = MlflowClient(self.environment["MLFLOW_TRACKING_URI"])
        experiment = client.get_experiment_by_name("mshnet")
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))


def wait_until(condition: Callable[[], Any], what: str) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < until, f"not within {DEADLINE_S} s: {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Four cores on paper, so that two jobs have room; on loopback, ended with the processes that it started only."""
    folder = tmp_path_factory.mktemp("head")
    write_voc(folder / "shapes", images=120, size_px=48, seed=3)
    dashboard, port = free_port(), free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))} | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
        "RAY_worker_niceness": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    # A socket's path has room for 107 characters, which pytest's own folders take up.
    with tempfile.TemporaryDirectory(prefix="ray") as short:
        command = [RAY, "start", "--head", "--block", f"--port={port}", "--node-ip-address=127.0.0.1", "--num-cpus=4"]
        command += [f"--dashboard-port={dashboard}", f"--temp-dir={short}", "--object-store-memory=100000000"]
        command += [f"--ray-client-server-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"]
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        with (folder / "ray.log").open("w") as log:
            process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        started, said = Head(folder, environment), (folder / "ray.log").read_text
        try:
            wait_until(lambda: "Ray runtime started" in said() or process.poll() is not None, "Ray is there")
            assert process.poll() is None, said()[-3000:]
            yield started
        finally:
            process.terminate()
            process.wait(60)


def test_a_stopped_job_is_gone_on_with_by_two_that_share_its_folds(head: Head) -> None:
    head.submit("first")
    checkpoints = f"store/folds/*/{CHECKPOINTS}/step-*"
    wait_until(lambda: list(head.folder.glob(checkpoints)) or _ended(head, "first"), "a checkpoint")
    assert not _ended(head, "first"), head.jobs.get_job_logs("first")[-4000:]
    head.ray("job", "stop", "first")
    assert head.ends("first") == "STOPPED"
    said = head.jobs.get_job_logs("first")
    assert "cross_validate.py: stopped; the same command goes on" in said
    assert not [line for line in said.splitlines() if line.startswith("Traceback")], said[-4000:]
    assert "INFO 1 node(s) looked at: 127.0.0.1" in said
    assert "\r" not in said
    assert "\x1b" not in said
    assert {run.info.status for run in head.runs()} == {"KILLED"}
    assert list(head.folder.glob(checkpoints))

    head.submit("second")
    head.submit("third")
    results = [head.result(name) for name in ("second", "third")]
    assert results[0] == results[1]
    logs = [head.jobs.get_job_logs(name) for name in ("second", "third")]
    assert sum("going on from update" in log for log in logs) == 1
    waited = [log for log in logs if "train fold 0: Ray's job" in log]
    assert len(waited) == 1
    assert "is at it already; waiting for its end" in waited[0]
    assert "WARNING train fold 0: another job did it; taking its result" in waited[0]
    # The upload has no .git: what it was made from is found by the trees.
    runs = head.runs()
    assert sorted((run.data.tags.get("fold"), run.info.status) for run in runs if "fold" in run.data.tags) == [
        ("0", "FINISHED")
    ]
    assert len(runs) == 2
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["git_tree.mshnet"] == git_tree(REPOSITORY / "mshnet")
        assert run.data.tags["git_commit"].startswith("trees mshnet ")


def _ended(head: Head, name: str) -> bool:
    return bool(head.jobs.get_job_status(name).is_terminal())
