"""A real HTTP proxy in front of a server, that fails or delays a chosen share of the requests.

Requests and answers pass through unchanged, the Host header too: S3's signature covers it, and the client signs the
proxy's address. So what a client sees is a server that fails, at the outermost edge.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

BLOCK_BYTES = 1 << 16
SLOW_DOWN = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>proxy</Message></Error>"


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Shares of the requests, 0..1, that meet each fault; a request meets one at most, and may be delayed besides."""

    slow_down: float = 0.0
    """Answered 503 SlowDown; nothing reaches the server."""
    reset: float = 0.0
    """The connection is reset; nothing reaches the server."""
    lose_answer: float = 0.0
    """The server does what was asked, then the connection is reset instead of its answer."""
    truncate: float = 0.0
    """The connection ends within the answer's body. Answers without a body pass."""
    delay: float = 0.0
    """Held back for `delay_s` first."""
    delay_s: float = 1.0

    def __post_init__(self) -> None:
        if min(getattr(self, item.name) for item in fields(self)) < 0 or self.delay > 1 or sum(self.shares) > 1:
            raise ValueError(f"shares must be 0..1 and add up to 1 at most, got {self}")

    @property
    def shares(self) -> tuple[float, ...]:
        """Of the faults that exclude each other, in the order of their names below."""
        return self.slow_down, self.reset, self.lose_answer, self.truncate

    def draw(self, generator: random.Random) -> tuple[str, bool]:
        """The fault that a request meets (empty: none), and whether it is delayed; always two draws."""
        dice, delayed = generator.random(), generator.random() < self.delay
        for name, share in zip(("slow_down", "reset", "lose_answer", "truncate"), self.shares, strict=True):
            if dice < share:
                return name, delayed
            dice -= share
        return "", delayed


@dataclass(frozen=True)
class Head:
    """The first lines of a request or an answer, as they came, and the headers by lower-case name."""

    raw: bytes
    first: list[str]
    headers: Mapping[str, str]

    @classmethod
    async def read(cls, reader: asyncio.StreamReader) -> Head:
        """The next head on a connection; IncompleteReadError at its end."""
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").strip().split("\r\n")
        pairs = (line.split(":", 1) for line in lines)
        return cls(raw, first.split(" ", 2), {name.strip().lower(): value.strip() for name, value in pairs})

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.first[1])

    @property
    def length(self) -> int | None:
        """The body's length in bytes; None where it comes in chunks."""
        chunked = "chunked" in self.headers.get("transfer-encoding", "")
        return None if chunked else int(self.headers.get("content-length", 0))


async def blocks(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
    """A body as it came, piece by piece."""
    if length is None:
        size = 1
        while size:
            line = await reader.readline()
            size = int(line.split(b";")[0], 16)
            yield line + await reader.readexactly(size + 2)
        return
    while length:
        block = await reader.read(min(length, BLOCK_BYTES))
        if not block:
            raise ConnectionResetError("the body ended early")
        length -= len(block)
        yield block


def reset(writer: asyncio.StreamWriter) -> None:
    """End a connection with RST, as a server that died does."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@dataclass
class FaultProxy:
    """`with FaultProxy(endpoint, Faults(reset=0.1), seed=1) as proxy:` serves at `proxy.endpoint` until the end.

    `faults` may be replaced at any time; `counts` has what was done, by the names of the faults, and `requests`.
    The n-th request meets the same fault for the same seed; which request is the n-th is up to the clients.
    """

    upstream: str
    faults: Faults = field(default_factory=Faults)
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter, init=False)
    endpoint: str = field(default="", init=False)

    def __enter__(self) -> Self:
        self._generator = random.Random(self.seed)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        if not self._ready.wait(timeout=30):
            raise RuntimeError("the proxy did not start")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(timeout=30)

    async def _run(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.endpoint = "http://{}:{}".format(*server.sockets[0].getsockname())
        self._ready.set()
        await self._end.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(await Head.read(reader), reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            reset(writer)  # the client left, or the server did
        except asyncio.CancelledError:
            pass  # the proxy ends
        finally:
            writer.close()

    async def _answer(self, request: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request; whether the connection can take another."""
        fault, delayed = self.faults.draw(self._generator)
        self.counts["requests"] += 1
        if delayed:
            self.counts["delay"] += 1
            await asyncio.sleep(self.faults.delay_s)
        if fault == "reset":
            self.counts[fault] += 1
            reset(writer)
            return False
        if fault == "slow_down":
            self.counts[fault] += 1
            return await self._slow_down(request, reader, writer)
        server_reader, server_writer = await asyncio.open_connection(*self._address)
        server_writer.write(request.raw)
        sending = asyncio.create_task(self._send(request, reader, server_writer))
        try:
            return await self._pass_on(request, fault, server_reader, writer) and sending.done()
        finally:
            sending.cancel()
            server_writer.close()

    @property
    def _address(self) -> tuple[str, int]:
        parts = urlsplit(self.upstream)
        return str(parts.hostname), int(parts.port or 80)

    async def _slow_down(self, request: Head, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        waits = "100-continue" in request.headers.get("expect", "")
        if not waits:  # the body is under way: unread, it would turn the answer into a reset
            async for _ in blocks(reader, request.length):
                pass
        head = f"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: {len(SLOW_DOWN)}\r\n"
        writer.write(head.encode() + (b"Connection: close\r\n\r\n" if waits else b"\r\n") + SLOW_DOWN)
        await writer.drain()
        return not waits

    async def _send(self, request: Head, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        try:
            async for block in blocks(reader, request.length):
                server.write(block)
                await server.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            server.transport.abort()  # the client left, or the server did: nothing more to wait for

    async def _pass_on(
        self, request: Head, fault: str, server: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        while (answer := await Head.read(server)).status < 200:  # 100 Continue comes before the answer
            writer.write(answer.raw)
        if fault == "lose_answer":
            self.counts[fault] += 1
            reset(writer)
            return False
        writer.write(answer.raw)
        empty = request.first[0] == "HEAD" or answer.status in (204, 304) or answer.length == 0
        if empty:
            await writer.drain()
            return True
        cut = int((answer.length or 0) * self._generator.random()) if fault == "truncate" else None
        async for block in blocks(server, answer.length):
            if cut is not None and cut <= len(block):
                self.counts[fault] += 1
                writer.write(block[: min(cut, len(block) - 1)])
                await writer.drain()
                return False
            cut = None if cut is None else cut - len(block)
            writer.write(block)
            await writer.drain()
        return True
