"""The registered model: what MLflow stores and serves, as code plus safetensors plus JSON (no pickle).

MLflow copies this file beside the weights and runs it when the model is loaded, so it imports `mshnet` but
nothing of `pipelines`. One row of input is one query:

- `query`: PNG or JPEG, base64;
- `supports`: a JSON list of k labelled examples' images, base64 each;
- `masks`: a JSON list of their k masks, of the size of their image: each base64 PNG, object pixels not 0, or COCO
  run lengths (`{"size": [height, width], "counts": "..."}`).

One row of output: `mask`, of the query's own size. Pictures are turned upright by EXIF first; masks are of upright
ones. With the parameter `output` it is base64 PNG, 255 where the object is, else 0 (`png`), or the JSON of COCO's run
lengths (`rle`); with `threshold` (0..1, 0.5) the object is where its probability is at or above it.

Examples that were sent before are known by their contents: they are not computed again while they are kept.
What a request may cost is limited (`mshnet.encoded.Limits`, set by environment variables). A request that cannot be
used is answered with 400 and the reason, a failure of the server with 500.

It computes in float32 unless told otherwise, whatever the precision that it was trained and judged at, since any
server can; a model trained in bfloat16 is thus served a little more exactly than it was judged.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

from mshnet.encoded import COLUMNS, Limits, Pictures, Row, encode, read_rows, run_lengths
from mshnet.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Bool, UInt8

LOG = logging.getLogger("mshnet.served_model")
OUTPUT_COLUMN = "mask"
OUTPUTS = ("png", "rle")
THRESHOLD = 0.5
PACKAGES = (
    "mlflow",
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "pillow",
    "safetensors",
    "jaxtyping",
    "fsspec",
    "pycocotools",
    "msgspec",
)


class BadRequestError(MlflowException, ValueError):  # type: ignore[misc]  # mlflow is untyped here
    """What the sender must change; MLflow's server answers it with 400 and the message."""

    def __init__(self, message: str) -> None:
        MlflowException.__init__(self, message, error_code=INVALID_PARAMETER_VALUE)


class FewShotSegmenter(PythonModel):  # type: ignore[misc]
    """Segments queries by their labelled examples; no ground truth of the query is needed. Any threads may ask."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights (called once by MLflow). The device is MSHNET_SERVE_DEVICE: auto, cpu, cuda."""
        from mshnet.predict import Segmenter

        self.limits = Limits.from_environment()
        self.segmenter = Segmenter.from_checkpoint(
            context.artifacts["model"],
            device=os.environ.get("MSHNET_SERVE_DEVICE", "auto"),
            precision=os.environ.get("MSHNET_SERVE_PRECISION", "float32"),  # type: ignore[arg-type]  # checked there
        )
        self._kept: OrderedDict[str, int] = OrderedDict()
        self._turn = threading.Lock()  # the network uses all cores for one query

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """One mask per row. Raises ValueError naming row and column of what cannot be used."""
        try:
            output, threshold = _parameters(params or {})
            rows = list(_rows(model_input, self.limits))  # all are looked at before any is computed
            return pd.DataFrame({OUTPUT_COLUMN: [self._answer(row, output, threshold) for row in rows]})
        except InputError as error:
            raise BadRequestError(str(error)) from error
        except Exception as error:
            LOG.exception("a request failed")
            raise MlflowException(
                f"the server failed ({type(error).__name__}); its log has more", error_code=INTERNAL_ERROR
            ) from error

    def _answer(self, row: Row, output: str, threshold: float) -> str:
        pictures = Pictures(row, self.limits)
        query, name = pictures.query(), row.examples
        examples = [] if name in self._kept else pictures.examples()
        with self._turn:
            self._learn(name, row, examples)
            found = self.segmenter(query, classes=(name,))
        mask = found.probabilities[0] >= threshold
        return run_lengths(mask) if output == "rle" else encode(mask.astype("uint8") * 255)

    def _learn(
        self,
        name: str,
        row: Row,
        examples: Sequence[tuple[UInt8[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]],
    ) -> None:
        if name in self._kept:
            self._kept.move_to_end(name)
            return
        # Forgotten between the look and this turn: rare enough to decode them here.
        images, masks = zip(*(examples or Pictures(row, self.limits).examples()), strict=True)
        try:
            self.segmenter.learn(name, images, masks)
        except InputError as error:
            raise InputError(str(error).replace(name, row.place)) from error
        self._kept[name] = self.segmenter.memory_bytes(name)
        while len(self._kept) > 1 and sum(self._kept.values()) > self.limits.kept_bytes:
            oldest, _ = self._kept.popitem(last=False)
            self.segmenter.forget(oldest)


def _rows(table: pd.DataFrame, limits: Limits) -> Iterator[Row]:
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise InputError(f"expected the columns {', '.join(COLUMNS)}; missing {', '.join(missing)}")
    return read_rows(list(table[list(COLUMNS)].itertuples(index=False, name=None)), limits)


def _parameters(params: Mapping[str, Any]) -> tuple[str, float]:
    output, threshold = params.get("output", OUTPUTS[0]), float(params.get("threshold", THRESHOLD))
    if output not in OUTPUTS:
        raise InputError(f"params: output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if not 0 <= threshold <= 1:
        raise InputError(f"params: threshold must be 0..1, got {threshold}")
    return output, threshold


# How it is stored ---------------------------------------------------------------------------------------


def input_example(side: int = 48) -> pd.DataFrame:
    """One row that the model accepts: a bright disc to be found, one labelled example of it."""
    import numpy as np

    y, x = np.mgrid[:side, :side]
    disc = (x - side / 2) ** 2 + (y - side / 2) ** 2 < (side / 4) ** 2
    image = np.where(disc[..., None], (230, 180, 40), (40, 60, 90)).astype(np.uint8)
    return pd.DataFrame(
        {
            "query": [encode(np.roll(image, side // 8, axis=1))],
            "supports": [json.dumps([encode(image)])],
            "masks": [json.dumps([encode((disc * 255).astype(np.uint8))])],
        }
    )


def save(folder: Path, weights: Path, config: Mapping[str, Any], identity: Any) -> None:
    """Write the MLflow model: this file, `mshnet`'s source, the weights, config.json, example, requirements.

    `identity` is the `mlflow.models.Model` that carries the logged model's ids.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    import mshnet
    from mshnet import checkpoint

    columns = Schema([ColSpec(DataType.string, name) for name in COLUMNS])
    params = ParamSchema(
        [ParamSpec("output", DataType.string, OUTPUTS[0]), ParamSpec("threshold", DataType.double, THRESHOLD)]
    )
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = Path(scratch, "model")
        artifacts.mkdir()
        shutil.copyfile(weights, artifacts / checkpoint.WEIGHTS_FILE)  # MLflow refuses links
        content = {"format": checkpoint.FORMAT_VERSION, **config}
        (artifacts / checkpoint.CONFIG_FILE).write_text(json.dumps(content, indent=2))
        mlflow.pyfunc.save_model(
            path=str(folder),
            python_model=__file__,
            artifacts={"model": str(artifacts)},
            signature=ModelSignature(columns, Schema([ColSpec(DataType.string, OUTPUT_COLUMN)]), params),
            input_example=input_example(),
            code_paths=[str(Path(mshnet.__file__).parent)],  # a server needs no checkout of this project
            pip_requirements=list(_pinned()),
            mlflow_model=identity,
        )


def _pinned() -> Iterator[str]:
    from importlib.metadata import version

    for package in PACKAGES:
        yield f"{package}=={version(package).partition('+')[0]}"


mlflow.models.set_model(FewShotSegmenter())
