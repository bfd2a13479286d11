"""infra/monitoring: Prometheus's own checks, and a real Prometheus that watches a real Ray while a fold trains."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.metrics import GAUGES
from tests.object_store import free_port
from tests.training_process import UPDATES_EACH

REPOSITORY = Path(__file__).resolve().parents[2]
MONITORING = REPOSITORY / "infra" / "monitoring"
DISCOVERY = "/tmp/ray/prom_metrics_service_discovery.json"
STALLED_S = 15
EPOCHS = 7
JOB = """
import sys
from dataclasses import replace
from pathlib import Path
from pipelines import train
from pipelines.cluster import connected
from tests.training_process import small_fold
config, drawn = small_fold(Path(sys.argv[1]), epochs=int(sys.argv[2]))
config = replace(config, compute=replace(config.compute, log_every_steps=2, checkpoint_every_steps=0))
with connected():
    train.fit(config, drawn, sys.argv[1] + "/fold", "")
"""

pytestmark = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="no Prometheus here: sudo apt-get install -y --no-install-recommends prometheus",
)


def panels() -> dict[str, list[str]]:
    """The dashboard's expressions, by panel."""
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    shown = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in shown}


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
)
def test_prometheus_takes_the_files_and_the_alerts_fire_when_they_should(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tested_and_explained() -> None:
    alerts = [line.split()[2] for line in (MONITORING / "alerts.yml").read_text().splitlines() if "- alert:" in line]
    assert len(alerts) >= 5
    tested, explained = (MONITORING / "alerts_test.yml").read_text(), (REPOSITORY / "docs/monitoring.md").read_text()
    for alert in alerts:
        assert f"alertname: {alert}" in tested
        assert f"`{alert}`" in explained


@dataclass(frozen=True)
class Watched:
    """A cluster of one node, and the Prometheus that scrapes it."""

    url: str
    ray: psutil.Process
    environment: dict[str, str]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression gives now; an error where it is none."""
        with urllib.request.urlopen(
            f"{self.url}/api/v1/query?query={urllib.parse.quote(expression)}", timeout=10
        ) as answer:
            content = json.load(answer)
        found: list[dict[str, Any]] = content["data"]["result"]
        return found

    def wait(self, what: str, holds: Callable[[], object], seconds: float = 400) -> None:
        """Until it holds."""
        until = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < until, f"waited {seconds:g} s in vain: {what}"
            time.sleep(0.3)


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    """Ray's token is on. Reports and scrapes come more often than in earnest, and a fold counts as stalled soon."""
    with contextlib.ExitStack() as ending:
        # Sockets lie in it, whose paths must be short.
        root = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="mshnet-", ignore_cleanup_errors=True)))
        (root / "token").write_text("0123456789abcdef0123456789abcdef")
        gcs = free_port()
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))} | {
            "RAY_ADDRESS": f"127.0.0.1:{gcs}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(root / "token"),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_raylet_start_wait_time_s": "300",  # on a busy machine
            "RAY_metrics_report_interval_ms": "3000",  # it forgets gauges after twice as long
            "OMP_NUM_THREADS": "1",
        }
        ray = [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *(f"--port={gcs}", f"--dashboard-port={free_port()}", f"--dashboard-agent-listen-port={free_port()}"),
            *("--dashboard-host=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0", "--num-cpus=2"),
            *(f"--temp-dir={root}/ray", "--object-store-memory=100000000", f"--ray-client-server-port={free_port()}"),
        ]
        log = ending.enter_context((root / "log").open("w"))
        head = subprocess.Popen(ray, env=environment, stdout=log, stderr=log)
        ending.callback(end, head)

        port = free_port()
        config = (MONITORING / "prometheus.yml").read_text()
        assert config.count(DISCOVERY) == 1
        config = config.replace(DISCOVERY, str(root / "ray" / Path(DISCOVERY).name)).replace("10s", "1s")
        alerts = (MONITORING / "alerts.yml").read_text()
        assert alerts.count("> 900") == 1
        (root / "prometheus.yml").write_text(config)
        (root / "alerts.yml").write_text(alerts.replace("> 900", f"> {STALLED_S}"))
        services = [
            {"targets": [f"127.0.0.1:{port}"], "labels": {"service": "up", "__metrics_path__": "/-/healthy"}},
            {"targets": [f"127.0.0.1:{port}"], "labels": {"service": "wrong", "__metrics_path__": "/nowhere"}},
            {"targets": ["127.0.0.1:9"], "labels": {"service": "down", "__metrics_path__": "/"}},
        ]
        (root / "services.json").write_text(json.dumps(services))
        prometheus = [
            *("prometheus", f"--config.file={root}/prometheus.yml", f"--storage.tsdb.path={root}/data"),
            *(f"--web.listen-address=127.0.0.1:{port}", "--enable-feature=extra-scrape-metrics"),
        ]
        ending.callback(end, subprocess.Popen(prometheus, stdout=log, stderr=log))
        found = Watched(f"http://127.0.0.1:{port}", psutil.Process(head.pid), environment)

        def scraped() -> object:
            assert head.poll() is None, (root / "log").read_text()[-3000:]
            with contextlib.suppress(OSError):
                return found.query("ray_node_cpu_count and on () (sum(ray_resources) > 0)")
            return None

        found.wait("the node's metrics in Prometheus", scraped)
        yield found


