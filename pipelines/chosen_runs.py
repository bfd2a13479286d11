"""Which runs fill a table: all measured in one way; what was measured otherwise is set apart, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mshnet.errors import InputError
from mshnet.protocols import EPISODES, Protocol
from pipelines.cells import SHOTS, Table
from pipelines.fold_table import novel_images
from pipelines.results import FoldResult
from pipelines.tracking import flattened
from pipelines.tracking_search import TrackedRun

FIELD_LISTS = "the field's list files"
Measured = tuple[tuple[str, str], ...]
"""How a run was measured, as (name, value) pairs: runs in one table agree in all of it."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which runs may fill the tables; what is left empty may be anything."""

    protocol: str = ""
    """Name of the test episodes: published, published-5x1000, published-10000, balanced, or a run's own words."""
    selection: str = ""
    """On what the epoch was chosen: base (held-out base classes), novel (the test episodes, as published), last; or
    given: the weights were not trained here."""
    resize: str = ""
    """square or original."""
    image_size_px: int = 0
    """Side of the square that the network sees."""
    weights: str = ""
    """Of the backbone: imagenet, random, or a file's fingerprint."""
    recipe: str = ""
    """default, paper, published or demo: only runs trained with exactly its values."""

    def refusal(self, run: TrackedRun) -> str:
        """Why a run may not fill a cell; "" where it may."""
        protocol = run.folds[0].protocol
        found = {
            "protocol": protocol.name,
            "selection": selection_of(run),
            "resize": protocol.resize,
            "image_size_px": protocol.side_px,
            "weights": weights_of(run),
        }
        for name, value in found.items():
            wanted = getattr(self, name)
            if wanted and wanted != value:
                return f"{name.replace('_', ' ')}: {value}, asked for was {wanted}"
        return _other_values(run, self.recipe) if self.recipe else ""


def _other_values(run: TrackedRun, recipe: str) -> str:
    from pipelines import recipes

    config = recipes.named(recipe, run.params["dataset"]).to_json()
    if selection_of(run) == "given":
        return f"not the recipe {recipe}: the weights were given, not trained here"
    wanted = flattened({"training": config["training"], "validation": {"selection": config["validation"]["selection"]}})
    for name, value in wanted.items():
        if run.params.get(name, value) != value and name != "training.seed":
            return f"not the recipe {recipe}: {name} {run.params[name]}, not {value}"
    return ""


def selection_of(run: TrackedRun) -> str:
    """base, novel, last, or given: the weights were not trained here."""
    return run.tags.get("selection") or run.params.get("validation.selection", "")


def weights_of(run: TrackedRun) -> str:
    """Of the backbone: imagenet, random, or the fingerprint of a file."""
    return run.tags.get("fingerprint.backbone_weights") or run.params.get("backbone_weights", "unknown")


def architecture_of(run: TrackedRun) -> str:
    """mshnet, or a network beside it."""
    return run.params.get("model.architecture", "mshnet")


def measured(run: TrackedRun) -> Measured:
    """What must agree before numbers stand in one table. Supports, and classes that could not be tested, are the
    cells' own."""
    weights = weights_of(run)
    return (
        *_agreed(run.folds),
        # A file of weights is of one backbone.
        ("backbone weights", weights if weights in ("imagenet", "random") else "from a file"),
        ("data", f"fingerprint {run.tags.get('fingerprint.data', 'unknown')[:12]}"),
    )


def _agreed(folds: Sequence[FoldResult]) -> Iterable[tuple[str, str]]:
    by_fold = [dict(_of_fold(fold)) for fold in folds]
    for name in by_fold[0]:
        yield name, "; ".join(dict.fromkeys(values[name] for values in by_fold))


def _of_fold(fold: FoldResult) -> Measured:
    protocol = fold.protocol
    size = f"{protocol.side_px} px"
    return (
        ("test episodes", _episodes(protocol)),
        ("checkpoint", protocol.selection.split(" (")[0]),
        ("image size", f"{size} square" if protocol.resize == "square" else f"{size} square, judged at original size"),
        ("ignored pixels", "left out of the counts" if protocol.ignore == "excluded" else "background"),
        ("masks", protocol.mask_mode),
        # Each fold's lists have a hash of their own.
        (
            "split lists",
            FIELD_LISTS if protocol.split_lists.startswith("lists:") else protocol.split_lists,
        ),
        ("training images with a novel class", novel_images(fold)),
    )


