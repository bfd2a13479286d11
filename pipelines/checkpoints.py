"""A fold's checkpoints: the state of a training between two updates, each one a file put in place whole.

Ray Train's own are a folder that its driver copies and lists; these need neither, so that a step waits for a copy
in memory only and a job that is submitted again needs nothing but the store (docs/adr/0008).
"""

from __future__ import annotations

import json
import re
import sys
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mshnet.errors import InputError
from pipelines import storage
from pipelines.config import CrossValidationConfig, fingerprint
from pipelines.drawn import DrawnTraining
from pipelines.results import EpochRecord, Record

if TYPE_CHECKING:
    from torch import Tensor

FORMAT_VERSION = 1
RUN = "run"
"""Folder below a fold's own, of no more use once the fold is trained."""
CHECKPOINTS = f"{RUN}/checkpoints"
OWNER = "owner"
"""File beside the checkpoints that says which run may write and remove them."""
_NAME = re.compile(r"step-(\d{9})\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Progress(Record):
    """Where training stands: with the weights and the optimizer's momentum, all that going on needs.

    The order of episodes, the learning rate and the dropout's masks are pure functions of (seed, step), so they have
    no state of their own.
    """

    step: int = 0
    """Updates done; with the updates of an epoch it is also the position inside the epoch."""
    history: list[EpochRecord] = field(default_factory=list)
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    """Total, outer and inner loss summed over the updates of the epoch begun."""
    train_s: float = 0.0

    @property
    def ranked(self) -> list[EpochRecord]:
        """The epochs, best validation first, of equals the last; those without validation come after the others."""
        return sorted(self.history, key=_score, reverse=True)

    @property
    def best(self) -> EpochRecord | None:
        """The first of the ranked; None before the first epoch's end."""
        return next(iter(self.ranked), None)


def _score(record: EpochRecord) -> tuple[float, int]:
    return (-1.0 if record.validation_miou is None else record.validation_miou, record.epoch)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory."""

    progress: Progress
    tensors: Mapping[str, Tensor]
    crc32: str
    """Of all that is in it."""


class DamagedCheckpointError(RuntimeError):
    """A checkpoint that is not what was written."""


class TakenOverError(RuntimeError):
    """The fold belongs to another run, or is finished: this one must write nothing more."""


class Checkpoints:
    """The checkpoints of one fold below a folder or URI.

    Only the writer removes any: what is older than the one just written and neither the one before it nor the best
    epoch of one of these two. So whichever of them is damaged, all that the other one names is there.
    """

    def __init__(self, folder: str, key: str) -> None:
        """`key` is the fingerprint of all that the fold's weights depend on."""
        self.folder, self.key = folder, key
        self._latest: Progress | None = None
        self._damaged: set[str] = set()
        self._token = ""

    def claim(self) -> None:
        """From now on this object is the one that writes here; others that did raise TakenOverError."""
        token = uuid.uuid4().hex
        storage.write_bytes(storage.join(self.folder, OWNER), token.encode())
        self._token = token

    def names(self) -> list[str]:
        """Of what lies there, the newest first."""
        return sorted(filter(_NAME.fullmatch, storage.sizes(self.folder)), reverse=True)

    def newest(self) -> tuple[str, Checkpoint] | None:
        """The newest sound one and its name; None where there is none. Says which ones are damaged.

        Raises InputError for one of another fold, configuration or format.
        """
        for name in self.names():
            try:
                found = self.read(name)
            except FileNotFoundError:
                continue  # a writer that is about to end removed it
            except DamagedCheckpointError as error:
                self._damaged.add(name)
                _warn(f"{error}; taking the one before it")
                continue
            self._latest = found.progress
            return name, found
        return None

    def read(self, name: str) -> Checkpoint:
        """One of them. Raises FileNotFoundError, DamagedCheckpointError, or InputError for one of something else."""
        uri = storage.join(self.folder, name)
        metadata, tensors = _decoded(storage.read_bytes(uri), uri)
        found = (metadata["format"], metadata["key"])
        if found != (str(FORMAT_VERSION), self.key):
            raise InputError(
                f"expected a checkpoint of format {FORMAT_VERSION} and of the training {self.key} at {uri!r}, found "
                f"format {found[0]} and {found[1]}; move it away, or use another --store"
            )
        return Checkpoint(Progress.from_json(metadata["progress"]), tensors, metadata["crc32"])

    def best(self, progress: Progress) -> tuple[EpochRecord, Checkpoint]:
        """Of the epochs that have a sound one, the best. Says which better ones were damaged or lost.

        Raises FileNotFoundError where none has.
        """
        for record in progress.ranked:
            try:
                found = self.read(name_of(record.step))
            except (FileNotFoundError, DamagedCheckpointError) as error:
                # What is not the best was mostly removed as such.
                if record == progress.best or isinstance(error, DamagedCheckpointError):
                    _warn(f"the weights of epoch {record.epoch} are lost ({error}); taking the best of the others")
                continue
            return record, found
        raise FileNotFoundError(f"no sound checkpoint of an epoch's end in {self.folder!r}")

    def write(self, progress: Progress, tensors: Mapping[str, Tensor]) -> None:
        """Put one in place, then remove those that are of no more use.

        Raises TakenOverError once another run has claimed the folder, or it is gone.
        """
        data = _encoded(self.key, progress, dict(tensors))
        self._check_owner()
        storage.write_bytes(storage.join(self.folder, name_of(progress.step)), data)
        before, self._latest = self._latest, progress
        self._check_owner()
        try:
            self._remove_all_but(kept(progress, before), written=name_of(progress.step))
        except Exception as error:  # noqa: BLE001 - whatever ails the store: what counts is in place
            _warn(f"old checkpoints in {self.folder!r} could not be removed ({error}); the next one's turn")

    def _check_owner(self) -> None:
        if not self._token:
            return
        try:
            found = storage.read_bytes(storage.join(self.folder, OWNER)).decode()
        except FileNotFoundError:
            found = "nobody: the fold is finished, or was removed"
        if found != self._token:
            raise TakenOverError(
                f"expected to be the run that writes to {self.folder!r} ({self._token}), found {found}; another job, "
                "or the same one submitted again, has taken it over: wait for its end, then submit again"
            )

    def _remove_all_but(self, wanted: set[str], written: str) -> None:
        for name in self.names():
            # A newer one is of a run that was killed a moment ago and is as good as our own will be.
            if name not in wanted and (name < written or name in self._damaged):
                storage.remove(storage.join(self.folder, name))
        self._damaged.clear()


def fold_key(config: CrossValidationConfig, drawn: DrawnTraining) -> str:
    """Fingerprint of all that a checkpoint's state depends on and its folder does not promise.

    Not where the backbone's weights lie: the folder's name holds their content, and they may be moved.
    """
    return fingerprint(config.model.identity(), config.to_json()["training"], config.precision, drawn.to_json())


def name_of(step: int) -> str:
    """The file of a checkpoint after so many updates."""
    return f"step-{step:09d}.safetensors"


def kept(newest: Progress, before: Progress | None) -> set[str]:
    """Files to keep: the newest two and the best epoch of each, which is mostly one and the same."""
    wanted = [progress for progress in (newest, before) if progress is not None]
    best = [record.step for progress in wanted if (record := progress.best)]
    return {name_of(step) for step in (*(progress.step for progress in wanted), *best)}


def _warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _encoded(key: str, progress: Progress, tensors: dict[str, Tensor]) -> bytes:
    import safetensors.torch

    metadata = {"format": str(FORMAT_VERSION), "key": key, "progress": progress.to_text()}
    return safetensors.torch.save(tensors, {**metadata, "crc32": _checksum(metadata, tensors)})


def _decoded(data: bytes, uri: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    import safetensors
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")
        metadata = dict(json.loads(data[8 : 8 + length])["__metadata__"])
        sound = metadata["crc32"] == _checksum({k: v for k, v in metadata.items() if k != "crc32"}, tensors)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DamagedCheckpointError(f"the checkpoint {uri!r} is damaged ({error})") from error
    if not sound:
        raise DamagedCheckpointError(f"the checkpoint {uri!r} is damaged (its checksum is another)")
    return metadata, tensors


def _checksum(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    import torch

    value = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
