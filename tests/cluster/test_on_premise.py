"""The whole story on three hosts: up, a cross-validation, what goes wrong around it, down. The tests run in order.

All that goes wrong happens to one training, one thing after the other: each time it must go on, and at the end its
table is that of the undisturbed one.

Screenshots of what a person sees go to the folder that MSHNET_SCREENSHOTS names.
"""

from __future__ import annotations

import hashlib
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest

from mshnet.data.shapes import write_voc
from tests import object_store, postgresql
from tests.cluster import browsing
from tests.cluster import hosts as namespaces
from tests.cluster.hosts import HEAD, NAMES, REPOSITORY, WORKERS, Hosts, Listener
from tests.cluster.operator import Operator, Submission, wait_until
from tests.secrets_left import assert_no_secret, no_secret_in_command_lines

STORE, SOURCE = "s3://mshnet/store", "s3://mshnet/source"
FOLDS = (0, 1)
EPOCHS, EPISODES, GLOBAL_BATCH = 3, 20, 4
UPDATES = EPOCHS * EPISODES // GLOBAL_BATCH
FLAGS = shlex.split(
    f"--dataset pascal --source {SOURCE} --store {STORE} --workers 2 --cpus-per-worker 2 "
    f"--image-size-px 65 --min-object-px 100 --backbone resnet18 --backbone-weights random --epochs {EPOCHS} "
    f"--episodes-per-epoch {EPISODES} --global-batch {GLOBAL_BATCH} --learning-rate 0.02 "
    "--validation-episodes 4 --held-out-classes 2 --protocol balanced --evaluation-episodes 8 --threshold-episodes 4 "
    "--panels-each 1 --images-per-shard 60 --feature-cache-gib 1"
)
DISTURBED = (FOLDS[:1], "--checkpoint-every-steps", "1")
"""The fold and what else it is given: a checkpoint is 240 MB, and the undisturbed run does with one an epoch."""
UP_S, RUN_S, DISTURBED_S = 300.0, 900.0, 1200.0
CUT_S = 60.0

pytestmark = [pytest.mark.cluster, pytest.mark.alone, pytest.mark.timeout(1500)]


