"""The command: verbs, how it ends, and that help is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mshnet.__main__ import VERBS, main
from tests.mshnet.test_import import loaded_by


def test_help_lists_the_verbs_and_loads_none(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    out = capsys.readouterr().out
    for verb, (_, line) in VERBS.items():
        assert f"  {verb} " in out
        assert line in out
    assert loaded_by("import mshnet.__main__; mshnet.__main__.VERBS") == set()


@pytest.mark.parametrize("verb", VERBS)
def test_a_verbs_own_help_waits_for_no_torch(verb: str) -> None:
    code = (
        "import sys\nfrom mshnet.__main__ import main\n"
        f"try: main([{verb!r}, '--help'])\nexcept SystemExit as end: assert not end.code, end.code\n"
        "loaded = [name for name in ('torch', 'gradio', 'mlflow', 'ray') if name in sys.modules]\n"
        "assert not loaded, loaded"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: mshnet {verb}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "mshnet: expected a verb (segment, learn, import-published, page), found none; see mshnet --help"),
        (["segmnt"], 2, "found 'segmnt'"),
        (["segment", "--model", "m", "--query", "q", "--out", "o"], 1, "mshnet segment: expected --support"),
        (
            ["learn", "--model", "m", "--name", "x", "--out", "o.safetensors"],
            1,
            "mshnet learn: expected one or more examples",
        ),
        (["segment", "--nonsense"], 2, "--nonsense"),
    ],
)
def test_how_it_ends(arguments: list[str], code: int, message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "mshnet", *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
