"""Remote shards on the node's own disk: one copy for all its processes, bounded, least recently used out first.

Nothing but files and the kernel's locks, so that a process may be killed anywhere (docs/adr/0006-node-cache.md):

    SHA256             a whole shard, hashed when it arrived; its modification time says when it was last used
    SHA256.SIZE.part   one that is being fetched, locked by who fetches it
    lock               held while room is made and while names change
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mshnet.data.store.manifest import Shard
from mshnet.data.store.shards import DamagedShardError, map_shard
from mshnet.errors import InputError

DIRECTORY, LIMIT = "MSHNET_CACHE_DIR", "MSHNET_CACHE_GIB"
"""Environment variables."""
HOME = "XDG_CACHE_HOME"
"""Names, if set, where a user's caches lie."""
DEFAULT_GIB = 32.0
FREE_SHARE = 0.05
"""Of the disk, which the cache leaves free."""
TOUCH_S = 10.0
"""A use is written down when the last one is this long ago."""
_NAME = re.compile(r"[0-9a-f]{64}(\.(?P<size>\d+)\.part)?")

Fetch = Callable[[str], object]
"""Writes a remote shard to a local path."""


class NodeCache:
    """Whole shards, by the SHA-256 of their content, shared by every process of a user on a node.

    The files together stay below `limit_bytes` (and leave 5% of the disk free); only where the shards that are being
    fetched at one time do not fit below it at once is it passed, by at most one shard per process.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int) -> None:
        self.folder = Path(folder)
        self.limit_bytes = limit_bytes
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        open(self.folder / "lock", "ab").close()  # where that cannot be written, it is better said now

    @staticmethod
    def from_environment() -> NodeCache:
        """The node's cache: MSHNET_CACHE_DIR (else `mshnet` among the user's caches), at most MSHNET_CACHE_GIB.

        Raises InputError for a limit that is no positive number, and for a folder that is relative, cannot be written
        or, below the temporary one, is another user's.
        """
        given = os.environ.get(LIMIT, str(DEFAULT_GIB))
        try:
            limit_gib = float(given)
        except ValueError:
            limit_gib = 0.0
        if not 0 < limit_gib < float("inf"):
            raise InputError(f"{LIMIT} must be a positive number of GiB, got {given!r}")
        limit_bytes, chosen = int(limit_gib * 2**30), os.environ.get(DIRECTORY)
        if not chosen:
            return _default(limit_bytes)
        folder = os.path.expanduser(chosen)
        if not os.path.isabs(folder):  # processes of one job have different working directories
            raise InputError(f"{DIRECTORY} must be an absolute path, got {chosen!r}")
        try:
            return NodeCache(folder, limit_bytes)
        except OSError as error:
            raise InputError(
                f"expected {DIRECTORY} to be a folder that this user may write to, found {chosen!r} ({error}); "
                "set it to another, or allow it"
            ) from error

    def map(self, shard: Shard, fetch: Fetch) -> mmap.mmap:
        """The shard in memory: fetched where it is not there, awaited where another process fetches it.

        A mapping stays good when the shard is evicted, but its disk space is free only when it is dropped: so drop it.
        Raises DamagedShardError for one that is missing or damaged where it comes from, InputError when the disk is
        full of other things.
        """
        return self._find(shard) or self._fetch(shard, fetch, wait=True)

    def fetch_ahead(self, shard: Shard, fetch: Fetch) -> bool:
        """Have the shard there. False, at once, where another process or thread is fetching it; raises as `map`."""
        try:
            return bool(self._find(shard) or self._fetch(shard, fetch, wait=False))
        except BlockingIOError:
            return False

    def drop(self, shard: Shard) -> None:
        """Forget a copy that was damaged here."""
        with contextlib.suppress(FileNotFoundError):
            self._path(shard).unlink()

    def room_bytes(self) -> int:
        """How much the cache may hold at the moment, with what it holds."""
        disk = shutil.disk_usage(self.folder)
        held = sum(file.stat.st_size for file in self._files())
        return max(0, min(self.limit_bytes, held + disk.free - int(FREE_SHARE * disk.total)))

    def _path(self, shard: Shard) -> Path:
        return self.folder / shard.sha256

    def _find(self, shard: Shard) -> mmap.mmap | None:
        try:
            with open(self._path(shard), "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if found.st_size == shard.size_bytes:
                    if abs(time.time() - found.st_mtime) > TOUCH_S:
                        os.utime(file.fileno())
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            return None
        self.drop(shard)
        return None

    def _fetch(self, shard: Shard, fetch: Fetch, wait: bool) -> mmap.mmap:
        part = self.folder / f"{shard.sha256}.{shard.size_bytes}.part"
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a cleaner of temporary files may have been there
        with _locked(part, wait) as lock:
            # Whoever holds a part's lock is the only one to write, rename or remove it.
            try:
                if data := self._find(shard):  # from whoever held the lock before
                    part.unlink()
                    return data
                self._make_room()
                self._arrive(shard, fetch, part, lock)
                data = map_shard(str(part), shard)
                with _locked(self.folder / "lock"):  # a look at the folder meanwhile could miss both names
                    part.rename(self._path(shard))
                    self._evict(keep=self._path(shard))  # two that came at once may be too many together
                return data
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _arrive(self, shard: Shard, fetch: Fetch, part: Path, lock: IO[bytes]) -> None:
        try:
            self._write(shard, fetch, part)
        except FileNotFoundError as error:
            raise DamagedShardError(f"expected {shard.size_bytes} bytes, found none") from error
        size, digest = lock.seek(0, os.SEEK_END), _sha256(lock)
        if size != shard.size_bytes:
            raise DamagedShardError(f"expected {shard.size_bytes} bytes, found {size}")
        if digest != shard.sha256:
            raise DamagedShardError(f"expected sha256 {shard.sha256[:12]}…, found {digest[:12]}…")

    def _write(self, shard: Shard, fetch: Fetch, part: Path) -> None:
        while True:
            try:
                fetch(str(part))
                return
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                os.truncate(part, 0)
                if not self._make_room(shard.size_bytes):
                    free = shutil.disk_usage(self.folder).free
                    raise InputError(
                        f"expected {shard.size_bytes} bytes free for a shard in the cache {str(self.folder)!r}, found "
                        f"{free}; free some there, or set {DIRECTORY} to a folder on another disk"
                    ) from error

    def _make_room(self, at_least: int = 0) -> int:
        """Evict until the cache is within its limit, and at least so many bytes; returns how many."""
        with _locked(self.folder / "lock"):
            return self._evict(at_least)

    def _evict(self, at_least: int = 0, keep: Path | None = None) -> int:
        room = self.room_bytes()
        files = [file for file in self._files() if not file.is_part or not _removed_if_abandoned(file.path)]
        total, evicted = sum(file.size_bytes for file in files), 0
        for file in sorted(files, key=lambda file: file.stat.st_mtime):
            if total - evicted <= room and evicted >= at_least:
                break
            if not file.is_part and file.path != keep:
                file.path.unlink(missing_ok=True)
                evicted += file.size_bytes
        return evicted

    def _files(self) -> list[_File]:
        """What of the folder is the cache's: a user may have pointed it at one with other things in it."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if match := _NAME.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):  # another process's fetch has ended
                        files.append(_File(Path(entry.path), entry.stat(), match["size"]))
        return files


