"""The alias of the version to use, in a real registry whose versions have tags but no files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.conditions import Conditions
from pipelines.tracking import Tracker
from pipelines.tracking_champion import CHAMPION, CROSS_VALIDATION_TAG, Champion, Contender, crown
from pipelines.tracking_registry import CONDITIONS_TAG, Registry
from tests.pipelines.test_tracking_registry import CONDITIONS

NAME = "mshnet-shapes-1shot"


@dataclasses.dataclass
class Job:
    """Cross-validations as their folds' registrations leave them."""

    registry: Registry
    client: Any

    def judged(
        self, run: str, folds: Mapping[int, tuple[float, float]], conditions: Conditions = CONDITIONS
    ) -> Champion:
        """The choice after a cross-validation with (mIoU, prototype matching's mIoU) by fold."""
        contenders = []
        for fold, (miou, prototype) in folds.items():
            own = dataclasses.replace(conditions, episodes_hash=f"{fold}{conditions.episodes_hash}")
            tags = {"fold": str(fold), "miou": repr(miou), CONDITIONS_TAG: own.to_text()}
            made = self.client.create_model_version(NAME, "file:///nowhere", tags=tags)
            contenders.append(Contender(version=str(made.version), lead=miou - prototype))
        found = crown(self.registry, run, contenders)
        assert self.holder() == found.version
        return found

    def holder(self) -> str:
        return str(self.client.get_registered_model(NAME).aliases.get(CHAMPION, ""))


@pytest.fixture
def job(tmp_path: Path, empty_database: bytes) -> Job:
    (tmp_path / "mlflow.db").write_bytes(empty_database)
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "e")
    client = tracker._client()
    client.create_registered_model(NAME)
    return Job(Registry(tracker, NAME), client)


def test_of_one_cross_validation_it_is_the_fold_with_the_largest_lead_over_prototype_matching(job: Job) -> None:
    found = job.judged("first", {0: (0.70, 0.60), 1: (0.50, 0.25), 2: (0.60, 0.40)})
    assert found.version == "2", "not fold 0, whose classes are easy for anybody"
    assert found.reason == "has +25.0 mIoU points over prototype matching, the most of 3 fold(s)"
    assert job.client.get_model_version(NAME, "3").tags[CROSS_VALIDATION_TAG] == "first"


def test_a_better_cross_validation_takes_it_and_a_worse_one_does_not(job: Job) -> None:
    job.judged("first", {0: (0.50, 0.2), 1: (0.60, 0.2)})
    assert job.holder() == "2"
    worse = job.judged("worse", {0: (0.90, 0.2), 1: (0.10, 0.2)})
    assert worse.version == "2", "its mean is lower, whatever one fold has"
    assert "mean mIoU 55.0 %, the new one 50.0 %" in worse.reason
    assert job.judged("equal", {0: (0.60, 0.2), 1: (0.50, 0.2)}).version == "2"
    better = job.judged("better", {0: (0.62, 0.2), 1: (0.58, 0.2)})
    assert better.version == "7"
    assert "mean mIoU 60.0 %, 55.0 % before" in better.reason


def test_the_same_job_again_leaves_it_where_a_person_put_it(job: Job) -> None:
    job.judged("first", {0: (0.5, 0.2), 1: (0.6, 0.2)})
    job.client.set_registered_model_alias(NAME, CHAMPION, "1")
    again = crown(job.registry, "first", [Contender(version="1", lead=0.3), Contender(version="2", lead=0.4)])
    assert (again.version, job.holder()) == ("1", "1")


def test_folds_that_were_added_count_only_as_more_of_the_same(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    assert job.judged("one fold", {0: (0.5, 0.3)}).version == "1"
    assert job.judged("all", {0: (0.5, 0.3), 1: (0.2, 0.1), 2: (0.6, 0.1)}).version == "4", (
        "equal on fold 0, more folds"
    )
    with caplog.at_level(logging.WARNING):
        assert job.judged("one good fold", {0: (0.9, 0.1)}).version == "4"
    assert "alias 'champion' stays at version 4: its cross-validation was judged on fold 1, 2 too" in caplog.text


def test_other_conditions_leave_it(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.judged("first", {0: (0.5, 0.2)})
    original = dataclasses.replace(CONDITIONS, protocol=dataclasses.replace(CONDITIONS.protocol, resize="original"))
    with caplog.at_level(logging.WARNING):
        assert job.judged("original", {0: (0.9, 0.2)}, original).version == "1"
    assert "fold 0 was measured under other conditions (resize: original, not square)" in caplog.text


def test_a_version_that_no_cross_validation_made_keeps_it(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.client.create_model_version(NAME, "file:///nowhere", tags={"fold": "0"})
    job.client.set_registered_model_alias(NAME, CHAMPION, "1")
    with caplog.at_level(logging.WARNING):
        assert job.judged("first", {0: (0.9, 0.2)}).version == "1"
    assert "was made by no cross-validation" in caplog.text
    job.client.delete_registered_model_alias(NAME, CHAMPION)
    assert job.judged("second", {0: (0.5, 0.2)}).version == "3"


def test_without_a_score_it_is_not_set(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert job.judged("diverged", {0: (float("nan"), 0.2), 1: (0.5, 0.2)}).version == ""
    assert "alias 'champion' is not set: a fold of the new cross-validation has no score" in caplog.text
