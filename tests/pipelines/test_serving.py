"""The registered model behind a real `mlflow models serve` process: nothing is lost, bad requests get their reason."""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from mshnet import ModelConfig, architectures, checkpoint
from mshnet.encoded import encode
from mshnet.predict import Segmenter
from pipelines.tracking import Tracker
from pipelines.tracking_champion import Contender, crown
from pipelines.tracking_registry import NewVersion, Registry
from tests.mshnet.data.test_hostile_data import bomb
from tests.pipelines.test_served_model import changed, decoded, episode, frame, noise
from tests.pipelines.test_tracking_registry import CONDITIONS

SIDE = 65
NAME = "mshnet-shapes-1shot"
REQUESTS, AT_A_TIME = 200, 8


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    """The module that starts and asks the server."""
    folder = str(Path(__file__).resolve().parents[2] / "benchmarks")
    with pytest.MonkeyPatch.context() as changed_path:
        changed_path.syspath_prepend(folder)
        yield importlib.import_module("serving")
    sys.modules.pop("serving", None)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the architecture whose masks depend on the examples, and not only on the query, without any training."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    network = architectures.build(ModelConfig(architecture="panet", backbone="resnet18"))
    checkpoint.save_model(network.eval(), str(folder), {"image_size_px": SIDE})
    return folder


@pytest.fixture(scope="module")
def server(
    benchmark: Any, model: Path, tmp_path_factory: pytest.TempPathFactory, empty_database: bytes
) -> Iterator[Any]:
    """Of the version that has the alias `champion`."""
    folder = tmp_path_factory.mktemp("registry")
    (folder / "mlflow.db").write_bytes(empty_database)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    tracker = Tracker(uri, "e")
    registry, run = Registry(tracker, NAME), tracker.start_parent("cv", {}, {}, "key")
    described = NewVersion(fold=0, miou=0.5, conditions=CONDITIONS, description="fold 0", tags={})
    version = registry.register(run, model / checkpoint.WEIGHTS_FILE, checkpoint.read_config(str(model)), described)
    assert crown(registry, run, [Contender(version=version, lead=0.3)]).version == version
    environment = {"MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1"}
    with benchmark.served(f"models:/{NAME}@champion", folder / "server.log", environment) as running:
        yield running


def scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright box on a dark, noisy ground, and where it is."""
    random = np.random.default_rng(seed)
    picture, mask = noise(60, 70, seed) // 3, np.zeros((60, 70), dtype=np.uint8)
    top, left = random.integers(5, 30, 2)
    mask[top : top + 25, left : left + 30] = 1
    picture[mask > 0] = random.integers(80, 256, 3)
    return picture, mask


def body(rows: Any, **params: Any) -> bytes:
    return json.dumps({"dataframe_split": rows.to_dict(orient="split", index=False), "params": params}).encode()


def test_two_hundred_requests_eight_at_a_time_are_all_answered_right(server: Any, model: Path) -> None:
    """Four queries by three sets of examples, PNG and run lengths in turn; every tenth request is malformed."""
    segmenter = Segmenter.from_checkpoint(model)
    queries = [scene(i)[0] for i in range(4)]
    examples = [[scene(10 * k + i) for i in range(1, k + 1)] for k in (1, 2, 3)]
    asked, expected = [], {}
    for number in range(REQUESTS):
        i, k, output = number % 4, number % 3, ("png", "rle")[number // 4 % 2]
        rows = frame(queries[i], [image for image, _ in examples[k]], [mask for _, mask in examples[k]])
        if number % 10 == 9:
            rows = rows.assign(query="%%%")
        asked.append((i, k, output, body(rows, output=output, threshold=0.5)))
    for k, pairs in enumerate(examples):
        segmenter.learn("it", [image for image, _ in pairs], [mask for _, mask in pairs])
        expected |= {(i, k): segmenter(query, classes=["it"]).mask for i, query in enumerate(queries)}
    assert len({mask.tobytes() for mask in expected.values()}) == len(expected), "so a mix-up would be seen"

    with ThreadPoolExecutor(AT_A_TIME) as threads:
        answers = list(threads.map(lambda each: server.ask(each[3]), asked))
    assert Counter(status for status, _ in answers) == {200: REQUESTS * 9 // 10, 400: REQUESTS // 10}
    for number, ((i, k, output, _), (status, answer)) in enumerate(zip(asked, answers, strict=True)):
        if number % 10 == 9:
            assert (status, "row 0, query: expected base64 text" in json.loads(answer)["message"]) == (400, True)
            continue
        (row,) = json.loads(answer)["predictions"]
        found = decoded(row["mask"]) > 0 if output == "png" else coco.decode(json.loads(row["mask"])) > 0
        np.testing.assert_array_equal(found, expected[i, k])


MALFORMED = {
    "not JSON": (b"{", 400, "valid JSON"),
    "not UTF-8": (b"\xff\xfe{}", 400, "valid JSON"),
    "a JSON list": (b"[1]", 400, "exactly one of the input fields"),
    "no rows": (body(changed().iloc[:0]), 400, "expected 1 to 16 rows, got 0"),
    "too many rows": (body(changed().loc[[0] * 17]), 400, "expected 1 to 16 rows, got 17"),
    "a column is missing": (body(changed().drop(columns="masks")), 400, "masks"),
    "a number for a query": (body(changed(query=7)), 400, "query"),
    "null": (body(changed(query=None)), 400, "row 0, query: expected base64 text"),
    "not base64": (body(changed(query="%%%")), 400, "row 0, query: expected base64 text"),
    "half a picture": (body(changed(query=encode(noise(40, 40, 0))[:2000])), 400, "row 0, query: expected a whole PNG"),
    "a bomb": (
        body(changed(query=base64.b64encode(bomb(20_000, 20_000)).decode())),
        400,
        "row 0, query: expected a whole",
    ),
    "too large": (
        body(changed(query=encode(np.zeros((5000, 5001), np.uint8)))),
        400,
        "row 0, query: expected 25,000,000 pixels at most, got 5001×5000",
    ),
    "no mask": (body(changed(masks="[]")), 400, "row 0, masks: expected a JSON list of one or more"),
    "another size": (body(changed(masks=json.dumps([encode(np.ones((9, 9), np.uint8))] * 2))), 400, "its image 50×70"),
    "no object": (body(changed(masks=json.dumps([encode(np.zeros((70, 50), np.uint8))] * 2))), 400, "found none"),
    "unknown output": (body(changed(), output="jpeg"), 400, "output must be one of png, rle, got 'jpeg'"),
    "a threshold beyond": (body(changed(), threshold=2.0), 400, "threshold must be 0..1, got 2.0"),
    "a threshold in words": (body(changed(), threshold="high"), 400, "threshold"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_request_is_answered_with_the_reason(server: Any, name: str) -> None:
    sent, status, reason = MALFORMED[name]
    found, answer = server.ask(sent)
    message = json.loads(answer)["message"]
    assert (found, reason in message) == (status, True), message
    assert "Traceback" not in answer.decode(), "nothing of the server's inside"


def test_requests_that_are_none_are_answered_too(server: Any) -> None:
    assert server.ask(b"hello", {"Content-Type": "text/plain"})[0] == 415
    assert server.ask(b"", method="GET")[0] == 405
    assert server.ask(b"", path="/elsewhere")[0] == 404
    with contextlib.closing(socket.create_connection(("127.0.0.1", server.port), timeout=60)) as gone:
        gone.sendall(
            b"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
    status, answer = server.ask(body(changed()))
    assert status == 200, "a sender who leaves in the middle takes nobody along"
    (row,) = json.loads(answer)["predictions"]
    assert decoded(row["mask"]).shape == (48, 80)


def test_a_picture_file_is_taken_as_it_is(server: Any, tmp_path: Path, benchmark: Any) -> None:
    query, supports, masks = episode(1)
    files = []
    for name, pixels in (("query.jpg", query), ("support.jpg", supports[0]), ("mask.png", masks[0])):
        Image.fromarray(pixels).save(tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    status, answer = server.ask(benchmark.request(files[0], [(files[1], files[2])], output="rle"))
    assert status == 200
    assert json.loads(json.loads(answer)["predictions"][0]["mask"])["size"] == [48, 80]
