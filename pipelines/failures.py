"""Which failures of a worker Ray Train does not try again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.train import ControllerError, UserCallback

from mshnet.errors import InputError, TrainingDivergedError
from pipelines.checkpoints import TakenOverError

NOT_AGAIN = (InputError, TrainingDivergedError, TakenOverError)
"""Another try would meet the first two again, and take the fold back from whoever has it now."""


class EndAtOnce(UserCallback):  # type: ignore[misc]  # Ray has no types
    """Ends the run, on all ranks, for an error after which it is not to be tried again."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, BaseException]) -> None:
        """What a callback raises ends the run; as Ray's own error it does so without a traceback."""
        for error in worker_exceptions.values():
            if isinstance(error, NOT_AGAIN):
                raise ControllerError(error)
