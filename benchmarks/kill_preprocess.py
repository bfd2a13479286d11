"""Kill the preprocessing at random moments, submit it again, and compare the store byte for byte.

    eval "$(infra/object_store.sh env)"
    python benchmarks/kill_preprocess.py --store s3://mshnet/bench --rounds 50

Each round starts the real command, `python -m pipelines.preprocess`, on a small generated set, and sends SIGKILL to its
driver, or to one of its Ray workers, at a random moment of a random phase (both drawn from --seed; every third round
any moment of the whole run). Workers are killed from the scan on: when one dies while `ray.init` still waits for it,
Ray 2.60 waits for ever, before anything of this project has begun. A job whose worker was killed must end well by
itself. One whose driver was killed is submitted again; in half of these rounds at once, while what it left behind may
still be running, and in one of five it is killed a second time. Then every file below images/ and scans/, hidden ones
included, must have the name and the SHA-256 that an undisturbed run gave it. Ends with code 1 where one does not.

50 rounds take about 15 minutes on two cores. Only processes that carry this run's mark in their environment are ever
killed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import tyro
from tqdm import tqdm

from mshnet.data.filesystem import filesystem
from pipelines.storage import absolute

REPOSITORY = Path(__file__).resolve().parents[1]
PHASES = ("before the scan", "scan", "shards", "seal", "after the seal")
PHASE_SHARES = (0.1, 0.2, 0.45, 0.15, 0.1)
TASKS = ("ray::scan", "ray::preprocess", "ray::seal")
"""How the titles of workers at a task begin."""
MARK = "MSHNET_KILL_PREPROCESS"
"""Environment variable by which the processes of a job are known, wherever they hang in the process tree."""
ENDING_S = 60.0
"""How long a killed driver's Ray processes may take to go away by themselves."""
SUBMISSIONS = 4
Victim = Literal["driver", "worker"]


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """What to kill, how often."""

    store: str = ""
    """Folder or URI to write below; empty: a temporary local folder."""
    rounds: int = 50
    """Each is a killed job."""
    images: int = 160
    """Size of the generated set."""
    images_per_shard: int = 20
    """Of the job's configuration."""
    seed: int = 0
    """Of victims and moments; the moments still depend on how fast the machine is."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What was done to a job, and what came of it."""

    victim: Victim
    phase: str
    submissions: int
    differences: tuple[str, ...]
    ended_s: float
    """How long a killed driver's processes took to go away."""
    left: int
    """Processes that did not, and were ended by force."""


class Job:
    """One submission of the command."""

    def __init__(self, source: Path, store: str, images_per_shard: int) -> None:
        self.store = store
        self.mark = uuid.uuid4().hex
        self.shards = -(-sum(1 for _ in source.glob("*2014/*.jpg")) // images_per_shard)
        line = [
            sys.executable, "-m", "pipelines.preprocess", "--dataset", "coco", "--source", str(source),
            "--store", store, "--images-per-shard", str(images_per_shard),
        ]  # fmt: skip
        environment = os.environ | {MARK: self.mark, "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the job
        self.process = subprocess.Popen(
            line, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=self.log
        )

    def alive(self) -> list[psutil.Process]:
        """All processes of the job, the driver included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def workers(self) -> list[psutil.Process]:
        """Ray workers, those that are at a task first. Ray's agents have such titles too, and are part of its node."""
        found = [(_title(p), p) for p in psutil.Process(self.process.pid).children(recursive=True)]
        at_task = [p for title, p in found if title.startswith(TASKS)]
        return at_task or [p for title, p in found if title == "ray::IDLE"]

    def phase(self) -> int:
        """Index into PHASES, by what lies on the store."""
        names = list(files(self.store))
        if any(name.endswith("/manifest.json") for name in names):
            return 4
        if any(name.endswith("/scan.json") for name in names):
            return 3 if sum("/shards/" in name for name in names) >= self.shards else 2
        return 1 if names or any("ray::scan" in _title(p) for p in self.alive()) else 0

    def running(self) -> bool:
        return self.process.poll() is None

    def end(self, expect_success: bool = True) -> int:
        """Wait for the driver; gives its exit code and shows the log of an unexpected one."""
        code = self.process.wait(timeout=600)
        if code and expect_success:
            self.log.seek(0)
            print(f"exit code {code}:\n{self.log.read()[-3000:]}", file=sys.stderr)
        self.log.close()
        return code


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()[:1])
    except psutil.Error:
        return ""


def files(store: str) -> dict[str, Any]:
    """Files below images/ and scans/ by relative name, whatever they are called."""
    fs, path = filesystem(store)
    fs.invalidate_cache()
    found = {}
    for part in ("images", "scans"):
        for name, info in fs.find(f"{path}/{part}", detail=True).items():
            found[name.removeprefix(path.rstrip("/") + "/")] = info
    return found


def contents(store: str) -> dict[str, str]:
    """SHA-256 of each file."""
    fs, path = filesystem(store)
    return {name: hashlib.sha256(fs.cat_file(f"{path}/{name}")).hexdigest() for name in files(store)}


def differences(expected: dict[str, str], found: dict[str, str]) -> tuple[str, ...]:
    """Names of files that are missing, too many or other than expected."""
    return tuple(sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)))


