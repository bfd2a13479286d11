"""Latency and throughput of the model as a service: a real `mlflow models serve` process, asked over HTTP.

    python benchmarks/serving.py --voc DIR/VOC2012 --backbone-weights WEIGHTS --out outputs/serving \
        --record docs/benchmarks/serving.md

Each way is asked the same number of times, with real pictures (JPEG files as they are, masks as PNG), ResNet-50, both
similarities, weights of the learnable part at random (they do not change the time):

- examples known: every request brings the same example, whose features the server kept;
- examples new: every request brings another one;
- five examples new: likewise, with five;
- eight at a time: examples known, from eight threads.

Time is from the first byte sent to the last received, memory the largest resident size of the server's processes. Their
CPU time hardly depends on what else the machine does.
Without --record nothing is written to the documentation.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import tyro
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]
STARTS_S, ANSWERS_S = 500, 500
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to serve and ask."""

    voc: Path
    """Folder with JPEGImages and SegmentationClassAug."""
    backbone_weights: str = "imagenet"
    """As the job's flag."""
    out: Path
    """Folder for the model and the server's log."""
    requests: int = 40
    """Of each way."""
    image_size_px: int = 473
    at_a_time: int = 8
    record: Path | None = None
    """Markdown file whose part about this machine is written anew."""


