"""Where an update's time goes: named regions of the code, and the table of them from a profiler's trace.

recorder = recording(skip=3, updates=5)
with recorder:
    for batch in batches:
        train_step(...)
        recorder.step()
print(breakdown(recorder).table())
"""

from __future__ import annotations

import bisect
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mshnet.errors import InputError
from mshnet.timeline import Span, innermost, length, minus, overlap, union

Region = Literal[
    "loader wait",
    "backbone",
    "similarity",
    "merging",
    "loss",
    "backward",
    "optimizer",
    "communication",
    "checkpoint copy",
]
REGIONS: tuple[Region, ...] = get_args(Region)
"""The parts of an update, in the order in which it meets them."""
OTHER = "other"
"""What no region covers."""

_NOTHING: AbstractContextManager[Any] = nullcontext()
_ON_THE_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a Chrome trace
_LAUNCHES = ("cuda_runtime", "cuda_driver")


def region(name: Region) -> AbstractContextManager[Any]:
    """Names what runs inside `with region(name):` in a profiler's trace; nothing while no profiler records.

    Regions may nest; time counts for the innermost. Inside compiled code they do nothing: put them around it.
    """
    if torch.compiler.is_compiling() or not torch.autograd.profiler._is_profiler_enabled:
        return _NOTHING
    return torch.profiler.record_function(name)


def recording(skip: int, updates: int) -> torch.profiler.profile:
    """A profiler that lets `skip` updates pass, records `updates` and stops; call `.step()` after every update."""
    if skip < 1 or updates < 1:
        raise InputError(
            f"skip and updates must be 1 or more (the profiler itself has to warm up), got {skip} and {updates}"
        )
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    schedule = torch.profiler.schedule(wait=skip - 1, warmup=1, active=updates, repeat=1)
    return torch.profiler.profile(activities=activities, schedule=schedule)


@dataclass(frozen=True)
class RegionTime:
    """Mean time of one region per update. The rows of a breakdown add up to its total."""

    name: str
    ms: float
    """Of the thread that runs the update."""
    device_ms: float | None
    """Of the GPU, for the work that the region launched, whenever it ran; None without one."""


@dataclass(frozen=True)
class Breakdown:
    """Mean over the recorded updates."""

    updates: int
    regions: tuple[RegionTime, ...]
    """Those of `REGIONS` in their order, then `OTHER`."""
    total_ms: float
    """Of an update, by the clock."""
    device_idle_ms: float | None
    """Part of it in which no kernel ran; None without a GPU."""

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return asdict(self)

    def table(self) -> str:
        """Markdown, one row per region that took any time."""
        on_device = self.device_idle_ms is not None
        rows: list[tuple[str, float | None, float | None]] = [
            (row.name, row.ms, row.device_ms) for row in self.regions if row.ms or row.device_ms
        ]
        if on_device:
            rows.append(("GPU idle", None, self.device_idle_ms))
        rows.append(("total", self.total_ms, self.total_ms if on_device else None))
        head = ["region", "ms per update", "%", *(["GPU ms per update", "GPU %"] if on_device else [])]
        lines = [" | ".join(head), " | ".join(["---", *["---:"] * (len(head) - 1)])]
        for name, *times in rows:
            cells = [cell for ms in times[: 1 + on_device] for cell in self._cells(ms)]
            lines.append(" | ".join([name, *cells]))
        return "".join(f"| {line} |\n" for line in lines)

    def _cells(self, ms: float | None) -> tuple[str, str]:
        return ("", "") if ms is None else (f"{ms:.2f}", f"{100 * ms / self.total_ms:.1f}")


