"""One layer of retries: what is tried again, what is not, and what comes out in the end."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import re
import socket
import threading
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mshnet.data.s3 import ObjectStore

KEY_ID, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG"
BODY = b"0123456789" * 100
Fault = Callable[[BaseHTTPRequestHandler], None]


def answer(status: int, code: str = "") -> Fault:
    """An error as S3 words it."""

    def fault(request: BaseHTTPRequestHandler) -> None:
        body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode() if code else b"<html>busy</html>"
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    return fault


def serve(request: BaseHTTPRequestHandler) -> None:
    """What was asked for."""
    first, last = re.findall(r"\d+", request.headers.get("Range", f"0-{len(BODY) - 1}"))
    body = BODY[int(first) : int(last) + 1] if request.command in ("GET", "HEAD") else b""
    request.send_response(206 if "Range" in request.headers else 200)
    request.send_header("Content-Length", str(len(body)))
    request.send_header("ETag", '"tag"')
    request.end_headers()
    if request.command == "GET":
        request.wfile.write(body)


def hang_up(request: BaseHTTPRequestHandler) -> None:
    """The connection is closed without an answer."""
    request.close_connection = True
    request.connection.close()


def break_off(request: BaseHTTPRequestHandler) -> None:
    """The body ends in the middle."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(BODY)))
    request.end_headers()
    request.wfile.write(BODY[: len(BODY) // 2])
    request.close_connection = True


def stall(request: BaseHTTPRequestHandler) -> None:
    """No answer within the client's timeout."""
    request.server.stalled.wait(30)  # type: ignore[attr-defined]
    request.close_connection = True


class Server(ThreadingHTTPServer):
    """S3 as far as one object goes, with faults in front: each request takes the next one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.seen: list[str] = []
        self.stalled = threading.Event()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def handle_any(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append(f"{self.command} {self.path.partition('?')[0]}")
        fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        with contextlib.suppress(OSError):
            (fault or serve)(self)

    do_GET = do_HEAD = do_PUT = handle_any

    def log_message(self, *_: Any) -> None:
        pass


def environment(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Of a client of that port, and of nothing else."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Listening, and the environment of a client of it."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        environment(monkeypatch, server.server_port)
        yield server
        server.stalled.set()
        server.shutdown()


def store(**limits: float) -> ObjectStore:
    return ObjectStore(**limits, skip_instance_cache=True)


PASSING = {
    "slow down": answer(503, "SlowDown"),
    "too many": answer(429, "TooManyRequests"),
    "internal": answer(500, "InternalError"),
    "gateway": answer(502),
    "gateway timeout": answer(504),
    "request timeout": answer(400, "RequestTimeout"),
    "rival's conditional put": answer(409, "ConditionalRequestConflict"),
    "damaged on the way": answer(400, "XAmzContentSHA256Mismatch"),
    "hung up": hang_up,
}


@pytest.mark.parametrize("name", PASSING)
def test_passing_faults_go_unnoticed(server: Server, name: str) -> None:
    server.faults = [PASSING[name]] * 2
    store().pipe_file("bucket/key", b"data")
    assert server.seen == ["PUT /bucket/key"] * 3


@pytest.mark.parametrize("fault", [break_off, hang_up, answer(503, "SlowDown")], ids=["breaks off", "hangs up", "full"])
def test_a_body_is_read_again_until_it_is_whole(server: Server, fault: Fault, tmp_path: Path) -> None:
    fs = store()
    server.faults = [fault] * 2
    assert fs.cat_file("bucket/key") == BODY
    assert server.seen == ["GET /bucket/key"] * 3
    server.faults = [serve, fault, fault]  # the first asks for the size
    with fs.open("bucket/key", "rb") as file:
        assert file.read() == BODY
    server.faults = [serve, fault, fault]
    fs.get_file("bucket/key", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_server_that_does_not_answer_is_asked_again(server: Server) -> None:
    server.faults = [stall] * 2
    assert store(timeout_s=0.5).cat_file("bucket/key") == BODY
    assert len(server.seen) >= 3


OPERATIONS: dict[str, Callable[[ObjectStore, str], object]] = {
    "cat": lambda fs, _: fs.cat_file("bucket/key"),
    "pipe": lambda fs, _: fs.pipe_file("bucket/key", b"data"),
    "get": lambda fs, file: fs.get_file("bucket/key", file + ".got"),
    "put": lambda fs, file: fs.put_file(file, "bucket/key"),
    "info": lambda fs, _: fs.info("bucket/key"),
    "exists": lambda fs, _: fs.exists("bucket/key"),
    "ls": lambda fs, _: fs.ls("bucket/key"),
    "find": lambda fs, _: fs.find("bucket/key"),
    "open": lambda fs, _: fs.open("bucket/key", "rb").read(),
    "create": lambda fs, _: fs.pipe_file("bucket/key", b"data", mode="create"),
    "rm": lambda fs, _: fs.rm("bucket/key", recursive=True),
}
LASTING = {"unavailable": answer(503, "SlowDown"), "hangs up": hang_up, "stalls": stall}


@pytest.mark.parametrize("fault", LASTING)
def test_no_layer_multiplies_another(server: Server, fault: str, tmp_path: Path) -> None:
    """Without patience every operation is over after one request: nobody else tries again."""
    (tmp_path / "file").write_bytes(BODY)
    server.always = LASTING[fault]
    fs = store(patience_s=0.0, timeout_s=0.5 if fault == "stalls" else 30.0)
    asked = {}
    for name, operation in OPERATIONS.items():
        server.seen.clear()
        with pytest.raises(OSError, match=r"503|SlowDown|no answer from the object store at http://127.0.0.1"):
            operation(fs, str(tmp_path / "file"))
        asked[name] = len(server.seen)
    # aiohttp asks again at once, and only once, where a connection that it kept was closed.
    assert {name: n for name, n in asked.items() if n > (2 if fault == "hangs up" else 1)} == {}


def test_no_operation_waits_for_ever(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a server that accepts connections and not even says "100 Continue"."""
    (tmp_path / "file").write_bytes(BODY)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        environment(monkeypatch, listener.getsockname()[1])
        fs = store(patience_s=0.0, timeout_s=0.3)
        for operation in OPERATIONS.values():
            with pytest.raises(ConnectionError, match=r"no answer from the object store at http://127.0.0.1"):
                operation(fs, str(tmp_path / "file"))


def test_nor_where_bodies_break_off(server: Server) -> None:
    server.always = break_off
    with pytest.raises(ConnectionError, match=r"no answer from the object store at http://127.0.0.1"):
        store(patience_s=0.0).cat_file("bucket/key")
    assert len(server.seen) == 1


def test_patience_ends(server: Server) -> None:
    server.always = answer(503, "SlowDown")
    with pytest.raises(OSError, match="SlowDown no: 'bucket/key'"):
        store(patience_s=1.0).cat_file("bucket/key")
    assert 3 <= len(server.seen) <= 6  # after 0, 0.1, 0.3, 0.7 s, or less by chance


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (answer(404, "NoSuchKey"), FileNotFoundError),
        (answer(404, "NoSuchBucket"), FileNotFoundError),
        (answer(403, "SignatureDoesNotMatch"), PermissionError),
        (answer(403, "InvalidAccessKeyId"), PermissionError),
        (answer(403, "AccessDenied"), PermissionError),
        (answer(400, "InvalidArgument"), OSError),
        (answer(501, "NotImplemented"), OSError),
    ],
    ids=["key", "bucket", "signature", "key id", "denied", "argument", "unknown"],
)
def test_what_does_not_pass_is_said_at_once(server: Server, fault: Fault, kind: type[OSError]) -> None:
    server.always = fault
    with pytest.raises(kind, match="no: 'bucket/key'"):
        store().cat_file("bucket/key")
    assert len(server.seen) == 1


