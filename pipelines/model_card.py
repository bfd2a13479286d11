"""The model card of a fold's version: what a person must know before using it, filled in from the fold's records.

Its sections are those of Mitchell et al., "Model Cards for Model Reporting" (2019).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.fold_table import in_percent, interval_text, network_name, percent
from pipelines.markdown import escaped, table
from pipelines.pages import plain, rendered
from pipelines.results import Score

if TYPE_CHECKING:
    from pipelines.drawn import DrawnTraining
    from pipelines.run_pages import FoldPage

CARD = "model_card.md"
"""Its name among the files of the model and of the fold's run."""
WEAKEST = 3
"""Classes that are named as such."""


def model_card(page: FoldPage, training: DrawnTraining) -> str:
    """The card as Markdown, with a front matter as model hubs read it."""
    result, config = page.result, page.config
    context = {
        "config": config,
        "result": result,
        "network": network_name(config.model.architecture),
        "percent": percent,
        "interval": lambda ends: f"({interval_text(in_percent(ends))})",
        "code": lambda name: plain(name.replace("`", "")),
        "table": lambda header, rows: plain("\n".join(table(header, rows))),
        "details": _details(page),
        "training": _training(page, training),
        "conditions": page.measured(),
        "scores": page.score_rows(),
        "classes": _classes(result.score),
        "sizes": [[name, percent(100 * s.miou), str(s.episodes)] for name, s in result.score.by_size.items()],
        "weaknesses": [plain(line) for line in _weaknesses(result.score)],
    }
    return rendered("model_card.md.j2", context)


def _details(page: FoldPage) -> list[list[str]]:
    config, result = page.config, page.result
    return [
        ["network", f"{network_name(config.model.architecture)} ({config.model.label})"],
        ["backbone", f"{config.model.backbone}, frozen"],
        [
            "pictures",
            f"resized to {config.images.image_size_px}×{config.images.image_size_px} px; masks at their own size",
        ],
        ["weights", "safetensors, backbone included; no pickle"],
        ["made by", f"mshnet, commit {result.git_commit}"],
        ["run", result.run_id],
    ]


def _training(page: FoldPage, training: DrawnTraining) -> list[list[str]]:
    config, result = page.config, page.result
    data = [
        ["data", f"{config.data_title}, fingerprint {page.conditions.data_fingerprint[:12]}"],
        ["masks", result.protocol.mask_mode],
    ]
    if result.given:
        return [*data, ["training", "not known: the weights were given, not trained here"]]
    removed = f"{training.removed_pairs:,} pairs removed" if result.protocol.novel_removed else "kept"
    return [
        *data,
        ["backbone's weights", config.backbone_weights],
        ["classes", f"{len(training.base_classes)}, none of the test classes among them: {_named(page, training)}"],
        ["left out", ", ".join(training.left_out) or "no class"],
        ["pictures with a class", f"{training.training_pairs:,} pairs"],
        ["those that show a test class too", removed],
        ["split lists", training.split_lists],
        ["seen", f"{result.train_episodes:,} episodes, epoch {result.best_epoch} kept"],
        ["epoch chosen", training.selection],
        ["precision", config.precision],
        ["time", f"{result.train_s / 3600:.1f} h"],
    ]


def _named(page: FoldPage, training: DrawnTraining) -> str:
    from mshnet.data.folds import class_names

    names = page.result.class_names or class_names(page.config.dataset)
    return ", ".join(names[class_id] for class_id in training.base_classes)


def _classes(score: Score) -> list[list[str]]:
    return [
        [name, percent(100 * value), interval_text(in_percent(score.class_interval.get(name)))]
        for name, value in sorted(score.class_iou.items(), key=lambda item: -item[1])
    ]


def _weaknesses(score: Score) -> Iterator[str]:
    """Where the numbers say that it is weak, in words; Markdown."""
    worst = sorted(score.class_iou.items(), key=lambda item: item[1])[:WEAKEST]
    if len(score.class_iou) > 1:
        named = ", ".join(f"{escaped(name)} ({percent(100 * value)} %)" for name, value in worst)
        yield f"Weakest classes: {named}."
    small, large = score.by_size.get("small"), score.by_size.get("large")
    if small and large:
        yield (
            f"Small objects: mIoU {percent(100 * small.miou)} %, large ones {percent(100 * large.miou)} % "
            f"({small.episodes:,} and {large.episodes:,} episodes)."
        )
