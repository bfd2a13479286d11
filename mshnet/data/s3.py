"""S3 through s3fs, with one layer of retries in place of three on top of each other."""

from __future__ import annotations

import asyncio
import errno
import io
import logging
import math
import os
import posixpath
import random
import re
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import botocore.exceptions
import s3fs
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError, SSLError
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync_wrapper

PATIENCE_S = 120.0
TIMEOUT_S = 30.0
CHUNK_BYTES = 8 * 2**20  # of an upload or a download
CHUNKS_AT_ONCE = 4
_LONGEST_WAIT_S = 5.0
_SLOWEST_BYTES_PER_S = 2**18
_MOST_PARTS = 10_000  # S3's limit

_log = logging.getLogger(__name__)
_jitter = random.SystemRandom()  # never the generator that a training run has seeded

_TRANSIENT_STATUS = (429, 500, 502, 503, 504)
_TRANSIENT_CODES = (
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
)
_TRANSIENT_ERRORS = (
    aiohttp.ClientError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    ResponseParserError,  # some gateways answer in HTML when they are full
    ConnectionError,
    TimeoutError,
)
_CREDENTIAL_ERRORS = (
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.ProfileNotFound,
)


class ObjectStore(s3fs.S3FileSystem):  # type: ignore[misc]
    """S3 with endpoint, region and credentials from the environment; pickles without any of them.

    A request (with the body of its answer) that fails for a passing reason is repeated, with growing random
    waits, until `patience_s` after its first failure. Then, and for everything else, it raises an OSError:
    ConnectionError where nothing answers, PermissionError where credentials are refused or absent,
    FileNotFoundError, FileExistsError.
    Paths are taken literally; only `glob` gives `*?[` a meaning.
    """

    # Requests pass botocore's retries (by count, and off after 100 that failed in one process), s3fs's around these,
    # and s3fs's around whole reads. Against a server that hangs the three multiply to half an hour; yet none covers
    # the body of a large read, and no timeout an upload that waits for "100 Continue" or for the server to read on.
    # So the inner ones are off, and `_call_s3`, which every request passes, keeps the time.
    retries = 1

    def __init__(self, patience_s: float = PATIENCE_S, timeout_s: float = TIMEOUT_S, **options: Any) -> None:
        super().__init__(
            use_listings_cache=False,  # others write too
            default_block_size=CHUNK_BYTES,
            max_concurrency=CHUNKS_AT_ONCE,
            config_kwargs={
                "retries": {"mode": "standard", "total_max_attempts": 1},
                "connect_timeout": min(10.0, timeout_s),
                "read_timeout": timeout_s,
                "max_pool_connections": 32,
                # Not every server knows the newer checksums; over plain HTTP the signature covers the body.
                "request_checksum_calculation": "when_required",
                "response_checksum_validation": "when_required",
            },
            **options,
        )
        self.patience_s = patience_s
        self.timeout_s = timeout_s

    async def _call_s3(self, method: str, *parameters: Any, **more: Any) -> Any:
        failures, give_up_at = 0, None
        while True:
            try:
                await self.set_session()  # may ask for credentials in a slow place
                async with asyncio.timeout(self.timeout_s + len(more.get("Body", b"")) / _SLOWEST_BYTES_PER_S):
                    answer = await super()._call_s3(method, *parameters, **more)
                if method == "get_object":
                    answer["Body"] = _Body(await _read(answer["Body"]))
                return answer
            except (OSError, BotoCoreError, ResponseParserError, aiohttp.ClientError) as error:
                clear = _as_builtin(error, more, self._s3.meta.endpoint_url if self._s3 else "an unknown address")
                now, wait_s = time.monotonic(), min(0.1 * 2**failures, _LONGEST_WAIT_S)
                # Aborting an upload follows on a failure that had its time.
                give_up_at = give_up_at or now + (0 if method == "abort_multipart_upload" else self.patience_s)
                if not _is_transient(error) or now + wait_s > give_up_at:
                    raise clear from None if clear is error else error.__cause__ or error
            failures += 1
            # The seventh in a row is no hiccup: who waits should know what for.
            _log.log(logging.WARNING if failures == 7 else logging.DEBUG, "%s: %s; trying again", method, clear)
            await asyncio.sleep(_jitter.uniform(wait_s / 2, wait_s))

    call_s3 = sync_wrapper(_call_s3)

    async def set_session(self, *arguments: Any, **more: Any) -> Any:
        # Errors and warnings name the endpoint, so no secret may be in it.
        try:
            client = await super().set_session(*arguments, **more)
        except ValueError as error:  # the endpoint is no URL, the region none
            raise OSError(errno.EINVAL, re.sub(": .*@", ": ", str(error))) from None
        if "@" in client.meta.endpoint_url:
            raise OSError(
                errno.EINVAL,
                "expected AWS_ENDPOINT_URL (or the profile's endpoint_url) without user and password, found one with",
            )
        return client

    async def _expand_path(
        self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None, assume_literal: bool = False
    ) -> list[str]:
        # A name is a name: `rm` would take exp1 for exp[1]. (`glob` is another way.)
        paths = [path] if isinstance(path, str) else path
        found: list[str] = await super()._expand_path(paths, recursive, maxdepth, assume_literal=True)
        return found

    async def _mkdir(self, path: str, **_: Any) -> None:
        # Keys need no folder; s3fs would ask for the bucket each time, and make one where it finds none.
        pass

    mkdir = sync_wrapper(_mkdir)

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        # One request; s3fs would ask for the size first.
        bucket, key, _version = self.split_path(path)
        whole = start is None and end is None
        limits = {} if whole else {"Range": await self._process_limits(path, start, end)}
        answer = await self._call_s3("get_object", Bucket=bucket, Key=key, **limits)
        return bytes(await answer["Body"].read())

    async def _put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        # In parts read from disk, at most CHUNKS_AT_ONCE of them in memory.
        part_bytes = max(CHUNK_BYTES, math.ceil(os.path.getsize(lpath) / _MOST_PARTS))
        await super()._put_file(lpath, rpath, **({"chunksize": part_bytes} | options))

    async def _get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        # By ranges of one version of the object, at most CHUNKS_AT_ONCE of them in memory.
        if os.path.isdir(lpath):
            return
        info = await self._info(rpath)
        bucket, key, _ = self.split_path(rpath)
        size = int(info["size"])
        version = {"IfMatch": info["ETag"]} if info["ETag"] else {}
        starts = range(0, size, CHUNK_BYTES)

        async def fetch(start: int) -> bytes:
            limits = f"bytes={start}-{min(start + CHUNK_BYTES, size) - 1}"
            answer = await self._call_s3("get_object", Bucket=bucket, Key=key, Range=limits, **version)
            return bytes(await answer["Body"].read())

        with open(lpath, "wb") as file:
            for i in range(0, len(starts), CHUNKS_AT_ONCE):
                for data in await asyncio.gather(*map(fetch, starts[i : i + CHUNKS_AT_ONCE])):
                    file.write(data)


