"""Train a tiny text-to-image pipeline: python scripts/make_sd_digits.py (about 18 minutes on one CPU core).

Writes assets/sd_digits/, a StableDiffusionPipeline in diffusers' format of some two megabytes: AutoencoderKL, CLIP
tokenizer, CLIPTextModel, UNet2DConditionModel. It draws scenes of one or two handwritten digits from captions such as
"a photo of a three left of a five". Trained on the 1,437 training digits of scikit-learn, tested on the other 360: with
it, zero-shot classification and Winoground work offline, for real.

The autoencoder comes first, then text encoder and UNet together. The average of the weights (EMA) is stored, in half
precision.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lightning_diffclf import NoiseSchedule
from lightning_diffclf.data.digit_scenes import WORDS, random_scenes
from lightning_diffclf.data.digits import DigitsDataModule

LENGTH = 16  # tokens
POOL = 40_000  # scenes that are encoded once


def make_tokenizer() -> CLIPTokenizer:
    """Byte pairs that make one token of each word of the captions; anything else is spelled."""
    words = [*WORDS, "a", "an", "the", "photo", "picture", "of", "left", "right", "digit", "number", "and", "no"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,:'-\"")
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[str] = []
    for word in words:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            rule, merged = f"{pieces[0]} {pieces[1]}", pieces[0] + pieces[1]
            if rule not in merges:
                merges.append(rule)
            if merged not in vocabulary:
                vocabulary.append(merged)
            pieces = [merged, *pieces[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=[tuple(rule.split()) for rule in merges],
        model_max_length=LENGTH,
    )


def train_autoencoder(data: DigitsDataModule, steps: int) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=16,
        mid_block_add_attention=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3, weight_decay=0)
    generator, start = torch.Generator().manual_seed(1), time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        images = random_scenes(data.train, 64, generator).images
        posterior = vae.encode(images).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample(generator)).sample, images)
        loss = error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0 or step == steps - 1:
            print(f"autoencoder {step}/{steps} mse {error.item():.4f} {time.time() - start:.0f} s", flush=True)
    with torch.no_grad():
        latents = vae.encode(random_scenes(data.train, 500, generator).images).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return vae.eval().requires_grad_(False)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=(4, 8),
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 48),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=4,  # number of heads, by diffusers' names
    )


def train(data: DigitsDataModule, vae: AutoencoderKL, steps: int, out: Path, batch_size: int = 96) -> None:
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    nets = torch.nn.ModuleDict({"text_encoder": make_text_encoder(tokenizer), "unet": make_unet()})
    averaged = copy.deepcopy(nets).requires_grad_(False)
    print({name: sum(p.numel() for p in net.parameters()) for name, net in [*nets.items(), ("vae", vae)]}, flush=True)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    optimizer = torch.optim.AdamW(nets.parameters(), 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    generator, start = torch.Generator().manual_seed(2), time.time()
    latents, captions, ids = encode(data, vae, tokenizer, POOL, generator)
    nothing = tokenizer("", padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    print(f"{len(latents)} scenes, such as {captions[:3]}", flush=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 300) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        pick = torch.randint(len(latents), (batch_size,), generator=generator)
        x0 = latents[pick]
        empty = torch.rand(batch_size, 1, generator=generator) < 0.1  # for the unconditional prediction
        t = torch.randint(1000, (batch_size,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        text = nets["text_encoder"](torch.where(empty, nothing, ids[pick]))[0]
        output = nets["unet"](schedule.add_noise(x0, noise, t), t, text).sample
        loss = F.mse_loss(output, schedule.target(x0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(nets.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), nets.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        if step % 100 == 0 or step == steps - 1:
            print(f"pipeline {step}/{steps} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
        if step % 1000 == 999 or step == steps - 1:
            save(vae, averaged, tokenizer, scheduler, out)


@torch.no_grad()
def encode(data, vae, tokenizer, count, generator) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    """Latents of random scenes, their captions, and the tokens of these."""
    latents, captions = [], []
    for _ in range(count // 500):
        scenes = random_scenes(data.train, 500, generator)
        latents.append(vae.encode(scenes.images).latent_dist.mean * vae.config.scaling_factor)
        captions += scenes.captions
    different = sorted(set(captions))
    tokens = tokenizer(different, padding="max_length", max_length=LENGTH, return_tensors="pt").input_ids
    row = {caption: number for number, caption in enumerate(different)}
    return torch.cat(latents), captions, tokens[[row[caption] for caption in captions]]


def save(vae, nets, tokenizer, scheduler, out: Path) -> None:
    parts = {name: copy.deepcopy(part).half() for name, part in [("vae", vae), *nets.items()]}
    pipeline = StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(out, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/sd_digits"))
    parser.add_argument("--autoencoder-steps", type=int, default=800)
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()
    data = DigitsDataModule()
    data.setup()
    vae = train_autoencoder(data, args.autoencoder_steps)
    train(data, vae, args.steps, args.out)
    size = sum(path.stat().st_size for path in args.out.rglob("*.safetensors"))
    print(json.dumps({"out": str(args.out), "safetensors_bytes": size}))


if __name__ == "__main__":
    main()
