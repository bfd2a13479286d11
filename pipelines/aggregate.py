"""The folds together: means, report, and the parent run, as the job's last stage."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines import provenance, run_metrics, run_pages, storage, survey
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.dag import Stage
from pipelines.fold_table import paper_row
from pipelines.register import SameRun
from pipelines.report import picture_name, pictured_files, write_report
from pipelines.results import CrossValidation, FoldResult, Interval, mean
from pipelines.scan import Scan
from pipelines.tracking import Tracker
from pipelines.tracking_champion import CHAMPION, Champion, Contender, crown
from pipelines.tracking_registry import Registry, version_page

CODE_VERSION = 4
"""Raise it when the same folds would be reported in another way."""
RESULT_FILE = "cross_validation.json"


def stage(
    config: CrossValidationConfig,
    scanned: Scan,
    weights: str,
    evaluated: tuple[Stage, ...],
    registered: tuple[Stage, ...],
    parent_run_id: str,
    job: str,
) -> Stage:
    """Aggregate and report."""
    key = fingerprint("report", CODE_VERSION, [stage.key for stage in registered], job)
    folder = storage.join(config.store, "reports", f"{config.dataset}-{config.shot}shot-{key}")
    pictures = {str(f): e.folder for f, e in zip(config.folds, evaluated, strict=True)}
    return Stage(
        name="report",
        result=storage.join(folder, "result.json"),
        run=aggregate,
        arguments=(config, scanned, weights, parent_run_id, folder, pictures),
        needs=registered,
        parts=(RESULT_FILE, "report.html", "report.md"),
        complete=SameRun("parent_run_id", parent_run_id),
    )


def aggregate(
    config: CrossValidationConfig,
    scanned: Scan,
    weights: str,
    parent_run_id: str,
    folder: str,
    pictures: Mapping[str, str],
    *fold_results: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Means over the folds, the report on the store and in the parent run; the job's summary."""
    folds = [FoldResult.from_json(result) for result in fold_results]
    result = _cross_validation(config, scanned, weights, parent_run_id, folds)
    tracker = Tracker(config.tracking_uri, config.experiment)
    champion = record(tracker, config, result)
    images = {
        picture_name(fold.fold, name): storage.read_bytes(storage.join(pictures[str(fold.fold)], name))
        for fold in folds
        for name in pictured_files(fold)
    }
    with tempfile.TemporaryDirectory() as scratch:
        html, markdown = write_report(result, images, scratch)
        for path in sorted(Path(scratch).rglob("*")):
            if path.is_file():
                storage.write_bytes(storage.join(folder, path.relative_to(scratch).as_posix()), path.read_bytes())
        tracker.log_file(parent_run_id, scratch, "report")
    storage.write_json(storage.join(folder, RESULT_FILE), result.to_json())
    tracker.finish(parent_run_id)
    summary = _summary(config, result, storage.join(folder, html.name), storage.join(folder, markdown.name), folder)
    return {**summary, CHAMPION: {"version": champion.version, "reason": champion.reason}}


def _cross_validation(
    config: CrossValidationConfig, scanned: Scan, weights: str, parent_run_id: str, folds: list[FoldResult]
) -> CrossValidation:
    from mshnet import architectures

    learnable = sum(parameter.numel() for parameter in architectures.build(config.model).relation.parameters())
    network = config.model.similarity if config.model.architecture == "mshnet" else config.model.architecture
    miou_interval, fb_iou_interval = _mean_intervals(config, folds)
    return CrossValidation(
        name=f"{config.data_title} {config.shot}-shot {config.model.backbone} {network}",
        dataset=config.dataset,
        backbone=config.model.backbone,
        similarity=config.model.similarity,
        shot=config.shot,
        image_size_px=config.images.image_size_px,
        folds=folds,
        mean_miou=mean([fold.score.miou for fold in folds]),
        mean_fb_iou=mean([fold.score.fb_iou for fold in folds]),
        parent_run_id=parent_run_id,
        config=config.to_json(),
        fingerprints={
            **provenance.fingerprints(scanned, weights),
            **{f"fold {fold.fold}, trained by commit": fold.git_commit for fold in folds},
        },
        git_commit=provenance.git_commit(),
        versions=provenance.versions(),
        learnable_parameters=learnable,
        mask_mode=scanned.mask_mode,
        architecture=config.model.architecture,
        miou_interval=miou_interval,
        fb_iou_interval=fb_iou_interval,
        artifacts={
            "store": config.store,
            "tracking": config.tracking_uri,
            **{f"fold {fold.fold} model": storage.join(config.store, fold.checkpoint) for fold in folds},
        },
    )


