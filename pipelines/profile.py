"""Where an update's time goes, for one fold: a trace file and a table, from a few updates of the real training."""

from __future__ import annotations

import gzip
import json
import sys
import tempfile
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
    To be made, stepped and closed in the thread that trains. On other ranks every method does nothing.
    """

    def __init__(
        self,
        folder_uri: str,
        steps: int = 5,
        rank: int = 0,
        tracker: Tracker | None = None,
        run_id: str = "",
    ) -> None:
        from mshnet.profiling import recording

        self.folder, self.steps, self.tracker, self.run_id = folder_uri, steps, tracker, run_id
        self.breakdown: Breakdown | None = None
        """The table, once it was written."""
        self._done = 0
        self._profiler: Any = None
        if rank == 0:
            self._profiler = recording(SKIPPED, steps)
            self._profiler.start()

    def step(self) -> None:
        """After each update."""
        if self._profiler is None:
            return
        self._done += 1
        if self._done in (SKIPPED, SKIPPED + self.steps):
            _synchronise()  # so that the recorded updates' kernels are theirs, all of them and no others
        self._profiler.step()
        if self._done == SKIPPED + self.steps:
            self._finish()

    def close(self) -> None:
        """At the end of training, however it ends: writes what was recorded, if that was not done before."""
        if self._profiler is not None:
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
        self.breakdown = breakdown_of_trace(json.loads(trace), updates)
        table = self.breakdown.table()
        self._write(
            {
                TRACE: gzip.compress(trace, mtime=0),
                TABLE: table.encode(),
                NUMBERS: json.dumps(self.breakdown.to_json(), indent=2).encode(),
            }
        )
        _say(f"mean of {updates} updates; files in {self.folder}\n\n{table}")

    def _write(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            try:
                storage.write_bytes(storage.join(self.folder, name), data)
                if self.tracker is not None:
                    self.tracker.log_bytes(self.run_id, data, f"profile/{name}")
            except Exception as error:  # noqa: BLE001 - whatever ails store or tracker, training goes on
                _say(f"{name} was not kept everywhere ({error})")


def _synchronise() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _say(text: str) -> None:
    print(f"profile: {text}", file=sys.stderr, flush=True)
