"""The mean clamped cosine against its equation: blocked, and as a Triton kernel, interpreted and on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mshnet.kernels import cosine
from mshnet.kernels.cosine import blocked_mean_cosine, mean_cosine
from tests import tolerances
from tests.mshnet.plain_cosine import comparison, plain_mean_cosine

REPOSITORY = Path(__file__).resolve().parents[3]
BOUNDS = {
    torch.float64: tolerances.COSINE_FLOAT64.bound,
    torch.float32: tolerances.COSINE_FLOAT32.bound,
    torch.bfloat16: tolerances.COSINE_BFLOAT16.bound,
}
CASES = {
    "one support": (1, 1, 4, 64, 50, 50, (20,)),
    "ragged shots": (2, 3, 3, 48, 70, 40, (7, 0, 40, 1)),
    "one position": (1, 2, 2, 32, 9, 9, (1,)),
    "all positions": (2, 1, 2, 80, 33, 33, (33,)),
    "no object at all": (2, 2, 1, 16, 9, 9, (0,)),
    "several blocks": (1, 2, 2, 32, 300, 130, (130, 90)),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 rows, so that small cases have several, and a last one that is not full."""
    monkeypatch.setattr(cosine, "_BLOCK_BYTES", 1)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels last", "channels first"])
@pytest.mark.parametrize("name", CASES)
def test_blocked_agrees_with_the_equation(name: str, channels_last: bool, dtype: torch.dtype) -> None:
    case = comparison(*CASES[name], channels_last)
    found = mean_cosine(*case.to(dtype).arguments())
    expected = plain_mean_cosine(*case.arguments())
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= BOUNDS[dtype]
    assert expected.max() > 0.01 or name == "no object at all"


def test_an_empty_object_gives_exact_zeros() -> None:
    case = comparison(*CASES["ragged shots"]).to(torch.float32)
    found = mean_cosine(*case.arguments())
    assert (found[0, 1] == 0).all()  # the second support in turn
    assert (found[0, 0] > 0).any()


def test_what_is_not_object_is_not_read() -> None:
    case = comparison(*CASES["ragged shots"]).to(torch.float32)
    expected = mean_cosine(*case.arguments())
    case.objects.mT[~case.is_object[:, :, None].expand(-1, -1, 3, -1)] = torch.nan
    assert torch.equal(mean_cosine(*case.arguments()), expected)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_fused_kernel_interpreted() -> None:
    """In a process of its own: triton reads the variable when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)}
    line = [sys.executable, "-c", "from tests.mshnet.kernels.test_cosine import check_fused; check_fused('cpu')"]
    done = subprocess.run(line, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == f"{2 * len(CASES)} cases"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fused_kernel_on_a_gpu() -> None:
    check_fused("cuda")
    # Real sizes, the blocked product as the judge; no copy to the host on the way.
    case = comparison(2, 5, 4, 512, 3600, 3600, (600, 0, 3600, 1, 77)).to(torch.bfloat16, "cuda")
    mean_cosine(*case.arguments())
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = mean_cosine(*case.arguments())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (found - blocked_mean_cosine(*case.arguments())).abs().max() <= tolerances.COSINE_BFLOAT16.bound


def check_fused(device: str) -> None:
    from mshnet.kernels.cosine_triton import fused_mean_cosine

    cases = 0
    for name, sizes in CASES.items():
        case = comparison(*sizes, channels_last=name != "ragged shots")
        expected = plain_mean_cosine(*case.arguments())
        for dtype in (torch.float32, torch.bfloat16):
            found = fused_mean_cosine(*case.to(dtype, device).arguments()).cpu()
            assert found.shape == expected.shape
            error = float((found - expected).abs().max())
            assert error <= BOUNDS[dtype], (name, dtype, error)
            cases += 1
    print(f"{cases} cases")
