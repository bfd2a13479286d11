"""The cost model's arithmetic, by hand on a network of round numbers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mshnet.cost import EpisodeFlops

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WORK = EpisodeFlops(backbone=60, cosine=10, prototype=0, merging=10, pyramid=20, backward=100)  # 100 and 200


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cost_plan: Any = importlib.import_module("cost_plan")
    monkeypatch.setattr(cost_plan, "flops", lambda *_: WORK)
    monkeypatch.setattr(cost_plan, "gradient_bytes", lambda *_: 1000)
    monkeypatch.setattr(cost_plan, "batch_norms", lambda *_: 5)
    yield cost_plan
    del sys.modules["cost_plan"]


def test_a_table_has_two_backbones_two_shots_and_four_folds(model: Any) -> None:
    pascal, coco = model.runs(2), model.runs(3)
    assert len(pascal) == len(coco) == 16
    assert {(run.model.backbone, run.shot) for run in coco} == {
        (backbone, shot) for backbone in ("resnet50", "resnet101") for shot in (1, 5)
    }
    assert [runs[0].training.episodes_per_epoch for runs in (pascal, coco)] == [750 * 15, 7500]
    assert {run.training.global_batch for run in pascal + coco} == {8}


@pytest.mark.parametrize(("workers", "seconds"), [(1, 0.0), (2, 10.001), (4, 15.001), (8, 17.501)])
def test_a_ring_moves_the_data_nearly_twice(model: Any, workers: int, seconds: float) -> None:
    assert model.ring_all_reduce_s(1000.0, workers, 100.0, 0.001) == pytest.approx(seconds)


def test_an_update_is_computation_shared_and_communication_added(model: Any) -> None:
    run, given = model.runs(2)[0], model.Assumptions(link_efficiency=0.5, message_us=1000.0)
    device = model.Device("x", 800.0, 400.0, 0.25, "")
    assert model.update_s(run, device, 1, 200.0, given) == pytest.approx((8 * 200 / 800 + 0.25, 0.0))
    # A quarter of the work; the ring, its message, and two messages for each of five batch norms.
    assert model.update_s(run, device, 4, 200.0, given) == pytest.approx((0.75, 1.5 * 1000 / 100 + 0.001 + 10 * 0.001))


def test_a_fold_is_updates_validations_and_the_test(model: Any) -> None:
    run, device = model.runs(2)[0], model.Device("x", 800.0, 400.0, 0.0, "")
    updates, judged = 300 * (11250 // 8), 300 * 200 + 1000
    assert model.run_s(run, device, 1, 1.0, model.Assumptions(start_s=7.0)) == pytest.approx(
        7 + updates * 2 + judged * 0.25
    )


def test_the_longest_runs_go_first(model: Any) -> None:
    assert model.makespan_s([1.0, 2.0, 3.0, 4.0], 2) == 5.0
    assert model.makespan_s([3.0, 3.0, 2.0, 2.0, 2.0], 2) == 7.0  # the best is 6
    assert model.makespan_s([3.0, 1.0], 32) == 3.0


def test_more_gpus_than_folds_go_into_folds_and_cost_their_communication(model: Any) -> None:
    device, given = model.Device("x", 800.0, 400.0, 0.0, ""), model.Assumptions(start_s=0.0, message_us=1e4)
    one, *none = model.plans(model.runs(2), 4, device, given)
    assert (one.folds_at_once, one.workers, none) == (4, 1, [])
    assert one.held_gpu_hours == pytest.approx(one.busy_gpu_hours)
    cheapest, quickest = model.plans(model.runs(2), 32, device, given)
    assert (cheapest.folds_at_once, cheapest.workers) == (16, 1)
    assert cheapest.hours == pytest.approx(one.hours / 4)
    assert (quickest.folds_at_once, quickest.workers) == (16, 2)
    assert quickest.hours < cheapest.hours
    assert quickest.held_gpu_hours > cheapest.held_gpu_hours


def test_spot_pays_for_what_is_lost(model: Any) -> None:
    given = model.Assumptions(spot_losses_per_h=0.1, restart_s=360.0)
    assert model.spot_factor(4, given) == pytest.approx(1 + 0.1 * 4 * 0.1)


def test_a_measured_rate_takes_the_place_of_an_assumption(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "HERE", tmp_path)
    (tmp_path / "single_device.json").write_text("[]")
    assumed = model.card(model.Assumptions(card="h100", fraction=0.5))
    assert (assumed.name, assumed.training_flops_per_s, assumed.fixed_s) == ("H100", 0.5 * 989e12, 0.001)
    (tmp_path / "single_device.json").write_text(
        '[{"device": "NVIDIA H100", "backbone": "resnet50", "shot": 1, "source": "x",'
        ' "training_episodes_per_s": 3, "evaluation_episodes_per_s": 5}]'
    )
    measured = model.card(model.Assumptions(card="h100"))
    assert (measured.training_flops_per_s, measured.evaluation_flops_per_s, measured.fixed_s) == (600, 500, 0)
