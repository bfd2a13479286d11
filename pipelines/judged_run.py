"""A finished run's outcomes episode by episode, found again from its report or its tracked run."""

from __future__ import annotations

import posixpath
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from mshnet.errors import InputError
from mshnet.outcomes import Judged, read_outcomes
from mshnet.protocols import Protocol
from pipelines import storage
from pipelines.results import CrossValidation, FoldResult
from pipelines.run_pages import OUTCOMES
from pipelines.tracking_search import FOLD_FILE, RESULT_FILE, child_runs, file_of, name_and_params

_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class JudgedFold:
    """A fold's tables of outcomes."""

    fold: int
    protocol: Protocol
    episodes_hash: str
    """Of the episodes at the protocol's own number of supports; empty where none was recorded."""
    judged: tuple[Judged, ...]
    class_names: tuple[str, ...] = ()
    """By class id, of one's own data."""

    def of(self, predictor: str, shot: int) -> list[Judged]:
        """One predictor's tables at a number of supports, seed after seed; InputError where there is none."""
        found = [judged for judged in self.judged if (judged.predictor, judged.shot) == (predictor, shot)]
        if not found:
            known = sorted({f"{judged.predictor} ({judged.shot}-shot)" for judged in self.judged})
            raise InputError(
                f"fold {self.fold}: expected outcomes of {predictor!r} at {shot}-shot, found {', '.join(known)}; "
                "choose one of these, or evaluate again with --evaluation-shots"
            )
        return found


@dataclass(frozen=True)
class JudgedRun:
    """A cross-validation, as far as its test episodes are concerned."""

    name: str
    place: str
    """Where it was read from: a URI or a run id."""
    dataset: str
    shot: int
    folds: dict[int, JudgedFold]


def read_run(place: str, tracking_uri: str = "") -> JudgedRun:
    """A run by the URI of its cross_validation.json (or the folder that holds it), or by its parent run's id.

    Raises InputError where there is none, where a fold's table is missing, and where a table is not the one that the
    result names by its hash.
    """
    if _RUN_ID.fullmatch(place):
        return _tracked(place, tracking_uri)
    uri = storage.absolute(place)
    if not uri.endswith(".json"):
        uri = storage.join(uri, RESULT_FILE)
    if storage.size_bytes(uri) is None:
        raise InputError(
            f"expected a {RESULT_FILE}, the folder of a report, or the id of a parent run, found nothing at {place!r}"
        )
    result = CrossValidation.from_json(storage.read_bytes(uri))
    folds = {fold.fold: _judged(fold, _stored_table(fold, result, uri)) for fold in result.folds}
    return JudgedRun(result.name, place, result.dataset, result.shot, folds)


def _tracked(run_id: str, tracking_uri: str) -> JudgedRun:
    (name, params), folds = name_and_params(tracking_uri, run_id), {}
    for child in child_runs(tracking_uri, run_id):
        if record := file_of(tracking_uri, child, FOLD_FILE):
            fold = FoldResult.from_json(record)
            folds[fold.fold] = _judged(fold, _logged_table(fold, tracking_uri, child))
    if not folds or not {"dataset", "shot"} <= params.keys():
        raise InputError(
            f"expected the id of a cross-validation's parent run with judged folds below it, found {run_id} "
            f"({name}), which has none; is it a fold's own, or is its job not done?"
        )
    return JudgedRun(name, run_id, params["dataset"], int(params["shot"]), folds)


def _logged_table(fold: FoldResult, tracking_uri: str, run_id: str) -> list[Judged]:
    table = file_of(tracking_uri, run_id, OUTCOMES)
    if not table:
        raise InputError(
            f"fold {fold.fold}: expected {OUTCOMES} among the files of its run {run_id}, found none: it was "
            "evaluated by an older version; submit its job again"
        )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, OUTCOMES)
        file.write_bytes(table)
        return read_outcomes(str(file), fold.outcomes_sha256)


def _judged(fold: FoldResult, judged: list[Judged]) -> JudgedFold:
    return JudgedFold(fold.fold, fold.protocol, fold.episodes_hash, tuple(judged), fold.class_names)


def _stored_table(fold: FoldResult, result: CrossValidation, uri: str) -> list[Judged]:
    if not fold.outcomes:
        raise InputError(
            f"fold {fold.fold}: expected a table of outcomes, found a result that names none: it was evaluated by an "
            "older version; submit its job again"
        )
    folder = posixpath.dirname(uri)
    # The store as it was named; where it lies now, if it was moved with its reports; a copy beside the report.
    roots = [result.artifacts.get("store", ""), posixpath.dirname(posixpath.dirname(folder)), folder]
    places = [storage.join(root, fold.outcomes) for root in roots if root]
    for place in places:
        if storage.size_bytes(place) is not None:
            return read_outcomes(place, fold.outcomes_sha256)
    raise InputError(
        f"fold {fold.fold}: expected its table of outcomes at one of {', '.join(places)}, found none; put the store "
        "back, or submit the job again"
    )