def end(process: subprocess.Popen[Any]) -> None:
    """With all that it started; at once, where Ray would drain itself for 30 s."""
    if process.poll() is None:
        every = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in every:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(every[1:], timeout=20)
    process.wait(20)


@pytest.fixture(scope="module")
def fold(watched: Watched, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """A job that trains a small fold on the cluster."""
    root = tmp_path_factory.mktemp("fold")
    line = [sys.executable, "-c", JOB, str(root), str(EPOCHS)]
    process = subprocess.Popen(
        line, cwd=REPOSITORY, env=watched.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield process
    end(process)


def worker(watched: Watched) -> psutil.Process:
    """The process that trains."""
    found = []
    for child in watched.ray.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one of Ray's own, ended meanwhile
            if child.name().startswith("ray::RayTrain"):
                found.append(child)
    assert len(found) == 1
    return found[0]


@pytest.mark.timeout(1500)
def test_a_fold_is_seen_to_train_to_stand_still_and_to_end(watched: Watched, fold: subprocess.Popen[str]) -> None:
    def stalled() -> list[dict[str, Any]]:
        return watched.query('ALERTS{alertname="FoldStalled", alertstate="firing"}')

    def seen(name: str) -> bool:
        assert fold.poll() is None, fold.communicate()[0][-3000:]
        return bool(watched.query(f"ray_{name}"))

    for name in GAUGES:
        watched.wait(name, lambda name=name: seen(name))
    assert float(watched.query("max(ray_mshnet_fold_updates_planned)")[0]["value"][1]) == UPDATES_EACH * EPOCHS
    assert not stalled()
    for title, expressions in panels().items():
        for expression in expressions:
            found = watched.query(expression)  # fails where it is no expression
            assert found or title.startswith("GPU"), title
    services = {found["metric"]["service"]: found["value"][1] for found in watched.query(panels()["Services"][0])}
    assert services == {"up": "1", "wrong": "0", "down": "0"}

    trains = worker(watched)
    listening = [c.laddr.ip for c in trains.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    trains.suspend()
    try:
        watched.wait("the alert", stalled)
        assert stalled()[0]["metric"]["fold"] == "0"
        assert not watched.query("ray_mshnet_fold_updates")  # what stands still is forgotten by Ray
    finally:
        trains.resume()
    watched.wait("the alert's end", lambda: not stalled())

    assert fold.wait(400) == 0, fold.communicate()[0][-3000:]
    watched.wait("the gauges' end", lambda: not watched.query("ray_mshnet_fold_started_time_seconds"))
    assert watched.query("last_over_time(ray_mshnet_fold_updates[10m])")
    # Long enough for the alert, were the end taken for a stall.
    last = float(watched.query("max(last_over_time(ray_mshnet_fold_last_update_time_seconds[10m]))")[0]["value"][1])
    watched.wait("time", lambda: time.time() - last > STALLED_S + 3)
    assert not stalled()