def _mean_intervals(
    config: CrossValidationConfig, folds: Sequence[FoldResult]
) -> tuple[Interval, Interval] | tuple[None, None]:
    """Of the mean over the folds: mIoU's and FB-IoU's; None where a fold's episodes were not kept one by one."""
    from mshnet.data.folds import class_names
    from mshnet.outcomes import Outcomes, read_outcomes
    from mshnet.statistics import bootstrap_mean, concatenated

    judged: list[tuple[Outcomes, list[int]]] = []
    for fold in folds:
        if not fold.outcomes:
            return None, None
        names = fold.class_names or class_names(config.dataset)
        tables = read_outcomes(storage.join(config.store, fold.outcomes), fold.outcomes_sha256)
        own = [t.outcomes for t in tables if t.predictor == "trained" and t.shot == fold.protocol.shot]
        judged.append((concatenated(own), [names.index(name) for name in fold.novel_classes]))
    miou, fb_iou = bootstrap_mean(judged, config.evaluation.bootstrap_samples)
    return Interval(low=miou[0], high=miou[1]), Interval(low=fb_iou[0], high=fb_iou[1])


def record(tracker: Tracker, config: CrossValidationConfig, result: CrossValidation) -> Champion:
    """What the parent run's page shows; the alias of the version to use, where it points afterwards."""
    run_id, folds = result.parent_run_id, result.folds
    tracker.log_metrics(run_id, run_metrics.of_cross_validation(result, paper_row(result)))
    hashes = [fold.episodes_hash for fold in folds]
    # One for all folds: parents with the same are comparable as a whole.
    together = hashes[0] if len(hashes) == 1 else fingerprint(*hashes)
    tracker.set_tags(run_id, provenance.protocol_tags(folds[0].protocol, together))
    links = {"report": tracker.page(run_id, run_pages.REPORT)}
    if config.is_own:
        links["data report"] = tracker.page(run_id, survey.ARTIFACT)
    for fold in folds:
        links[f"fold {fold.fold}"] = tracker.page(fold.run_id)
        if fold.model_version:
            links[f"fold {fold.fold}'s model"] = version_page(config.model_name, fold.model_version)
    champion = _crown(tracker, config, result)
    if champion.version:
        links[f"{CHAMPION}: version {champion.version}"] = version_page(config.model_name, champion.version)
    tracker.describe(run_id, run_pages.of_cross_validation(result, links))
    tracker.log_bytes(run_id, result.to_text().encode(), RESULT_FILE)
    return champion


def _crown(tracker: Tracker, config: CrossValidationConfig, result: CrossValidation) -> Champion:
    contenders = [
        Contender(version=fold.model_version, lead=fold.score.miou - fold.baselines["prototype"].miou)
        for fold in result.folds
        if fold.model_version
    ]
    if not contenders:
        return Champion(version="", reason="no fold has a registered version")
    return crown(Registry(tracker, config.model_name), result.parent_run_id, contenders)


def _summary(
    config: CrossValidationConfig, result: CrossValidation, html: str, markdown: str, folder: str
) -> dict[str, Any]:
    return {
        "dataset": result.dataset,
        "shot": result.shot,
        "folds": [
            {
                "fold": fold.fold,
                "miou": fold.score.miou,
                "fb_iou": fold.score.fb_iou,
                "selection": fold.selection,
                **{f"{name}_miou": score.miou for name, score in fold.baselines.items()},
                "run_id": fold.run_id,
                "model_version": fold.model_version,
            }
            for fold in result.folds
        ],
        "mean_miou": result.mean_miou,
        "mean_fb_iou": result.mean_fb_iou,
        "parent_run_id": result.parent_run_id,
        "registered_model": config.model_name,
        "report": html,
        "report_markdown": markdown,
        "result": storage.join(folder, RESULT_FILE),
    }