# The server --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A running `mlflow models serve`."""

    port: int
    process: psutil.Process

    def ask(
        self, body: bytes, headers: Mapping[str, str] = JSON, method: str = "POST", path: str = "/invocations"
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWERS_S)) as connection:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.read()

    def memory_bytes(self) -> int:
        """Resident, of all its processes."""
        return int(self._total(lambda process: process.memory_info().rss))

    def cpu_s(self) -> float:
        """Of all its processes, since they began."""
        return self._total(lambda process: sum(process.cpu_times()[:2]))

    def _total(self, value: Callable[[psutil.Process], float]) -> float:
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (self.process, *self.process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += value(process)
        return total


@contextlib.contextmanager
def served(model: str, log: Path, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Serve a model (URI or folder) on a free port of loopback, from when it answers until the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--model-uri", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--timeout", str(ANSWERS_S)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    variables = {**os.environ, "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", **(environment or {})}
    with log.open("w") as output:
        started = subprocess.Popen(command, env=variables, stdout=output, stderr=output, cwd=log.parent)
    process = psutil.Process(started.pid)
    try:
        server = Server(port, process)
        _wait_for(server, started, log)
        yield server
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in (*process.children(recursive=True), process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        started.wait()


def _wait_for(server: Server, started: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + STARTS_S
    while started.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.ask(b"", method="GET", path="/ping")[0] == 200:
                return
        time.sleep(0.2)
    raise RuntimeError(f"the server does not answer:\n{log.read_text()}")


def packaged(config: Any, image_size_px: int, backbone_weights: str, out: Path) -> Path:
    """An MLflow model of a new network, as the registry stores it."""
    from mlflow.models import Model

    from mshnet import architectures, checkpoint
    from pipelines import served_model

    network, folder, packed = architectures.build(config), out / "model", out / "packaged"
    checkpoint.load_backbone_weights(network.backbone, backbone_weights)
    checkpoint.save_model(network, str(folder), {"image_size_px": image_size_px})
    shutil.rmtree(packed, ignore_errors=True)  # of an earlier run
    served_model.save(packed, folder / checkpoint.WEIGHTS_FILE, checkpoint.read_config(str(folder)), Model())
    return packed


# What is asked -----------------------------------------------------------------------------------------


def request(query: bytes, examples: Sequence[tuple[bytes, bytes]], **params: Any) -> bytes:
    """The body for a query (a PNG or JPEG file) and labelled examples (the same, and a mask as PNG)."""

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    row = {
        "query": text(query),
        "supports": json.dumps([text(image) for image, _ in examples]),
        "masks": json.dumps([text(mask) for _, mask in examples]),
    }
    return json.dumps({"dataframe_records": [row], "params": params}).encode()


def voc_examples(root: Path, count: int) -> list[tuple[bytes, bytes]]:
    """Pictures with the mask of their largest class."""
    found = []
    for file in sorted((root / "SegmentationClassAug").glob("*.png")):
        picture = root / "JPEGImages" / f"{file.stem}.jpg"
        labels = np.array(Image.open(file))
        counts = np.bincount(labels[labels != 255], minlength=2)[1:]
        if counts.max() > labels.size // 20 and picture.is_file():
            mask = io.BytesIO()
            Image.fromarray(np.where(labels == counts.argmax() + 1, 255, 0).astype(np.uint8)).save(mask, "PNG")
            found.append((picture.read_bytes(), mask.getvalue()))
        if len(found) == count:
            return found
    raise SystemExit(f"expected {count} labelled pictures under {root}, found {len(found)}")


# The measurement ---------------------------------------------------------------------------------------


@dataclass
class Way:
    """One way of asking, and what came of it."""

    name: str
    at_a_time: int = 1
    seconds: list[float] = field(default_factory=list)
    whole_s: float = 0.0
    bytes_sent: int = 0
    cpu_s: float = 0.0

    def row(self) -> list[str]:
        """Of the table."""
        ordered = sorted(self.seconds)
        return [
            self.name,
            str(len(ordered)),
            f"{statistics.median(ordered):.2f}",
            f"{ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]:.2f}",
            f"{len(ordered) / self.whole_s:.2f}",
            f"{self.cpu_s / len(ordered):.2f}",
            f"{self.bytes_sent / len(ordered) / 1e6:.2f}",
        ]


def measure(server: Server, way: Way, bodies: Sequence[bytes]) -> Way:
    """Ask for each body; an answer other than 200 ends the benchmark."""

    def one(body: bytes) -> float:
        start = time.perf_counter()
        status, answer = server.ask(body)
        if status != 200:
            raise SystemExit(f"expected 200, got {status}: {answer[:500]!r}")
        return time.perf_counter() - start

    start, used = time.perf_counter(), server.cpu_s()
    with ThreadPoolExecutor(way.at_a_time) as threads:
        way.seconds = list(threads.map(one, bodies))
    way.whole_s, way.bytes_sent = time.perf_counter() - start, sum(map(len, bodies))
    way.cpu_s = server.cpu_s() - used
    return way


@contextlib.contextmanager
def largest(value: Callable[[], int]) -> Iterator[list[int]]:
    """The largest value seen while the block runs."""
    seen, done = [0], threading.Event()

    def look() -> None:
        while not done.wait(0.2):
            seen[0] = max(seen[0], value())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def main(arguments: Arguments) -> None:
    """Measure, print, record."""
    from mshnet import ModelConfig

    arguments.out.mkdir(parents=True, exist_ok=True)
    count = arguments.requests
    pictures = voc_examples(arguments.voc, count + 5)
    queries = [image for image, _ in pictures[:count]]
    known = [request(query, pictures[-1:], output="rle") for query in queries]
    new = [request(query, [example], output="rle") for query, example in zip(queries, pictures[1:], strict=False)]
    five = [request(query, pictures[i : i + 5], output="rle") for i, query in enumerate(queries)]
    size = arguments.image_size_px
    packed = packaged(ModelConfig(backbone="resnet50"), size, arguments.backbone_weights, arguments.out)
    load = os.getloadavg()[0]
    with served(str(packed), arguments.out / "server.log") as server, largest(server.memory_bytes) as memory:
        server.ask(known[0])  # the first one warms up
        fewer = max(1, count // 4)
        ways = [
            measure(server, Way("example known"), known),
            measure(server, Way("example new"), new[:count]),
            measure(server, Way("five examples new"), five[:fewer]),
            measure(
                server,
                Way(f"example known, {arguments.at_a_time} at a time", arguments.at_a_time),
                list(itertools.islice(itertools.cycle(known), 2 * count)),
            ),
        ]
    text = report(ways, memory[0], f"{os.cpu_count()} cores, {size} px, ResNet-50, float32; load before: {load:.1f}")
    print(text)
    if arguments.record:
        head, _, _ = arguments.record.read_text().partition("\n## ")
        arguments.record.write_text(f"{head.rstrip()}\n\n{text}")


def report(ways: Sequence[Way], memory_bytes: int, setting: str) -> str:
    """The part of the documentation that is measured."""
    header = ["", "requests", "median, s", "95 % below, s", "answers/s", "CPU s each", "MB sent each"]
    lines = [f"## {setting} ({time.strftime('%Y-%m-%d')})", "", f"| {' | '.join(header)} |"]
    lines.append("| --- |" + " ---: |" * (len(header) - 1))
    lines += [f"| {' | '.join(way.row())} |" for way in ways]
    return "\n".join([*lines, "", f"Memory of the server at most: {memory_bytes / 2**30:.2f} GiB.", ""])


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main(tyro.cli(Arguments))
