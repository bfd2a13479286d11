"""Every episode's counts as a table: read as written, and refused where it is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mshnet.errors import InputError
from mshnet.metrics import Counts
from mshnet.outcomes import Judged, Outcomes, read_outcomes, write_outcomes


def judged(predictor: str, shot: int, seed: int, n: int) -> Judged:
    numbers = np.random.default_rng([shot, seed, n]).integers(0, 2**40, (n, 7))
    counts = Counts(numbers[:, :2], numbers[:, 2:4])
    queries = tuple(f"image é{i}" for i in numbers[:, 4] % 3)
    return Judged(predictor, shot, seed, queries, Outcomes(counts, numbers[:, 4] % 80, numbers[:, 5], numbers[:, 6]))


ALL = [judged("trained", 1, 0, 5), judged("trained", 1, 2**32 - 1, 4), judged("foreground", 1, 0, 5)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    uri = str(tmp_path / "folder" / "outcomes.arrow")
    sha256 = write_outcomes(uri, ALL)
    assert write_outcomes(str(tmp_path / "again"), ALL) == sha256
    for found in (read_outcomes(uri, sha256), read_outcomes(uri)):
        for mine, theirs in zip(found, ALL, strict=True):
            assert (mine.predictor, mine.shot, mine.seed, mine.queries) == (
                theirs.predictor, theirs.shot, theirs.seed, theirs.queries
            )  # fmt: skip
            assert mine.outcomes.counts.intersection.dtype == mine.outcomes.class_ids.dtype == np.int64
            for part in ("intersection", "union"):
                np.testing.assert_array_equal(
                    getattr(mine.outcomes.counts, part), getattr(theirs.outcomes.counts, part)
                )
            for part in ("class_ids", "object_px", "counted_px"):
                np.testing.assert_array_equal(getattr(mine.outcomes, part), getattr(theirs.outcomes, part))


def test_another_file_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "outcomes.arrow")
    sha256 = write_outcomes(uri, ALL)
    write_outcomes(uri, ALL[:2])
    with pytest.raises(InputError, match=f"with sha256 {sha256[:12]}"):
        read_outcomes(uri, sha256)
    (tmp_path / "text").write_text("no table")
    with pytest.raises(InputError, match="expected a table of outcomes"):
        read_outcomes(str(tmp_path / "text"))
    with pa.OSFile(str(tmp_path / "other"), "wb") as file, pa.ipc.new_file(file, pa.schema([("a", pa.int32())])):
        pass
    with pytest.raises(InputError, match=r"found columns \['a'\]"):
        read_outcomes(str(tmp_path / "other"))
    with pytest.raises(FileNotFoundError):
        read_outcomes(str(tmp_path / "absent"))


def test_a_query_for_each_episode() -> None:
    with pytest.raises(InputError, match="got 1 and 5"):
        Judged("trained", 1, 0, ("a",), ALL[0].outcomes)
