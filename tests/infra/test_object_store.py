"""The S3 server for one machine: real starts, stops and kills, and who can read what."""

from __future__ import annotations

import configparser
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import botocore.config
import botocore.exceptions
import psutil
import pytest

from tests.object_store import ABSENT, DAEMONS, ObjectStore, free_port, installed

pytestmark = pytest.mark.skipif(not installed(), reason=ABSENT)

REPOSITORY = Path(__file__).resolve().parents[2]
BODY = b"what was put must be what is got" * 1000


def keys(store: ObjectStore) -> tuple[str, str]:
    """Access key and secret key, out of the store's credentials file."""
    credentials = configparser.ConfigParser()
    credentials.read(store.folder / "aws" / "credentials")
    section = credentials["mshnet"]
    return section["aws_access_key_id"], section["aws_secret_access_key"]


def client(store: ObjectStore, secret: str | None = None) -> Any:
    """An S3 client with the store's keys, or with another secret."""
    access, right_secret = keys(store)
    return boto3.Session().client(
        "s3",
        endpoint_url=store.endpoint,
        region_name="us-east-1",
        aws_access_key_id=access,
        aws_secret_access_key=secret or right_secret,
        config=botocore.config.Config(max_pool_connections=16, retries={"mode": "standard", "max_attempts": 5}),
    )


def pids(store: ObjectStore) -> list[int]:
    """The process of each daemon that runs."""
    return [process.pid for daemon in DAEMONS if (process := store.process(daemon))]


@pytest.fixture
def running(object_store: ObjectStore) -> Iterator[ObjectStore]:
    """The session's server, which runs again afterwards whatever the test did to it."""
    yield object_store
    object_store.start()


def test_what_was_stored_survives_stop_and_start(running: ObjectStore) -> None:
    client(running).put_object(Bucket=running.bucket, Key="stop", Body=BODY)
    assert running.run("status").returncode == 0
    running.stop()
    assert pids(running) == []
    status = running.run("status")
    assert status.returncode == 3
    assert status.stdout.count("stopped") == 3
    running.stop()  # a second time changes nothing
    running.start()
    started = pids(running)
    assert len(started) == 3
    running.start()  # nor does this
    assert pids(running) == started
    assert client(running).get_object(Bucket=running.bucket, Key="stop")["Body"].read() == BODY


def test_restart_is_a_stop_and_a_start(running: ObjectStore) -> None:
    before = pids(running)
    assert running.run("restart").returncode == 0
    assert not set(before) & set(pids(running))
    assert len(pids(running)) == 3


@pytest.mark.parametrize("killed", [*([name] for name in DAEMONS), DAEMONS], ids=[*DAEMONS, "all"])
def test_what_was_stored_survives_sigkill(running: ObjectStore, killed: list[str]) -> None:
    client(running).put_object(Bucket=running.bucket, Key="kill", Body=BODY)
    before = {name: process.pid for name in DAEMONS if (process := running.process(name))}
    running.kill(*killed)
    assert running.run("status").returncode == 3
    running.start()
    after = {name: process.pid for name in DAEMONS if (process := running.process(name))}
    assert {name for name in DAEMONS if before[name] != after[name]} == set(killed)
    assert client(running).get_object(Bucket=running.bucket, Key="kill")["Body"].read() == BODY


def test_a_stale_pid_file_kills_nobody(running: ObjectStore) -> None:
    running.kill("client.rgw")
    with psutil.Popen(["sleep", "600"]) as bystander:
        (running.folder / "run" / "client.rgw.pid").write_text(f"{bystander.pid}\n")
        assert "client.rgw  stopped" in running.run("status").stdout
        running.stop()
        assert bystander.is_running()
        assert bystander.status() != psutil.STATUS_ZOMBIE
        bystander.send_signal(signal.SIGTERM)


def test_only_the_owner_can_read_it(object_store: ObjectStore) -> None:
    assert stat.S_IMODE(object_store.folder.stat().st_mode) == 0o700
    for secret in ("aws/credentials", "aws/config", "keyring", "osd/block", "ceph.conf"):
        assert stat.S_IMODE((object_store.folder / secret).stat().st_mode) == 0o600, secret


