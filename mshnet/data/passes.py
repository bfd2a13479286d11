"""One pass over batches, as pieces of memory: decoded here or by loader processes, brought to a GPU ahead of need."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from mshnet.data.readers import Readers, Slots, Wanted, read_rows
from mshnet.data.store.images import ImageStore

KEPT_BATCHES = 2
"""That a consumer may keep as they are: the one it works on, and that before until the name is given to the next."""
_ROWS_AHEAD = 8
"""Per loader process at least, and two batches at least."""
_ROWS_PER_TASK = 4, 16
"""At least, as a task costs 0.1 ms beside 1.7 ms for each row; at most, so that a task fits a message."""


@runtime_checkable  # the tests' run-time shape check needs isinstance
class Plan(Protocol):
    """A batch to come."""

    @property
    def nbytes(self) -> int: ...
    def wanted(self) -> Sequence[Wanted]: ...


@runtime_checkable
class Pass(Protocol):
    """Batches' memory, in order. Iterating raises what reading raises, in the turn of the batch concerned."""

    def __iter__(self) -> Iterator[UInt8[Tensor, " bytes"]]: ...
    def __next__(self) -> UInt8[Tensor, " bytes"]: ...
    def is_ready(self) -> bool:
        """Whether the next one is there without waiting."""
        ...


class LocalPass:
    """Decodes each batch when it is asked for."""

    def __init__(self, store: ImageStore, plans: Iterable[Plan], pinned: bool) -> None:
        self._store, self._plans, self._pinned = store, iter(plans), pinned

    def __iter__(self) -> Iterator[UInt8[Tensor, " bytes"]]:
        return self

    def __next__(self) -> UInt8[Tensor, " bytes"]:
        plan = next(self._plans)
        memory = torch.empty(plan.nbytes, dtype=torch.uint8, pin_memory=self._pinned)
        read_rows(self._store, plan.wanted(), memory.numpy())
        return memory

    def is_ready(self) -> bool:
        return False


class SharedPass:
    """Has loader processes decode some batches ahead, into memory that is used again when nobody refers to it."""

    def __init__(self, readers: Readers, plans: Iterable[Plan], most_bytes: int, pinned: bool) -> None:
        """One batch or more; `most_bytes` of the largest."""
        self._readers, self._pinned = readers, pinned
        self._upcoming: deque[int] = deque()
        plans = iter(plans)
        first = next(plans)
        self._plans = chain([first], plans)
        rows, processes = len(first.wanted()), len(readers.processes)
        self._ahead = max(2, -(-_ROWS_AHEAD * processes // rows))
        self._rows_per_task = min(max(rows // (2 * processes), _ROWS_PER_TASK[0]), _ROWS_PER_TASK[1])
        before = readers.slots
        self._number = readers.begin_pass(self._ahead + KEPT_BATCHES, most_bytes)
        if pinned and readers.slots is not before:
            _pin(readers.slots)
        self._submit()

    def __iter__(self) -> Iterator[UInt8[Tensor, " bytes"]]:
        return self

    def __next__(self) -> UInt8[Tensor, " bytes"]:
        self._check()
        self._submit()
        if not self._upcoming:
            raise StopIteration
        slot = self._upcoming.popleft()
        self._readers.wait(slot)
        slots = self._readers.slots
        if len(slots.lent) < KEPT_BATCHES:
            return slots.lend(slot)
        shared = torch.frombuffer(
            slots.memory, dtype=torch.uint8, count=slots.slot_bytes, offset=slot * slots.slot_bytes
        )
        return torch.empty(slots.slot_bytes, dtype=torch.uint8, pin_memory=self._pinned).copy_(shared)

    def is_ready(self) -> bool:
        self._check()
        self._submit()
        return bool(self._upcoming) and self._readers.is_filled(self._upcoming[0])

    def _check(self) -> None:
        if self._number != self._readers.number:
            raise RuntimeError("expected to go on with the loader's last pass; another has begun since")

    def _submit(self) -> None:
        slots = self._readers.slots
        while len(self._upcoming) < self._ahead and (plan := next(self._plans, None)):
            if plan.nbytes > slots.slot_bytes:
                raise ValueError(
                    f"expected episodes of one number of shots in a pass: {slots.slot_bytes} bytes, found {plan.nbytes}"
                )
            slot = next(i for i in range(slots.count) if i not in slots.lent and i not in self._upcoming)
            self._readers.submit(slot, plan.wanted(), self._rows_per_task)
            self._upcoming.append(slot)


def _pin(slots: Slots) -> None:
    """Keep the slots in place for a GPU's copies, which are immediate without, and wait for."""
    runtime = torch.cuda.cudart()
    address = np.frombuffer(slots.memory, np.uint8).ctypes.data
    if int(runtime.cudaHostRegister(address, len(slots.memory), 0)) == 0:
        weakref.finalize(slots.memory, runtime.cudaHostUnregister, address).atexit = False


class UploadedPass:
    """Brings each batch to a GPU by a stream of its own; the next one, if it is there, before this one is used."""

    def __init__(self, host: Pass, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._host, self._device, self._stream = host, device, stream
        stream.synchronize()  # what the pass before sent from memory that is used again now
        self._uploaded: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        self._sending: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def __iter__(self) -> Iterator[UInt8[Tensor, " bytes"]]:
        return self

    def __next__(self) -> UInt8[Tensor, " bytes"]:
        memory, sent = self._uploaded.popleft() if self._uploaded else self._upload(next(self._host))
        if self._host.is_ready():
            self._uploaded.append(self._upload(next(self._host)))
        current = torch.cuda.current_stream(self._device)
        current.wait_event(sent)
        memory.record_stream(current)  # or it is given away when this stream has not come to its use yet
        return memory

    def is_ready(self) -> bool:
        return bool(self._uploaded) or self._host.is_ready()

    def _upload(self, host: UInt8[Tensor, " bytes"]) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            memory = host.to(self._device, non_blocking=True)
            sent = self._stream.record_event()
        self._sending.append((host, sent))
        while len(self._sending) >= KEPT_BATCHES:  # sent long ago; now its memory may be used again
            self._sending.popleft()[1].synchronize()
        return memory, sent
