"""Photos from files: any format, any orientation, any mode, to what an autoencoder takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from glob import glob, has_magic
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import v2

from lightning_diffclf.errors import MissingFile, UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif"}

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # that are read: for EPS, Pillow runs a program

MAX_PIXELS = 150_000_000  # 450 MB in RGB


def open_image(path: str | Path) -> Image.Image:
    """An image in RGB, upright; transparent parts become white, 16-bit greys keep their range.

    Raises:
        ValueError: if the file is empty or no image.
        FileNotFoundError: if there is no file.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFile(f"image: no file {str(path)!r}")
    if path.stat().st_size == 0:
        raise UserError(f"image: {str(path)!r} is empty")
    return decode_image(path, f"image: {str(path)!r}")


def size_of_image(path: Path) -> tuple[int, int]:
    """Width and height of an image by its header, before it is turned as its camera says.

    Raises:
        ValueError: if the file is empty or no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as file:
                return file.size
    except Exception as error:  # of a damaged file Pillow raises what comes, by format
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"image: {str(path)!r} cannot be read ({reason})") from error


def decode_image(source: Path | IO[bytes], what: str) -> Image.Image:
    """An image in RGB, turned as its camera says.

    Args:
        source: The file.
        what: What it is, for messages.

    Raises:
        ValueError: if it is damaged, of a format not in :data:`FORMATS`, or of more than :data:`MAX_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we have a limit of our own
            with Image.open(source, formats=FORMATS) as file:
                if file.width * file.height > MAX_PIXELS:
                    raise UserError(f"{file.width:,} x {file.height:,} pixels, expected at most {MAX_PIXELS:,}")
                file.load()
                ImageOps.exif_transpose(file, in_place=True)
                return to_rgb(file)
    except Exception as error:  # of a damaged file Pillow raises what comes, by format
        reason = str(error).partition("\n")[0][:200] or type(error).__name__
        raise UserError(f"{what} cannot be read ({reason})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, with transparent parts in white and 16-bit greys scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" else max(float(values.max()), 1e-12)
        image = Image.fromarray(np.clip(values / top * 255, 0, 255).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        opaque = Image.new("RGBA", image.size, "white")
        opaque.alpha_composite(image.convert("RGBA"))
        image = opaque
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies in any case


def covering_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resized (bicubic) until it just covers (height, width), and cropped at its centre: as in the paper."""
    scale = max(height / image.height, width / image.width)
    size = [max(height, round(image.height * scale)), max(width, round(image.width * scale))]
    resized = v2.functional.resize(image, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    return v2.functional.center_crop(resized, [height, width])


def published_crop(image: Image.Image, size: int) -> Image.Image:
    """The square crop that the published DiT networks were trained on.

    The image is halved by averaging while its shorter side is at least twice ``size``, then resized (bicubic) until
    that side is ``size``, then cropped at its centre (Dhariwal & Nichol 2021; Peebles & Xie 2023).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to (3, H, W), float32 in [-1, 1]."""
    return v2.functional.pil_to_tensor(image).float() / 127.5 - 1


def resized_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) of a batch at another (height, width), bicubic and without cropping."""
    if tuple(images.shape[2:]) == size:
        return images
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.functional.resize(images, list(size), interpolation=bicubic, antialias=True)


def transform(
    height: int, width: int, crop: Literal["covering", "published"] = "covering"
) -> Callable[[Image.Image], Tensor]:
    """RGB images to (3, height, width) in [-1, 1], by one of the crops above.

    Raises:
        ValueError: if ``crop`` is none of them, or ``published`` and the target is not square.
    """
    if crop not in ("covering", "published"):
        raise UserError(f"crop: {crop!r}, expected 'covering' or 'published'")
    if crop == "published" and height != width:
        raise UserError(f"size: {height} x {width}, expected a square with crop 'published'")
    return partial(_prepare, height=height, width=width, crop=crop)


def _prepare(image: Image.Image, height: int, width: int, crop: str) -> Tensor:
    return to_tensor(published_crop(image, height) if crop == "published" else covering_crop(image, height, width))


def find_images(names: Iterable[str]) -> list[Path]:
    """Files that are named, those in folders that are named (and below), and what patterns match; each once, in order.

    Of folders, what is hidden is left out: macOS puts files such as ``._1.jpg`` there, Jupyter copies of images.

    Raises:
        FileNotFoundError: if a name stands for no file.
        ValueError: if nothing is named, or a folder or a pattern has no image.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            some = sorted(one for one in path.rglob("*") if _is_visible_image(one.relative_to(path)))
        elif path.is_file() or not has_magic(name):
            some = [path]
        else:
            some = sorted(Path(one) for one in glob(name, recursive=True) if Path(one).is_file())
        if not some:
            raise UserError(f"image: {name!r} has no image, expected files ending in {sorted(SUFFIXES)}")
        for one in some:
            if not one.is_file():
                raise MissingFile(f"image: no file {str(one)!r}")
            found[one] = None
    if not found:
        raise UserError("image: none given, expected files, folders or patterns")
    return list(found)


def _is_visible_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def stacked(samples: list[Any]) -> dict[str, Any]:
    """Samples with ``image``, ``label`` and ``id`` as one batch."""
    batch: dict[str, Any] = {"image": torch.stack([one["image"] for one in samples])}
    if all(one.get("label") is not None for one in samples):
        batch["label"] = torch.tensor([one["label"] for one in samples])
    for name in ("id", "candidates", "noise_key", "group"):
        if name in samples[0]:
            batch[name] = [one[name] for one in samples]
    return batch
