"""The services of the production path, really started, used, killed, saved, lost and brought back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import object_store, postgresql
from tests.object_store import free_port

SCRIPT = Path(__file__).resolve().parents[2] / "infra" / "services.sh"
HOST = "127.0.0.9"  # one of this machine's own, but not the default
USER, PASSWORD, NEW_PASSWORD = "mshnet", "a password to begin with", "another password later"
KEYS = ("the-given-key", "the-given-secret-of-the-store")

pytestmark = [
    pytest.mark.skipif(not object_store.installed(), reason=object_store.ABSENT),
    pytest.mark.skipif(bool(postgresql.absent()), reason=postgresql.absent()),
]


@dataclass(frozen=True)
class Services:
    """One set of services: its folder, ports and file of secrets."""

    folder: Path
    variables: dict[str, str]
    into: tuple[str, ...] = ()  # a command before each command: to be in systemd's namespace

    @property
    def secrets(self) -> Path:
        return Path(self.variables["MSHNET_SECRETS"])

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.variables['SERVICES_TRACKER_PORT']}"

    def give_secrets(self, password: str) -> None:
        self.secrets.write_text(
            f"MLFLOW_TRACKING_USERNAME={USER}\nMLFLOW_TRACKING_PASSWORD={password}\n"
            f"AWS_ACCESS_KEY_ID={KEYS[0]}\nAWS_SECRET_ACCESS_KEY={KEYS[1]}\n"
        )

    def run(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """One command of the script, whatever its exit code."""
        others = ("SERVICES", "OBJECT_STORE", "AWS_", "MLFLOW_")
        clean = {key: value for key, value in os.environ.items() if not key.startswith(others)}
        return subprocess.run(
            [*self.into, str(SCRIPT), *arguments],
            env=clean | self.variables | variables,
            capture_output=True,
            text=True,
            timeout=500,
        )

    def must(self, *arguments: str, **variables: str) -> str:
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, f"services.sh {' '.join(arguments)}:\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def pid(self, name: str) -> int:
        return int((self.folder / "run" / f"{name}.pid").read_text())

    def processes(self) -> list[psutil.Process]:
        """All of them: their work is in this folder, or their settings are."""
        places = (str(self.folder), str(self.database()))
        found = []
        for process in psutil.process_iter():
            try:
                if process.cwd().startswith(places) or any(place in " ".join(process.cmdline()) for place in places):
                    found.append(process)
            except psutil.Error:
                continue
        return [process for process in found if process.pid != os.getpid() and "pytest" not in process.name()]

    def database(self) -> Path:
        (line,) = [line for line in (self.folder / "settings").read_text().splitlines() if line.startswith("DATABASE=")]
        return Path(line.split("=", 1)[1].strip('"'))

    def remove(self) -> None:
        """Everything, as if the machine were lost."""
        database = self.database()
        self.must("stop")
        shutil.rmtree(database, ignore_errors=True)
        shutil.rmtree(self.folder)

    def ask(self, path: str, user: str = "", password: str = "", body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of one request to MLflow."""
        if user:
            headers["Authorization"] = "Basic " + b64encode(f"{user}:{password}".encode()).decode()
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(
            self.address + path, data, {"Content-Type": "application/json"} | headers, method="POST" if data else "GET"
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


@contextmanager
def services_in(root: Path, which: str = "", into: tuple[str, ...] = (), **more: str) -> Iterator[Services]:
    """A set that is not started yet; at the end it is stopped and removed."""
    variables = {
        "SERVICES_DIR": str(root / "services"),
        "SERVICES_HOST": HOST,
        "SERVICES_TRACKER_PORT": str(free_port()),
        "SERVICES_MONITORING_PORT": str(free_port()),
        "OBJECT_STORE_PORT": str(free_port()),
        "OBJECT_STORE_GIB": "4",
        "MSHNET_SECRETS": str(root / "cluster.env"),
    }
    services = Services(root / "services", variables | ({"SERVICES": which} if which else {}) | more, into)
    services.give_secrets(PASSWORD)
    try:
        yield services
    finally:
        if (services.folder / "settings").exists():
            services.remove()


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """All of them, running. A test that stops or kills them starts them again before its end."""
    with services_in(tmp_path_factory.mktemp("services")) as running:
        running.must("start")
        yield running


@pytest.fixture
def log_in(services: Services, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """MLflow's client, as the cluster's user has it."""

    def client(password: str) -> Any:
        from mlflow import MlflowClient

        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", services.address)
        return MlflowClient(services.address)

    return client


def log_run(client: Any, experiment: str, folder: Path) -> str:
    """A run with everything that a job logs, and a registered model of it."""
    run = client.create_run(client.create_experiment(experiment)).info.run_id
    client.log_param(run, "shots", 5)
    for step in range(3):
        client.log_metric(run, "miou", 0.1 * step, step=step)
    (folder / "fold.json").write_text('{"fold": 0}')
    client.log_artifact(run, str(folder / "fold.json"))
    client.create_registered_model(experiment)
    version = client.create_model_version(experiment, f"runs:/{run}/model", run).version
    client.set_registered_model_alias(experiment, "champion", version)
    client.set_terminated(run)
    return run


def what_is_there(client: Any, run: str, experiment: str, folder: Path) -> dict[str, Any]:
    """The run as the client finds it."""
    folder.mkdir()
    found = client.get_run(run)
    return {
        "status": found.info.status,
        "params": found.data.params,
        "miou": [(metric.step, metric.value, metric.timestamp) for metric in client.get_metric_history(run, "miou")],
        "artifact": Path(client.download_artifacts(run, "fold.json", str(folder))).read_text(),
        "model": client.get_model_version_by_alias(experiment, "champion").run_id,
    }


def test_all_of_it_serves(services: Services) -> None:
    assert services.run("status").returncode == 0
    checked = services.run("check")
    assert checked.returncode == 0
    assert checked.stdout.count(" serves\n") >= 3
    before = services.pid("tracker"), services.pid("database")
    services.must("start")  # changes nothing
    assert before == (services.pid("tracker"), services.pid("database"))


def test_it_listens_where_it_is_said(services: Services) -> None:
    port = {key: int(value) for key, value in services.variables.items() if key.endswith("PORT")}
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for process in services.processes()
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    outside = {(ip, number) for ip, number in listening if ip != "127.0.0.1"}
    assert outside == {(HOST, port["SERVICES_TRACKER_PORT"]), (HOST, port["OBJECT_STORE_PORT"])}
    postgres = psutil.Process(services.pid("database"))
    assert postgres.name() == "postgres"
    assert not postgres.net_connections(kind="inet")


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/version",
        "/metrics",
        "/signup",
        "/graphql",
        "/api/2.0/mlflow/experiments/search?max_results=1",
        "/ajax-api/2.0/mlflow/experiments/search?max_results=1",
        "/api/2.0/mlflow-artifacts/artifacts?path=.",
        "/get-artifact?path=fold.json&run_uuid=0",
        "/ajax-api/3.0/mlflow/assistant/config",
        "/ajax-api/3.0/jobs/0",
        "/gateway/x",
    ],
)
def test_a_stranger_is_refused(services: Services, path: str) -> None:
    assert services.ask(path)[0] == 401
    assert services.ask(path, USER, "not the password")[0] == 401