def _default(limit_bytes: int) -> NodeCache:
    """Among the user's caches, else below the temporary folder, which lies in memory on many nodes."""
    for caches in (os.environ.get(HOME, ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(caches):
            with contextlib.suppress(OSError):  # a home folder that cannot be written
                return NodeCache(Path(caches, "mshnet"), limit_bytes)
    folder = Path(tempfile.gettempdir(), f"mshnet-cache-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        # Anybody may make folders there.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise InputError(f"expected {str(folder)!r} to be a folder of yours, found another's; set {DIRECTORY}")
        return NodeCache(folder, limit_bytes)
    except OSError as error:
        raise InputError(
            f"expected a folder for the cache that this user may write to, found none in the home folder nor at "
            f"{str(folder)!r} ({error}); set {DIRECTORY} to one"
        ) from error


@dataclass(frozen=True)
class _File:
    path: Path
    stat: os.stat_result
    reserved: str | None
    """Bytes that a part will have."""

    @property
    def is_part(self) -> bool:
        return self.reserved is not None

    @property
    def size_bytes(self) -> int:
        return self.stat.st_size if self.reserved is None else int(self.reserved)


def _removed_if_abandoned(part: Path) -> bool:
    """Remove a part that nobody is fetching: whoever did was killed."""
    try:
        with _locked(part, wait=False, create=False):
            part.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True, create: bool = True) -> Iterator[IO[bytes]]:
    """Hold the lock of the file of that name. Raises BlockingIOError where another does and not to wait was asked."""
    while True:
        with open(path, "ab+" if create else "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Who held it before may have renamed or removed the file: then this lock means nothing.
            if _is_at(file, path):
                try:
                    yield file
                finally:
                    fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child holds the file too
                return


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sha256(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # typeshed wants readinto