def timed_phases(job: Job) -> list[float]:
    """When each phase of an undisturbed job began, and when the job ended: seconds from its start."""
    started = time.monotonic()
    began = [0.0] * (len(PHASES) + 1)
    while job.running():
        now, phase = time.monotonic() - started, job.phase()
        for i in range(1, phase + 1):
            began[i] = began[i] or now
        time.sleep(0.01)
    if job.end():
        raise SystemExit("the undisturbed job failed")
    began[-1] = time.monotonic() - started
    return began


def wait_for(job: Job, phase: int) -> None:
    """Return when the job has come to a phase, or has ended."""
    while job.running() and job.phase() < phase:
        time.sleep(0.01)


def strike(job: Job, victim: Victim, rng: np.random.Generator, began: list[float], anywhere: bool) -> str:
    """Kill at a drawn moment; gives the phase that it was in, "not" where the job ended before."""
    if anywhere:
        time.sleep(float(rng.uniform(0, began[-1])))
    else:
        phase = int(rng.choice(len(PHASES), p=PHASE_SHARES))
        wait_for(job, phase)
        time.sleep(float(rng.uniform(0, began[phase + 1] - began[phase])))
    if victim == "driver":
        was = PHASES[job.phase()] if job.running() else "not"
        job.process.kill()
        return was
    wait_for(job, 1)
    while job.running():
        workers = job.workers()
        if workers:
            chosen = workers[int(rng.integers(len(workers)))]
            was = PHASES[job.phase()]
            try:
                chosen.kill()
            except psutil.Error:
                continue
            return was
        time.sleep(0.01)
    return "not"


def wait_gone(job: Job) -> tuple[float, int]:
    """Wait for a killed driver's processes; those that stay are killed. Gives seconds and how many stayed."""
    started = time.monotonic()
    while left := job.alive():
        if time.monotonic() - started > ENDING_S:
            for process in left:
                process.kill()
            return ENDING_S, len(left)
        time.sleep(0.05)
    return time.monotonic() - started, 0


def one_round(
    arguments: Arguments, source: Path, store: str, rng: np.random.Generator, began: list[float], anywhere: bool
) -> tuple[Victim, str, int, float, int]:
    """A job killed and brought to its end: victim, phase, submissions, seconds until all was gone, what was left."""
    victim: Victim = "driver" if rng.random() < 0.6 else "worker"
    strikes = 2 if victim == "driver" and rng.random() < 0.2 else 1
    at_once = rng.random() < 0.5
    phases: list[str] = []
    ended_s, left = 0.0, 0
    waiting: list[Job] = []
    while True:
        job = Job(source, store, arguments.images_per_shard)
        struck = len(phases) < strikes
        if struck:
            phases.append(strike(job, victim, rng, began, anywhere))
        if job.end(expect_success=not struck or victim == "worker") == 0:
            break
        waiting.append(job)
        if len(waiting) == SUBMISSIONS:
            raise SystemExit(f"the job did not end well in {SUBMISSIONS} submissions")
        if not at_once:
            seconds, stayed = wait_gone(job)
            ended_s, left = max(ended_s, seconds), left + stayed
    for job in waiting if at_once else []:
        left += wait_gone(job)[1]
    return victim, phases[0], len(waiting) + 1, ended_s, left