def test_what_is_open_to_all_says_nothing(services: Services) -> None:
    assert services.ask("/health") == (200, b"OK")
    status, body = services.ask("/api/3.0/mlflow/server-info")
    assert status == 200
    assert b"/services" not in body


def test_other_names_and_other_sites_are_refused(services: Services) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert services.ask(search, USER, PASSWORD, Host="evil.example:5000")[0] == 403
    assert services.ask(search, USER, PASSWORD, Host="localhost:12345")[0] == 200  # a tunnel's end
    create = "/api/2.0/mlflow/experiments/create"
    assert services.ask(create, USER, PASSWORD, {"name": "x"}, Origin="http://evil.example")[0] == 403
    for origin in ("http://localhost:12345", services.address):
        assert services.ask(create, USER, PASSWORD, {"name": origin}, Origin=origin)[0] == 200


def test_the_user_is_no_administrator(services: Services) -> None:
    another = {"username": "another", "password": "a password for another"}
    assert services.ask("/api/2.0/mlflow/users/create", USER, PASSWORD, another)[0] == 403
    status, body = services.ask("/api/2.0/mlflow/users/current", USER, PASSWORD)
    assert status == 200
    assert json.loads(body)["user"]["is_admin"] is False


def test_secrets_are_the_owners_alone(services: Services) -> None:
    assert stat.S_IMODE(services.folder.stat().st_mode) == 0o700
    tracker = services.folder / "tracker"
    made = [(tracker / name).read_text() for name in ("admin_password", "session_key")]
    assert all(len(secret) == 64 for secret in made)
    secrets = [*made, PASSWORD, KEYS[1]]
    for process in services.processes():
        with suppress(psutil.NoSuchProcess):  # a connection's, closed meanwhile
            assert not any(secret in " ".join(process.cmdline()) for secret in secrets)
    printed = "".join(services.must(command) for command in ("start", "status", "check"))
    logs = "".join(path.read_text(errors="replace") for path in (services.folder / "log").iterdir())
    assert not any(secret in text for secret in secrets for text in (printed, logs))
    for path in services.folder.rglob("*"):
        if "object_store" not in path.parts:  # tests/infra/test_object_store.py looks there
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE(services.database().stat().st_mode) & 0o077 == 0