def test_the_secret_is_in_one_file_only(object_store: ObjectStore) -> None:
    _, secret = keys(object_store)
    assert len(secret) == 40
    printed = "".join(done.stdout + done.stderr for done in map(object_store.run, ("env", "start", "status")))
    assert object_store.endpoint in printed
    assert secret not in printed
    for daemon in DAEMONS:
        process = object_store.process(daemon)
        assert process is not None
        assert secret not in " ".join([*process.cmdline(), *process.environ().values()])
    texts = [path for path in object_store.folder.rglob("*") if path.is_file() and "store.db" not in path.parts]
    holders = [path for path in texts if path.name != "block" and secret.encode() in path.read_bytes()]
    assert holders == [object_store.folder / "aws" / "credentials"]


def test_the_environment_leads_every_client_to_it(object_store: ObjectStore, s3_folder: str) -> None:
    import s3fs

    assert object_store.environment["AWS_ENDPOINT_URL"] == object_store.endpoint
    boto3.Session().client("s3").put_object(Bucket=object_store.bucket, Key="environment", Body=BODY)
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.pipe(f"{s3_folder}/a", BODY)
    assert files.cat(f"{s3_folder}/a") == files.cat(f"{object_store.bucket}/environment") == BODY


def test_env_takes_back_keys_that_would_win_over_the_profile(object_store: ObjectStore) -> None:
    first = object_store.run("env").stdout.splitlines()[0]
    assert first.split()[0] == "unset"
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"} <= set(first.split())


@pytest.mark.parametrize("secret", ["x" * 40, ""], ids=["wrong", "none"])
def test_a_stranger_is_refused(object_store: ObjectStore, secret: str) -> None:
    if secret:
        stranger = client(object_store, secret)
    else:
        unsigned = botocore.config.Config(signature_version=botocore.UNSIGNED)
        stranger = boto3.Session().client(
            "s3", endpoint_url=object_store.endpoint, region_name="us-east-1", config=unsigned
        )
    for request in (
        lambda: stranger.list_objects_v2(Bucket=object_store.bucket),
        lambda: stranger.put_object(Bucket=object_store.bucket, Key="stranger", Body=b""),
    ):
        with pytest.raises(botocore.exceptions.ClientError) as refused:
            request()
        assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 403


def test_nothing_listens_beyond_this_machine(object_store: ObjectStore) -> None:
    listening = {daemon: set[tuple[str, int]]() for daemon in DAEMONS}
    for daemon in DAEMONS:
        process = object_store.process(daemon)
        assert process is not None
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                listening[daemon].add((connection.laddr.ip, connection.laddr.port))
    assert {address for found in listening.values() for address, _ in found} == {"127.0.0.1"}
    assert listening["client.rgw"] == {("127.0.0.1", object_store.port)}
    assert len(listening["mon.a"]) == 1


def test_of_sixteen_conditional_puts_one_wins(object_store: ObjectStore) -> None:
    s3 = client(object_store)
    start = threading.Barrier(16)
    outcomes: list[str] = []

    def put(racer: int) -> None:
        start.wait()
        try:
            s3.put_object(Bucket=object_store.bucket, Key="race", Body=str(racer).encode(), IfNoneMatch="*")
            outcomes.append(f"won {racer}")
        except botocore.exceptions.ClientError as error:
            outcomes.append(error.response["Error"]["Code"])

    racers = [threading.Thread(target=put, args=(racer,)) for racer in range(16)]
    for thread in racers:
        thread.start()
    for thread in racers:
        thread.join()
    winner = s3.get_object(Bucket=object_store.bucket, Key="race")["Body"].read().decode()
    assert Counter(outcomes) == Counter({"PreconditionFailed": 15, f"won {winner}": 1})


def test_parts_of_unfinished_uploads_are_thrown_away_after_a_week(object_store: ObjectStore) -> None:
    (rule,) = client(object_store).get_bucket_lifecycle_configuration(Bucket=object_store.bucket)["Rules"]
    assert rule["Status"] == "Enabled"
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}


