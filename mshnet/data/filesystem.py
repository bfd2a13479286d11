"""The file system behind a URI: the one place where it is made. Loads s3fs only for an s3 URI."""

from __future__ import annotations

import functools
import os
import re
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mshnet.errors import InputError

_USER = re.compile(
    r"(?<!abfs)(?<!abfss)://[^/]*@"  # Azure has CONTAINER@ACCOUNT there
    r"|://[^/?]*:(?!\d+(/|$)).*@"  # passwords may have a slash; not the colon of HOST:PORT
    r"|s3a?://[^/]*:.*@",  # which S3 has not
    re.IGNORECASE,
)
_SIGNATURE = re.compile(r"://.*[?&][^=&/]*(sig|token|credential|secret|passw|key_?id)[^=&/]*=", re.IGNORECASE)


def is_local(uri: str) -> bool:
    """Whether a URI is a path of this machine: plain, or `file://`."""
    return "://" not in uri or uri.startswith(("file://", "local://"))


def is_s3(uri: str) -> bool:
    """Whether a URI is of an object store that speaks S3."""
    return uri.startswith(("s3://", "s3a://"))


def filesystem(uri: str, quick: bool = False) -> tuple[Any, str]:
    """The fsspec file system of a path or URI, and its own name of the place.

    An s3 URI is served with the endpoint, region and credentials of the usual AWS environment and files; a request
    that fails for a passing reason is repeated for two minutes, or seconds where it is to be `quick` (see
    `mshnet.data.s3`). Safe to call from any thread and after a fork. Raises InputError for a URI that carries
    credentials or is of an unknown kind.
    """
    if is_local(uri):
        return LocalFileSystem(), LocalFileSystem._strip_protocol(uri)
    refuse_secrets(uri)
    if not is_s3(uri):
        try:
            return fsspec.core.url_to_fs(uri)  # type: ignore[no-any-return]
        except (ValueError, ImportError) as error:
            raise InputError(
                f"expected a local path, s3://BUCKET/... or another URI that fsspec opens, found {uri!r} ({error})"
            ) from error
    environment = tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    fs = _object_store(os.getpid(), environment, quick)
    return fs, fs._strip_protocol(uri)


@functools.lru_cache(maxsize=4)
def _object_store(process: int, environment: tuple[tuple[str, str], ...], quick: bool) -> Any:
    # fsspec's own cache would go on with the credentials that the process began with.
    try:
        from mshnet.data.s3 import ObjectStore
    except ImportError as error:
        raise InputError(f"expected s3fs to be installed for s3:// URIs ({error}); pip install s3fs") from error
    limits = {"patience_s": 3.0, "timeout_s": 5.0} if quick else {}
    return ObjectStore(**limits, skip_instance_cache=True)


def secret_in(uri: str) -> str | None:
    """What of a URI is a credential, in words that do not repeat it; None for a bare one."""
    if _SIGNATURE.search(uri):
        return "a key or signature after the ?"
    return "a user or password before the @" if _USER.search(uri) else None


def refuse_secrets(uri: str) -> None:
    """Raise InputError, without repeating it, for a URI with a user and password or a signature in it."""
    if found := secret_in(uri):
        raise InputError(
            f"expected a URI without credentials, found {found}; URIs are recorded, so give the bare URI and set "
            "AWS_PROFILE (with AWS_SHARED_CREDENTIALS_FILE) or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
