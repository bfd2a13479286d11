"""`python -m mshnet page`: try a model in the browser, on this machine."""

from __future__ import annotations

import importlib.util
import logging
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from mshnet.commands.examples import Precision
from mshnet.errors import InputError

if TYPE_CHECKING:
    from mshnet.predict import Segmenter

MOST_PICTURES = 24


def command(
    model: str,
    learned: tuple[str, ...] = (),
    pictures: str = "",
    port: int = 7860,
    device: str = "auto",
    precision: Precision = "float32",
    tracking_uri: str = "",
) -> None:
    """Try a model in the browser: mark an object on one to five pictures, segment another picture by them.

    The page is served on this machine only (127.0.0.1) and needs no network; Ctrl-C ends it.

    Args:
        model: A model folder (path or URI), or models:/NAME@ALIAS or models:/NAME/VERSION of the registry.
        learned: Files of classes that were learnt before (mshnet learn); they are looked for too.
        pictures: Folder with pictures to pick a query from.
        port: Where the page is: http://127.0.0.1:PORT.
        device: auto (a GPU where there is one), cpu, cuda or cuda:N.
        precision: float32, or bfloat16 (quicker on a GPU).
        tracking_uri: Of the registry; empty: what MLFLOW_TRACKING_URI names.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("expected gradio for the page, found it missing; pip install 'mshnet[page]'")
    if not 0 < port < 1 << 16:
        raise InputError(f"port must be 1..65535, got {port}")
    to_pick = _pictures(pictures)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="mshnet-page-") as scratch:
        # Before the import, which reads them: uploads go when the page does, and nobody is told of its use.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(scratch, "uploads"))
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        _serve(_segmenter(model, learned, device, precision, tracking_uri), Path(scratch), to_pick, port)


def _pictures(folder: str) -> list[str]:
    if not folder:
        return []
    from mshnet.data.picture_files import is_picture

    if not Path(folder).is_dir():
        raise InputError(f"expected a folder of pictures on this machine, found {folder!r}")
    found = sorted(str(path.resolve()) for path in Path(folder).iterdir() if is_picture(path))
    if not found:
        raise InputError(f"expected pictures in {folder!r}, found none")
    return found[:MOST_PICTURES]


def _segmenter(model: str, learned: tuple[str, ...], device: str, precision: Precision, uri: str) -> Segmenter:
    from mshnet.predict import Segmenter, SupportSet

    supports = [SupportSet.load(path) for path in learned]
    segmenter = Segmenter.open(model, tracking_uri=uri, device=device, precision=precision)
    for support in supports:
        segmenter.add(support)
    return segmenter


def _serve(segmenter: Segmenter, scratch: Path, pictures: list[str], port: int) -> None:
    from mshnet.page import build, launch

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    page = build(segmenter, scratch, pictures)
    print(f"page: {launch(page, port)} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    ended.wait()
    page.close(verbose=False)