def test_the_store_has_the_given_keys(services: Services) -> None:
    credentials = (services.folder / "object_store" / "aws" / "credentials").read_text()
    assert all(key in credentials for key in KEYS)


def test_killed_it_starts_again_with_what_was_there_and_takes_a_new_password(
    services: Services, log_in: Callable[[str], Any], tmp_path: Path
) -> None:
    run = log_run(log_in(PASSWORD), "killed", tmp_path)
    before = what_is_there(log_in(PASSWORD), run, "killed", tmp_path / "before")
    for process in services.processes():
        with suppress(psutil.NoSuchProcess):  # a child of one that was killed before
            process.send_signal(signal.SIGKILL)
    assert services.run("status").returncode == 3
    services.give_secrets(NEW_PASSWORD)
    services.must("start")
    assert what_is_there(log_in(NEW_PASSWORD), run, "killed", tmp_path / "after") == before
    assert services.ask("/api/2.0/mlflow/users/current", USER, PASSWORD)[0] == 401
    services.give_secrets(PASSWORD)
    services.must("start")
    assert services.ask("/api/2.0/mlflow/users/current", USER, PASSWORD)[0] == 200


def test_lost_and_restored(services: Services, log_in: Callable[[str], Any], tmp_path: Path) -> None:
    run = log_run(log_in(PASSWORD), "restored", tmp_path)
    before = what_is_there(log_in(PASSWORD), run, "restored", tmp_path / "before")
    backups = tmp_path / "backups"
    for _ in range(2):
        services.must("backup", str(backups), SERVICES_BACKUPS_KEPT="1")
        (saved,) = backups.iterdir()  # the one before is gone
        saved_at = saved.name[-7:]
        wait_for(lambda: time.strftime("%H%M%SZ", time.gmtime()), saved_at.__ne__)
    manifest = json.loads((saved / "manifest.json").read_text())
    assert stat.S_IMODE(saved.stat().st_mode) == 0o700
    assert any(path.endswith("/fold.json") for path in manifest["files"])

    refused = services.run("restore", str(backups))
    assert refused.returncode == 1
    assert "there is something already:" in refused.stderr
    assert "--replace" in refused.stderr

    services.remove()
    damaged = tmp_path / "damaged"
    shutil.copytree(saved, damaged)
    (damaged / "mlflow.dump").write_bytes((damaged / "mlflow.dump").read_bytes()[:-1] + b"x")
    refused = services.run("restore", str(damaged))
    assert refused.returncode == 1
    assert "is damaged, nothing was changed: mlflow.dump (not what was saved)" in refused.stderr

    services.must("restore", str(backups))
    assert services.run("check").returncode == 0
    assert what_is_there(log_in(PASSWORD), run, "restored", tmp_path / "after") == before
    log_in(PASSWORD).set_tag(run, "mine", "still")  # who made it may still change it


def wait_for(look: Callable[[], Any], enough: Callable[[Any], bool], seconds: float = 240) -> Any:
    """What was seen when it was enough."""
    end = time.monotonic() + seconds
    while not enough(seen := look()):
        assert time.monotonic() < end, f"not in {seconds} s; last seen: {seen}"
        time.sleep(0.2)
    return seen


