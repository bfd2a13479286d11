"""Features on a node's own disk while an evaluation lasts: bounded, shared by its processes, least recently used out.

Nothing but files and the kernel's locks, so that a process may be killed anywhere (docs/adr/0012-features-on-disk.md):

    KEY/users       locked, shared, by every process that uses the folder; who can have it alone removes the folder
    KEY/room        held while room is made and while names change
    KEY/ROW         an image's features, whole; its modification time says when they were last used
    KEY/ROW.part    those that are being written
    KEY/ROW.lock    held by who computes or writes them
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from mshnet.backbone import Features
from mshnet.data.store.cache import FREE_SHARE, NodeCache

LOG = logging.getLogger(__name__)
FOLDER = "features"
"""Beside the node's cache of remote shards (MSHNET_CACHE_DIR)."""
_USERS, _ROOM, _GONE = "users", "room", ".gone-"
_FILE = re.compile(r"\d+(\.part)?")
_HEAD_BYTES = 4096
"""Types and shapes, as JSON; then the levels' numbers, channels last."""


class FeatureFiles:
    """Features by store row, of one backbone at one precision: all of that is in the `key`.

    The files together stay below `limit_bytes`, and leave 5% of the disk free. A disk that is full, or fails, costs
    time only: what is not there is computed. The folder is removed by the last of its processes to close it; where
    that one was killed, by the next that opens any.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        root = Path(folder)
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._users = _joined(self.folder)
        self._failed = False
        for other in root.iterdir():
            if other != self.folder:
                _remove_if_unused(other)
        self.close = weakref.finalize(self, _leave, self.folder, self._users)
        """Use it no more; the last to do so removes the files."""

    @staticmethod
    def on_this_node(key: str, limit_bytes: int) -> FeatureFiles | None:
        """Beside the node's cache; None where nothing may be written there, which is said.

        Raises InputError as `NodeCache.from_environment` does.
        """
        folder = NodeCache.from_environment().folder / FOLDER
        try:
            return FeatureFiles(folder, key, limit_bytes)
        except OSError as error:
            LOG.warning("no features are kept in %s: %s", folder, error)
            return None

    def read(self, row: int, device: torch.device) -> Features | None:
        """An image's features, on a device; None where they are not there."""
        try:
            with open(self.folder / str(row), "rb", buffering=0) as file:
                os.utime(file.fileno())
                return _read(file, device)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self._say(f"could not read {self.folder / str(row)}: {error}")
            return None

    def write(self, row: int, features: Features) -> None:
        """Put an image's features there, unless they are; what has not been used for longest makes room."""
        with self.claimed(row):
            self.put(row, features)

    def put(self, row: int, features: Features) -> None:
        """The same for whoever holds the row's claim."""
        path, part = self.folder / str(row), self.folder / f"{row}.part"
        head = _head(features)
        size = _HEAD_BYTES + sum(maps.nbytes for maps in features)
        if size > self.limit_bytes or path.exists():
            return
        try:
            with open(part, "wb", buffering=0) as file:
                if not self._reserved(file, size):
                    part.unlink()
                    return
                for data in (memoryview(head), *(_bytes(maps).numpy().data for maps in features)):
                    _write_all(file, data)
            part.rename(path)
        except OSError as error:  # a full disk, mostly
            self._say(f"could not keep features in {self.folder}: {error}; they are computed again where needed")
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def claimed(self, row: int) -> Iterator[None]:
        """Hold the right to compute and write a row; waits while another has it."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_locked(self.folder / f"{row}.lock"))
            except OSError as error:  # a full disk has no room for a name either
                self._say(f"could not share features in {self.folder}: {error}; each process computes its own")
            yield

    def held_bytes(self) -> int:
        """What the files take together."""
        return sum(size for _, _, size in self._files())

    def _reserved(self, file: IO[bytes], size: int) -> bool:
        """Room for a file: taken at once, so that two that write at one time pass the limit together no more."""
        with _locked(self.folder / _ROOM):
            files = sorted((used, path, held) for path, used, held in self._files() if path.suffix != ".part")
            disk = shutil.disk_usage(self.folder)
            total = self.held_bytes()
            room = min(self.limit_bytes, total + disk.free - int(FREE_SHARE * disk.total))
            for _, path, held in files:
                if total + size <= room:
                    break
                path.unlink(missing_ok=True)
                total -= held
            if total + size > room:
                return False
            os.posix_fallocate(file.fileno(), 0, size)
            return True

    def _files(self) -> list[tuple[Path, float, int]]:
        """Path, when last used, bytes."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if _FILE.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        stat = entry.stat()
                        found.append((Path(entry.path), stat.st_mtime, stat.st_size))
        return found

    def _say(self, problem: str) -> None:
        if not self._failed:
            self._failed = True
            LOG.warning("%s", problem)


def _head(features: Features) -> bytes:
    shapes = [list(maps.shape[1:]) for maps in features]
    text = json.dumps({"dtype": str(features[0].dtype).removeprefix("torch."), "shapes": shapes}).encode()
    return text.ljust(_HEAD_BYTES)


def _bytes(maps: Tensor) -> Tensor:
    """The numbers of one image's maps, channels last, as bytes; without a copy where they lie so."""
    return maps.detach().movedim(2, -1).contiguous().cpu().view(torch.uint8).flatten()


def _read(file: IO[bytes], device: torch.device) -> Features:
    head = json.loads(file.read(_HEAD_BYTES))
    dtype: torch.dtype = getattr(torch, head["dtype"])
    levels = []
    for layers, channels, height, width in head["shapes"]:
        count = layers * channels * height * width
        maps = torch.empty(count, dtype=dtype)
        left = maps.view(torch.uint8).numpy().data
        while left:
            read = file.readinto(left)  # type: ignore[attr-defined]  # an unbuffered file has it
            if not read:
                raise ValueError(f"it ends {len(left)} bytes too early")
            left = left[read:]
        levels.append(maps.view(1, layers, height, width, channels).movedim(-1, 2).to(device))
    return Features(*levels)


def _write_all(file: IO[bytes], left: memoryview) -> None:
    while left:
        left = left[file.write(left) :]


def _joined(folder: Path) -> IO[bytes]:
    """The folder's users file, locked with the others'."""
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # its last user has just removed it
            users = open(folder / _USERS, "ab")  # noqa: SIM115 kept open: it is the lock
            fcntl.flock(users, fcntl.LOCK_SH)
            if _is_at(users, folder / _USERS):
                return users
            users.close()


def _leave(folder: Path, users: IO[bytes]) -> None:
    users.close()
    _remove_if_unused(folder)


def _remove_if_unused(folder: Path) -> None:
    """Also what is left of one whose removal was cut short."""
    with contextlib.suppress(OSError):
        if _GONE in folder.name:
            shutil.rmtree(folder)
            return
        with open(folder / _USERS, "rb") as users:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(users, folder / _USERS):
                # Under another name first, so that who comes meanwhile makes a new one.
                gone = folder.with_name(folder.name + _GONE + uuid.uuid4().hex)
                folder.rename(gone)
                shutil.rmtree(gone)


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
