"""Images: files whose paths are the examples, and what a vision transformer reads of them.

A data set holds paths. An image is decoded when its batch is made, so that memory does not grow
with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from transformers import BaseImageProcessor

from bayes_lora.errors import InputError

PATHS = "image"
"""Column of the paths."""

FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read; others that Pillow knows are no photographs, and some run programs."""

# A damaged file may raise any of these, and an immense one its warning, made an error, or memory.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def read_folder(folder: Path) -> dict[str, list[str]]:
    """Paths and classes of the images of a folder that has a folder for every class.

    Files that are no images by their name are left out, as is all that begins with a dot.

    Raises
    ------
    InputError
        If there is no such folder, or it has no images in folders.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as name:
    ...     (Path(name) / "cat").mkdir()
    ...     (Path(name) / "cat" / "1.png").touch()
    ...     read_folder(Path(name))["label"]
    ['cat']
    """
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}
    found = sorted(
        path
        for path in folder.glob("*/**/*")
        if path.suffix.lower() in known
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise InputError(
            f"{folder} has no images: give a data_dir in which train and validation have a folder "
            "of images for every class"
        )
    classes = [path.relative_to(folder).parts[0] for path in found]
    return {PATHS: [str(path.resolve()) for path in found], "label": classes}


def why_unreadable(path: str) -> str:
    """What is wrong with an image, in a few words; empty for one that can be read to its end.

    Examples
    --------
    >>> why_unreadable("nowhere.png")
    'nowhere.png cannot be read (No such file or directory)'
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                return f"{path} has more than 8 bits a colour: convert it"
            image.draft("RGB", (1, 1))  # of a JPEG, an eighth of its size is enough to tell
            image.load()
    except UnidentifiedImageError:
        return f"{path} is no image"
    except UNREADABLE as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return f"{path} cannot be read ({said})"
    return ""


def pixels(paths: Sequence[str], processor: BaseImageProcessor) -> Tensor:
    """Images as the backbone reads them, shape (images, 3, height, width).

    They are turned as their EXIF data say, and have three colours.

    Raises
    ------
    InputError
        If one cannot be read.
    """
    images = []
    for path in paths:
        try:
            with Image.open(path, formats=FORMATS) as image:
                images.append(ImageOps.exif_transpose(image).convert("RGB"))
        except UNREADABLE as error:
            raise InputError(why_unreadable(path) or f"{path} cannot be read ({error})") from error
    found = processor(images=images, return_tensors="pt")["pixel_values"]
    return torch.as_tensor(found)