def test_an_ordinary_user_has_a_database_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.getuid() != 0:
        pytest.skip("all other tests here run as an ordinary user")
    root = Path("/tmp") / f"mshnet-{os.getpid()}-{time.monotonic_ns()}"  # pytest's own folder is closed to others
    root.mkdir()
    try:
        as_nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "--")
        with services_in(root, "database", as_nobody) as services:
            shutil.chown(root, "nobody", "nogroup")
            services.must("start")
            assert services.database() == services.folder / "database"
            postgres = psutil.Process(services.pid("database"))
            assert postgres.username() == "nobody"
            assert not postgres.net_connections(kind="inet")
            assert "database" in services.must("check")
            # Root is not whom PostgreSQL expects at the socket.
            stranger = subprocess.run(
                [
                    "psql",
                    "-h",
                    str(services.folder / "database" / "socket"),
                    "-U",
                    "mshnet",
                    "-c",
                    "select 1",
                    "mlflow",
                ],
                capture_output=True,
                text=True,
            )
            assert "Peer authentication failed" in stranger.stderr
    finally:
        shutil.rmtree(root)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """A real systemd of our own, for one user; what to say before a command so that it is asked."""
    cgroup = Path("/sys/fs/cgroup/systemd")
    if os.getuid() != 0 or not os.access(cgroup, os.W_OK) or not shutil.which("systemctl"):
        pytest.skip("no systemd can be started here (needs root and a writable cgroup hierarchy)")
    (tmp_path / "run").mkdir(mode=0o700)
    names = [parent / f"mshnet-{os.getpid()}" for parent in (cgroup, cgroup.parent / "unified") if parent.is_dir()]
    own = "".join(f"mkdir {name} && echo $$ >{name}/cgroup.procs\n" for name in names)
    script = f"mount --make-rprivate /\nmount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/system\n{own}"
    environment = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    manager = subprocess.Popen(
        ["unshare", "-m", "bash", "-ec", f"{script}exec /lib/systemd/systemd --user"],
        env=os.environ | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    into = ("nsenter", "-t", str(manager.pid), "-m", "env", *(f"{key}={value}" for key, value in environment.items()))
    try:
        running = [*into, "systemctl", "--user", "is-system-running"]
        wait_for(
            lambda: subprocess.run(running, capture_output=True, text=True).stdout.strip(),
            lambda state: state in ("running", "degraded") or manager.poll() is not None,
            60,
        )
        if manager.poll() is not None:
            pytest.skip(f"systemd does not start here (exit code {manager.returncode})")
        yield into
    finally:
        manager.terminate()
        manager.wait(60)
        for name in names:
            for folder in sorted(name.rglob("*/"), reverse=True):
                folder.rmdir()
            name.rmdir()


def test_systemd_keeps_them_running(systemd: tuple[str, ...], tmp_path: Path) -> None:
    def state(name: str) -> tuple[int, int]:
        shown = subprocess.run(
            [*systemd, "systemctl", "--user", "show", "--property=MainPID,NRestarts", f"mshnet@{name}"],
            capture_output=True,
            text=True,
        ).stdout
        found = dict(line.split("=") for line in shown.splitlines())
        return int(found["MainPID"]), int(found["NRestarts"])

    (tmp_path / "artifacts").mkdir()
    with services_in(
        tmp_path,
        "database tracker",
        systemd,
        SERVICES_UNITS="user",
        SERVICES_ARTIFACTS=str(tmp_path / "artifacts"),
    ) as services:
        services.must("units")
        assert "kept running by systemd" in services.must("status")
        for name in ("database", "tracker"):
            pid, _ = state(name)
            assert pid == services.pid(name)
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda: state(name), lambda seen: seen[1] >= 1 and seen[0] not in (0, pid))  # noqa: B023
        wait_for(lambda: services.run("check").returncode, lambda code: code == 0)
        # What runs but does not answer is found by the health timer's command.
        (server,) = psutil.Process(services.pid("tracker")).children()
        server.suspend()
        assert services.run("check").returncode == 3
        services.must("heal")  # or the timer's is at it already
        wait_for(lambda: services.run("check").returncode, lambda code: code == 0)
        services.must("units", "remove")
        assert services.run("status").returncode == 3
        assert not list((tmp_path / "config" / "systemd" / "user").glob("mshnet*"))


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_the_units_are_as_systemd_wants_them(tmp_path: Path) -> None:
    for unit in (SCRIPT.parent / "systemd").iterdir():
        text = unit.read_text()
        for name, value in {
            "@SERVICES@ ": "mshnet@database.service ",
            "@WANTED_BY@": "default.target",
            "@SCRIPT@": str(SCRIPT),
            "@DIR@": str(tmp_path),
            "@SECRETS@": str(tmp_path / "cluster.env"),
        }.items():
            text = text.replace(name, value)
        (tmp_path / unit.name.replace("@.", "@database.")).write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.glob("mshnet*"))], capture_output=True, text=True
    )
    assert [line for line in found.stderr.splitlines() if "mshnet" in line] == []
    assert found.returncode == 0


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SERVICES": "database mlflow"}, "SERVICES must be some of 'object_store database tracker monitoring'"),
        ({"SERVICES_HOST": "0.0.0.0"}, "SERVICES_HOST must be one IPv4 address of this machine"),
        ({"SERVICES_TRACKER_PORT": "http"}, "SERVICES_TRACKER_PORT must be a port number, got 'http'"),
        ({"SERVICES_ARTIFACTS": "somewhere"}, "SERVICES_ARTIFACTS must be s3://BUCKET/PREFIX or a folder's whole path"),
        ({"SERVICES": "database tracker"}, "say where MLflow's artifacts lie: SERVICES_ARTIFACTS=s3://..."),
    ],
)
def test_wrong_settings_are_named_and_start_nothing(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    with services_in(tmp_path) as services:
        done = services.run("start", **variables)
        assert done.returncode == 1
        assert message in done.stderr
        assert not (services.folder / "settings").exists()
        assert services.run("strat").returncode == 1
