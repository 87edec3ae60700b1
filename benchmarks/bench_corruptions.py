"""Do corrupted images harm a generative classifier less than discriminative ones? On digits, trained on the same.

python train.py --config dit_digits.yaml
python train.py --config timm_digits.yaml
python train.py --config resnet_digits.yaml
python benchmarks/bench_corruptions.py

The DiT decides by 100 draws and ``LikelihoodRatio``. Corruptions are those of ``--classifier.corruption``. Intervals
are Wilson's; p is that of McNemar's test of the DiT and the last network: are they right on different images?
"""

import argparse
import platform
from datetime import date

import numpy as np
import torch

from lightning_diffclf import DiffusionClassifier, Draws, LikelihoodRatio
from lightning_diffclf.baselines.timm_classifier import TimmFromScratch
from lightning_diffclf.classifier.discriminative import DiscriminativeClassifier
from lightning_diffclf.data.corruptions import Corruption
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.modules.checkpoints import read_checkpoint, trained_module
from lightning_diffclf.results.statistics import mcnemar, wilson

KINDS = ("gaussian_noise", "gaussian_blur", "pixelate", "jpeg", "brightness", "contrast")
SEVERITIES = (1, 3, 5)


def discriminative(path: str) -> TimmFromScratch:
    """The network of a checkpoint of ``TimmFromScratch``."""
    checkpoint = read_checkpoint(path)
    given = checkpoint["hyper_parameters"]
    module = TimmFromScratch(**{name: value for name, value in given.items() if not name.startswith("_")})
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", default="runs/dit_digits/checkpoints/last.ckpt")
    usual = [f"runs/{name}_digits/checkpoints/last.ckpt" for name in ("timm", "resnet")]
    parser.add_argument("--others", nargs="+", default=usual)
    given = parser.parse_args()
    data = DigitsDataModule()
    data.setup()
    images, labels, ids = (data.test.parts[name] for name in ("image", "label", "id"))
    dit = DiffusionClassifier(trained_module(given.dit), draws=Draws(100), elimination=LikelihoodRatio(0.01))
    others = [discriminative(path) for path in given.others]
    names = " | ".join(str(one.hparams["model"]) for one in others)
    print(f"{date.today()}, {platform.machine()} CPU, torch {torch.__version__}, {len(images)} test digits\n")
    print(f"| corruption | DiT | {names} | p | NFE of the DiT |\n| --- | --- |{' --- |' * len(others)} --- | --- |")
    for kind, severity in [("none", 0), *((kind, severity) for kind in KINDS for severity in SEVERITIES)]:
        seen = Corruption(kind, severity)(images, ids.tolist()) if severity else images
        decided = [list(one(seen, ids)) for one in (dit, *map(DiscriminativeClassifier, others))]
        right = [np.array([r.prediction for r in some]) == labels.numpy() for some in decided]
        shares = " | ".join(str(wilson(int(some.sum()), len(some))) for some in right)
        p = mcnemar(int((right[0] & ~right[-1]).sum()), int((right[-1] & ~right[0]).sum()))
        name, nfe = f"{kind}/{severity}" if severity else kind, np.mean([r.nfe for r in decided[0]])
        print(f"| {name} | {shares} | {p:.2g} | {nfe:.0f} |", flush=True)


if __name__ == "__main__":
    main()