def test_a_rival_who_was_first(server: Server) -> None:
    server.always = answer(412, "PreconditionFailed")
    with pytest.raises(FileExistsError):
        store().pipe_file("bucket/key", b"data", mode="create")
    with pytest.raises(OSError, match="PreconditionFailed") as caught:  # no such condition was set
        store().pipe_file("bucket/key", b"data")
    assert not isinstance(caught.value, FileExistsError)


def test_an_invalid_bucket_is_a_value(server: Server) -> None:
    with pytest.raises(ValueError, match="Invalid bucket name"):
        store().cat_file("a b/key")
    assert server.seen == []


@pytest.mark.parametrize("place", ["127.0.0.1:{port}", "bad host"])
@pytest.mark.parametrize("user", ["http://me:hunter2", "http://hunter2", "http://me:hunter2/x", "me:hunter2"])
def test_an_endpoint_with_a_password_is_refused_and_not_repeated(
    server: Server, place: str, user: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="mshnet")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"{user}@{place.format(port=server.server_port)}")
    fs = store()
    for _ in range(2):
        with pytest.raises(OSError, match=r"without user and password|Invalid endpoint") as caught:
            fs.cat_file("bucket/key")
        assert caught.value.errno == errno.EINVAL
        for text in ("".join(traceback.format_exception(caught.value)), caplog.text, str(pickle.dumps(caught.value))):
            assert "hunter2" not in text
    assert server.seen == []


def test_settings_that_cannot_be_read_are_said_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text("[profile\nregion")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    with pytest.raises(OSError, match="Unable to parse config file") as caught:
        store().cat_file("bucket/key")
    assert caught.value.errno == errno.EINVAL
    assert not isinstance(caught.value, ConnectionError)
    assert server.seen == []


def test_who_waits_is_told_once_what_for(server: Server, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr("mshnet.data.s3._LONGEST_WAIT_S", 0.01)
    server.faults = [answer(503, "SlowDown")] * 20
    store().cat_file("bucket/key")
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "get_object" in warning.message
    assert "SlowDown" in warning.message


@pytest.mark.parametrize("fault", [*LASTING, "breaks off", "no credentials", "signature"])
def test_failures_tell_no_secret(
    server: Server, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither in our log, nor in the chain of errors, nor in the pickle that goes back to the driver."""
    caplog.set_level(logging.DEBUG, logger="mshnet")
    server.always = LASTING.get(fault, break_off if fault == "breaks off" else answer(403, "SignatureDoesNotMatch"))
    if fault == "no credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(OSError, match=r"SlowDown|no answer|Unable to locate|SignatureDoesNotMatch") as caught:
        store(patience_s=0.5, timeout_s=0.3).cat_file("bucket/key")
    for text in ("".join(traceback.format_exception(caught.value)), caplog.text, str(pickle.dumps(caught.value))):
        assert KEY_ID not in text
        assert SECRET not in text
