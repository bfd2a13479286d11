"""Two cells of a table by the real command: one fails, the other is done, and is not done twice."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from pipelines import tables, tracking_search
from pipelines.chosen_runs import Asked
from tests.e2e.conftest import run

TINY = shlex.split(
    "--tables 4 --similarities cosine --backbones resnet18 --backbone-weights random --image-size-px 33 "
    "--min-object-px 100 --folds 0 --epochs 1 --episodes-per-epoch 8 --learning-rate 0.02 --validation-episodes 4 "
    "--held-out-classes 2 --protocol balanced --evaluation-episodes 10 --threshold-episodes 5 --panels-each 1 "
    "--bootstrap-samples 50"
)


@pytest.mark.e2e
@pytest.mark.timeout(1200)
def test_a_cell_that_fails_stops_no_other_and_one_that_is_done_is_not_done_again(
    pictures: Path, tmp_path: Path
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    command = ["-m", "pipelines.matrix", *TINY, "--pascal-source", str(pictures), "--tracking-uri", uri]
    command += ["--store", str(tmp_path / "store")]

    first = run([*command, "--shots", "1", "60"], Path.cwd())  # no class has 61 pictures
    assert first.code == 1, first.stderr
    done, failed = first.result["cells"]
    assert (done["cell"], done["status"]) == ("pascal 1-shot resnet18 cosine", "done")
    assert (failed["cell"], failed["status"]) == ("pascal 60-shot resnet18 cosine", "failed")
    assert failed["error"].startswith("pascal 60-shot: draw ")
    assert "60 + 1" in failed["error"] or "61" in failed["error"], failed["error"]
    statuses = {run.params["shot"]: run.status for run in tracking_search.cross_validations(uri, "mshnet")}
    assert statuses == {"1": "FINISHED", "60": "FAILED"}

    again = run([*command, "--shots", "1"], Path.cwd())
    assert again.code == 0, again.stderr
    (cell,) = again.result["cells"]
    assert cell == {**done, "status": "was done"}
    assert "stages:" not in again.stderr

    (filled,) = tables.read(uri, "mshnet", [4], Asked()).filled
    ((key, shown),) = filled.chosen.runs.items()
    assert (key.backbone, key.similarity, shown.run_id) == ("resnet18", "cosine", done["parent_run_id"])
    assert shown.folds[0].score.miou == done["mean_miou"]
