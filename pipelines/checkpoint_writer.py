"""Into a checkpoint and out of it: copied while the training goes on, written from a thread of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipelines.checkpoints import Checkpoints, Progress, TakenOverError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class BackgroundWriter:
    """Writes checkpoints off the training's thread: a step waits for a copy in memory, and on a GPU not even for that.

    An error of the thread is raised by the next call, or by `close`; that of a checkpoint that was only offered is
    said, once, as the next one may do better. A context manager.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._copies: dict[str, Tensor] = {}
        self._offered = False
        self._said: set[str] = set()

    def offer(self, progress: Progress, tensors: Mapping[str, Tensor]) -> bool:
        """Write one inside an epoch, unless one is being written; whether it will be tried."""
        if self._written is not None and not self._written.done():
            self._say_once(
                "left out",
                f"the checkpoint of update {progress.step} is left out: the one before is still being written "
                "(said once; a larger --checkpoint-every-steps would do)",
            )
            return False
        self.put(progress, tensors)
        self._offered = True
        return True

    def put(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Write one, after the one that is being written."""
        self.wait()
        copied = self._copy(tensors)
        self._offered = False
        self._written = self._thread.submit(self._write, progress, copied)

    def wait(self) -> None:
        """Until all that was given is written; raises what went wrong."""
        written, self._written = self._written, None
        if written is None:
            return
        try:
            written.result()
        except TakenOverError:
            raise
        except Exception as error:
            if not self._offered:
                raise
            self._say_once(
                "failed",
                f"a checkpoint inside an epoch could not be written ({type(error).__name__}: {error}); going on "
                "(said once; at the epoch's end it would end the worker)",
            )

    def _say_once(self, about: str, text: str) -> None:
        if about not in self._said:
            print(text, file=sys.stderr, flush=True)
        self._said.add(about)

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def _copy(self, tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
        """Copy into this writer's memory, pinned for a GPU; an event that says when it has arrived."""
        import torch

        from mshnet.profiling import region

        with region("checkpoint copy"), torch.no_grad():
            on_gpu = any(tensor.is_cuda for tensor in tensors.values())
            if self._copies.keys() != tensors.keys():
                # One set, reused: there is never more than one checkpoint under way.
                self._copies = {
                    name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                    for name, tensor in tensors.items()
                }
            for name, tensor in tensors.items():
                self._copies[name].copy_(tensor, non_blocking=True)
            if not on_gpu:
                return None
            # On the stream of the training, so before the next update changes anything.
            event = torch.cuda.Event()
            event.record()
            return event

    def _write(self, progress: Progress, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        self._checkpoints.write(progress, self._copies)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception as own:
            if error is None:
                raise
            # The one in flight decides whether the worker is started again.
            print(f"and a checkpoint was not written ({type(own).__name__}: {own})", file=sys.stderr, flush=True)


def state_tensors(
    relation: torch.nn.Module, optimizer: torch.optim.Optimizer, backbone: torch.nn.Module
) -> dict[str, Tensor]:
    """What a checkpoint holds beside its progress: weights, momentum, and the backbone's buffers.

    The backbone is frozen, but where it was calibrated the last bits of its batch norm are this machine's.
    """
    tensors = {f"relation.{name}": tensor for name, tensor in relation.state_dict().items()}
    for name, parameter in relation.named_parameters():
        momentum = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    return tensors | {f"backbone.{name}": tensor for name, tensor in backbone.named_buffers()}


def load_state(
    tensors: Mapping[str, Tensor],
    relation: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    backbone: torch.nn.Module,
) -> None:
    """Put a checkpoint's tensors into place; without an optimizer, for a model that is not trained on."""
    import torch

    relation.load_state_dict(_below("relation.", tensors))
    backbone.load_state_dict(_below("backbone.", tensors), strict=False)
    if optimizer is None:
        return
    momentum = _below("momentum.", tensors)
    for name, parameter in relation.named_parameters():
        if name in momentum:
            # In the parameter's own memory format, as the optimizer made it.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum[name])


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
