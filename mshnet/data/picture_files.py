"""Pictures from files (paths or URIs), upright and as 8-bit RGB: what a person sees in a viewer."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mshnet.data.filesystem import filesystem
from mshnet.data.pictures import rgb, upright
from mshnet.data.source import opened_picture
from mshnet.errors import InputError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""TIFF beside those of data sets: scanners and microscopes give it. Of several pages the first is taken."""
ENDINGS = frozenset({".jpg", ".jpeg", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff"})


def is_picture(name: str | os.PathLike[str]) -> bool:
    """Whether a file's name ends as a picture's that can be read; hidden files are none."""
    path = Path(name)
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def read_picture(uri: str | os.PathLike[str]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture file, turned upright (EXIF), as `mshnet.data.pictures.rgb` has it.

    Raises InputError naming the file where it is absent, damaged, of another format or too large.
    """
    return rgb(upright(opened(uri)))


def opened(uri: str | os.PathLike[str]) -> Image.Image:
    """A picture file decoded, in stored orientation and with its own kind of pixels. Errors as `read_picture`."""
    return decoded(read_bytes(uri), os.fspath(uri))


def read_bytes(uri: str | os.PathLike[str]) -> bytes:
    """A file's content. Raises InputError where there is none to read."""
    fs, path = filesystem(os.fspath(uri))
    try:
        return bytes(fs.cat_file(path))
    except FileNotFoundError as error:
        raise InputError(f"no file '{os.fspath(uri)}'; check the path") from error
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"expected a file to read at '{os.fspath(uri)}', found {error.strerror}") from error


def decoded(data: bytes, name: str) -> Image.Image:
    """As `opened`, of a file's content; `name` is for errors."""
    try:
        picture = opened_picture(data, FORMATS)
        picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's three ways to say "broken"
        raise InputError(
            f"cannot read '{name}' as a picture ({len(data)} bytes): {_reason(error)}; give a whole file of "
            f"{', '.join(FORMATS)}"
        ) from error
    return picture


def _reason(error: Exception) -> str:
    # Pillow names the buffer's address where it knows no format.
    return "of no known format" if "cannot identify" in str(error) else str(error)
