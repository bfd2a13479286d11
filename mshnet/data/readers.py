"""Loader processes: they decode rows of a store straight into memory that the process which asks shares with them.

Memory and pipes have no names and every end is closed by the kernel, so that whoever is killed leaves nothing behind:
the memory is a file without a name, and a loader process ends when its standard input does. Processes are started
afresh, never forked: a fork would copy the locks that threads of Ray and torch hold. Linux only.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import IO, NamedTuple, NoReturn

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mshnet.data.store.images import ImageStore
from mshnet.errors import InputError

_MESSAGE_BYTES = 2**16
_ALIVE_S = 0.2
"""How often whoever waits looks whether the loader processes live."""
_ORPHAN_S = 2.0
"""How often a loader process looks whether its parent is still the one that started it."""
_END_S = 5.0
"""Given to a loader process to end by itself."""
_STARTED = -1
"""In a slot's place: the process is ready."""
_PAGE = mmap.ALLOCATIONGRANULARITY


class LoaderProcessError(RuntimeError):
    """A loader process ended before it was told to, or failed in a way that is no fault of the input."""


class Wanted(NamedTuple):
    """A row to decode, and where to."""

    row: int
    class_id: int
    with_ignore: bool
    image_at: int
    """Bytes from the beginning of the batch's memory."""
    mask_at: int


def read_rows(store: ImageStore, wanted: Iterable[Wanted], memory: UInt8[np.ndarray, " bytes"]) -> None:
    """Decode rows into a batch's memory. Raises InputError as the store does."""
    side = store.manifest.format.image_size_px
    area = side * side
    for row, class_id, with_ignore, image_at, mask_at in wanted:
        image = memory[image_at : image_at + 3 * area].reshape(side, side, 3)
        mask = memory[mask_at : mask_at + area].reshape(side, side)
        store.read_into(row, class_id, image, mask, with_ignore)


