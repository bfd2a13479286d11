"""The workflow: a stage is a Ray task with a durable result, an edge an object reference.

Ray schedules, spreads and retries. A stage's result lies on the store under a fingerprint of all that
it depends on and is written last, so the same job submitted again does only what is missing.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mshnet.errors import InputError
from pipelines import capacity, environment, progress, storage, turns

LOG = logging.getLogger(__name__)
Result = Mapping[str, Any]
LOOK_S = 30.0
"""How long nothing may happen before it is looked into."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of the job."""

    name: str
    result: str
    """URI of its JSON result; existing, it means done."""
    run: Callable[..., Result]
    """Module-level function of `arguments`, then the results of `needs`."""
    arguments: tuple[Any, ...] = ()
    needs: tuple[Stage, ...] = ()
    after: tuple[Stage, ...] = ()
    """Stages to wait for without needing their results: order where the cluster lacks room."""
    cpus: float = 1
    gpus: float = 0
    parts: tuple[str, ...] = ()
    """Files beside the result that belong to it: with one of them gone, the stage is not done."""
    scratch: str = ""
    """Folder that is of no use any more once the result is written."""
    complete: Callable[[Result], bool] = field(default=lambda result: True)
    """Whether a recorded result still holds, as far as a quick look can tell."""
    holds: Callable[[Result], bool] | None = None
    """The same by a thorough look, inside the task. With it, a stage that is needed always runs, but keeps a
    recorded result that holds."""
    exclusive: bool = False
    """The result is written only where there is none: of two jobs that race for it one wins, the other says so."""
    alone: bool = False
    """Of several jobs on a cluster that want it, one does it; the others wait and take its result."""
    spread: bool = False
    """Over the nodes, rather than packed on few."""
    images: int = 0
    """How many it works through, for the progress; its result then has `size_bytes`."""
    says: Callable[[Result], str] | None = None
    """What of its result a person is told as soon as it is there, while the job goes on."""

    @property
    def folder(self) -> str:
        """Where the result lies, and what belongs to it."""
        return posixpath.dirname(self.result)

    @property
    def key(self) -> str:
        """What names the result wherever the store lies, fingerprint included; for others' fingerprints."""
        return "/".join(self.result.split("/")[-2:])

    def recorded(self) -> Result | None:
        """The durable result, or None."""
        result = _whole(self.result, self.parts)
        return result if result is not None and self.complete(result) else None


def _whole(uri: str, parts: Sequence[str]) -> Result | None:
    result = storage.read_json(uri)
    folder = posixpath.dirname(uri)
    if result is None or not all(storage.exists(storage.join(folder, part)) for part in parts):
        return None
    return result


class StageFailedError(RuntimeError):
    """Some stages failed; the others' results are kept."""

    def __init__(self, message: str, stages: Sequence[str]) -> None:
        super().__init__(message)
        self.stages = tuple(stages)


class StageInputError(InputError):
    """Some stages failed, and one of them because of what the user gave."""

    def __init__(self, message: str, stages: Sequence[str]) -> None:
        super().__init__(message)
        self.stages = tuple(stages)


@dataclass(frozen=True)
class Plan:
    """What is done and what would run, in an order that respects the edges."""

    done: Mapping[str, Result]
    pending: tuple[Stage, ...]
    skipped: int
    """Stages that nothing pending needs."""
    recorded: frozenset[str] = frozenset()
    """Pending stages of an earlier job whose results are looked at thoroughly and kept if they hold."""

    def lines(self) -> Iterator[str]:
        """The graph as text, a stage a line."""
        for name in self.done:
            yield f"done  {name}"
        for stage in self.pending:
            needs = ", ".join(need.name for need in stage.needs)
            verb = "check" if stage.name in self.recorded else "run  "
            yield f"{verb} {stage.name}" + (f"  <- {needs}" if needs else "")


def plan(targets: Sequence[Stage]) -> Plan:
    """Look at the store, from the targets upstream: what a done stage needed is not even looked at."""
    done: dict[str, Result] = {}
    pending: dict[str, Stage] = {}
    checked: set[str] = set()

    def visit(stage: Stage) -> None:
        if stage.name in done or stage.name in pending:
            return
        recorded = stage.recorded()
        if recorded is not None and stage.holds is None:
            done[stage.name] = recorded
            return
        if recorded is not None:
            checked.add(stage.name)
        for need in stage.needs:
            visit(need)
        pending[stage.name] = stage

    for target in targets:
        visit(target)
    every: set[str] = set()

    def count(stage: Stage) -> None:
        if stage.name not in every:
            every.add(stage.name)
            for need in stage.needs:
                count(need)

    for target in targets:
        count(target)
    return Plan(done, tuple(pending.values()), len(every) - len(done) - len(pending), frozenset(checked))


