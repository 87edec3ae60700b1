"""Speed of the training loaders in one process: python benchmarks/bench_loader.py.

Latents of 32 x 32 x 4 are sampled from their moments, which lie in one memory-mapped file. Photos are JPEG files of
500 x 375 pixels, as ImageNet's are on average: decoded, cropped as published, flipped and made tensors. Beside them, in
alternating rounds: Pillow alone decoding the same files, and decoding, resizing and cropping them.
"""

import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import PIL
import torch
from bench_train import latents
from PIL import Image

from lightning_diffclf.data.imagenet import ImageNetDataModule

PHOTOS, ROUNDS, SIZE = 200, 7, 256


def photos(root: Path) -> list[Path]:
    """Write photos with as much detail as natural ones: noise with a falling spectrum."""
    rng = np.random.default_rng(0)
    height, width = 375, 500
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    falling = 1 / np.maximum(np.hypot(fy, fx), 1 / width)
    paths = []
    for number in range(PHOTOS):
        spectrum = falling * np.fft.rfft2(rng.standard_normal((3, height, width)))
        pixels = np.fft.irfft2(spectrum, (height, width))
        pixels = 128 + 50 * (pixels - pixels.mean((1, 2), keepdims=True)) / pixels.std((1, 2), keepdims=True)
        path = root / str(number % 2) / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(path, quality=90)
        paths.append(path)
    return paths


def speed(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def decode(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def decode_and_crop(path: Path) -> Image.Image:
    image = decode(path)
    width, height = (round(side * SIZE / min(image.size)) for side in image.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))


def through_loader(data: ImageNetDataModule, batches: int) -> None:
    loader = iter(data.train_dataloader())
    for _ in range(batches):
        next(loader)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = latents(Path(temporary) / "latents", 32)
        of_latents = ImageNetDataModule(str(folder), str(folder), batch_size=256, num_workers=0)
        of_latents.setup("fit")
        paths = photos(Path(temporary) / "photos")
        of_photos = ImageNetDataModule(str(paths[0].parents[1]), str(folder), batch_size=PHOTOS, num_workers=0)
        of_photos.setup("fit")
        work: dict[str, tuple[int, Callable[[], object]]] = {
            "latents": (256 * 16, lambda: through_loader(of_latents, 16)),
            "photos": (PHOTOS, lambda: through_loader(of_photos, 1)),
            "Pillow, decode": (PHOTOS, lambda: [decode(path) for path in paths]),
            "Pillow, decode and crop": (PHOTOS, lambda: [decode_and_crop(path) for path in paths]),
        }
        speeds: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(ROUNDS):
            for name, (count, what) in work.items():
                speeds[name].append(speed(count, what))
        mean_size = np.mean([path.stat().st_size for path in paths]) / 1000
    print(f"# Loaders, {platform.machine()} CPU, one process, {date.today()}\n")
    print(f"torch {torch.__version__}, Pillow {PIL.__version__}; files of {mean_size:.0f} kB on average\n")
    print("| what | images/s, median | slowest … fastest round |")
    print("| --- | --- | --- |")
    for name, values in speeds.items():
        print(f"| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} … {max(values):,.0f} |")
    for name in ("Pillow, decode", "Pillow, decode and crop"):
        ratios = [a / b for a, b in zip(speeds["photos"], speeds[name], strict=True)]
        print(f"\nphotos / ({name}), round by round: median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
