"""The table of an update's parts: each moment once, on traces whose answer is known and on real ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mshnet.errors import InputError
from mshnet.profiling import OTHER, REGIONS, Breakdown, breakdown, breakdown_of_trace, recording, region

MAIN, AUTOGRAD, GLOO, STREAM = 1, 2, 3, 7


def event(name: str, start: float, end: float, category: str = "user_annotation", thread: int = MAIN) -> dict[str, Any]:
    """Milliseconds here; a Chrome trace has microseconds."""
    return {"ph": "X", "name": name, "cat": category, "tid": thread, "ts": 1e3 * start, "dur": 1e3 * (end - start)}


def kernel(name: str, start: float, end: float, launched: float, thread: int = MAIN) -> list[dict[str, Any]]:
    correlation = {"args": {"correlation": hash((name, start))}}
    return [
        event("cudaLaunchKernel", launched, launched + 0.01, "cuda_runtime", thread) | correlation,
        event(name, start, end, "kernel", STREAM) | correlation,
    ]


def table_of(events: Sequence[dict[str, Any]], updates: int | None = None) -> Breakdown:
    found = breakdown_of_trace({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}, updates)
    assert [row.name for row in found.regions] == [*REGIONS, OTHER]
    assert sum(row.ms for row in found.regions) == pytest.approx(found.total_ms)
    return found


def ms(found: Breakdown) -> dict[str, float]:
    return {row.name: pytest.approx(row.ms) for row in found.regions if row.ms > 1e-9}


def device_ms(found: Breakdown) -> dict[str, float | None]:
    return {row.name: pytest.approx(row.device_ms) for row in found.regions if row.device_ms}


def test_nested_regions_count_once_and_the_rest_is_other() -> None:
    events = [
        event("ProfilerStep#4", 0, 10),
        event("merging", 1, 6),
        event("similarity", 2, 4),
        event("backward", 6, 9),
        event("ProfilerStep#5", 10, 20),
        event("merging", 10, 14),
        event("backward", 25, 40),  # after the last update
        event("loader wait", 3, 9, thread=AUTOGRAD),  # not the updates' thread
    ]
    found = table_of(events)
    assert (found.updates, found.total_ms, found.device_idle_ms) == (2, 10.0, None)
    assert ms(found) == {"similarity": 1.0, "merging": 3.5, "backward": 1.5, OTHER: 4.0}
    assert ms(table_of(events, updates=1)) == {"similarity": 2.0, "merging": 3.0, "backward": 3.0, OTHER: 2.0}


def test_waiting_for_a_collective_is_communication_and_one_behind_computation_is_free() -> None:
    events = [
        event("ProfilerStep#0", 0, 20),
        event("merging", 0, 8),
        event("BatchNorm", 1, 7, "cpu_op"),  # holds a launch, so it may wait
        event("aten::mean", 1, 2, "cpu_op"),
        event("c10d::allreduce_", 2, 3, "cpu_op"),
        event("gloo:all_reduce", 2.5, 6, thread=GLOO),
        event("aten::sub", 6, 7, "cpu_op"),
        event("backward", 8, 18),
        event("c10d::allreduce_", 9, 10, "cpu_op"),
        event("gloo:all_reduce", 10, 16, thread=GLOO),
        event("autograd::ConvolutionBackward0", 10, 14, "cpu_op"),
        event("communication", 18, 19),
    ]
    assert ms(table_of(events)) == {"merging": 4.0, "backward": 7.0, "communication": 8.0, OTHER: 1.0}


def test_the_gpu_works_for_the_region_that_launched_it_and_hides_nccl() -> None:
    events = [
        event("ProfilerStep#0", 0, 20),
        event("merging", 0, 3),
        event("backward", 3, 6),
        event("optimizer", 6, 7),
        *kernel("conv", 1, 5, launched=0.5),
        *kernel("conv on a second stream", 4, 6, launched=0.7),
        *kernel("dgrad", 6, 12, launched=4, thread=AUTOGRAD),
        *kernel("ncclDevKernel_AllReduce", 10, 15, launched=5, thread=AUTOGRAD),
        *kernel("sgd", 15, 16, launched=6.5),
        *kernel("of an earlier update", 0, 1, launched=-1),
    ]
    found = table_of(events)
    assert device_ms(found) == {"merging": 5.0, "backward": 6.0, "communication": 3.0, "optimizer": 1.0}
    assert found.device_idle_ms == pytest.approx(5.0)
    assert "| backward | 3.00 | 15.0 | 6.00 | 30.0 |" in found.table()
    assert "| GPU idle |  |  | 5.00 | 25.0 |" in found.table()


def test_the_table_shows_what_took_time() -> None:
    found = table_of([event("ProfilerStep#0", 0, 8), event("backbone", 0, 6)])
    assert found.table() == (
        "| region | ms per update | % |\n"
        "| --- | ---: | ---: |\n"
        "| backbone | 6.00 | 75.0 |\n"
        "| other | 2.00 | 25.0 |\n"
        "| total | 8.00 | 100.0 |\n"
    )


def test_a_real_recording_holds_the_updates_after_those_let_pass() -> None:
    recorder = recording(skip=2, updates=3)
    x = torch.randn(120, 120)
    calls = []
    with recorder:
        for _ in range(8):
            with region("merging"):
                (x @ x).sum()
                with region("similarity"):
                    named = isinstance(region("loss"), torch.profiler.record_function)
                    (x @ x).sum()
            calls.append(named)
            recorder.step()
    assert calls == [False, False, True, True, True, False, False, False]
    found = breakdown(recorder)
    assert found.updates == 3
    assert sum(row.ms for row in found.regions) == pytest.approx(found.total_ms)
    assert set(ms(found)) == {"similarity", "merging", OTHER}


def test_a_region_stays_out_of_compiled_code() -> None:
    def network(x: torch.Tensor) -> torch.Tensor:
        with region("merging"):
            return x.sin() + 1

    compiled = torch.compile(network, fullgraph=True, backend="eager")
    x = torch.arange(3.0)
    with recording(skip=1, updates=1) as recorder:
        for _ in range(3):
            assert torch.equal(compiled(x), x.sin() + 1)
            recorder.step()


def test_a_trace_without_an_update_is_refused() -> None:
    with pytest.raises(InputError, match="at least one update, found none"):
        breakdown_of_trace({"traceEvents": [event("merging", 0, 1)]})
    with pytest.raises(InputError, match="got 0 and 5"):
        recording(skip=0, updates=5)
