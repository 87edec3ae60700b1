"""Training throughput: python benchmarks/bench_train.py [--model DiT-S/2] [--batch 16] [--device cuda] [--compile].

Four contenders train on the same latents, from the same loader, with AdamW, in alternating rounds of one process:

* ``Trainer``: ClassConditionalDiT under Lightning with EMA, checkpoint, requeue and classifier callbacks, as train.py;
* ``plain``: the same module's loss in a plain loop with the same EMA: what Lightning and the callbacks cost;
* ``DiT``: our network with a mean squared error and AdamW, no EMA;
* ``diffusers``: its DiTTransformer2DModel of the same size in the same loop.

The split of a step is taken in rounds of its own, as it waits for the device after each part. Utilisation is the share
of the matmul rate measured in the same run that the model's floating point operations (counted by torch, backward twice
the forward) come to.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import diffusers
import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from measuring import Stopwatch, forward_flops, matmul_rate, randomised, synchronize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_diffclf import EMA, ClassConditionalDiT, DiffusionClassifierCallback, DiT
from lightning_diffclf.callbacks.requeue import Requeue
from lightning_diffclf.data.imagenet import ImageNetDataModule
from lightning_diffclf.data.latents import LatentsIndex, LatentsWriter
from lightning_diffclf.models.dit import SIZES

PARTS = ("data", "forward", "backward", "optimizer", "EMA")


def latents(folder: Path, side: int, count: int = 2048) -> Path:
    """Write random latents of 1,000 classes."""
    index = LatentsIndex(
        "random", [count], (4, side, side), 8 * side, "none", "none", 0.18215, 0.0, [str(c) for c in range(1000)]
    )
    LatentsWriter.create(folder, index)
    writer, rng = LatentsWriter(folder), np.random.default_rng(0)
    moments = rng.standard_normal((count, 2, 8, side, side), dtype=np.float32)
    writer.write(0, moments, np.stack([rng.integers(1000, size=count), np.arange(count)], axis=1))
    list(writer.verify())
    return folder


def autocast(args: argparse.Namespace) -> torch.autocast:
    return torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.precision == "bf16-mixed")


def make_module(args: argparse.Namespace) -> ClassConditionalDiT:
    module = ClassConditionalDiT(model=args.model, input_size=args.side, compile=args.compile)
    randomised(module)
    return module


def make_data(args: argparse.Namespace, folder: Path) -> ImageNetDataModule:
    settings = {"size": 8 * args.side, "batch_size": args.batch, "num_workers": args.workers}
    data = ImageNetDataModule(str(folder), str(folder), **settings)
    data.setup("fit")
    return data


def under_trainer(args: argparse.Namespace, folder: Path) -> Callable[[], float]:
    def round_() -> float:
        watch = Stopwatch(args.device, args.warmup)
        with tempfile.TemporaryDirectory() as run_dir:
            trainer = L.Trainer(
                accelerator="gpu" if args.device == "cuda" else "cpu",
                devices=1,
                precision=args.precision,
                max_steps=args.warmup + args.steps,
                limit_val_batches=0,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=[
                    DiffusionClassifierCallback(draws=10),
                    EMA(),
                    ModelCheckpoint(run_dir, every_n_train_steps=10**9),
                    Requeue(),
                    watch,
                ],
            )
            trainer.fit(make_module(args), make_data(args, folder))
        return watch.seconds

    return round_


def steps_of(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    for batch in make_data(args, folder).train_dataloader():
        yield {name: batch[name].to(args.device, non_blocking=True) for name in ("image", "label")}


def plain_loop(args: argparse.Namespace, folder: Path, split: bool = False) -> Callable[[], float | list[float]]:
    """Our module without Lightning."""

    def round_() -> float | list[float]:
        module = make_module(args).to(args.device).train()
        if args.compile:
            module.net.compile()
        optimizer = torch.optim.AdamW(module.net.parameters(), lr=1e-4, weight_decay=0.0)
        average = AveragedModel(module, use_buffers=False, multi_avg_fn=get_ema_multi_avg_fn(0.9999))
        batches = steps_of(args, folder)
        seconds = [0.0] * len(PARTS)
        start = 0.0

        def lap(part: int) -> None:
            nonlocal last
            if split:
                synchronize(args.device)
                now = time.perf_counter()
                seconds[part] += now - last
                last = now

        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                synchronize(args.device)
                start, seconds[:] = time.perf_counter(), [0.0] * len(PARTS)
            last = time.perf_counter()
            batch = next(batches)
            lap(0)
            with autocast(args):
                t, noise, drop, _ = module._training_draws(batch["image"], step)
                loss = module.losses(batch["image"], batch["label"], t, noise, drop)["loss"].mean()
            lap(1)
            loss.backward()
            lap(2)
            optimizer.step()
            optimizer.zero_grad()
            lap(3)
            average.update_parameters(module)
            lap(4)
        synchronize(args.device)
        if split:
            return [value / args.steps for value in seconds]
        return (time.perf_counter() - start) / args.steps

    return round_


def bare_loop(args: argparse.Namespace, folder: Path, ours: bool) -> Callable[[], float]:
    """A network alone: epsilon prediction, mean squared error."""
    size, patch_size = args.model.removeprefix("DiT-").split("/")
    hidden_size, depth, num_heads = SIZES[size]

    def round_() -> float:
        if ours:
            net = DiT.from_name(args.model, input_size=args.side)
        else:
            net = diffusers.DiTTransformer2DModel(
                num_attention_heads=num_heads,
                attention_head_dim=hidden_size // num_heads,
                in_channels=4,
                out_channels=8,
                num_layers=depth,
                sample_size=args.side,
                patch_size=int(patch_size),
                num_embeds_ada_norm=1000,
                norm_type="ada_norm_zero",
                norm_elementwise_affine=False,
            )
        net = randomised(net).to(args.device).train()
        if args.compile:
            net.compile()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)
        batches = steps_of(args, folder)
        start = 0.0
        for step in range(args.warmup + args.steps):
            if step == args.warmup:
                synchronize(args.device)
                start = time.perf_counter()
            batch = next(batches)
            x0, y = batch["image"], batch["label"]
            noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),), device=x0.device)
            with autocast(args):
                out = net(x0 + noise, t, y) if ours else net(x0 + noise, timestep=t, class_labels=y).sample
                loss = (out[:, :4].float() - noise).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(args.device)
        return (time.perf_counter() - start) / args.steps

    return round_


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2")
    parser.add_argument("--side", type=int, default=32, help="of latents")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a round")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", default=None, help="bf16-mixed or 32-true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    args.precision = args.precision or ("bf16-mixed" if args.device == "cuda" else "32-true")

    dtype = torch.bfloat16 if args.precision == "bf16-mixed" else torch.float32
    rate = matmul_rate(args.device, dtype, 8192 if args.device == "cuda" else 1536)
    flops = 3 * forward_flops(lambda: DiT.from_name(args.model, input_size=args.side))
    with tempfile.TemporaryDirectory() as temporary:
        folder = latents(Path(temporary) / "latents", args.side)
        contenders = {
            "Trainer": under_trainer(args, folder),
            "plain": plain_loop(args, folder),
            "DiT": bare_loop(args, folder, ours=True),
            "diffusers": bare_loop(args, folder, ours=False),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        memory = {}
        for _ in range(args.rounds):
            for name, contender in contenders.items():
                if args.device == "cuda":
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                seconds[name].append(contender())
                if args.device == "cuda":
                    memory[name] = torch.cuda.max_memory_allocated() / 2**30
        split = plain_loop(args, folder, split=True)()

    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU"
    print(f"# Training, {device}, {torch.get_num_threads()} threads, {date.today()}\n")
    print(f"{args}; torch {torch.__version__}, diffusers {diffusers.__version__}, lightning {L.__version__}\n")
    print("| contender | images/s | utilisation | fastest round, images/s | peak memory, GiB |")
    print("| --- | --- | --- | --- | --- |")
    for name, values in seconds.items():
        speed, best = args.batch / statistics.median(values), args.batch / min(values)
        peak = f"{memory[name]:.1f}" if name in memory else "–"
        print(f"| {name} | {speed:.2f} | {speed * flops / rate:.1%} | {best:.2f} | {peak} |")
    print(f"\nMatmul: {rate / 1e12:.2f} TFLOP/s; a training step of one image: {flops / 1e9:.1f} GFLOP.\n")
    for name, over, under in (("Lightning and callbacks", "Trainer", "plain"), ("diffusers / DiT", "diffusers", "DiT")):
        ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        fastest = min(seconds[over]) / min(seconds[under])
        print(f"{name}: seconds of {over} over {under}, round by round, median {statistics.median(ratios):.3f} ")
        print(f"({min(ratios):.3f} … {max(ratios):.3f}); fastest over fastest {fastest:.3f}.\n")
    parts = ", ".join(f"{part} {share / sum(split):.1%}" for part, share in zip(PARTS, split, strict=True))
    print(f"A step of the plain loop: {parts}.")


if __name__ == "__main__":
    main()
