"""The temporary folder, where what is being made lies without a name."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator

from mshnet.errors import InputError


@contextlib.contextmanager
def temporary_room(wanted: str) -> Iterator[None]:
    """Around writing to the temporary folder: where its disk is full, raises InputError that names it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(
            f"expected room for {wanted} in the temporary folder {tempfile.gettempdir()!r}, found none ({error}); "
            "set TMPDIR to a folder on a larger disk"
        ) from error