class Slots:
    """Memory that the loader processes share with this one, in equal slots, one for a batch."""

    def __init__(self, file: IO[bytes], begin: int, count: int, slot_bytes: int) -> None:
        size = -(-count * slot_bytes // _PAGE) * _PAGE
        os.ftruncate(file.fileno(), begin + size)
        self.begin, self.end, self.count, self.slot_bytes = begin, begin + size, count, slot_bytes
        self.memory = mmap.mmap(file.fileno(), size, offset=begin)
        self.lent: set[int] = set()
        """Slots to which tensors refer."""
        weakref.finalize(self.memory, _punch, file, begin, size).atexit = False

    def lend(self, slot: int) -> UInt8[Tensor, " bytes"]:
        """A slot as a tensor. It is lent until that, and every view of it, is gone."""
        array = np.frombuffer(self.memory, np.uint8, self.slot_bytes, slot * self.slot_bytes)
        self.lent.add(slot)
        # The array lives as long as torch's storage, which is longer than the tensor where a view is kept.
        weakref.finalize(array, self.lent.discard, slot).atexit = False
        return torch.from_numpy(array)


def _punch(file: IO[bytes], begin: int, size: int) -> None:
    """Give memory back that nobody refers to any more."""
    with mmap.mmap(file.fileno(), size, offset=begin) as memory:
        memory.madvise(mmap.MADV_REMOVE)


class Readers:
    """Loader processes. All take their tasks from one socket: whichever is free goes on, and nobody need tell it."""

    def __init__(self, store: ImageStore, processes: int) -> None:
        about = pickle.dumps(store)
        self._file = open(os.memfd_create("mshnet-batches"), "r+b", buffering=0)  # noqa: SIM115 - lives with its maps
        os.pwrite(self._file.fileno(), about, _PAGE)
        self._begin = -(-(_PAGE + len(about)) // _PAGE) * _PAGE
        os.ftruncate(self._file.fileno(), self._begin)
        self._pass = np.frombuffer(mmap.mmap(self._file.fileno(), _PAGE), np.int64, 1)
        """The first page: the number of the pass whose rows are still wanted."""
        self._mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._poll = select.poll()
        self._poll.register(self._mine, select.POLLIN)
        with its:
            inherited = its.fileno(), self._file.fileno()
            self.processes = [_start(*inherited, len(about), number) for number in range(processes)]
        self._looked_at = 0.0
        self._starting = processes
        self._pending: Counter[int] = Counter()
        self._errors: dict[int, Exception] = {}
        self.slots = Slots(self._file, self._begin, 1, _PAGE)
        self.close = weakref.finalize(self, _close, self.processes, self._mine)

    def wait_until_started(self) -> None:
        """Until every process is ready for tasks."""
        while self._starting:
            self._receive(_ALIVE_S)

    @property
    def number(self) -> int:
        """Of the pass that is under way."""
        return int(self._pass[0])

    def begin_pass(self, slots: int, slot_bytes: int) -> int:
        """Give up what was submitted and not waited for; have slots as many and as large as this, or more.

        Returns the pass's number.
        """
        self._pass[0] += 1
        while any(self._pending.values()):
            self._receive(_ALIVE_S)
        self._errors.clear()
        if self.slots.count < slots or self.slots.slot_bytes < slot_bytes:
            # Behind the old ones, which somebody may still look at.
            self.slots = Slots(self._file, self.slots.end, slots, slot_bytes)
        return self.number

    def submit(self, slot: int, wanted: Sequence[Wanted], rows_per_task: int) -> None:
        """Have rows decoded into a slot."""
        slots = self.slots
        place = (self.number, slots.begin, len(slots.memory), slot, slots.slot_bytes)
        for i in range(0, len(wanted), rows_per_task):
            self._send(pickle.dumps((*place, [tuple(row) for row in wanted[i : i + rows_per_task]])))
            self._pending[slot] += 1

    def is_filled(self, slot: int) -> bool:
        """Whether `wait` would return at once."""
        while self._pending[slot] and self._receive(0):
            pass
        return not self._pending[slot] and slot not in self._errors

    def wait(self, slot: int) -> None:
        """Until a slot is filled. Raises what reading it raised, LoaderProcessError where a process is gone."""
        while self._pending[slot]:
            self._receive(_ALIVE_S)
        if error := self._errors.pop(slot, None):
            raise error

    def _send(self, message: bytes) -> None:
        while True:
            try:
                self._mine.send(message, socket.MSG_DONTWAIT)
                return
            except BlockingIOError:  # full: they might be waiting to be rid of what they have done
                self._receive(_ALIVE_S)
            except (BrokenPipeError, ConnectionResetError):
                self._raise_ended()

    def _receive(self, timeout_s: float) -> bool:
        if time.monotonic() > self._looked_at + _ALIVE_S:
            self._looked_at = time.monotonic()
            if any(process.poll() is not None for process in self.processes):
                self._raise_ended()
        if not self._poll.poll(1000 * timeout_s):
            return False
        try:
            message = self._mine.recv(_MESSAGE_BYTES)
        except ConnectionResetError:  # all have ended, with tasks left
            message = b""
        if not message:
            self._raise_ended()
        slot, error = pickle.loads(message)
        if slot == _STARTED:
            self._starting -= 1
            return True
        self._pending[slot] -= 1
        if error is not None:
            self._errors.setdefault(slot, error)
        return True

    def _raise_ended(self) -> NoReturn:
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                if code := process.wait(_ALIVE_S):
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    raise LoaderProcessError(
                        f"loader process {process.pid} {how}; what it was reading is lost. Where memory is short the "
                        "kernel kills processes: give it more, or fewer loader processes, and start again"
                    )
        raise LoaderProcessError("the loader processes have ended; start again")


def _start(tasks: int, file: int, about_bytes: int, number: int) -> subprocess.Popen[bytes]:
    code = (
        f"import sys; sys.path[:] = {sys.path!r}; "
        f"from mshnet.data.readers import serve; serve({tasks}, {file}, {about_bytes}, {os.getpid()})"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, f"mshnet-loader-{number}"],
        stdin=subprocess.PIPE,  # never written to: its end is this process's end
        stdout=2,  # standard output is for a command's result
        pass_fds=(tasks, file),
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )


def _close(processes: Sequence[subprocess.Popen[bytes]], tasks: socket.socket) -> None:
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    tasks.close()


# In a loader process


def serve(tasks: int, file: int, about_bytes: int, parent: int) -> None:
    """Decode what is asked for until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    store: ImageStore = pickle.loads(os.pread(file, about_bytes, _PAGE))
    wanted_pass = np.frombuffer(mmap.mmap(file, _PAGE), np.int64, 1)
    connection = socket.socket(fileno=tasks)
    connection.send(pickle.dumps((_STARTED, None)))
    mapped, memory = (0, 0), np.empty(0, np.uint8)
    while message := connection.recv(_MESSAGE_BYTES):
        number, begin, size, slot, slot_bytes, rows = pickle.loads(message)
        if mapped != (begin, size):
            mapped, memory = (begin, size), np.frombuffer(mmap.mmap(file, size, offset=begin), np.uint8)
        error = None
        if number == wanted_pass[0]:
            error = _attempt(store, [Wanted(*row) for row in rows], memory[slot * slot_bytes :][:slot_bytes])
        connection.send(pickle.dumps((slot, error)))


def _attempt(store: ImageStore, rows: Sequence[Wanted], memory: UInt8[np.ndarray, " bytes"]) -> Exception | None:
    try:
        read_rows(store, rows, memory)
    except InputError as error:
        return InputError(str(error))
    except Exception:  # noqa: BLE001 - whatever it is, it is told to whoever asked
        return LoaderProcessError(
            f"loader process {os.getpid()} failed:\n{traceback.format_exc()[-_MESSAGE_BYTES // 4 :]}"
        )
    return None


def _end_with(parent: int) -> None:
    """End this process, whatever it is doing, when the parent's end of standard input closes."""
    while os.getppid() == parent and not select.select([0], [], [], _ORPHAN_S)[0]:
        pass
    os._exit(0)
