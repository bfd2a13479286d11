"""The production path on a real S3 server of this machine, undisturbed and with what goes wrong around it."""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import shlex
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from mshnet.data.filesystem import filesystem
from mshnet.data.shapes import write_coco
from tests.e2e.conftest import SMALL, Outcome, cross_validate, run, start
from tests.fault_proxy import FaultProxy, Faults
from tests.object_store import ObjectStore
from tests.secrets_left import assert_no_secret

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SHARDS = 8


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated pictures in the COCO layout."""
    root = tmp_path_factory.mktemp("source") / "coco"
    write_coco(root, images=200, size_px=160, seed=5)
    return root


def preprocess(source: str | Path, store: str, *more: str) -> list[str]:
    """The command line."""
    flags = shlex.split("--dataset coco --image-size-px 225 --images-per-shard 25")
    return ["-m", "pipelines.preprocess", *flags, "--source", str(source), "--store", store, *more]


@pytest.fixture(scope="module")
def undisturbed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a local run leaves, by path below the store."""
    root = tmp_path_factory.mktemp("undisturbed")
    outcome = run(preprocess(source, str(root / "store")), root)
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert outcome.result["shards"] == SHARDS
    return contents(str(root / "store"))


def contents(store: str) -> dict[str, str]:
    """Every file of a store with its hash."""
    fs, root = filesystem(store)
    return {path.removeprefix(f"{root}/"): hashlib.sha256(fs.cat_file(path)).hexdigest() for path in fs.find(root)}


