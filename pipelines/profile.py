"""Where an update's time goes, for one fold: a trace file and a table, from a few updates of the real training."""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import storage

if TYPE_CHECKING:
    from mshnet.profiling import Breakdown
    from pipelines.tracking import Tracker

TRACE, TABLE, NUMBERS = "trace.json.gz", "profile.md", "profile.json"
SKIPPED = 5  # updates: caches fill, compilers finish, loader processes start


class StepProfiler:
    """Records some updates of rank 0, then writes its files and costs nothing any more.

    `trace.json.gz` opens in https://ui.perfetto.dev; `profile.md` and `profile.json` hold the table, which is
    also printed. They lie in `folder_uri` and, with a tracker, among the run's artifacts under `profile/`.
    To be made, stepped and closed in the thread that trains. On other ranks every method does nothing. None
    raises: what goes wrong is said, and training goes on without a profile.
    """

    def __init__(
        self,
        folder_uri: str,
        steps: int = 5,
        rank: int = 0,
        tracker: Tracker | None = None,
        run_id: str = "",
    ) -> None:
        self.folder, self.steps, self.tracker, self.run_id = folder_uri, steps, tracker, run_id
        self.breakdown: Breakdown | None = None
        """The table, once it was written."""
        self._done = 0
        self._profiler: Any = None
        if rank == 0:
            self._guarded(self._start)

    def step(self) -> None:
        """After each update."""
        if self._profiler is not None:
            self._guarded(self._step)

    def close(self) -> None:
        """At the end of training, however it ends: writes what was recorded, if that was not done before."""
        if self._profiler is not None:
            self._guarded(self._finish)

    def _guarded(self, what: Callable[[], None]) -> None:
        """Whatever ails the profiler, training goes on, and an error that ends it stays the one that is seen."""
        try:
            what()
        except Exception as error:  # noqa: BLE001 - said; the training is worth more than its profile
            _say(f"none is made ({type(error).__name__}: {error}); training goes on")
            profiler, self._profiler = self._profiler, None
            if profiler is not None:
                with suppress(Exception):  # it is broken already; only its costs are to end
                    profiler.stop()

    def _start(self) -> None:
        from mshnet.profiling import recording

        self._profiler = recording(SKIPPED, self.steps)
        self._profiler.start()

    def _step(self) -> None:
        self._done += 1
        if self._done in (SKIPPED, SKIPPED + self.steps):
            _synchronise()  # so that the recorded updates' kernels are theirs, all of them and no others
        self._profiler.step()
        if self._done == SKIPPED + self.steps:
            self._finish()

    def _finish(self) -> None:
        from mshnet.profiling import breakdown_of_trace

        profiler, self._profiler = self._profiler, None
        profiler.stop()
        updates = self._done - SKIPPED
        if updates < 1:
            _say(f"no profile: {self._done} updates were made, and the first {SKIPPED} are not recorded")
            return
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch, "trace.json")
            profiler.export_chrome_trace(str(file))
            trace = file.read_bytes()
        self._keep({TRACE: gzip.compress(trace, mtime=0)})  # before it is read: a trace is good without its table
        self.breakdown = breakdown_of_trace(json.loads(trace), updates)
        table = self.breakdown.table()
        _say(f"mean of {updates} updates; files in {self.folder}\n\n{table}")
        self._keep({TABLE: table.encode(), NUMBERS: json.dumps(self.breakdown.to_json(), indent=2).encode()})

    def _keep(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            try:
                storage.write_bytes(storage.join(self.folder, name), data)
            except Exception as error:  # noqa: BLE001 - whatever ails the store, training goes on
                _say(f"{name} was not kept in {self.folder} ({error})")
            self._log(data, f"profile/{name}")

    def _log(self, data: bytes, path: str) -> None:
        if self.tracker is None:
            return
        try:
            self.tracker.log_bytes(self.run_id, data, path)
        except Exception as error:  # noqa: BLE001 - whatever ails the tracker, training goes on
            self.tracker = None  # one that is silent is waited for once, and not for each file
            _say(f"{path} was not logged, and no other file of the profile will be ({error})")


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _say(text: str) -> None:
    print(f"profile: {text}", file=sys.stderr, flush=True)
