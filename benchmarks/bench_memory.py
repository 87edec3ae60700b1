"""Does host memory grow with images x candidates? python benchmarks/bench_memory.py [--images 500 50000].

Peak resident memory of whole processes that evaluate images of 4 x 4 pixels under 1,000 candidates with a network that
returns noise: errors and scores are all different, so nothing compresses that would not in an evaluation. "test" counts
labelled images, "predict" has none, "resume" runs a test again that had ended, "merge" joins its folder into a
new one. Only differences between rows of the same work mean something: PyTorch and Lightning alone take most of each.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lightning_diffclf import Candidates, DiffusionClassifierCallback, NoiseSchedule
from lightning_diffclf.results.store import merge


class Noise(L.LightningModule):
    """A denoiser that knows nothing."""

    def __init__(self, candidates: int) -> None:
        super().__init__()
        self.schedule = NoiseSchedule.linear()
        self.candidates = Candidates([f"class {k}" for k in range(candidates)])

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def predict(self, x_t: torch.Tensor, t: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
        return torch.randn_like(x_t)

    def test_step(self, batch: object, batch_idx: int) -> None: ...

    def predict_step(self, batch: object, batch_idx: int) -> None: ...


class Images(Dataset):
    """Noise, with labels at random."""

    def __init__(self, count: int, candidates: int) -> None:
        self.count, self.candidates = count, candidates

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, object]:
        generator = torch.Generator().manual_seed(index)
        label = int(torch.randint(self.candidates, (), generator=generator))
        return {"image": torch.randn(1, 4, 4, generator=generator), "label": label, "id": index}


def work(what: str, images: int, candidates: int, keep_errors: bool, out: Path) -> None:
    if what == "merge":
        found = merge([out], out.with_name("merged"))
        assert found == images
        return
    module, data = Noise(candidates), DataLoader(Images(images, candidates), 64)
    callback = DiffusionClassifierCallback(draws=1, microbatch=4000, output_dir=str(out), keep_errors=keep_errors)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = L.Trainer(accelerator="cpu", callbacks=[callback], **quiet)
    trainer.predict(module, data, return_predictions=False) if what == "predict" else trainer.test(module, data)


def measured(*arguments: object) -> tuple[float, float, float]:
    """Peak memory in MB, seconds and CPU seconds of a process of its own."""
    command = [sys.executable, __file__, "--work", *map(str, arguments)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    megabytes, cpu = map(float, done.stdout.split()[-2:])
    return megabytes, time.perf_counter() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, nargs="+", default=[500, 50_000])
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--keep-errors", action="store_true")
    parser.add_argument("--work", nargs=3, metavar=("WHAT", "IMAGES", "OUT"), help="in a process of its own")
    given = parser.parse_args()
    if given.work is not None:
        what, images, out = given.work
        work(what, int(images), given.candidates, given.keep_errors, Path(out))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.process_time())
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "lightning", "pyarrow"))
    print(f"{os.cpu_count()} cores, on which {os.getloadavg()[0]:.0f} processes ran when it began")
    print(f"{date.today()}, {platform.machine()} CPU, Python {platform.python_version()}, {versions}\n")
    print(f"| {given.candidates} candidates | " + " | ".join(f"{n} images, MB" for n in given.images), end="")
    print(" | difference, MB | the last, s | CPU, s |\n" + "| --- " * (len(given.images) + 4) + "|", flush=True)
    flags = ["--candidates", given.candidates, *(["--keep-errors"] if given.keep_errors else [])]
    with tempfile.TemporaryDirectory() as folder:
        for what in ("test", "resume", "merge", "predict"):
            peaks, seconds, cpu = [], 0.0, 0.0
            for images in given.images:
                out = Path(folder) / ("predict" if what == "predict" else "test") / str(images) / "out"
                peak, seconds, cpu = measured(what, images, out, *flags)
                peaks.append(peak)
            cells = [f"{peak:.0f}" for peak in [*peaks, peaks[-1] - peaks[0]]]
            print(f"| {what} | {' | '.join(cells)} | {seconds:.0f} | {cpu:.0f} |", flush=True)


if __name__ == "__main__":
    main()
