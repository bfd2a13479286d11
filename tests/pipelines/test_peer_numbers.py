from __future__ import annotations

import pytest

from pipelines.peer_numbers import PEERS, Peer

PRINTED_OTHERWISE = {("pascal", "resnet50", "PFENet [35]", 1): (60.725, 60.8)}
"""Means that the paper's table prints unlike its own folds: (mean of the folds, printed)."""
ROWS = [(*setting, peer) for setting, peers in PEERS.items() for peer in peers]


@pytest.mark.parametrize("shot", [1, 5])
@pytest.mark.parametrize(("dataset", "backbone", "peer"), ROWS, ids=lambda value: getattr(value, "method", str(value)))
def test_a_printed_mean_is_that_of_the_printed_folds(dataset: str, backbone: str, peer: Peer, shot: int) -> None:
    published = peer.published(shot)
    if published is None or published.fold_miou is None:
        return
    mean = sum(published.fold_miou) / 4
    known = PRINTED_OTHERWISE.get((dataset, backbone, peer.method, shot))
    if known:
        assert (mean, published.mean_miou) == pytest.approx(known)
    else:  # each is printed to one decimal
        assert mean == pytest.approx(published.mean_miou, abs=0.0501)


def test_the_rows_are_those_of_the_paper_s_tables() -> None:
    counts = {setting: sum(not peer.later for peer in peers) for setting, peers in PEERS.items()}
    assert counts == {
        ("pascal", "resnet50"): 4,
        ("pascal", "resnet101"): 5,
        ("coco", "resnet50"): 4,
        ("coco", "resnet101"): 3,
        ("coco", "foundation models"): 0,
    }
    hsnet = next(peer for peer in PEERS["pascal", "resnet101"] if peer.method == "HSNet [30]")
    assert hsnet.five_shot is not None
    assert (hsnet.five_shot.fold_miou, hsnet.five_shot.fb_iou) == ((71.8, 74.4, 67.0, 68.3), 80.6)
    assert hsnet.published(2) is None


def test_a_later_method_has_a_mean_and_no_folds() -> None:
    later = [peer for peers in PEERS.values() for peer in peers if peer.later]
    assert len(later) == 13
    assert all(peer.one_shot and peer.one_shot.fold_miou is None for peer in later)
