"""How robust is a diffusion classifier of digits? python benchmarks/bench_attack.py.

Robust accuracy under APGD with the same draws for every image and call, on the first test digits, and what randomised
smoothing certifies. All distances are in units of images in [0, 1]; l2 of 8 × 8 pixels.
"""

import platform
from datetime import date

import numpy as np
import torch
from tasks import TASKS

from lightning_diffclf import DiffusionClassifier, DiffusionLogits
from lightning_diffclf.classifier.attack import APGD
from lightning_diffclf.classifier.smoothing import Denoised, certify
from lightning_diffclf.results.statistics import wilson

DRAWS, STEPS, ATTACKED, CERTIFIED = 5, 20, 40, 20
N0, N, SIGMAS, RADII = 20, 100, (0.12, 0.25), (0.1, 0.2, 0.3)


def main() -> None:
    task = TASKS["digits"]
    network, (images, labels, ids) = task.network().requires_grad_(False), task.test()
    images = images / 2 + 0.5
    base = DiffusionLogits(DiffusionClassifier(network, draws=DRAWS))
    print(f"{date.today()}, {platform.machine()} CPU, torch {torch.__version__}\n")
    print("| norm | eps | right without attack | right under APGD |\n| --- | --- | --- | --- |")
    some, truth = images[:ATTACKED], labels[:ATTACKED]
    with torch.no_grad():
        clean = int((base(some).argmax(1) == truth).sum())
    for norm, eps in (("linf", 0.03), ("linf", 0.1), ("l2", 0.5)):
        right = int(APGD(eps, norm, steps=STEPS)(base, some, truth).right.sum())
        print(f"| {norm} | {eps} | {wilson(clean, ATTACKED)} | {wilson(right, ATTACKED)} |", flush=True)
    print(f"\n| sigma | answers | right at radius {' | right at radius '.join(map(str, RADII))} |")
    print(f"| --- | --- |{' --- |' * len(RADII)}")
    for sigma in SIGMAS:
        smoothed = Denoised(network, base, sigma)
        found = [
            certify(smoothed, image, sigma, n0=N0, n=N, alpha=0.01, image_id=image_id)
            for image, image_id in zip(images[:CERTIFIED], ids, strict=False)
        ]
        right = np.array(
            [one.prediction == label for one, label in zip(found, labels[:CERTIFIED].tolist(), strict=True)]
        )
        radius = np.array([one.radius for one in found])
        shares = " | ".join(str(wilson(int((right & (radius >= r)).sum()), CERTIFIED)) for r in RADII)
        print(f"| {sigma} | {sum(one.prediction is not None for one in found)} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
