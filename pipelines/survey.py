"""The data report: what a labelled data set holds, and what to expect of it, before anything is trained.

    python -m pipelines.survey --dataset coco-json --images photos --annotations labels.json --out outputs/survey

takes the job's flags, reads every picture once, and names all problems instead of ending with the first. The job makes
the same report of one's own data from the sealed store, before it trains.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mshnet.data.expectations import Small
from mshnet.errors import InputError
from pipelines import own_folds, storage
from pipelines.config import CrossValidationConfig, JobArguments, fingerprint
from pipelines.dag import Stage
from pipelines.preprocess import store_uri
from pipelines.scan import Scan
from pipelines.survey_page import CHOICE, NUMBERS, PAGE, TEXT, WEIGHTS, DataReport

if TYPE_CHECKING:
    from mshnet.data.folds import Partition
    from mshnet.data.source import LabelledImage, Source
    from mshnet.data.survey_facts import FoldPairs, Problem, Remark, SurveyedImage
    from pipelines.survey_page import Load

CODE_VERSION = 1
"""Raise it when the same store would give another report."""
PICTURED = 60
"""Classes with examples, the most frequent first."""
ARTIFACTS = "data_report"
"""Folder of the parent run's artifacts."""
ARTIFACT = f"{ARTIFACTS}/{PAGE}"
"""The page among them."""


@dataclass(frozen=True, kw_only=True)
class SurveyArguments(JobArguments):
    """What `python -m pipelines.survey` takes."""

    out: str = "outputs/survey"
    """Folder or URI for data_report.html, data_report.md with its pictures, survey.json and classes.json."""
    small: Small = "leave-out"
    """What classes.json proposes for classes with too few images: leave-out, or merge into one class "other"."""

    def __post_init__(self) -> None:
        if self.dry_run:
            raise InputError("a survey runs nothing and writes its report alone; leave --dry-run out")


def stage(config: CrossValidationConfig, scanned: Scan, sealed: Stage, parent_run_id: str) -> Stage:
    """The report of the sealed store, on the store and in the parent run."""
    from pipelines.register import SameRun

    validation = config.validation
    held_out = validation.held_out_classes if config.selection == "base" else None
    settings = [own_folds.key(config), config.data_title, config.shot, config.min_object_px, config.split_lists]
    flags = [config.removes_novel, config.skip_small_classes, held_out, config.training.seed]
    key = fingerprint("survey", CODE_VERSION, sealed.key, settings, flags, config.images.image_size_px)
    folder = storage.join(config.store, "surveys", f"{config.dataset}-{config.shot}shot-{key}")
    return Stage(
        name="data report",
        result=storage.join(folder, "result.json"),
        run=survey_store,
        arguments=(config, folder, store_uri(config, scanned), parent_run_id),
        needs=(sealed,),
        parts=(PAGE, TEXT, NUMBERS, CHOICE),
        complete=SameRun("parent_run_id", parent_run_id),
        says=summary_text,
    )


def survey_store(
    config: CrossValidationConfig, folder: str, store: str, parent_run_id: str, sealed: Mapping[str, Any]
) -> Mapping[str, Any]:
    """The stage: counts from the store's labels, pictures from its images."""
    from mshnet.data.store.images import ImageStore
    from mshnet.data.survey_facts import SurveyedImage

    images = ImageStore(store)
    seen = []
    for row, (image_id, subset, pixels) in enumerate(images.contents()):
        height, width = images.size_px(row)
        seen.append(SurveyedImage(image_id=image_id, subset=subset, height=height, width=width, pixels=pixels))

    def load(image_id: str, class_id: int) -> tuple[Any, Any]:
        from pipelines.pictures import stretched

        row = images.row(image_id)
        return stretched(images, row), images.original_mask(row, class_id).numpy() == 1

    report = _report(config, images.manifest.class_names, seen, (), (), "leave-out", load)
    return {**_written(report, folder, parent_run_id, config), "parent_run_id": parent_run_id}