def breakdown(profiler: torch.profiler.profile, updates: int | None = None) -> Breakdown:
    """The table of a stopped profiler; `updates` where it was stopped before its end: those that were whole."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(file))
        return breakdown_of_trace(json.loads(file.read_bytes()), updates)


def breakdown_of_trace(trace: Mapping[str, Any], updates: int | None = None) -> Breakdown:
    """The table of a Chrome trace that torch.profiler wrote. Raises InputError where it holds no update.

    Host: each moment of the updates' thread counts once, for its innermost region. Communication is the
    region of that name and, wherever it happens, the time in which the thread waits for a gloo collective:
    one is under way and the thread is in no operator. What computation hides costs nothing and is not shown;
    waiting for a slower rank is.
    Device: each moment with a kernel counts once, for the region in which the first of them was launched;
    NCCL's kernels are communication, and count where no other runs.
    """
    host = _Host([event for event in trace["traceEvents"] if event.get("ph") == "X"], updates)
    times = host.times()
    device, idle = _device_times(host)
    n = 1e3 * len(host.updates)
    rows = tuple(
        RegionTime(name, times.get(name, 0.0) / n, device.get(name, 0.0) / n if device else None)
        for name in (*REGIONS, OTHER)
    )
    total = length([host.window]) / n
    return Breakdown(len(host.updates), rows, total, None if idle is None else idle / n)


class _Host:
    """The threads of a trace, cut into pieces of one innermost region each."""

    def __init__(self, events: Sequence[Mapping[str, Any]], updates: int | None) -> None:
        self.events = events
        steps = [event for event in events if event["name"].startswith("ProfilerStep#")]
        self.updates = sorted(map(_span, steps))[:updates]
        if not self.updates:
            raise InputError(
                "expected a trace of at least one update, found none; record with mshnet.profiling.recording and "
                "call its .step() after every update"
            )
        self.window = (self.updates[0][0], self.updates[-1][1])
        self.thread = next(event["tid"] for event in steps)
        named: dict[Any, list[tuple[Span, str]]] = defaultdict(list)
        for event in events:
            if event["name"] in REGIONS and event.get("cat") == "user_annotation":
                named[event["tid"]].append((_span(event), event["name"]))
        self.pieces = {thread: innermost(regions) for thread, regions in named.items()}

    def times(self) -> dict[str, float]:
        """Microseconds of each region on the updates' thread, inside the updates."""
        waits = self._waits()
        times: dict[str, float] = defaultdict(float)
        covered: list[Span] = []
        for span, name in self.pieces.get(self.thread, []):
            piece = overlap([span], [self.window])
            covered += piece
            waited = length(overlap(piece, waits))
            times[name] += length(piece) - waited
            times["communication"] += waited
        rest = minus([self.window], union(covered))
        waited = length(overlap(rest, waits))
        times["communication"] += waited
        times[OTHER] = length(rest) - waited
        return times

    def _waits(self) -> list[Span]:
        """When the thread launches a collective, or waits for one that is under way elsewhere."""
        operators = [e for e in self.events if e.get("cat") == "cpu_op" and e["tid"] == self.thread]
        launches = union(_span(e) for e in operators if e["name"].startswith("c10d::"))
        # An operator that contains a launch may wait inside, such as batch norm's: its inner operators count.
        busy = union(_span(e) for e in operators if not overlap([_span(e)], launches))
        under_way = union(_span(e) for e in self.events if e["name"].startswith("gloo:"))
        return union([*launches, *minus(under_way, busy)])

    def region_at(self, thread: Any, time: float) -> str:
        """The innermost region then: the thread's own, else that of the updates' thread, which waits for it."""
        for pieces in (self.pieces.get(thread, []), self.pieces.get(self.thread, [])):
            i = bisect.bisect_right(pieces, time, key=lambda piece: piece[0][0]) - 1
            if i >= 0 and time < pieces[i][0][1]:
                return pieces[i][1]
        return OTHER


def _device_times(host: _Host) -> tuple[dict[str, float], float | None]:
    """Microseconds of each region on the device, and those without a kernel; ({}, None) without a device."""
    launched = {
        event["args"]["correlation"]: (event["tid"], event["ts"])
        for event in host.events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    computing: list[tuple[Span, str]] = []
    collectives: list[tuple[Span, str]] = []
    for event in host.events:
        launch = launched.get(event.get("args", {}).get("correlation"))
        if event.get("cat") in _ON_THE_DEVICE and launch and host.window[0] <= launch[1] < host.window[1]:
            name = "communication" if "nccl" in event["name"].lower() else host.region_at(*launch)
            (collectives if name == "communication" else computing).append((_span(event), name))
    if not computing and not collectives:
        return {}, None
    times: dict[str, float] = dict.fromkeys((*REGIONS, OTHER), 0.0)
    hidden: list[Span] = []
    for kernels in (computing, collectives):
        end = -math.inf
        for (start, stop), name in sorted(kernels):
            times[name] += length(minus([(max(start, end), max(stop, end))], hidden))
            end = max(stop, end)
        hidden = union(span for span, _ in computing)
    return times, max(0.0, length([host.window]) - sum(times.values()))


def _span(event: Mapping[str, Any]) -> Span:
    start = float(event["ts"])
    return start, start + float(event["dur"])
