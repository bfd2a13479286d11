"""Actors that take calls as they come free. One that is killed is replaced, and its call made again."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

END_S = 10.0
"""Given to an actor to end by itself."""
LOOK_S = 60.0
"""Of waiting for a first actor, before it is said."""

Call = tuple[str, tuple[Any, ...]]
"""A method's name and its arguments."""


class Crew:
    """Up to `size` actors of one class, which has `prepare()` and `close()`. A context manager.

    Only actors that are up are given calls, so those for which there is no room hold nothing back; what they hold goes
    back to the cluster as soon as there is nothing left to do for them. So crews, and trainings, may wait for each
    other's places: whoever has one gets on with it alone.
    """

    def __init__(
        self,
        kind: type[Any],
        arguments: tuple[Any, ...],
        size: int,
        options: dict[str, Any],
        max_failures: int,
        what: str,
    ) -> None:
        """`max_failures` is how often in a row actors may die without any call coming to its end; `what` they do."""
        import ray

        self._new: Callable[[], Any] = lambda: ray.remote(**options, max_restarts=0)(kind).remote(*arguments)
        self.size, self.max_failures, self.what = size, max_failures, what
        self.ready_at: float | None = None
        """`time.monotonic()` when the first actor was up."""
        self._said = False
        self._failures = 0
        self._idle: list[Any] = []
        self._busy: dict[Any, tuple[Any, int | None]] = {}
        """By the result that is waited for: the actor, and which of the calls; None: it prepares."""

    def results(self, calls: Sequence[Call], upcoming: int = 0) -> Iterator[tuple[int, Any]]:
        """Each call's number and result, as they come. Afterwards as many actors stay as there are calls `upcoming`.

        At least one does. Raises what a call raised, and RuntimeError where actors die again and again.
        """
        import ray

        left = deque(range(len(calls)))
        while left or any(call is not None for _, call in self._busy.values()):
            self._engage(len(left) + upcoming)
            while left and self._idle:
                actor, number = self._idle.pop(), left.popleft()
                method, arguments = calls[number]
                self._busy[getattr(actor, method).remote(*arguments)] = actor, number
            patience = None if self.ready_at or self._said else LOOK_S
            ended, _ = ray.wait(list(self._busy), num_returns=1, timeout=patience)
            if not ended:
                self._said = True
                _say(
                    f"{self.what}: waiting for a first worker; free are {ray.available_resources().get('CPU', 0):g} CPU"
                )
                continue
            actor, done = self._busy.pop(ended[0])
            try:
                result = ray.get(ended[0])
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                self._dismiss([actor], gracefully=False)
                if done is not None:
                    left.appendleft(done)
                self._note_death(error)
                continue
            except ray.exceptions.RayTaskError as error:
                self._idle.append(actor)
                raise _cause(error) from None
            self._idle.append(actor)
            if done is None:
                self.ready_at = self.ready_at or time.monotonic()
                continue
            self._failures = 0
            yield done, result

    def _engage(self, calls: int) -> None:
        """As many actors as there is something to do for, and no more than that."""
        working = sum(call is not None for _, call in self._busy.values())
        wanted = min(self.size, working + calls)
        while len(self._idle) + len(self._busy) < wanted:
            actor = self._new()
            self._busy[actor.prepare.remote()] = actor, None
        spare = len(self._idle) + len(self._busy) - max(wanted, 1)
        starting = [ref for ref, (_, call) in self._busy.items() if call is None][: max(0, spare)]
        self._dismiss([self._busy.pop(ref)[0] for ref in starting], gracefully=False)
        surplus = max(0, spare - len(starting))
        gone, self._idle = self._idle[:surplus], self._idle[surplus:]
        self._dismiss(gone)

    def _note_death(self, error: Exception) -> None:
        self._failures += 1
        if self._failures > self.max_failures:
            raise RuntimeError(
                f"{self.what}: {self._failures} workers died one after the other without getting any further, the last "
                f"with: {error}"
            ) from error
        _say(f"{self.what}: a worker died; another does again what it was doing")

    def _dismiss(self, actors: Sequence[Any], gracefully: bool = True) -> None:
        import ray

        if gracefully and actors:
            ended = [actor.close.remote() for actor in actors]
            with contextlib.suppress(ray.exceptions.RayError):
                ray.wait(ended, num_returns=len(ended), timeout=END_S)
        for actor in actors:
            ray.kill(actor)

    def close(self) -> None:
        """End all actors."""
        self._dismiss([actor for actor, call in self._busy.values()], gracefully=False)
        self._busy.clear()
        idle, self._idle = self._idle, []
        self._dismiss(idle)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # a task's log lines are not shown


def _cause(error: Any) -> BaseException:
    from pipelines.dag import cause

    return cause(error)