@dataclass(frozen=True)
class Outcome:
    """What became of the stages that were wanted."""

    results: Mapping[str, Result]
    """Of the targets that are done, by name."""
    failures: Mapping[str, BaseException]
    """Of every stage that failed, also for the failure of what it needed, by name."""


def execute(targets: Sequence[Stage]) -> dict[str, Result]:
    """Run what is missing; results of the targets by name.

    Raises StageInputError when a stage found bad input, StageFailedError when one failed otherwise; either
    way all that does not depend on it has been finished first.
    """
    outcome = attempt(targets)
    if outcome.failures:
        _raise(outcome.failures)
    return dict(outcome.results)


def attempt(targets: Sequence[Stage], ended: Callable[[str, bool], None] = lambda name, well: None) -> Outcome:
    """Run what is missing, as far as it goes: a failure stops only what depends on it.

    `ended` is told of each stage that was run to its end, and whether it ended well.
    """
    import ray

    planned = plan(targets)
    task = ray.remote(num_returns=2, max_retries=3)(_run)
    refs: dict[str, Any] = {name: ray.put(dict(result)) for name, result in planned.done.items()}
    held = list(planned.pending)
    waiting: dict[Any, Stage] = {}
    notes: dict[str, Any] = {}

    def submit() -> None:
        """Hand Ray what no earlier stage holds back: of a long queue, only what has its turn takes a process."""
        unfinished = {stage.name for stage in (*held, *waiting.values())}
        for stage in tuple(held):
            if any(e.name in unfinished for e in stage.after) or any(n.name not in refs for n in stage.needs):
                continue
            held.remove(stage)
            options = {"name": stage.name, "num_cpus": stage.cpus, "num_gpus": stage.gpus}
            refs[stage.name], notes[stage.name] = task.options(
                **options, scheduling_strategy=_strategy(stage.spread)
            ).remote(_Task.of(stage), *(refs[need.name] for need in stage.needs))
            waiting[refs[stage.name]] = stage

    submit()
    failures: dict[str, BaseException] = {}
    images = sum(stage.images for stage in planned.pending)
    with (
        progress.bar(total=len(planned.pending), desc="stages", unit="stage", mininterval=0) as bar,
        progress.bar(total=images, desc="images", unit="image", disable=not images) as image_bar,
    ):
        size_bytes = queued = 0
        asked: list[Any] = []
        while waiting:
            ready, _ = ray.wait(list(waiting), num_returns=1, timeout=LOOK_S)
            if not ready:
                queued = _say_queued(queued)
                asked = capacity.ask_nodes(asked) if queued else []
                continue
            stage = waiting.pop(ready[0])
            try:
                result, (note, kept) = ray.get([ready[0], notes[stage.name]])
            except ray.exceptions.RayError as error:
                failures[stage.name] = cause(error)
            else:
                if note:
                    LOG.warning("%s: %s", stage.name, note)
                if stage.says:
                    LOG.info("%s: %s", stage.name, stage.says(result))
                if stage.images and kept:  # no work, so not to count for the rate
                    image_bar.total -= stage.images
                    image_bar.refresh()
                elif stage.images:
                    size_bytes += int(result["size_bytes"])
                    image_bar.set_postfix_str(f"{size_bytes / 1e6:.0f} MB written", refresh=False)
                    image_bar.update(stage.images)
            bar.set_postfix_str(stage.name, refresh=False)
            bar.update()
            ended(stage.name, stage.name not in failures)
            submit()
    done = [stage for stage in targets if stage.name not in failures]
    return Outcome({stage.name: ray.get(refs[stage.name]) for stage in done}, failures)


def _say_queued(before: int) -> int:
    """Whether trainings wait for room, where that has changed."""
    queued = capacity.trainings_waiting()
    if queued and queued != before:
        LOG.info("%d training(s) wait for room: the cluster has %s, in use or too small", queued, capacity.found())
    return queued


