"""Does fine-tuning a text-to-image model on a labelled folder help? python benchmarks/bench_adapters.py OUT.

The tiny model that comes with the package, and a folder of scenes of one digit each, with a folder for each class
(zero, one, …), written to OUT. LoRA (`sd_lora.yaml`) and soft prompts for each class (`sd_soft_prompts.yaml`) are
trained on its `train` by the denoising loss, or with the classification loss as well, and classify its `test`, as the
model does that was not trained: all ten prompts, few draws. Trainings and evaluations go on where they were stopped.

The table: accuracy with Wilson's interval, and against the model that was not trained, McNemar's exact test (images
that only the trained one, and only the other, gets right).
"""

import argparse
import platform
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from bench_training_for_search import row, table
from PIL import Image
from torch import Tensor

from lightning_diffclf.cli import train
from lightning_diffclf.commands import run
from lightning_diffclf.data.digit_scenes import WORDS, DigitScenesDataModule
from lightning_diffclf.results.compare import compare
from lightning_diffclf.results.evaluation import Evaluation

ROOT = Path(__file__).parents[1]
MODEL = [
    *("--model.prompts", "a photo of a {}", "--model.dtype", "float32", "--data.size", "[8, 16]"),
    *("--model.pretrained", str(ROOT / "assets" / "sd_digits")),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
]
LORA = ["--model.checkpointing", "false", "--model.lr", "3e-3"]
TOKENS = ["--model.num_classes", "10", "--model.lr", "3e-2"]
TOLD_APART = ["--model.classification", "1", "--model.compared_classes", "10", "--model.compared_share", "0.25"]
VARIANTS = {
    "pretrained": ("sd_lora.yaml", LORA),
    "LoRA": ("sd_lora.yaml", LORA),
    "LoRA, classification": ("sd_lora.yaml", [*LORA, *TOLD_APART]),
    "soft prompts": ("sd_soft_prompts.yaml", TOKENS),
    "soft prompts, classification": ("sd_soft_prompts.yaml", [*TOKENS, *TOLD_APART]),
}


def write_images(root: Path, images: Tensor, labels: Sequence[int], ids: Sequence[int]) -> None:
    """Scenes (N, 3, 8, 16) in [-1, 1] as PNG files, in a folder for each class."""
    pixels = ((images / 2 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for one, label, image_id in zip(pixels, labels, ids, strict=True):
        path = root / WORDS[label] / f"{image_id}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated (default: all)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=360, help="test images")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 5])
    args = parser.parse_args()
    data, folder = DigitScenesDataModule(), args.out / "images"
    data.setup()
    for name, source in (("train", data.train), ("test", data.test)):
        count = args.images if name == "test" else len(source)
        parts = [source.parts[part][:count] for part in ("image", "label", "id")]
        write_images(folder / name, parts[0], parts[1].tolist(), parts[2].tolist())
    print(f"{date.today()}, {platform.machine()} CPU, torch {torch.__version__}; {args.steps} steps of {args.batch}")
    table("network", "seed", "CPU s", *(f"{draws} draws" for draws in args.draws), "McNemar p")
    pretrained: list[Evaluation] = []
    for name in dict.fromkeys(["pretrained", *(args.variant or VARIANTS)]):
        config, flags = VARIANTS[name]
        run_dir, start = args.out / f"{name.replace(', ', '_').replace(' ', '_')}_{args.seed}", time.process_time()
        common = [f"--data.root={folder}", *MODEL, *flags]
        if name == "pretrained":
            source = ["--config", config, "--untrained", f"--run_dir={run_dir}", *common]
        else:
            every = [f"--{what}={args.steps}" for what in ("trainer.max_steps", "checkpoint.every_n_train_steps")]
            seeds = [f"--{what}={args.seed}" for what in ("seed_everything", "model.seed", "data.seed")]
            short = [*every, *seeds, "--trainer.limit_val_batches=0", "--model.warmup_steps=10"]
            train([f"--config={config}", f"--run_dir={run_dir}", f"--data.batch_size={args.batch}", *common, *short])
            source = ["--ckpt", str(run_dir / "checkpoints" / "last.ckpt"), "--trainer.accelerator=cpu"]
        seconds, found = time.process_time() - start, []
        for draws in args.draws:
            out = run_dir / f"draws_{draws}"
            how = [f"--classifier.draws={draws}", "--classifier.elimination=null", "--data.eval_batch_size=60"]
            quiet = ["--trainer.enable_progress_bar=false", "--classifier.microbatch=120"]
            run("evaluate", [*source, f"--out={out}", *how, *quiet])
            found.append(Evaluation.read(out))
        pretrained = pretrained or found
        tests = [compare(one, other) for one, other in zip(found, pretrained, strict=True)]
        row(
            name,
            "–" if name == "pretrained" else args.seed,
            "–" if name == "pretrained" else f"{seconds:.0f}",
            *(one.accuracy for one in found),
            ", ".join(f"{one.p_value:.2g} ({one.only_first} : {one.only_second})" for one in tests)
            if name != "pretrained"
            else "",
        )


if __name__ == "__main__":
    main()
