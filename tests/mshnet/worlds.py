"""Real processes with a gloo group, without Ray: one scenario after the other, what each process found handed back."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed
from torch import multiprocessing as processes

DEADLINE_S = 400.0


class Scenario(Protocol):
    """What every process of a world runs; it must pickle."""

    def __call__(self, rank: int, world_size: int) -> object: ...


def run(scenarios: Mapping[int, Sequence[Scenario]], folder: Path) -> dict[int, list[list[Any]]]:
    """What each scenario returned to each rank: found[world_size][number of the scenario][rank].

    The worlds come one after the other, in the order given, in the same processes: starting them takes longest.
    """
    count = max(scenarios)
    context = processes.start_processes(
        _process, args=(str(folder), dict(scenarios)), nprocs=count, join=False, start_method="spawn"
    )
    assert context is not None
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not context.join(timeout=1):  # raises what a process raised
            assert time.monotonic() < deadline, f"{count} processes did not end within {DEADLINE_S} s"
    finally:
        for process in context.processes:
            process.kill()
    return {
        size: [list(of_ranks) for of_ranks in zip(*(_load(folder, size, rank) for rank in range(size)), strict=True)]
        for size in scenarios
    }


def _process(rank: int, folder: str, scenarios: Mapping[int, Sequence[Scenario]]) -> None:
    torch.set_num_threads(1)
    for world_size, of_world in scenarios.items():
        if rank < world_size:
            _join(rank, world_size, Path(folder))
            found = [scenario(rank, world_size) for scenario in of_world]
            torch.save(found, Path(folder, f"{rank}_of_{world_size}.pt"))
            distributed.destroy_process_group()


def _join(rank: int, world_size: int, folder: Path) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous_of_{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=DEADLINE_S),
    )


def _load(folder: Path, world_size: int, rank: int) -> list[Any]:
    found: list[Any] = torch.load(folder / f"{rank}_of_{world_size}.pt", weights_only=False)
    return found