def _written(
    report: DataReport, folder: str, parent_run_id: str = "", config: CrossValidationConfig | None = None
) -> dict[str, Any]:
    files = report.files()
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    if parent_run_id and config is not None:
        from pipelines.tracking import Tracker

        with tempfile.TemporaryDirectory() as scratch:
            for name, data in files.items():
                path = Path(scratch, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            Tracker(config.tracking_uri, config.experiment).log_file(parent_run_id, scratch, ARTIFACTS)
    found = report.survey
    return {
        "data": report.title,
        "images": found.images,
        "classes": len(found.class_names),
        "folds": len(found.folds),
        "problems": len(found.problems),
        "stops": sum(each.weight == "stops" for each in report.expectations),
        "expectations": [[each.weight, each.title] for each in report.expectations],
        "report": storage.join(folder, PAGE),
        "report_markdown": storage.join(folder, TEXT),
        "classes_file": storage.join(folder, CHOICE),
    }


def summary_text(result: Mapping[str, Any]) -> str:
    """What a person is told before the training starts."""
    lines = [f"{result['data']}: {result['images']:,} images, {result['classes']:,} classes"]
    lines += [f"  {WEIGHTS[weight]}: {title}" for weight, title in result["expectations"]]
    return "\n".join([*lines, f"  all of it: {result['report']}"])


def survey_source(config: CrossValidationConfig, out: str, small: Small = "leave-out") -> Mapping[str, Any]:
    """The command: every picture of a source is read once, and every problem named.

    Raises InputError where the source is absent, its classes are not clear, or none of its images can be used.
    """
    from mshnet.data.survey_facts import Problem, Remark
    from mshnet.data.survey_walk import twice, walk
    from pipelines import progress, scan

    scan.check(config)
    storage.check_writable(out)
    source = scan.opened(config)
    names = source.class_names
    seen: list[SurveyedImage] = []
    problems: list[Problem] = []
    for found in progress.bar(walk(source), desc="reading", unit="image", total=None):
        if isinstance(found, Problem):
            problems.append(found)
        else:
            seen.append(found)
    problems += twice(seen)
    remarks = [Remark(what=text) for text in source.remarks()]
    report = _report(config, names, seen, problems, remarks, small, _Examples(source))
    return _written(report, out)


class _Examples:
    """Reads pictures of a source by image id; the records are listed once, when the first is asked for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._records: dict[str, Any] = {}
        self._last: tuple[str, LabelledImage] | None = None

    def __call__(self, image_id: str, class_id: int) -> tuple[Any, Any]:
        if not self._records:
            self._records = {r.image_id: r for r in self._source.usable_records(lambda problem: None)}
        if self._last is None or self._last[0] != image_id:
            self._last = (image_id, self._source.load(self._records[image_id]))
        labelled = self._last[1]
        return labelled.image, labelled.masks[class_id]


def _report(
    config: CrossValidationConfig,
    names: tuple[str, ...],
    seen: Sequence[SurveyedImage],
    problems: Sequence[Problem],
    remarks: Sequence[Remark],
    small: Small,
    load: Load,
) -> DataReport:
    from mshnet.data.expectations import class_choice, expectations
    from mshnet.data.survey import survey
    from mshnet.visualize.survey_pictures import typical
    from pipelines import survey_page

    partition, folds, trouble = _folds(config, names, seen)
    found = survey(
        config.dataset,
        names,
        seen,
        folds,
        (*problems, *trouble),
        remarks,
        shot=config.shot,
        min_object_px=config.min_object_px,
        image_size_px=config.images.image_size_px,
        idle=partition.idle if partition else (),
    )
    pictures = survey_page.charts(found)
    examples = {}
    for c in sorted(found.classes, key=lambda c: (-c.large_enough, c.class_id))[:PICTURED]:
        wanted = [(image.image_id, image.share(c.class_id)) for image in typical(seen, c.class_id, found.min_object_px)]
        if wanted:
            examples[c.class_id] = survey_page.strip_name(c.class_id)
            pictures[examples[c.class_id]] = survey_page.strip(wanted, c.class_id, load)
    return DataReport(
        title=f"What {config.data_title} holds",
        place=config.own.annotations or config.source,
        survey=found,
        expectations=expectations(found, skip_small_classes=config.skip_small_classes, own=config.is_own),
        choice=_combined(config, class_choice(found, small)),
        removes_novel=config.removes_novel,
        origin=_origin(config, folds),
        pictures=pictures,
        examples=examples,
    )


def _combined(config: CrossValidationConfig, proposal: dict[str, Any]) -> dict[str, Any]:
    """The proposal on top of the class file that was given: its names are those after merging."""
    if not config.own.classes:
        return proposal
    from mshnet.data.class_choice import read_class_choice

    given = read_class_choice(config.own.classes)
    merge = {new: list(old) for new, old in given.merge.items()}
    gone = set(proposal["leave_out"])
    leave_out = [*given.leave_out]
    for name in proposal["leave_out"]:
        leave_out += merge.pop(name, [name])
    for new, parts in proposal["merge"].items():
        merge[new] = [old for part in parts for old in merge.pop(part, [part])]
        gone |= set(parts)
    folds = [left for fold in given.folds if (left := [name for name in fold if name not in gone])]
    return {"merge": merge, "leave_out": leave_out, **({"folds": folds} if folds else {})}


def _folds(
    config: CrossValidationConfig, names: tuple[str, ...], seen: Sequence[SurveyedImage]
) -> tuple[Partition | None, list[FoldPairs], list[Problem]]:
    """What each fold trains and tests on, or why it cannot be said."""
    from mshnet.data.survey_facts import Problem

    images = Counter(names[c] for image in seen for c in image.pixels)
    pairs: list[FoldPairs] = []
    problems: list[Problem] = []
    try:
        partition = own_folds.partition(config, names, images)
    except InputError as error:
        return None, [], [Problem(where="folds", what=str(error), stops=True)]
    for fold in range(partition.folds):
        try:
            pairs.append(_pairs(config, partition, fold, seen))
        except InputError as error:
            problems.append(Problem(where=f"fold {fold}", what=str(error), stops=fold in config.folds))
    return partition, pairs, problems


def _pairs(config: CrossValidationConfig, partition: Partition, fold: int, seen: Sequence[SurveyedImage]) -> FoldPairs:
    from mshnet.data.splits import without_novel
    from mshnet.data.survey import fold_pairs
    from pipelines.fold_lists import split_lists, without_small

    lists = split_lists(config, partition, fold, [(i.image_id, i.subset, dict(i.pixels)) for i in seen])
    kept = lists.train
    if config.removes_novel:
        kept = without_novel(kept, {image.image_id: set(image.pixels) for image in seen}, partition.tested(fold))
    held_out: tuple[int, ...] = ()
    if config.selection == "base":
        able = without_small(config, partition, kept)
        held_out = able.held_out(fold, config.validation.held_out_classes, config.training.seed)
    return fold_pairs(partition, lists, kept, seen, held_out)


def _origin(config: CrossValidationConfig, folds: Sequence[FoldPairs]) -> str:
    if not folds:
        return ""
    origin = f"{folds[0].origin[:1].upper()}{folds[0].origin[1:]}"
    return f"{origin}; images that show a novel class are {'' if config.removes_novel else 'not '}left out of training."


def main(argv: Sequence[str] | None = None) -> int:
    """The report of a source; its summary goes to stderr, the result as one JSON line to stdout."""
    from pipelines import job
    from pipelines.config import parse

    prog = "python -m pipelines.survey"
    description = "Say what a labelled data set holds and what to expect of it, before anything is trained."
    arguments = parse(SurveyArguments, argv, prog, description)

    def results() -> Any:
        config = job.resolved(arguments.cross_validation)
        result = survey_source(config, storage.absolute(arguments.out), arguments.small)
        print(f"\n{summary_text(result)}\n", file=sys.stderr)
        return result

    return job.report(results, prog)


if __name__ == "__main__":
    raise SystemExit(main())
