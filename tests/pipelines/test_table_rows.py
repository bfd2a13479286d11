"""A table's numbers: ours beside the paper's, and what there is none of."""

from __future__ import annotations

import pytest

from pipelines.cells import TABLES
from pipelines.chosen_runs import Asked
from pipelines.results import CHOSEN_ON_TEST, Interval
from pipelines.table_rows import Filled, Number, Row, behind, fill
from pipelines.tracking_search import TrackedRun
from tests.mshnet.test_parameter_counts import COUNTS
from tests.pipelines.tracked_runs import configuration, tracked

MIOU = (0.671, 0.72, 0.588, 0.611)


def filled(*runs: TrackedRun, table: int = 2) -> Filled:
    return fill(TABLES[table], runs[::-1], Asked())


def row(of: Filled, label: str, backbone: str = "resnet50") -> Row:
    (block,) = [block for block in of.blocks if block.backbone == backbone]
    (found,) = [row for row in block.rows if row.label == label]
    return found


def numbers(found: Row, shot: int = 1) -> dict[str, Number]:
    return {number.column: number for number in found.numbers if number.shot == shot}


def test_each_cell_has_its_value_interval_run_and_difference_to_the_paper_s() -> None:
    found = numbers(row(filled(tracked(configuration(), MIOU, "parent")), "MSHNet, here"))
    assert list(found) == ["fold 0", "fold 1", "fold 2", "fold 3", "mIoU", "FB-IoU"]
    fold = found["fold 3"]
    assert (fold.state, fold.paper, fold.run_id) == ("measured", 62.4, "fold-run-3")
    assert fold.value == pytest.approx(61.1)
    assert fold.difference == pytest.approx(-1.3)
    assert fold.interval is not None
    assert (fold.interval.low, fold.interval.high) == pytest.approx((59.7, 62.4))
    mean = found["mIoU"]
    assert (mean.run_id, mean.paper) == ("parent", 65.5)
    assert mean.value == pytest.approx(64.75)
    assert mean.interval is not None
    assert (mean.interval.low, mean.interval.high) == pytest.approx((63.95, 65.55))
    assert mean.inside, "65.5 lies in it"
    assert found["FB-IoU"].value == pytest.approx(78.5)
    assert found["FB-IoU"].difference == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("interval", "paper", "inside"),
    [
        (Interval(low=60.0, high=62.0), 62.0, True),
        (Interval(low=60.0, high=62.0), 62.1, False),
        (Interval(low=60.0, high=62.0), 59.9, False),
        (None, 61.0, None),
        (Interval(low=60.0, high=62.0), None, None),
    ],
)
def test_inside_means_in_the_interval(interval: Interval | None, paper: float | None, inside: bool | None) -> None:
    number = Number(shot=1, column="mIoU", value=61.0, interval=interval, state="measured", paper=paper)
    assert number.inside is inside
    assert number.difference == (None if paper is None else pytest.approx(61.0 - paper))


def test_what_has_not_been_run_says_so() -> None:
    failed = tracked(configuration(backbone="resnet101"), (), "failed", status="FAILED")
    table = filled(tracked(configuration(), MIOU[:2], "two folds"), failed)
    found = numbers(row(table, "MSHNet, here"))
    assert [number.state for number in found.values()] == ["measured"] * 2 + ["not run"] * 2 + ["2 of 4 folds"] * 2
    assert [number.value is None for number in found.values()] == [False] * 2 + [True] * 4
    assert {number.state for number in numbers(row(table, "MSHNet, here"), 5).values()} == {"not run"}
    assert {number.state for number in numbers(row(table, "MSHNet, here", "resnet101")).values()} == {"failed"}
    untrained = row(table, "same network, untrained", "resnet101")
    assert {number.state for number in untrained.numbers} == {"not run"}