def when_shards_are_done(store: str, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until so many are reported, while the job runs."""
    fs, root = filesystem(store)
    until = time.monotonic() + 120
    while len(fs.glob(f"{root}/images/*/shards/*.json")) < count:
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < until
        time.sleep(0.05)


def end(process: subprocess.Popen[str]) -> Outcome:
    """Wait for a job's end."""
    stdout, stderr = process.communicate(timeout=600)
    return Outcome(process.returncode, stdout, stderr)


def children_end(children: list[psutil.Process]) -> None:
    """Wait until a killed driver's local Ray is gone too; its two agents take a minute, and do nothing."""
    _, alive = psutil.wait_procs([child for child in children if "Agent" not in child.name()], timeout=60)
    assert not alive, [child.name() for child in alive]


def workers_of(driver: int) -> list[psutil.Process]:
    """Ray workers that run a shard's task."""
    found = []
    for child in psutil.Process(driver).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith("ray::preprocess"):
                found.append(child)
    return found


def test_the_store_on_s3_is_the_local_one_byte_for_byte_also_from_a_source_on_s3(
    s3_folder: str, source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    fs, root = filesystem(s3_folder)
    fs.put(f"{source}/", f"{root}/source", recursive=True)
    outcome = run(preprocess(f"{s3_folder}/source", f"{s3_folder}/store"), tmp_path)
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert contents(f"{s3_folder}/store") == undisturbed
    assert "image/s" in outcome.stderr
    assert "MB written" in outcome.stderr
    verified = run(preprocess("nowhere", f"{s3_folder}/store", "--verify"), tmp_path)
    assert verified.code == 0, verified.stderr[-3000:]
    assert verified.result == [outcome.result]


def test_a_server_that_dies_and_comes_back_is_waited_for(
    s3_folder: str, object_store: ObjectStore, source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    process = start(preprocess(source, s3_folder), tmp_path)
    when_shards_are_done(s3_folder, 2, process)
    object_store.kill()
    time.sleep(3)
    assert process.poll() is None
    object_store.start()
    outcome = end(process)
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert contents(s3_folder) == undisturbed


def test_a_tenth_of_the_requests_may_fail_or_be_slow(
    s3_folder: str,
    object_store: ObjectStore,
    source: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = Faults(slow_down=0.03, reset=0.02, lose_answer=0.02, truncate=0.02, delay=0.01)
    with FaultProxy(object_store.endpoint, faults, seed=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        outcome = run(preprocess(source, s3_folder), tmp_path)
        assert outcome.code == 0, outcome.stderr[-3000:]
        assert proxy.counts.total() - proxy.counts["requests"] > 2
    monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.endpoint)
    assert contents(s3_folder) == undisturbed


def test_of_two_racing_jobs_one_seals_and_the_other_says_so(
    s3_folder: str,
    object_store: ObjectStore,
    source: Path,
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FaultProxy(object_store.endpoint, Faults(delay=1.0, delay_s=0.2)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        slow = start(preprocess(source, s3_folder), tmp_path)
        monkeypatch.setenv("AWS_ENDPOINT_URL", object_store.endpoint)
        when_shards_are_done(s3_folder, 1, slow)
        # It has looked and found no manifest: so will the other, and seal first.
        proxy.faults = Faults(delay=1.0, delay_s=5.0)
        quick = run(preprocess(source, s3_folder), tmp_path)
        proxy.faults = Faults()
        late = end(slow)
    assert [quick.code, late.code] == [0, 0], quick.stderr[-2000:] + late.stderr[-2000:]
    assert quick.result == late.result
    assert contents(s3_folder) == undisturbed
    assert "was there first, with the same contents" in late.stderr
    assert "was there first" not in quick.stderr


def test_a_killed_driver_and_a_killed_worker_leave_the_same_store(
    s3_folder: str, source: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    process = start(preprocess(source, s3_folder), tmp_path)
    when_shards_are_done(s3_folder, 3, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    children_end(children)
    fs, root = filesystem(s3_folder)
    assert not fs.glob(f"{root}/images/*/manifest.json")

    process = start(preprocess(source, s3_folder), tmp_path)
    when_shards_are_done(s3_folder, 5, process)
    until = time.monotonic() + 60
    while not (workers := workers_of(process.pid)):
        assert process.poll() is None
        assert time.monotonic() < until
    workers[0].kill()
    outcome = end(process)
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert contents(s3_folder) == undisturbed


def test_the_whole_job_runs_over_s3_and_leaves_no_credential_anywhere(
    s3_folder: str, object_store: ObjectStore, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSHNET_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["--dataset", "pascal", "--source", str(pictures), "--store", s3_folder, "--folds", "1",
             "--tracking-uri", "sqlite:///mlflow.db", *SMALL, "--checkpoint-every-steps", "2"]  # fmt: skip
    outcome = run(cross_validate(*flags), tmp_path)
    assert outcome.code == 0, outcome.stderr[-3000:]
    assert outcome.result["report"].startswith(s3_folder)
    again = run(cross_validate(*flags), tmp_path)
    assert again.result == outcome.result

    fs, root = filesystem(s3_folder)
    (tmp_path / "output").write_text(outcome.stdout + outcome.stderr + again.stderr)
    fs.get(root, str(tmp_path / "on_s3"), recursive=True)
    credentials = configparser.ConfigParser()
    credentials.read(object_store.folder / "aws/credentials")
    assert assert_no_secret(dict(credentials["mshnet"]), [tmp_path, tmp_path / "on_s3"]) > 30


WRONG = {"AWS_PROFILE": "", "AWS_ACCESS_KEY_ID": "WRONGKEYID", "AWS_SECRET_ACCESS_KEY": "wrongsecret"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [(WRONG, "no credentials that may write to it"), ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "AWS_ENDPOINT_URL")],
    ids=["wrong-credentials", "no-server"],
)
def test_an_unusable_store_is_named_before_anything_starts(
    s3_folder: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], expected: str
) -> None:
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    outcome = run(preprocess(source, s3_folder), tmp_path, timeout_s=120)
    assert (outcome.code, outcome.stdout) == (1, "")
    assert expected in outcome.stderr
    assert not any(text in outcome.stderr for text in ("wrongsecret", "WRONGKEYID", "Traceback"))
