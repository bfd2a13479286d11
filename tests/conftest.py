"""What every test may use: the shared real data, if this machine has it, and a real S3 server, if it has Ceph."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import object_store as server

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
if WORKERS:
    # Before torch reads it: the workers, and what they start, share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

LONGEST = (
    "tests/cluster/",
    "tests/e2e/",
    "tests/infra/",
    "tests/mshnet/test_golden_training.py",
    "tests/test_tutorials.py",
    "tests/mshnet/",
    "tests/pipelines/test_predict.py",
    "tests/pipelines/test_serving.py",
)
"""Where the files are that take minutes, the longest first."""

SHARED = Path(os.environ.get("MSHNET_SHARED", Path(__file__).resolve().parents[2] / "shared"))

needs_shared = pytest.mark.skipif(
    not (SHARED / "reference").is_dir(),
    reason="the shared reference data is absent (set MSHNET_SHARED to the folder that holds reference/ and data/)",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several workers take file after file: a long one that came last would be waited for."""
    if WORKERS:
        items.sort(key=_how_early)


def _how_early(item: pytest.Item) -> int:
    return next((i for i, start in enumerate(LONGEST) if item.nodeid.startswith(start)), len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def node_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remote shards go to a folder of this session, of the processes that it starts too, not to the developer's own."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MSHNET_CACHE_DIR", str(tmp_path_factory.mktemp("node_cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the reference vectors and the real images."""
    return SHARED


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.ObjectStore]:
    """A real S3 server, one for the whole session. A test that stops or kills it starts it again before its end."""
    if not server.installed():
        pytest.skip(server.ABSENT)
    with server.running_in(tmp_path_factory.mktemp("object_store")) as store:
        yield store


@pytest.fixture
def s3_folder(object_store: server.ObjectStore, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place on it, as a URI, with the environment set so that every client finds it."""
    object_store.use(monkeypatch)
    return f"s3://{object_store.bucket}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small fold (`tests/training_process.py`) that nothing happened to: its folder, below that of its data.

    Trained once, whichever of pytest's workers comes first.
    """
    from tests.pipelines.drawn_fold import train_here
    from tests.training_process import UPDATES, small_fold

    folder = tmp_path_factory.getbasetemp()
    root = (folder.parent if WORKERS else folder) / "training"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        reached = train_here(*small_fold(root), root / "undisturbed")
    assert reached.step == UPDATES
    return root / "undisturbed"
