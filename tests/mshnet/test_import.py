"""What importing loads: the method needs no cluster, and a command's help no torch."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "ray", "mlflow", "pipelines", "matplotlib", "scipy", "pycocotools")


def loaded_by(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter holds after a statement."""
    code = f"import sys\n{statement}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return set(done.stdout.split())


def test_the_package_alone_loads_nothing() -> None:
    assert loaded_by("import mshnet, mshnet.config, mshnet.errors, mshnet.command_line") == set()


def test_the_method_needs_no_cluster() -> None:
    statement = "import mshnet.model, mshnet.checkpoint, mshnet.baselines; from mshnet import MSHNet"
    assert loaded_by(statement) == {"torch"}  # so the check does see what is loaded


def test_the_readers_load_no_torch() -> None:
    modules = ("coco", "episodes", "folds", "pascal", "sbd", "shapes", "source", "splits")
    assert loaded_by("import " + ", ".join(f"mshnet.data.{name}" for name in modules)) == set()


def test_an_unknown_name_is_an_attribute_error() -> None:
    import mshnet

    assert not hasattr(mshnet, "MSHNET")
    assert mshnet.ModelConfig.__module__ == "mshnet.config"