def test_a_second_server_beside_the_first_in_a_long_folder(
    object_store: ObjectStore, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # Longer than the path of a socket may be, with a blank, and full after 1 GiB.
    second = ObjectStore(tmp_path / "with a blank" / ("long" * 40), free_port())
    request.addfinalizer(second.stop)
    with ThreadPoolExecutor(2) as pool:  # two starts at once are one
        for started in pool.map(lambda _: second.run("start", OBJECT_STORE_GIB="1"), range(2)):
            assert started.returncode == 0, started.stderr
    first_s3, second_s3 = client(object_store), client(second)
    for name, s3 in (("first", first_s3), ("second", second_s3)):
        s3.put_object(Bucket="mshnet", Key="who", Body=name.encode())
    assert first_s3.get_object(Bucket="mshnet", Key="who")["Body"].read() == b"first"
    assert second_s3.get_object(Bucket="mshnet", Key="who")["Body"].read() == b"second"
    assert keys(object_store) != keys(second)
    moved = free_port()
    second.stop()
    assert second.run("start", OBJECT_STORE_PORT=str(moved), OBJECT_STORE_GIB="1").returncode == 0
    at_new_port = client(ObjectStore(second.folder, moved))
    assert at_new_port.get_object(Bucket="mshnet", Key="who")["Body"].read() == b"second"


def test_the_server_of_tests_that_were_killed_ends_too(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    block = "with running_in(Path(sys.argv[1])):\n    print(flush=True)\n    input()"
    script = f"import sys\nfrom tests.object_store import Path, running_in\n{block}"
    with psutil.Popen(
        [sys.executable, "-c", script, str(folder)], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as tests:
        assert tests.stdout.readline() == b"\n"
        daemons = [psutil.Process(pid) for pid in pids(ObjectStore(folder, 0))]
        assert len(daemons) == 3
        tests.kill()
    assert psutil.wait_procs(daemons, timeout=60)[1] == []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OBJECT_STORE_PORT": "http"}, "OBJECT_STORE_PORT must be a port number, got 'http'"),
        ({"OBJECT_STORE_HOST": "0.0.0.0"}, "OBJECT_STORE_HOST must be one IPv4 address of this machine"),
        ({"OBJECT_STORE_GIB": "0"}, "OBJECT_STORE_GIB must be a whole number from 1, got '0'"),
        ({"OBJECT_STORE_GIB": "9000000"}, "has only"),
    ],
)
def test_wrong_settings_are_named_and_start_nothing(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    store = ObjectStore(tmp_path / "store", free_port())
    done = store.run("start", **variables)
    assert done.returncode == 1
    assert message in done.stderr
    assert pids(store) == []


def test_the_folders_above_it_stay_open_to_others(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "outputs" / "deep" / "store", free_port())
    assert store.run("start", OBJECT_STORE_PORT="http").returncode == 1  # not before it has made its folder
    modes = [stat.S_IMODE(folder.stat().st_mode) for folder in (store.folder, *store.folder.parents[:2])]
    assert modes == [0o700, 0o755, 0o755]


def test_a_port_in_use_is_named(object_store: ObjectStore, tmp_path: Path) -> None:
    done = ObjectStore(tmp_path / "store", object_store.port).run("start")
    assert done.returncode == 1
    assert f"port {object_store.port} is in use" in done.stderr


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    done = ObjectStore(tmp_path, free_port()).run("start")
    assert done.returncode == 1
    assert "holds something else" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_status_and_env_where_there_is_none(tmp_path: Path) -> None:
    store = ObjectStore(tmp_path / "store", free_port())
    assert store.run("status").returncode == 3
    assert store.run("stop").returncode == 0
    env = store.run("env")
    assert env.returncode == 1
    assert env.stdout == ""
    assert "no object store in" in env.stderr
    assert not store.folder.exists()


def test_an_unknown_command_is_named(tmp_path: Path) -> None:
    done = ObjectStore(tmp_path / "store", free_port()).run("strat")
    assert done.returncode == 1
    assert "no such command 'strat'" in done.stderr
