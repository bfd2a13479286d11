"""The proxy that fails: that it fails as it says, as often as it says, and not otherwise."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import boto3
import botocore.config
import pytest

from tests.fault_proxy import FaultProxy, Faults
from tests.object_store import ObjectStore

BODY = bytes(range(256)) * 1024  # 256 KiB


class Echo(BaseHTTPRequestHandler):
    """GET gives BODY, /chunks in chunks; PUT gives back what was sent and keeps count."""

    protocol_version = "HTTP/1.1"
    puts = 0

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/chunks":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(BODY), 1000):
                piece = BODY[start : start + 1000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(BODY)))
        self.send_header("X-Host", self.headers["Host"])
        self.end_headers()
        self.wfile.write(BODY)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).puts += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def upstream() -> Iterator[str]:
    """A plain HTTP server of the standard library."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as server:
        Echo.puts = 0
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def connect(endpoint: str) -> http.client.HTTPConnection:
    """A connection that keeps alive."""
    parts = urlsplit(endpoint)
    return http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)


def fetch(endpoint: str, method: str = "GET", path: str = "/", body: bytes | None = None) -> str:
    """What one request on a fresh connection meets: its status, or the name of the exception."""
    connection = connect(endpoint)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        answer.read()
        return str(answer.status)
    except (http.client.HTTPException, ConnectionError) as error:
        return type(error).__name__
    finally:
        connection.close()


def test_without_faults_everything_passes_unchanged_on_one_connection(upstream: str) -> None:
    with FaultProxy(upstream) as proxy:
        connection = connect(proxy.endpoint)
        for path in ("/", "/chunks", "/"):
            connection.request("GET", path)
            assert connection.getresponse().read() == BODY
        connection.request("HEAD", "/")
        assert connection.getresponse().read() == b""
        connection.request("PUT", "/", BODY)
        assert connection.getresponse().read() == BODY
        connection.request("GET", "/")
        answer = connection.getresponse()
        assert f"http://{answer.headers['X-Host']}" == proxy.endpoint
        assert answer.read() == BODY
        connection.close()
    assert proxy.counts == {"requests": 6}


@pytest.mark.parametrize(
    ("faults", "method", "path", "met"),
    [
        (Faults(slow_down=1), "GET", "/", "503"),
        (Faults(slow_down=1), "PUT", "/", "503"),
        (Faults(reset=1), "GET", "/", "ConnectionResetError"),
        (Faults(lose_answer=1), "GET", "/", "ConnectionResetError"),
        (Faults(truncate=1), "GET", "/", "IncompleteRead"),
        (Faults(truncate=1), "GET", "/chunks", "IncompleteRead"),
        (Faults(truncate=1), "HEAD", "/", "200"),
    ],
)
def test_each_fault_is_what_its_name_says(upstream: str, faults: Faults, method: str, path: str, met: str) -> None:
    with FaultProxy(upstream, faults) as proxy:
        body = BODY if method == "PUT" else None
        assert {fetch(proxy.endpoint, method, path, body) for _ in range(5)} == {met}
        done = {name: count for name, count in proxy.counts.items() if name != "requests"}
        assert sum(done.values()) == (5 if met != "200" else 0)
        proxy.faults = Faults()
        assert fetch(proxy.endpoint, method, path, body) == "200"


@pytest.mark.parametrize(
    ("faults", "reached"), [(Faults(reset=1), 0), (Faults(slow_down=1), 0), (Faults(lose_answer=1), 1)]
)
def test_only_a_lost_answer_has_been_acted_on(upstream: str, faults: Faults, reached: int) -> None:
    with FaultProxy(upstream, faults) as proxy:
        assert fetch(proxy.endpoint, "PUT", "/", b"something") != "200"
        assert Echo.puts == reached


def test_shares_are_kept_and_the_seed_repeats_them(upstream: str) -> None:
    faults = Faults(slow_down=0.2, reset=0.1, truncate=0.2)
    seen = []
    for seed in (1, 1, 2):
        with FaultProxy(upstream, faults, seed) as proxy:
            seen.append([fetch(proxy.endpoint) for _ in range(200)])
        assert proxy.counts["requests"] == 200
        assert proxy.counts["slow_down"] == seen[-1].count("503")
        assert proxy.counts["truncate"] == seen[-1].count("IncompleteRead")
        assert proxy.counts["reset"] == seen[-1].count("ConnectionResetError")
        assert 70 <= 200 - seen[-1].count("200") <= 130  # 100 expected; four standard deviations are 28
    assert seen[0] == seen[1] != seen[2]


def test_a_delay_holds_back_and_then_passes(upstream: str) -> None:
    with FaultProxy(upstream, Faults(delay=1, delay_s=0.3)) as proxy:
        start = time.monotonic()
        assert fetch(proxy.endpoint) == "200"
        assert time.monotonic() - start >= 0.3
    assert proxy.counts == {"requests": 1, "delay": 1}


def test_many_at_once(upstream: str) -> None:
    with FaultProxy(upstream) as proxy, ThreadPoolExecutor(16) as pool:
        assert set(pool.map(fetch, [proxy.endpoint] * 200)) == {"200"}


def test_a_server_that_is_gone_looks_gone(upstream: str) -> None:
    with FaultProxy("http://127.0.0.1:1") as proxy:
        assert fetch(proxy.endpoint) in {"ConnectionResetError", "RemoteDisconnected"}


@pytest.mark.parametrize("shares", [{"reset": 0.7, "truncate": 0.4}, {"delay": 1.5}, {"reset": -0.1}])
def test_impossible_shares_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"shares must be 0\.\.1"):
        Faults(**shares)


def test_s3_works_through_it_and_the_client_retries_what_fails(
    object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    object_store.use(monkeypatch)
    faults = Faults(slow_down=0.1, reset=0.1, lose_answer=0.1)
    with FaultProxy(object_store.endpoint, faults, seed=3) as proxy:
        patient = botocore.config.Config(retries={"mode": "standard", "max_attempts": 10})
        s3 = boto3.Session().client("s3", endpoint_url=proxy.endpoint, config=patient)
        for key in range(20):
            s3.put_object(Bucket=object_store.bucket, Key=f"proxy/{key}", Body=BODY)
        for key in range(20):
            assert s3.get_object(Bucket=object_store.bucket, Key=f"proxy/{key}")["Body"].read() == BODY
        listed = s3.list_objects_v2(Bucket=object_store.bucket, Prefix="proxy/")
        assert listed["KeyCount"] == 20
    assert min(proxy.counts[name] for name in ("slow_down", "reset", "lose_answer")) > 0