class Cluster:
    """What the tests share."""

    def __init__(self, hosts: Hosts, operator: Operator) -> None:
        self.hosts, self.operator = hosts, operator
        self.began = time.monotonic()
        self.submissions: list[Submission] = []
        self.result: dict[str, Any] = {}
        self.rows: dict[int, Any] = {}
        """Of the undisturbed run's fold table."""
        self.weights: dict[int, str] = {}
        """Hashes of its models."""
        self.disturbed: Submission | None = None
        """The training to which all that goes wrong happens; none while it is not known to be well."""

    def submit(self, name: str, folds: tuple[int, ...], *more: str) -> Submission:
        """The job, as it would be submitted."""
        entrypoint = ["python", "pipelines/cross_validate.py", *FLAGS, "--folds", *map(str, folds), *more]
        submission = Submission(
            self.operator, name, [*entrypoint, "--registered-model", f"mshnet-{name.split('.')[0]}"]
        )
        self.submissions.append(submission)
        return submission

    # --- the store, seen from the operator's machine ---

    @cached_property
    def store(self) -> Any:
        """Its file system, made once: that takes longer than what is asked of it."""
        import s3fs

        secrets = self.operator.secrets
        return s3fs.S3FileSystem(
            key=secrets["AWS_ACCESS_KEY_ID"],
            secret=secrets["AWS_SECRET_ACCESS_KEY"],
            endpoint_url=f"http://{self.hosts.address(HEAD)}:7480",
            config_kwargs={"request_checksum_calculation": "when_required", "retries": {"max_attempts": 2}},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def forget_trainings(self) -> None:
        """So that the next job has only the pictures and the episodes."""
        fs = self.store
        for folder in ("folds", "evaluations", "reports"):
            if fs.exists(f"{STORE}/{folder}"):
                fs.rm(f"{STORE}/{folder}", recursive=True)

    def update(self, fold: int) -> int:
        """How far a fold is, by its checkpoints' names."""
        names = self.store.glob(f"{STORE}/folds/pascal-fold{fold}-*/run/checkpoints/step-*")
        return max((int(Path(name).stem.removeprefix("step-")) for name in names), default=0)

    def model_hash(self, fold: int) -> str:
        """Of the chosen weights."""
        fs = self.store
        (name,) = fs.glob(f"{STORE}/folds/pascal-fold{fold}-*/model/model.safetensors")
        return hashlib.sha256(fs.cat_file(name)).hexdigest()

    @contextmanager
    def mishap(self) -> Iterator[Submission]:
        """A training of the first fold alone, in the middle of it, to which the block does something."""
        if not self.rows:
            pytest.skip("the undisturbed run failed: there is nothing to compare with")
        if self.submissions[-1].id == "undisturbed":
            self.operator.wait_for_nodes(timeout_s=UP_S)
            self.forget_trainings()
            self.disturbed = self.submit("disturbed.1", *DISTURBED)
        if self.disturbed is None:
            pytest.skip("the training did not get over what happened to it before")
        submission, self.disturbed = self.disturbed, None
        submission.wait_for(lambda: self.update(0) >= 1, "the first update", RUN_S)
        began = time.monotonic()
        yield submission
        print(f"{submission.id}: {time.monotonic() - began:.0f} s of {time.monotonic() - submission.started:.0f} s")

    def assert_in_mid_training(self) -> None:
        """Or what was done to it came too late to show anything."""
        assert 0 < self.update(0) < UPDATES, f"update {self.update(0)} of {UPDATES}"

    def goes_on(self, submission: Submission) -> None:
        """By an update at least; the next mishap may come."""
        reached = self.update(0)
        submission.wait_for(lambda: self.update(0) > reached, f"an update after number {reached}", RUN_S)
        self.disturbed = submission

    def assert_undisturbed_table(self, submission: Submission) -> None:
        """What the job ends with is what it would have been."""
        result = submission.result(DISTURBED_S)
        assert row(result, 0) == self.rows[0]
        assert self.model_hash(0) == self.weights[0]


def row(result: dict[str, Any], fold: int) -> dict[str, Any]:
    """A fold's numbers in the job's last line, without the names of its runs."""
    (found,) = [one for one in result["folds"] if one["fold"] == fold]
    return {key: value for key, value in found.items() if not key.startswith(("run_id", "model"))}


def absent() -> str:
    """What this machine lacks for all this; empty if nothing."""
    if not object_store.installed():
        return object_store.ABSENT
    return postgresql.absent() or namespaces.absent()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if missing := absent():
        pytest.skip(missing)
    folder = tmp_path_factory.mktemp("cluster")
    with namespaces.up_in(folder / "hosts") as hosts:
        operator = Operator(hosts, folder / "operator")
        cluster = Cluster(hosts, operator)
        try:
            with operator_at_work(operator):
                yield cluster
        finally:
            for submission in cluster.submissions:
                submission.give_up()


def operator_at_work(operator: Operator) -> Any:
    """What is typed up to the open dashboard, whose tunnel stays open for the block."""
    made = (REPOSITORY / ".venv" / ".installed").stat().st_mtime
    for name in ("requirements.lock", "pyproject.toml"):
        # The hosts would try to make it anew, and cannot.
        assert made >= (REPOSITORY / name).stat().st_mtime, f"the environment is older than {name}: make setup"
    operator.run("infra/secrets.sh", "--own-object-store")
    assert operator.edit() == 4
    # The file is the place for more of the nodes' environment. Here three hosts and the tests share few cores.
    with open(operator.home / ".mshnet" / "cluster.env", "a") as file:
        file.write("RAY_worker_niceness=0\nOMP_NUM_THREADS=1\n")
    operator.run("ray", "up", "-y", str(operator.file), timeout_s=UP_S)
    return operator.dashboard()


def put_source(cluster: Cluster, folder: Path) -> None:
    """The data set to where every node finds it, with any S3 client."""
    write_voc(folder, images=160, size_px=80, seed=1)
    cluster.store.put(f"{folder}/", SOURCE, recursive=True)


def test_a_few_commands_lead_from_nothing_to_three_nodes(cluster: Cluster) -> None:
    operator = cluster.operator
    operator.wait_for_nodes(timeout_s=UP_S)
    print(f"three nodes after {time.monotonic() - cluster.began:.0f} s: {operator.commands}")
    assert len(operator.commands) == 3
    services = cluster.hosts.ssh(HEAD, "SERVICES_DIR=~/.mshnet/services ~/mshnet/infra/services.sh status")
    assert "no answer" not in services.stdout
    assert "stopped" not in services.stdout


def test_the_job_ends_with_the_fold_table(cluster: Cluster, tmp_path: Path) -> None:
    put_source(cluster, tmp_path / "shapes")
    with no_secret_in_command_lines(cluster.operator.hidden):
        submission = cluster.submit("undisturbed", FOLDS)
        print(f"submitted after {time.monotonic() - cluster.began:.0f} s, {len(cluster.operator.commands)} commands")
        submission.wait_for(lambda: cluster.update(0) >= 1, "the first update", RUN_S)
        assert cluster.operator.training_workers() == sorted(WORKERS)
        for name in NAMES:
            assert [one for one in cluster.hosts.listening(name) if not documented(cluster.hosts, name, one)] == []
        result = submission.result(RUN_S)
    print(f"undisturbed: {time.monotonic() - submission.started:.0f} s")
    cluster.result = result
    cluster.rows = {fold: row(result, fold) for fold in FOLDS}
    cluster.weights = {fold: cluster.model_hash(fold) for fold in FOLDS}
    assert "MSHNet, trained" in submission.said
    logs = cluster.operator.run("ray", "job", "logs", submission.id, counts=False)
    assert "MSHNet, trained" in logs


def test_the_tracker_is_browsed_through_a_tunnel(cluster: Cluster, tmp_path: Path) -> None:
    if missing := browsing.absent():
        pytest.skip(missing)
    if not cluster.result:
        pytest.skip("the undisturbed run failed: there is nothing to see")
    from selenium.webdriver.common.by import By

    secrets = cluster.operator.secrets
    with (
        cluster.operator.tunnel(f"{cluster.hosts.address(HEAD)}:5000") as port,
        browsing.browser(tmp_path) as driver,
    ):
        user, password = secrets["MLFLOW_TRACKING_USERNAME"], secrets["MLFLOW_TRACKING_PASSWORD"]
        driver.get(f"http://{user}:{password}@localhost:{port}/")
        driver.get(f"http://localhost:{port}/#/experiments/1/runs")
        browsing.wait_for_text(driver, "mshnet", "pascal 1-shot")
        browsing.picture(driver, "mlflow")
        run_id = cluster.result["folds"][0]["run_id"]
        driver.get(f"http://localhost:{port}/#/experiments/1/runs/{run_id}/model-metrics")
        browsing.wait_for_text(driver, "fold 0", "baseline_foreground")
        driver.find_element(By.CSS_SELECTOR, "input[placeholder*='metric charts']").send_keys("train/")
        browsing.wait_for_text(driver, "fold 0", "learning_rate", "outer_loss")
        browsing.picture(driver, "mlflow-fold")


def test_the_dashboard_is_browsed_through_a_tunnel(cluster: Cluster, tmp_path: Path) -> None:
    if missing := browsing.absent():
        pytest.skip(missing)
    from selenium.webdriver.common.by import By

    with browsing.browser(tmp_path) as driver:
        driver.get(cluster.operator.environment["RAY_API_SERVER_ADDRESS"] + "/#/cluster")
        browsing.wait_for_text(driver, "Authentication Token Required")
        driver.find_element(By.CSS_SELECTOR, "input[type=password]").send_keys(cluster.operator.token)
        driver.find_element(By.XPATH, "//button[contains(translate(., 'submit', 'SUBMIT'), 'SUBMIT')]").click()
        browsing.wait_for_text(driver, *(cluster.hosts.address(name) for name in NAMES))
        browsing.picture(driver, "dashboard")


def test_without_the_token_nothing_is_to_be_had(cluster: Cluster, tmp_path: Path) -> None:
    operator = cluster.operator
    for path in ("/api/jobs/", "/api/v0/nodes", "/nodes?view=summary", "/api/version"):
        assert operator.refusal(path, "") == 401
        assert operator.refusal(path, "0" * 64) == 403
    refused = operator.tried(
        "ray", "job", "submit", "--working-dir", "pipelines", "--", "true", HOME=str(tmp_path), RAY_AUTH_MODE="disabled"
    )
    assert refused.returncode != 0
    assert "Unauthorized: Missing authentication token" in refused.stdout
    joined = operator.tried(
        *("python", "-c", f"import ray; ray.init('{cluster.hosts.address(HEAD)}:6379')"),
        HOME=str(tmp_path), RAY_AUTH_MODE="disabled", timeout_s=120,
    )  # fmt: skip
    assert joined.returncode != 0
    print(joined.stdout[-1500:])
    with operator.tunnel(f"{cluster.hosts.address(HEAD)}:5000") as port, pytest.raises(HTTPError, match="401"):
        urlopen(f"http://localhost:{port}/api/2.0/mlflow/experiments/search?max_results=1", timeout=30)


# --- ports ---


class Row(NamedTuple):
    """Of the table in docs/cluster.md."""

    ports: range
    where: str
    bound_to: frozenset[str]


def table() -> list[Row]:
    """Of the documented ports."""
    rows = []
    for line in (REPOSITORY / "docs" / "cluster.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and len(cells) == 4 and cells[0][0].isdigit():
            first, _, last = cells[0].partition("–")
            rows.append(Row(range(int(first), int(last or first) + 1), cells[1], frozenset(cells[2].split(", "))))
    assert len(rows) > 10
    return rows


def bound_to(hosts: Hosts, name: str, address: str) -> str:
    """The documentation's word for it."""
    address = address.removeprefix("::ffff:")
    if address.startswith("127.") or address == "::1":
        return "loopback"
    return "node" if address == hosts.address(name) else "all" if address in ("*", "0.0.0.0", "::") else address


def documented(hosts: Hosts, name: str, listener: Listener) -> list[Row]:
    """The rows that a listener is of."""
    kind = "head" if name == HEAD else "workers"
    where, bound = ("every node", kind), bound_to(hosts, name, listener.address)
    return [row for row in table() if listener.port in row.ports and row.where in where and bound in row.bound_to]


def test_the_open_ports_are_the_documented_ones(cluster: Cluster) -> None:
    for name in NAMES:
        found = cluster.hosts.listening(name)
        print(name, *(f"{one.port} {one.address} {one.process}" for one in found), sep="\n  ")
        assert [one for one in found if not documented(cluster.hosts, name, one)] == []
        expected = {
            (row.ports[0], bound)
            for row in table()
            for bound in row.bound_to
            if len(row.ports) == 1 and row.where in ("every node", "head" if name == HEAD else "workers")
        }
        assert expected <= {(one.port, bound_to(cluster.hosts, name, one.address)) for one in found}


# --- what goes wrong ---


def test_the_object_store_is_restarted(cluster: Cluster) -> None:
    script = "OBJECT_STORE_DIR=~/.mshnet/services/object_store ~/mshnet/infra/object_store.sh"
    with cluster.mishap() as submission:
        cluster.hosts.ssh(HEAD, f"{script} stop", timeout_s=300)
        assert 7480 not in {one.port for one in cluster.hosts.listening(HEAD)}
        cluster.hosts.ssh(HEAD, f"{script} start", timeout_s=300)
        cluster.assert_in_mid_training()
        cluster.goes_on(submission)


def test_a_worker_host_loses_its_power(cluster: Cluster) -> None:
    with cluster.mishap() as submission:
        cluster.hosts.kill(WORKERS[0])
        cluster.assert_in_mid_training()
        submission.wait_for(lambda: len(cluster.operator.nodes()) == 2, "the lost node", RUN_S)
        cluster.hosts.start(WORKERS[0])
        back = time.monotonic()
        submission.wait_for(lambda: len(cluster.operator.nodes()) == 3, "the node's return", RUN_S)
        print(f"rejoined by itself {time.monotonic() - back:.0f} s after the power came back")
        cluster.goes_on(submission)
        assert "going on from update" in submission.said


def test_the_driver_is_killed_and_the_job_submitted_again(cluster: Cluster) -> None:
    with cluster.mishap() as submission:
        drivers = cluster.hosts.running(HEAD, "pipelines/cross_validate.py")
        assert len(drivers) == 1
        drivers[0].send_signal(signal.SIGKILL)
        assert submission.end(RUN_S) != 0
        print(submission.said[-1500:])
        wait_until(lambda: not cluster.operator.training_workers(), "the end of the job's workers", RUN_S)
        cluster.assert_in_mid_training()
        again = cluster.submit("disturbed.2", *DISTURBED)
        cluster.goes_on(again)
        assert "going on from update" in again.said


def test_the_network_between_head_and_worker_is_cut(cluster: Cluster) -> None:
    with cluster.mishap() as submission:
        cluster.hosts.cut(HEAD, WORKERS[0])
        cluster.assert_in_mid_training()
        until = time.monotonic() + CUT_S
        lost = False
        while time.monotonic() < until:
            lost = lost or len(cluster.operator.nodes()) < 3
            time.sleep(1)
        cluster.hosts.heal(HEAD, WORKERS[0])
        print(f"the head {'lost the node meanwhile' if lost else 'did not give the node up'}")
        cluster.disturbed = submission


def test_after_all_that_the_table_is_the_undisturbed_one(cluster: Cluster) -> None:
    if cluster.disturbed is None:
        pytest.skip("the training did not get over what happened to it before")
    cluster.assert_undisturbed_table(cluster.disturbed)
    cluster.operator.wait_for_nodes(timeout_s=RUN_S)


def test_no_secret_is_left_anywhere(cluster: Cluster, tmp_path: Path) -> None:
    operator, hosts = cluster.operator, cluster.hosts
    assert len(operator.hidden) == 3
    cluster.store.get("s3://mshnet/", f"{tmp_path}/s3/", recursive=True)
    (tmp_path / "said").write_text("".join(submission.said for submission in cluster.submissions))
    assert assert_no_secret(operator.hidden, [tmp_path, *(hosts.disk(name) / "tmp" for name in NAMES)]) > 100


def test_nothing_is_left_running(cluster: Cluster) -> None:
    operator = cluster.operator
    operator.run("ray", "exec", str(operator.file), "~/mshnet/infra/node.sh stop", timeout_s=UP_S)
    operator.run("ray", "down", "-y", str(operator.file), timeout_s=UP_S)
    for name in NAMES:
        with suppress(AssertionError):
            wait_until(lambda name=name: left(cluster.hosts, name) == [], f"an end on {name}", 60)
        assert left(cluster.hosts, name) == []
        assert {one.port for one in cluster.hosts.listening(name)} == {22}


def left(hosts: Hosts, name: str) -> list[str]:
    """What runs on a host beside its first process, sshd, and the far end of the tunnel of `ray dashboard`."""
    own = ("host.sh", "sleep 86400")
    found = []
    for process in hosts.processes(name):
        try:
            command = " ".join(process.cmdline())
            if process.status() != "zombie" and process.name() != "sshd" and not any(word in command for word in own):
                found.append(process.name())
        except psutil.NoSuchProcess:
            continue
    return [] if found in ([], ["sleep"]) else found