def table(rounds: list[Round]) -> str:
    """Rounds by victim and phase."""
    count: Counter[tuple[str, str]] = Counter((r.victim, r.phase) for r in rounds)
    wrong: Counter[tuple[str, str]] = Counter((r.victim, r.phase) for r in rounds if r.differences)
    again: Counter[tuple[str, str]] = Counter((r.victim, r.phase) for r in rounds if r.submissions > 1)
    lines = ["| killed | when | rounds | submitted again | stores that differ |", "| --- | --- | ---: | ---: | ---: |"]
    for victim in ("driver", "worker"):
        for phase in (*PHASES, "not"):
            key = (victim, phase)
            if count[key]:
                when = "ended before" if phase == "not" else phase
                lines.append(f"| {victim} | {when} | {count[key]} | {again[key]} | {wrong[key]} |")
    lines.append(f"| **all** | | {len(rounds)} | {again.total()} | **{wrong.total()}** |")
    return "\n".join(lines)


def main() -> int:
    """Run the rounds and print the table. 0: no store differs and every job went on by itself where it had to."""
    arguments = tyro.cli(Arguments, description=__doc__)
    scratch = Path(tempfile.mkdtemp(prefix="mshnet-kill-"))
    below = f"{absolute(arguments.store or str(scratch))}/kill-{uuid.uuid4().hex[:8]}"
    fs, path = filesystem(below)
    try:
        return _rounds(arguments, scratch / "source", below)
    finally:
        shutil.rmtree(scratch)
        if fs.exists(path):
            fs.rm(path, recursive=True)


def _rounds(arguments: Arguments, source: Path, below: str) -> int:
    generator = [sys.executable, str(REPOSITORY / "benchmarks" / "coco_scale.py"), "--out", str(source)]
    generator += ["--images", str(arguments.images)]
    subprocess.run(generator, check=True, stdout=sys.stderr, stderr=subprocess.DEVNULL)
    began = timed_phases(Job(source, f"{below}/undisturbed", arguments.images_per_shard))
    expected = contents(f"{below}/undisturbed")
    print(
        f"undisturbed: {began[-1]:.1f} s, {len(expected)} files; phases begin at "
        + ", ".join(f"{b:.1f} s" for b in began[:-1]),
        file=sys.stderr,
    )
    rounds: list[Round] = []
    for number in tqdm(range(arguments.rounds), desc="rounds"):
        store = f"{below}/{number}"
        rng = np.random.default_rng((arguments.seed, number))
        victim, phase, submissions, ended_s, left = one_round(
            arguments, source, store, rng, began, anywhere=number % 3 == 2
        )
        wrong = differences(expected, contents(store))
        if wrong:
            print(f"round {number}: {victim} killed, {phase}: {', '.join(wrong)} differ", file=sys.stderr)
        rounds.append(
            Round(victim=victim, phase=phase, submissions=submissions, differences=wrong, ended_s=ended_s, left=left)
        )
        fs, path = filesystem(store)
        fs.rm(path, recursive=True)
    print(table(rounds))
    print(
        f"\nRay's processes of a killed driver were gone after {max(r.ended_s for r in rounds):.1f} s at the latest; "
        f"{sum(r.left for r in rounds)} stayed."
    )
    alone = [r for r in rounds if r.victim == "worker" and r.submissions > 1]
    if alone:
        print(f"{len(alone)} jobs with a killed worker did not end well by themselves.")
    return int(bool(alone) or any(r.differences or r.left for r in rounds))


if __name__ == "__main__":
    raise SystemExit(main())
