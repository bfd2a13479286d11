"""Kill a training at random moments, let it go on, and compare its final weights bit for bit.

    python benchmarks/kill_training.py --kills 100 --record docs/benchmarks/exact_resume.md

A small fold (ResNet-18, 65 px, batch 4, float32, on the CPU with as many workers as --workers says, a checkpoint after
each update) is trained undisturbed, one worker in this process, then again and again by Ray Train on a local Ray, with
several kills in each round: SIGKILL to a worker, whose group Ray starts again, or to the driver, which is started again
by hand, half of the time at once, while what it left behind is still running. A kill falls after a drawn number of
updates since the last one and a drawn part of a second, or, one time in five, anywhere in the seconds after a start. At
the end of a round every tensor of the last checkpoint (weights, momentum, running statistics) must have the undisturbed
one's bits, and the history of losses its numbers. Ends with code 1 where not.

Only processes that carry this run's mark in their environment are ever killed.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
import tyro
from tqdm import tqdm

from mshnet.config import ImageFormat, ModelConfig, TrainingConfig
from mshnet.data.shapes import write_voc
from pipelines import draw, preprocess, scan, storage, train
from pipelines.checkpoints import CHECKPOINTS, Checkpoint, Checkpoints, fold_key
from pipelines.cluster import connected
from pipelines.config import ComputeConfig, CrossValidationConfig, ValidationConfig
from pipelines.dag import Stage
from pipelines.drawn import DrawnTraining

MARK = "MSHNET_KILL_TRAINING"
"""Environment variable by which a round's processes are known, wherever they hang in the process tree."""
UPDATES_PER_KILL = 4
PATIENCE_S = 300.0
Victim = Literal["worker", "driver"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to kill, how often."""

    kills: int = 100
    """Over all rounds."""
    kills_per_round: int = 10
    """In one training."""
    drivers: float = 0.4
    """Share of kills that hit the driver; the others hit the worker."""
    workers: int = 1
    """Of the training; of several, any may be killed."""
    seed: int = 0
    """Of victims and moments; the moments still depend on how fast the machine is."""
    record: str = ""
    """File to which the outcome is appended as Markdown; empty: none."""
    drive: str = ""
    """Of this script's own processes: the folder of the training that it is to drive."""


@dataclass(frozen=True)
class Kill:
    """What was killed, when, and how long it took until training was further than before."""

    victim: Victim
    starting: bool
    recovered_s: float


def configuration(root: Path, updates: int, workers: int) -> CrossValidationConfig:
    """The fold's: epochs of ten updates."""
    return CrossValidationConfig(
        source=str(root / "source"),
        store=str(root / "store"),
        images=ImageFormat(image_size_px=65),
        min_object_px=60,
        images_per_shard=80,
        backbone_weights="random",
        model=ModelConfig(backbone="resnet18"),
        training=TrainingConfig(epochs=-(-updates // 10), episodes_per_epoch=40, global_batch=4, learning_rate=0.01),
        validation=ValidationConfig(held_out_classes=3, validation_episodes=8),
        compute=ComputeConfig(workers=workers, checkpoint_every_steps=1, max_failures=10**6),
    )


def drawn_fold(config: CrossValidationConfig) -> DrawnTraining:
    """Data and episodes, made here where they are missing."""

    def done(stage: Stage) -> Mapping[str, Any]:
        recorded = stage.recorded()
        if recorded is None:
            recorded = stage.run(*stage.arguments, *(done(need) for need in stage.needs))
            storage.write_json(stage.result, recorded)
        return recorded

    if not Path(config.source).exists():
        write_voc(Path(config.source), images=120, size_px=80, seed=0)
    scanned = scan.scan_source(config)
    return DrawnTraining.from_json(done(draw.training_stage(config, scanned, preprocess.stages(config, scanned), 0)))


def drive(folder: Path) -> None:
    """A driver: to be killed."""
    plan = json.loads((folder.parent / "plan.json").read_text())
    config = CrossValidationConfig.from_json(plan["config"])
    with connected():
        train.fit(config, DrawnTraining.from_json(plan["drawn"]), str(folder), "")


class Round:
    """A training that is killed now and then."""

    def __init__(self, folder: Path, rng: np.random.Generator) -> None:
        self.folder, self.rng, self.mark = folder, rng, uuid.uuid4().hex
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 lives as long as the round
        self.process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {MARK: self.mark, "OMP_NUM_THREADS": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
        command = [sys.executable, __file__, "--drive", str(self.folder)]
        return subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log)

    def reached(self) -> int:
        """Updates of the newest checkpoint."""
        names = storage.sizes(str(self.folder / CHECKPOINTS))
        steps = (int(Path(name).stem.removeprefix("step-")) for name in names if name.startswith("step-"))
        return max(steps, default=0)

    def wait_until(self, update: int) -> bool:
        """Wait for a checkpoint of at least that update; False where the training ended."""
        until = time.monotonic() + PATIENCE_S
        while self.reached() < update:
            if self.process.poll() is not None:
                return False
            if time.monotonic() > until:
                self.fail(f"no checkpoint of update {update} within {PATIENCE_S} s")
            time.sleep(0.01)
        return self.process.poll() is None

    def kill(self, victim: Victim) -> Kill | None:
        """Kill at a drawn moment and wait until training got further; None where it ended before."""
        starting = self.rng.random() < 0.2
        if starting:
            time.sleep(float(self.rng.uniform(0, 8)))
        elif not self.wait_until(self.reached() + int(self.rng.integers(1, UPDATES_PER_KILL))):
            return None
        else:
            time.sleep(float(self.rng.uniform(0, 0.3)))
        was = self.reached()
        if not self._strike(victim):
            return None
        struck = time.monotonic()
        further = self.wait_until(was + 1)
        return Kill(victim, starting, time.monotonic() - struck) if further or self.process.wait() == 0 else None

    def _strike(self, victim: Victim) -> bool:
        if victim == "worker":
            until = time.monotonic() + PATIENCE_S
            while not (workers := [p for p in self.alive() if "RayTrainWorker" in _title(p)]):
                if self.process.poll() is not None or time.monotonic() > until:
                    return False
                time.sleep(0.01)
            workers[int(self.rng.integers(len(workers)))].kill()
            return True
        if self.process.poll() is not None:
            return False
        self.process.kill()
        self.process.wait()
        if self.rng.random() < 0.5:
            psutil.wait_procs(self.alive(), timeout=30)
        self.process = self._started()
        return True

    def alive(self) -> list[psutil.Process]:
        """This round's processes, children of killed drivers too."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.pid != os.getpid():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def end(self) -> None:
        """Wait for the training's end, then for its processes'."""
        if self.process.wait(timeout=3 * PATIENCE_S):
            self.fail(f"the driver ended with code {self.process.returncode}")
        for process in psutil.wait_procs(self.alive(), timeout=60)[1]:
            process.kill()

    def fail(self, reason: str) -> None:
        """Show the log and stop."""
        for process in self.alive():
            process.kill()
        self.log.seek(0)
        raise SystemExit(f"{reason}:\n{self.log.read()[-5000:]}")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()[:1]])
    except psutil.Error:
        return ""


def last(config: CrossValidationConfig, drawn: DrawnTraining, folder: Path) -> Checkpoint:
    """The newest checkpoint of a training that has come to its end."""
    newest = Checkpoints(str(folder / CHECKPOINTS), fold_key(config, drawn)).newest()
    if newest is None or newest[1].progress.step != config.training.epochs * config.training.steps_per_epoch:
        raise SystemExit(f"no checkpoint of the last update in {folder}")
    return newest[1]


def differences(found: Checkpoint, expected: Checkpoint) -> list[str]:
    """Names of tensors that have other bits, and "losses"."""
    names = [
        name
        for name in {*found.tensors, *expected.tensors}
        if name not in found.tensors
        or name not in expected.tensors
        or not torch.equal(found.tensors[name], expected.tensors[name])
    ]
    histories = [
        [(r.step, r.loss, r.outer_loss, r.inner_loss, r.validation_miou) for r in c.progress.history]
        for c in (found, expected)
    ]
    return sorted(names) + (["losses"] if histories[0] != histories[1] else [])


def table(kills: list[Kill], wrong: int, rounds: int, updates: int) -> str:
    """Kills by victim and moment."""
    lines = ["| killed | when | kills | further again after, median (most) |", "| --- | --- | ---: | ---: |"]
    for victim in ("worker", "driver"):
        for starting in (False, True):
            took = [k.recovered_s for k in kills if (k.victim, k.starting) == (victim, starting)]
            if took:
                when = "in the seconds after a start" if starting else "at an update"
                lines.append(f"| {victim} | {when} | {len(took)} | {np.median(took):.1f} s ({max(took):.1f} s) |")
    lines.append(f"| **all** | | **{len(kills)}** | |")
    verdict = f"{rounds} trainings of {updates} updates; final weights, momentum and losses that differ: **{wrong}**."
    return "\n".join(lines) + "\n\n" + verdict


def main() -> int:
    """Run the rounds and print the table. 0: all bits are the undisturbed ones."""
    arguments = tyro.cli(Arguments, description=__doc__)
    if arguments.drive:
        drive(Path(arguments.drive))
        return 0
    scratch = Path(tempfile.mkdtemp(prefix="mshnet-kill-"))
    try:
        return _rounds(arguments, scratch)
    finally:
        shutil.rmtree(scratch)


def _rounds(arguments: Arguments, scratch: Path) -> int:
    per_round = min(arguments.kills, arguments.kills_per_round)
    config = configuration(scratch, UPDATES_PER_KILL * per_round + 10, arguments.workers)
    updates = config.training.epochs * config.training.steps_per_epoch
    drawn = drawn_fold(config)
    (scratch / "plan.json").write_text(json.dumps({"config": config.to_json(), "drawn": drawn.to_json()}))
    started = time.monotonic()
    _undisturbed(config, drawn, scratch / "undisturbed")
    expected = last(config, drawn, scratch / "undisturbed")
    print(f"undisturbed: {updates} updates in {time.monotonic() - started:.0f} s", file=sys.stderr)
    kills: list[Kill] = []
    wrong = rounds = 0
    with tqdm(total=arguments.kills, desc="kills") as bar:
        while len(kills) < arguments.kills:
            rng = np.random.default_rng((arguments.seed, rounds))
            folder = scratch / f"round-{rounds}"
            training = Round(folder, rng)
            for _ in range(min(per_round, arguments.kills - len(kills))):
                killed = training.kill("driver" if rng.random() < arguments.drivers else "worker")
                if killed is None:
                    break
                kills.append(killed)
                bar.update()
            training.end()
            different = differences(last(config, drawn, folder), expected)
            if different:
                print(f"round {rounds} (seed {arguments.seed}): {different[:5]} differ", file=sys.stderr)
            wrong, rounds = wrong + bool(different), rounds + 1
            shutil.rmtree(folder)
    outcome = table(kills, wrong, rounds, updates)
    print(outcome)
    if arguments.record:
        with open(arguments.record, "a", encoding="utf-8") as file:
            file.write(f"\n{_conditions(arguments)}\n\n{outcome}\n")
    return int(bool(wrong))


def _undisturbed(config: CrossValidationConfig, drawn: DrawnTraining, folder: Path) -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.worker import train_loop

    # With other moments of writing, and one worker without Ray: neither is to matter.
    config = replace(config, compute=replace(config.compute, checkpoint_every_steps=0))
    if config.compute.workers > 1:
        with connected():
            train.fit(config, drawn, str(folder), "")
        return
    job = train.job(config, drawn, str(folder), "")
    TorchTrainer(train_loop, train_loop_config=job, scaling_config=ScalingConfig(num_workers=0)).fit()


def _conditions(arguments: Arguments) -> str:
    import ray

    command = f"python benchmarks/kill_training.py --kills {arguments.kills} --seed {arguments.seed}"
    if arguments.workers > 1:
        command += f" --workers {arguments.workers}"
    return (
        f"`{command}` on {time.strftime('%Y-%m-%d')}: {os.cpu_count()} CPU cores ({platform.machine()}), torch "
        f"{torch.__version__}, Ray {ray.__version__}."
    )


if __name__ == "__main__":
    raise SystemExit(main())