def test_every_table_has_the_baselines_of_its_runs() -> None:
    table = filled(tracked(configuration(), MIOU, "parent"))
    for label, value in [
        ("same network, untrained", 13.6),
        ("everything is foreground", 20.1),
        ("prototype matching, no training", 24.1),
    ]:
        found = numbers(row(table, label))
        assert found["mIoU"].value == pytest.approx(value)
        assert (found["mIoU"].paper, found["fold 0"].run_id) == (None, "fold-run-0")
    coco = [found.label for block in filled(table=3).blocks for found in block.rows if found.kind == "baseline"]
    assert coco == ["same network, untrained", "everything is foreground", "prototype matching, no training"] * 2


def test_one_similarity_alone_has_the_paper_s_row_above_it_and_its_parameters() -> None:
    table = filled(tracked(configuration(similarity="cosine"), (0.63, 0.66, 0.59, 0.55), "c"), table=4)
    labels = [found.label for found in table.blocks[0].rows]
    assert labels[:2] == ["MSHNet, cosine alone, paper", "MSHNet, cosine alone, here"]
    assert numbers(row(table, "MSHNet, cosine alone, here"))["fold 0"].difference == pytest.approx(-0.3)
    assert "FB-IoU" not in numbers(row(table, "MSHNet, cosine alone, here"))
    assert numbers(row(table, "everything is foreground"))["mIoU"].value == pytest.approx(20.1), "of the cosine run"
    assert {number.state for number in row(table, "same network, untrained, both similarities").numbers} == {"not run"}
    for block in table.blocks:
        for found in block.rows:
            if found.kind == "ours":
                assert found.parameters == COUNTS[block.backbone, found.similarity]
                assert f"{COUNTS[block.backbone, found.similarity] / 1e6:.1f}M" == found.paper_parameters


def test_a_second_network_is_a_row_without_the_paper_s_numbers_and_another_backbone_a_block() -> None:
    table = filled(
        tracked(configuration(architecture="panet"), MIOU, "panet"),
        tracked(configuration(backbone="resnet18"), MIOU, "small"),
    )
    found = row(table, "PANet, here")
    assert {number.paper for number in found.numbers} == {None}
    assert found.parameters is not None
    assert 0 < found.parameters < 1_000_000
    assert numbers(row(table, "everything is foreground"))["mIoU"].value == pytest.approx(20.1)
    assert {number.state for number in row(table, "same network, untrained").numbers} == {"not run"}, "MSHNet was not"
    assert [block.backbone for block in table.blocks] == ["resnet50", "resnet101", "resnet18"]
    assert row(table, "MSHNet, here", "resnet18").paper_parameters == ""


def test_the_published_rows_are_there_without_any_run() -> None:
    table = filled()
    assert numbers(row(table, "MSHNet, paper"), 5)["fold 2"].value == 65.7
    assert numbers(row(table, "HSNet [30]"))["FB-IoU"].value == 76.7
    bam = numbers(row(table, "BAM"), 5)
    assert (bam["mIoU"].value, bam["fold 0"].value, bam["fold 0"].state) == (70.9, None, "not printed")
    assert [peer.method for peer in filled(table=3).foreign] == ["Matcher", "FSSDINO", "GF-SAM"]


def test_an_epoch_chosen_on_the_test_episodes_is_said_beside_our_numbers() -> None:
    table = filled(tracked(configuration(), MIOU, "parent", selection=CHOSEN_ON_TEST))
    assert row(table, "MSHNet, here, epoch chosen on the test episodes")
    assert table.differs == []
    honest = filled(tracked(configuration(), MIOU, "parent"))
    assert honest.differs == [("checkpoint", "best epoch on held-out base classes", CHOSEN_ON_TEST)]


def test_the_runs_behind_a_table_are_told_with_their_training() -> None:
    (source,) = behind(filled(tracked(configuration(shot=5), MIOU, "parent")).chosen)
    assert (source.run_id, source.label, source.folds) == ("parent", "resnet50, both, 5-shot", (0, 1, 2, 3))
    assert source.training == "300 × 11250 episodes, batch 8, SGD 0.01, exponential, float32"
