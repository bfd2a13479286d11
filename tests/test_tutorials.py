"""The tutorials are run as they stand: their blocks in order, in a folder of their own, on generated data.

What a reader does not see is in a comment of the Markdown, just above the block:

- `<!-- run with: FLAGS -->`: the tests add these to each of its commands, to make it small;
- `<!-- not run: WHY -->`: it would take too long; that its flags exist is checked all the same.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from mshnet import ModelConfig, MSHNet
from mshnet.checkpoint import load_backbone_weights, published_state_dict, save_model
from mshnet.data.shapes import write_voc
from pipelines.config import JobArguments, parse
from pipelines.matrix import MatrixArguments, configurations
from tests.e2e.conftest import PROMPT

REPOSITORY = Path(__file__).resolve().parents[1]
TUTORIALS = REPOSITORY / "docs" / "tutorials"
BLOCK = re.compile(r"(?:<!-- (run with|not run): ([^\n]*?) -->\n)?```(sh|python)\n(.*?)```\n", re.DOTALL)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Block:
    """A fenced block and what its comment says."""

    language: str
    text: str
    told: str
    """run with, not run, or nothing."""
    flags: str

    @property
    def commands(self) -> list[str]:
        """Of a shell block, a line each."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [f"{line} {self.flags}" if self.told == "run with" else line for line in lines if line.strip()]


def blocks(text: str) -> list[Block]:
    return [Block(language, body, told, flags) for told, flags, language, body in BLOCK.findall(text)]


def tutorial(name: str) -> list[Block]:
    return blocks((TUTORIALS / name).read_text())


def run(block: Block, folder: Path) -> None:
    """As a reader would, in a shell that ends with the first failure."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = kept | PROMPT | {"OMP_NUM_THREADS": "1", "PATH": path}
    command = ["bash", "-euo", "pipefail", "-c", "\n".join(block.commands)]
    if block.language == "python":
        command = [sys.executable, "-c", block.text]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}"


def follow(name: str, folder: Path) -> None:
    for package in ("mshnet", "pipelines"):  # the commands are given from the project's folder
        (folder / package).symlink_to(REPOSITORY / package)
    for block in tutorial(name):
        if block.told != "not run":
            run(block, folder)


def segmented(mask: Path, picture: Path) -> set[int]:
    """The mask's values, after a look at its size and at the picture to look at."""
    with Image.open(mask) as found, Image.open(picture) as shown:
        assert found.size == shown.size
        with Image.open(mask.with_name(f"{mask.stem}_overlay.png")) as overlay:
            assert overlay.width >= shown.width  # a legend may stand beside it
        values: set[int] = {int(value) for _, value in found.convert("L").getcolors() or []}
        return values


def test_segment_a_new_class(tmp_path: Path) -> None:
    model = MSHNet(ModelConfig(backbone="resnet18"))
    load_backbone_weights(model.backbone, "random")
    save_model(model, str(tmp_path / "model"), {"image_size_px": 65})
    follow("segment_a_new_class.md", tmp_path)
    for number in (53, 71):
        name = f"shapes_{number:06d}"
        values = segmented(tmp_path / "masks" / f"{name}.png", tmp_path / "pictures" / "images" / f"{name}.jpg")
        assert values <= {0, 255}
    assert (tmp_path / "two_classes" / "classes.json").is_file()
    assert (tmp_path / "my_star.safetensors").is_file()


def test_own_data(tmp_path: Path) -> None:
    follow("own_data.md", tmp_path)
    assert (tmp_path / "survey" / "data_report.html").is_file()
    assert list(tmp_path.glob("outputs/store/reports/*/report.html"))
    assert len(list(tmp_path.glob("outputs/store/folds/*/model/model.safetensors"))) == 2
    assert len([mask for mask in tmp_path.glob("masks/*.png") if not mask.stem.endswith("_overlay")]) == 1


def test_reproduce_the_paper(tmp_path: Path) -> None:
    """With generated pictures for VOC's, and an untrained network for the published one."""
    torch.manual_seed(0)
    state = published_state_dict(MSHNet(ModelConfig(backbone="resnet18")))
    for fold in range(4):
        torch.save({f"module.{name}": value for name, value in state.items()}, tmp_path / f"fold{fold}.pt")
    write_voc(tmp_path / "data" / "VOC2012", images=90, size_px=80)
    follow("reproduce_the_paper.md", tmp_path)
    (report,) = tmp_path.glob("outputs/store/reports/*/report.md")
    text = report.read_text()
    assert "MSHNet, given weights" in text
    assert "given weights (training unknown)" in text
    assert "Learning curves" not in text
    # The network is the very one that stands beside it as the untrained one: seed 0 drew both.
    rows = {row.split("|")[1].strip(): row.split("|")[2:] for row in text.splitlines() if row.startswith("| ")}
    assert rows["MSHNet, given weights"] == rows["same network, untrained"]
    assert (tmp_path / "outputs" / "tables" / "tables.html").is_file()


PARSERS: dict[tuple[str, ...], Callable[[list[str]], object]] = {
    ("python", "pipelines/cross_validate.py"): lambda argv: parse(JobArguments, argv, "job", ""),
    ("python", "-m", "pipelines.matrix"): lambda argv: configurations(parse(MatrixArguments, argv, "matrix", ""), argv),
}


def not_run() -> Iterator[str]:
    for path in sorted(TUTORIALS.glob("*.md")):
        for block in blocks(path.read_text()):
            if block.told == "not run":
                yield from (command for command in block.commands if command.startswith("python"))


@pytest.mark.parametrize("command", not_run())
def test_what_is_not_run_has_flags_that_exist(command: str) -> None:
    argv = shlex.split(command)
    beginnings = [beginning for beginning in PARSERS if tuple(argv[: len(beginning)]) == beginning]
    assert beginnings, f"no way to check {command!r}"
    assert PARSERS[beginnings[0]](argv[len(beginnings[0]) :])
    with pytest.raises(SystemExit):
        PARSERS[beginnings[0]]([*argv[len(beginnings[0]) :], "--no-such-flag", "1"])


def test_every_block_is_found_and_links_lead_somewhere() -> None:
    names = {path.name for path in TUTORIALS.glob("*.md")}
    assert names == {"segment_a_new_class.md", "own_data.md", "reproduce_the_paper.md"}
    for name in names:
        text = (TUTORIALS / name).read_text()
        assert len(blocks(text)) == text.count("```") // 2, f"{name}: blocks of sh and python only"
        assert text.count("<!--") == len([block for block in blocks(text) if block.told]), name
        for link in re.findall(r"\]\(([^)#]+)", text):
            assert (TUTORIALS / link).is_file(), f"{name}: {link}"