def each(run: Callable[..., Any], calls: Sequence[tuple[Any, ...]], name: str) -> list[Any]:
    """A function's results for each tuple of arguments, as Ray tasks spread over the nodes, in order.

    Raises StageInputError when one found bad input, StageFailedError when one failed otherwise.
    """
    import ray

    task = ray.remote(_checked).options(name=name, num_cpus=1, max_retries=3, scheduling_strategy=_strategy(True))
    refs = [task.remote(run, *arguments) for arguments in calls]
    results = []
    for ref in progress.bar(refs, desc=name, disable=len(refs) == 1):
        try:
            results.append(ray.get(ref))
        except ray.exceptions.RayError as error:
            _raise({name: cause(error)})
    return results


def _checked(run: Callable[..., Any], *arguments: Any) -> Any:
    environment.check()
    return run(*arguments)


def _strategy(spread: bool) -> str:
    return "SPREAD" if spread else "DEFAULT"


@dataclass(frozen=True)
class _Task:
    """What a stage's task needs of it."""

    name: str
    result: str
    run: Callable[..., Result]
    arguments: tuple[Any, ...]
    holds: Callable[[Result], bool] | None
    exclusive: bool
    scratch: str
    alone: bool
    parts: tuple[str, ...]

    @staticmethod
    def of(stage: Stage) -> _Task:
        return _Task(**{field.name: getattr(stage, field.name) for field in fields(_Task)})


def _run(task: _Task, *needed: Result) -> tuple[Result, tuple[str, bool]]:
    """The task's body: the stage's result; what the user should be told ("" mostly), whether it kept an earlier one."""
    environment.check()
    if task.holds:
        recorded = storage.read_json(task.result)
        if recorded is not None and task.holds(recorded):
            return recorded, ("", True)
    if not task.alone or environment.VARIABLE not in os.environ:  # this machine's own Ray has one job
        return _done(task, needed)
    with turns.turn(task.result, task.name) as waited:
        theirs = _whole(task.result, task.parts) if waited else None
        return _done(task, needed) if theirs is None else (theirs, ("another job did it; taking its result", True))


def _done(task: _Task, needed: tuple[Result, ...]) -> tuple[Result, tuple[str, bool]]:
    result, note = task.run(*task.arguments, *needed), ""
    if task.exclusive:
        note = _write_once(task.result, result)
    else:
        storage.write_json(task.result, result)
    if task.scratch:
        storage.remove(task.scratch)
    return result, (note, False)


def _write_once(uri: str, result: Result) -> str:
    if storage.create_json(uri, result):
        return ""
    if storage.read_json(uri) != json.loads(json.dumps(result)):
        raise InputError(
            f"{uri!r} is there already and holds something else: another job wrote it first, or other versions "
            "of the libraries encode otherwise; what is there was left alone. Use another --store, or python -m "
            "pipelines.preprocess --repair to replace it"
        )
    # It may also be this job's own, where the answer to the first try was lost.
    return f"{uri!r} was there first, with the same contents; another job wrote it, or this one before; using it"


def cause(error: BaseException) -> BaseException:
    """What went wrong in a task or a training, without Ray's wrapping."""
    # Ray Train's errors hold what each worker raised, or what the controller did.
    workers = getattr(error, "worker_failures", None)
    inner = next(iter(workers.values())) if workers else getattr(error, "controller_failure", None)
    inner = inner or getattr(error, "cause", None)
    return cause(inner) if isinstance(inner, BaseException) else error


def causes(failures: Mapping[str, BaseException]) -> dict[str, str]:
    """What went wrong, in words, by the stage where it arose.

    A stage downstream fails with the cause of the one upstream: each cause is named once.
    """
    found: dict[str, str] = {}
    for name, error in failures.items():
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        found.setdefault(text, name)
    return {name: text for text, name in found.items()}


def _raise(failures: Mapping[str, BaseException]) -> None:
    arose = causes(failures)
    lines = "\n".join(f"  {name}: {text}" for name, text in arose.items())
    of_input = [error for error in failures.values() if isinstance(error, InputError)]
    message = f"{len(arose)} stage(s) failed; submit the same job again to go on from what is done:\n{lines}"
    if of_input:
        raise StageInputError(message, list(failures)) from of_input[0]
    raise StageFailedError(message, list(failures)) from next(iter(failures.values()))
