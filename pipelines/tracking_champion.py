"""The alias `champion`: of all versions of a registered model the one to use, whichever fold it is of.

Two choices. Of one cross-validation's folds it is the one that leads prototype matching, which needs no training, by
most mIoU on the same episodes: folds test different classes, so plain mIoU would choose the fold whose classes are
easy. Of two cross-validations it is the one with the higher mean mIoU over the folds that the alias's holder was
judged on, where all of these were measured under the same conditions; of equal ones that with more folds.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.tracking_client import client, quotable
from pipelines.tracking_registry import CONDITIONS_TAG, Registry, differing

LOG = logging.getLogger(__name__)
CHAMPION = "champion"
CROSS_VALIDATION_TAG = "cross_validation"
"""Of a version: the parent run's id. Versions that share it were made by one job."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A fold's version of the cross-validation that was just judged."""

    version: str
    lead: float
    """Its mIoU less that of prototype matching on the same episodes."""


@dataclass(frozen=True, kw_only=True)
class Champion:
    """Where the alias points after the choice, and why."""

    version: str
    """Empty where it points nowhere."""
    reason: str


def crown(registry: Registry, cross_validation: str, contenders: Sequence[Contender]) -> Champion:
    """Point the alias at the contender with the largest lead, unless its holder's cross-validation stands.

    `cross_validation` is the parent run's id. A holder that was judged under other conditions, on folds that this one
    lacks, or that no cross-validation made, is not comparable: it stays, and the log says why.
    """
    mlflow, name = client(registry.tracker.tracking_uri), registry.model_name
    for contender in contenders:
        mlflow.set_model_version_tag(name, contender.version, CROSS_VALIDATION_TAG, cross_validation)
    held = mlflow.get_registered_model(name).aliases.get(CHAMPION)
    by_fold = _judged(mlflow, name, cross_validation)
    if any(math.isnan(_miou(tags)) for tags in by_fold.values()):
        return _stays(name, held, "a fold of the new cross-validation has no score")
    best = max(contenders, key=lambda contender: contender.lead)
    why = f"has {100 * best.lead:+.1f} mIoU points over prototype matching, the most of {len(contenders)} fold(s)"
    if held is not None:
        holder = mlflow.get_model_version(name, str(held)).tags
        there = holder.get(CROSS_VALIDATION_TAG, "")
        if there == cross_validation:
            # This very job submitted again, or set by hand to another fold.
            reason = why if str(held) == best.version else "it is at another fold of this cross-validation, set by hand"
            return Champion(version=str(held), reason=reason)
        if not there:
            return _stays(name, held, "the version that has it was made by no cross-validation that says so")
        known = _judged(mlflow, name, there)
        if not known:
            return _stays(name, held, "its cross-validation does not say under which conditions it was judged")
        if missing := sorted(known.keys() - by_fold.keys()):
            return _stays(name, held, f"its cross-validation was judged on fold {', '.join(missing)} too")
        for fold, tags in known.items():
            if found := differing(by_fold[fold], tags):
                return _stays(name, held, f"fold {fold} was measured under other conditions ({found})")
        new, old = _mean(by_fold, known), _mean(known, known)
        if (new, len(by_fold)) <= (old, len(known)):
            reason = f"its cross-validation has mean mIoU {100 * old:.1f} %, the new one {100 * new:.1f} %"
            return Champion(version=str(held), reason=reason)
        why += f"; mean mIoU {100 * new:.1f} %, {100 * old:.1f} % before over the same folds"
    mlflow.set_registered_model_alias(name, CHAMPION, best.version)
    LOG.info("%s: alias %r is at version %s now: it %s", name, CHAMPION, best.version, why)
    return Champion(version=best.version, reason=why)


def _judged(mlflow: Any, name: str, cross_validation: str) -> dict[str, Mapping[str, str]]:
    """The tags of a cross-validation's versions by fold; of a fold that has several, the newest's."""
    found = mlflow.search_model_versions(f"name = '{quotable(name)}'")
    ours = [version for version in found if version.tags.get(CROSS_VALIDATION_TAG) == cross_validation]
    ours.sort(key=lambda version: int(version.version))
    return {version.tags["fold"]: version.tags for version in ours if CONDITIONS_TAG in version.tags}


def _mean(by_fold: Mapping[str, Mapping[str, str]], folds: Mapping[str, object]) -> float:
    return sum(_miou(by_fold[fold]) for fold in folds) / len(folds)


def _miou(tags: Mapping[str, str]) -> float:
    return float(tags.get("miou", "nan"))


def _stays(name: str, held: object, why: str) -> Champion:
    version = "" if held is None else str(held)
    where = f"stays at version {version}" if version else "is not set"
    LOG.warning("%s: alias %r %s: %s. Set the alias by hand if another is to be used.", name, CHAMPION, where, why)
    return Champion(version=version, reason=why)