class _Body:
    """A body that was read, in the place of one that may break off."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    async def read(self, size: int | None = -1) -> bytes:
        return self._data.read(size)

    def close(self) -> None:
        self._data.close()


async def _read(body: Any) -> bytes:
    try:
        data: bytes = await body.read()
        return data
    finally:
        body.close()


def _answer(error: BaseException) -> tuple[int | None, str, str]:
    """HTTP status, S3's code and words where a server answered; s3fs raises what it makes of botocore's error."""
    if not isinstance(error.__cause__, ClientError):
        return None, "", ""
    answer = error.__cause__.response
    found = answer.get("Error", {})
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status, found.get("Code") or str(status), found.get("Message") or ""


def _is_transient(error: Exception) -> bool:
    status, code, _ = _answer(error)
    if status is not None:
        return status in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
    return isinstance(error, _TRANSIENT_ERRORS) and not isinstance(error, SSLError)


def _as_builtin(error: Exception, request: Mapping[str, Any], endpoint: str) -> Exception:
    """The error with the place in its words and without botocore's signed request, which a pickle would carry on."""
    place = posixpath.join(request.get("Bucket", ""), request.get("Key", ""))
    status, code, words = _answer(error)
    if status is not None:
        if isinstance(error, FileNotFoundError):
            number = errno.ENOENT
        elif isinstance(error, PermissionError):
            number = errno.EACCES
        elif status == 412 and "IfNoneMatch" in request:  # s3fs knows only AWS's way to say so
            number = errno.EEXIST
        else:
            number = getattr(error, "errno", None) or errno.EIO
        return OSError(number, f"{code} {words}".strip(), place)  # Python makes the subclass of the number
    if isinstance(error, _CREDENTIAL_ERRORS):
        return PermissionError(errno.EACCES, str(error), place)
    if isinstance(error, ParamValidationError):
        return ValueError(" ".join(str(error).split()))
    if isinstance(error, _TRANSIENT_ERRORS):
        return ConnectionError(f"no answer from the object store at {endpoint}: {str(error) or 'too slow'}")
    if isinstance(error, OSError):
        return error
    return OSError(errno.EINVAL, str(error), place)  # botocore's own: of its settings and files
