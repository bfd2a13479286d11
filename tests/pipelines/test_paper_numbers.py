from __future__ import annotations

import pytest

from pipelines.paper_numbers import ROWS, paper_row


@pytest.mark.parametrize("setting", ROWS, ids=lambda setting: "-".join(map(str, setting)))
def test_the_paper_s_mean_is_the_mean_of_its_folds(setting: tuple[str, str, str, int]) -> None:
    row = ROWS[setting]
    # One decimal is printed of each: the mean of rounded numbers may differ by that much.
    assert sum(row.fold_miou) / 4 == pytest.approx(row.mean_miou, abs=0.1001)


def test_the_headline_numbers_are_there_and_others_are_not() -> None:
    row = paper_row("pascal", "resnet101", "both", 5)
    assert row is not None
    assert (row.table, row.mean_miou, row.fb_iou, row.fold_miou) == (2, 72.3, 82.7, (73.0, 76.3, 68.1, 71.9))
    coco = paper_row("coco", "resnet50", "both", 1)
    assert coco is not None
    assert (coco.table, coco.mean_miou, coco.fb_iou) == (3, 44.1, None)
    assert len(ROWS) == 16
    for absent in [
        ("shapes", "resnet50", "both", 1),
        ("pascal", "resnet18", "both", 1),
        ("coco", "resnet50", "cosine", 1),
    ]:
        assert paper_row(*absent) is None
    assert paper_row("pascal", "resnet50", "both", 2) is None
