"""The card says what the fold's records say, and takes any name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pipelines.conditions import Conditions
from pipelines.drawn import DrawnTraining
from pipelines.model_card import model_card
from pipelines.results import CHOSEN_ON_TEST, GIVEN, FoldResult
from pipelines.run_pages import FoldPage
from tests.pipelines.recorded_example import DATA, configuration, fold_result, protocol

TRAINING = DrawnTraining(
    fold=1, folder="episodes/a", store="images/b", split_lists="lists:4f2c1a9be07d",
    selection="best epoch on held-out base classes (car, cat)", base_classes=tuple(range(15)), left_out=("sofa",),
    training_pairs=8528, removed_pairs=1727, pairs_sha256="a" * 64, validation_sha256="b" * 64,
)  # fmt: skip


def card(folder: Path, changes: dict[str, Any] | None = None, **setting: Any) -> str:
    config = configuration(folder, "sqlite:///unused.db", **setting)
    result: FoldResult = dataclasses.replace(fold_result(config, 1, 0.704), run_id="r1", **(changes or {}))
    conditions = Conditions(protocol=result.protocol, episodes_hash="e68ad4a7d8d5", data_fingerprint=DATA)
    text = model_card(FoldPage(config=config, result=result, conditions=conditions, links={}), TRAINING)
    return text.replace("\u00a0", "")


def test_a_card_says_what_was_trained_measured_and_where_it_fails(tmp_path: Path) -> None:
    text = card(tmp_path)
    for expected in (
        "# Model card: mshnet-pascal-resnet50-1shot, fold 1\n",
        r"mIoU 70.4 % (\[69.0, 71.7\]) on classes it was not trained on.",
        "by 1 labelled example (trained so)",
        'Segmenter.from_registry("models:/mshnet-pascal-resnet50-1shot@fold1")',
        f"| data | pascal, fingerprint {DATA[:12]} |",
        "| classes | 15, none of the test classes among them: aeroplane, bicycle, bird, ",
        "| left out | sofa |",
        "| pictures with a class | 8,528 pairs |",
        "| those that show a test class too | 1,727 pairs removed |",
        "| seen | 135,000 episodes, epoch 9 kept |",
        "| time | 1.5 h |",
        "| test classes | bus, car, cat, chair, cow |",
        "| episodes hash | e68ad4a7d8d5 |",
        r"| MSHNet, trained | 70.4 | \[69.0, 71.7\] | 78.0 |",
        "| prototype matching, no training | 23.6 |",
        r"| bus | 78.4 | \[75.4, 81.4\] |",
        "| small | 50.4 | 210 |",
        "- Weakest classes: cow (62.4 %), chair (66.4 %), cat (70.4 %).",
        "- Small objects: mIoU 50.4 %, large ones 78.4 % (210 and 360 episodes).",
        "Licence of the weights",
    ):
        assert expected in text
    assert "chosen on the test episodes" not in text
    assert text.index("| bus |") < text.index("| car |"), "the best class first"
    assert text.startswith("---\nlibrary_name: mshnet\n"), "model hubs read this"


def test_what_flatters_and_what_is_not_known_is_said(tmp_path: Path) -> None:
    config = configuration(tmp_path, "sqlite:///unused.db")
    chosen = card(tmp_path, {"protocol": protocol(config, selection=CHOSEN_ON_TEST)})
    assert "**The epoch was chosen on the test episodes**" in chosen
    given = card(tmp_path, {"protocol": protocol(config, selection=f"{GIVEN} (training unknown)")})
    assert "| training | not known: the weights were given, not trained here |" in given
    assert "episodes, epoch" not in given


def test_names_that_hold_marks_stay_names(tmp_path: Path) -> None:
    name = "[x](javascript:alert(1)) | <b>\n# heading"
    score = fold_result(configuration(tmp_path, "sqlite:///unused.db"), 1, 0.7).score
    hostile = dataclasses.replace(score, class_iou={name: 0.5, "cat": 0.6}, class_interval={})
    text = card(tmp_path, {"novel_classes": [name], "score": hostile}, registered_model="a<b>|c")
    escaped = r"\[x\](javascript:alert(1)) \| \<b\> # heading"
    assert text.count(escaped) == 3, "as test class, by class, among the weakest"
    assert name not in text
    assert r"# Model card: a\<b\>\|c, fold 1" in text
