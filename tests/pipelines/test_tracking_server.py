"""A tracking server that is not there, or does not let us in."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mshnet.errors import InputError
from pipelines.tracking_server import check
from tests.object_store import free_port

USER = base64.b64encode(b"mshnet:hunter2").decode()


class Answers(BaseHTTPRequestHandler):
    """As MLflow's server does: 401 without the user, 403 under another name than it was started for."""

    def do_GET(self) -> None:
        if "localhost" in self.headers["Host"]:
            status, body = 403, b"Invalid Host header - possible DNS rebinding attack detected"
        elif self.headers.get("Authorization") != f"Basic {USER}":
            status, body = 401, b"You are not authenticated"
        else:
            status, body = (200, b"{}") if self.path.startswith("/api/2.0/mlflow/experiments/") else (404, b"nothing")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_who_is_let_in(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "mshnet")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    check(f"http://127.0.0.1:{port}")
    with pytest.raises(InputError, match=r"found status 404 \(nothing\); look into its log"):
        check(f"http://127.0.0.1:{port}/elsewhere")
    with pytest.raises(InputError, match=r"takes no requests under this name \(403\); start it with this HOST:PORT"):
        check(f"http://localhost:{port}")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(
        InputError, match=r"\(401\); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    ) as caught:
        check(f"http://127.0.0.1:{port}")
    assert "wrong" not in str(caught.value)


def test_a_server_that_is_not_there_is_found_out_in_seconds() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=f"expected a tracking server at '{uri}', found none that answers .*refused"):
        check(uri)


def test_files_and_databases_are_not_asked() -> None:
    check("sqlite:////nowhere/mlflow.db")
    check("postgresql+psycopg2://nowhere.invalid/mlflow")