def _episodes(protocol: Protocol) -> str:
    several = f" of each of {len(protocol.seeds)} seeds" if len(protocol.seeds) > 1 else ""
    return f"{protocol.name} ({protocol.episodes:,} episodes{several})" if protocol.name in EPISODES else protocol.name


@dataclass(frozen=True)
class Key:
    """What a run fills."""

    backbone: str
    similarity: str
    architecture: str
    shot: int

    @staticmethod
    def of(run: TrackedRun) -> Key:
        params = run.params
        return Key(params["model.backbone"], params["model.similarity"], architecture_of(run), int(params["shot"]))


@dataclass(frozen=True)
class Apart:
    """A run that fills no cell."""

    run: TrackedRun
    why: str


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The runs of a table."""

    measured: Measured = ()
    """Of all of them; empty without any."""
    runs: Mapping[Key, TrackedRun] = field(default_factory=dict)
    apart: tuple[Apart, ...] = ()
    unfinished: Mapping[Key, TrackedRun] = field(default_factory=dict)
    """The newest one where none has finished."""


def choose(table: Table, runs: Sequence[TrackedRun], asked: Asked) -> Chosen:
    """The runs that fill a table, of those of an experiment, newest first.

    Of the ways of measuring that may be, the one that fills most folds, the newest of equals. Of a cell's runs
    measured so the newest one with all folds, else the newest of those with most.
    """
    fitting = [run for run in runs if fits(table, run)]
    finished = [run for run in fitting if run.folds]
    refused = {run.run_id: why for run in finished if (why := asked.refusal(run))}
    groups: dict[Measured, list[TrackedRun]] = {}
    for run in finished:
        if run.run_id not in refused:
            groups.setdefault(measured(run), []).append(run)
    newest_first = list(groups)
    best = max(newest_first, key=lambda how: (_filled(groups[how]), -newest_first.index(how)), default=())
    chosen: dict[Key, TrackedRun] = {}
    for run in sorted(groups.get(best, ()), key=lambda run: (-len(run.folds), -run.started_ms)):
        chosen.setdefault(Key.of(run), run)
    taken = {run.run_id for run in chosen.values()}
    unfinished: dict[Key, TrackedRun] = {}
    for run in fitting:
        if not run.folds and run.status != "FINISHED" and Key.of(run) not in chosen:
            unfinished.setdefault(Key.of(run), run)
    apart = tuple(
        Apart(run, refused.get(run.run_id) or _why_apart(run, best, chosen))
        for run in fitting
        if run.run_id not in taken
    )
    return Chosen(measured=best, runs=chosen, apart=apart, unfinished=unfinished)


def fits(table: Table, run: TrackedRun) -> bool:
    """Whether a table has a place for such a run, whatever its state."""
    key = Key.of(run)
    similar = key.similarity in table.similarities or key.architecture != "mshnet"
    return run.params["dataset"] == table.dataset and key.shot in SHOTS and similar


def _filled(runs: Sequence[TrackedRun]) -> int:
    return len({(Key.of(run), fold.fold) for run in runs for fold in run.folds})


def _why_apart(run: TrackedRun, best: Measured, chosen: Mapping[Key, TrackedRun]) -> str:
    if run.problem:
        return run.problem
    if not run.folds:
        return run.status.lower()
    others = dict(best)
    differing = [f"{name}: {value}, not {others[name]}" for name, value in measured(run) if others.get(name) != value]
    if differing:
        return "measured otherwise: " + "; ".join(differing)
    holder = chosen[Key.of(run)]
    return "fewer folds than the run shown" if len(run.folds) < len(holder.folds) else "older than the run shown"


def check(asked: Asked) -> None:
    """Raises InputError for a word that no run can have, before anything is read."""
    words = {
        "selection": ("base", "novel", "last", "given"),
        "resize": ("square", "original"),
        "recipe": ("default", "paper", "published", "demo"),
    }
    for name, known in words.items():
        if (given := getattr(asked, name)) and given not in known:
            raise InputError(f"{name} must be one of {', '.join(known)}, or left out, got {given!r}")


def mean_miou(found: TrackedRun) -> float | None:
    """Of the folds that a run has, in %; None without any."""
    return 100 * sum(fold.score.miou for fold in found.folds) / len(found.folds) if found.folds else None
