"""The registered model: what MLflow stores and serves, as code plus safetensors plus JSON (no pickle).

MLflow copies this file beside the weights and runs it when the model is loaded, so it imports `mshnet` but
nothing of `pipelines`. One row of input is one query:

- `query`: PNG or JPEG, base64;
- `supports`: a JSON list of k labelled examples' images, base64 each;
- `masks`: a JSON list of their k masks, base64 PNG each, of the size of their image, object pixels not 0.

One row of output: `mask`, base64 PNG of the query's own size, 255 where the object is, else 0.

It computes in float32 whatever the precision that it was trained and judged at, since any server can; a model
trained in bfloat16 is thus served a little more exactly than it was judged.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd  # type: ignore[import-untyped]
from mlflow.pyfunc import PythonModel, PythonModelContext

INPUT_COLUMNS: tuple[str, ...] = ("query", "supports", "masks")
OUTPUT_COLUMN = "mask"
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
)


class FewShotSegmenter(PythonModel):  # type: ignore[misc]  # mlflow is untyped here
    """Segments queries by their labelled examples; no ground truth of the query is needed."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the weights (called once by MLflow)."""
        from mshnet import checkpoint

        folder = context.artifacts["model"]
        self.image_size_px = int(checkpoint.read_config(folder)["image_size_px"])
        self.model = checkpoint.load_model(folder)

    def predict(self, context: PythonModelContext, model_input: pd.DataFrame, params: Any = None) -> pd.DataFrame:
        """One mask per row. Raises ValueError naming row and column of what cannot be read."""
        missing = [name for name in INPUT_COLUMNS if name not in model_input.columns]
        if missing:
            raise ValueError(f"expected the columns {', '.join(INPUT_COLUMNS)}; missing {', '.join(missing)}")
        rows = model_input[list(INPUT_COLUMNS)].itertuples(index=False, name=None)
        masks = [self._segment(index, *row) for index, row in enumerate(rows)]
        return pd.DataFrame({OUTPUT_COLUMN: masks})

    def _segment(self, row: int, query_text: str, supports_text: str, masks_text: str) -> str:
        import torch

        from mshnet.data.transforms import normalise
        from mshnet.masking import resize

        query = _image(query_text, f"row {row}, query")
        support_list, mask_list = _texts(supports_text, row, "supports"), _texts(masks_text, row, "masks")
        if len(support_list) != len(mask_list):
            raise ValueError(
                f"row {row}: expected one mask per support, got {len(support_list)} supports and {len(mask_list)} masks"
            )
        supports = [_image(text, f"row {row}, supports[{i}]") for i, text in enumerate(support_list)]
        masks = [_mask(text, f"row {row}, masks[{i}]") for i, text in enumerate(mask_list)]
        for i, (support, mask) in enumerate(zip(supports, masks, strict=True)):
            if support.size != mask.size:
                raise ValueError(
                    f"row {row}: masks[{i}] is {_size(mask)} px but its image {_size(support)} px; they must agree"
                )
        with torch.inference_mode():
            prediction = self.model(
                normalise(self._pixels(query))[None],
                normalise(torch.stack([self._pixels(support) for support in supports]))[None],
                torch.stack([self._object(mask) for mask in masks])[None],
            )
            logits = resize(prediction.logits_low, (query.height, query.width))
        return encode(logits[0].argmax(0).to(torch.uint8).mul(255).numpy())

    def _pixels(self, image: Any) -> Any:
        """uint8 (3, H, W) at the model's size, resized as in training."""
        import numpy as np
        import torch
        from PIL import Image

        side = self.image_size_px
        resized = np.array(image.resize((side, side), Image.Resampling.BILINEAR))
        return torch.from_numpy(resized).permute(2, 0, 1)

    def _object(self, mask: Any) -> Any:
        """Float 0 or 1 (H, W) at the model's size, resized as in training."""
        import numpy as np
        import torch
        from torch.nn import functional as F

        original = torch.from_numpy(np.array(mask) != 0).float()
        side = self.image_size_px
        return F.interpolate(original[None, None], size=(side, side), mode="nearest")[0, 0]


def encode(pixels: Any) -> str:
    """A uint8 array, (H, W) or (H, W, 3), as base64 PNG text."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def _texts(text: str, row: int, column: str) -> list[str]:
    try:
        items = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"row {row}, {column}: expected a JSON list of base64 texts, got text that is not JSON"
        ) from error
    if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
        raise ValueError(f"row {row}, {column}: expected a JSON list of one or more base64 texts")
    return items


def _open(text: str, place: str) -> Any:
    from mshnet.data.source import opened_picture

    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: expected base64 text") from error
    try:
        image = opened_picture(data, formats=("PNG", "JPEG"))
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{place}: expected a whole PNG or JPEG image ({error})") from error
    return image


def _image(text: str, place: str) -> Any:
    return _open(text, place).convert("RGB")


def _mask(text: str, place: str) -> Any:
    mask = _open(text, place)
    if mask.format != "PNG":  # JPEG would blur the edges into new values
        raise ValueError(f"{place}: expected a PNG, got {mask.format}")
    if len(mask.getbands()) > 1:
        raise ValueError(f"{place}: expected one channel (grey, palette or 1 bit), got {mask.mode}")
    return mask


def _size(image: Any) -> str:
    return f"{image.width}×{image.height}"


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
    from mlflow.types import ColSpec, DataType, Schema

    import mshnet
    from mshnet import checkpoint

    columns = Schema([ColSpec(DataType.string, name) for name in INPUT_COLUMNS])
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
            signature=ModelSignature(columns, Schema([ColSpec(DataType.string, OUTPUT_COLUMN)])),
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
