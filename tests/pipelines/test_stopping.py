"""SIGTERM in the middle of a command, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest

from pipelines import stopping

WAITING = """
import sys, time
from pipelines import job
from pipelines.cluster import connected

def forever():
    time.sleep(1000)

def results():
    with connected():
        import ray
        reference = ray.remote(forever).remote()
        try:
            print("begun", flush=True)
            ray.get(reference)
        finally:
            print("ending", flush=True)
            time.sleep(float(sys.argv[1]))
            print("ended", flush=True)

raise SystemExit(job.report(results, "cross_validate.py"))
"""


def test_a_command_that_is_told_to_stop_ends_in_order() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, "1"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "ending\n"
        process.send_signal(signal.SIGTERM)  # the end is not disturbed by a second one
        assert process.stdout.readline() == "ended\n"
        _, errors = process.communicate(timeout=60)
        assert process.returncode == stopping.EXIT_CODE == 143
        assert errors.splitlines()[-1] == "cross_validate.py: stopped; the same command goes on"
        assert "Traceback" not in errors
        _, left = psutil.wait_procs(started, timeout=30)
        assert left == []
    finally:
        process.kill()
        process.communicate()


def test_the_handler_of_before_is_there_again() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(stopping.Stopped), stopping.orderly():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
