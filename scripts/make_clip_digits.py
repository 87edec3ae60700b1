"""Train a tiny CLIP: python scripts/make_clip_digits.py (minutes on one CPU core).

Writes assets/clip_digits/, a CLIPModel in transformers' format of less than half a megabyte. It is trained on what
assets/sd_digits was trained on: scenes of one or two handwritten digits, made of the 1,437 training digits of
scikit-learn, and captions such as "a photo of a three left of a five", in the same tokens. So a contrastive model and a
diffusion model can be compared on the same images and prompts, offline.

Scenes of the same caption in a batch are all right answers to each other (Khosla et al. 2020, supervised contrastive
learning): there are few captions. The average of the weights (EMA) is stored, in half precision.
"""

import argparse
import copy
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from lightning_diffclf.data.digit_scenes import random_scenes
from lightning_diffclf.data.digits import DigitsDataModule
from lightning_diffclf.data.images import resized_to
from lightning_diffclf.shipped import shipped

SIDE = 16  # of the images that it sees: scenes of 8 x 16 are stretched


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = size | ends | {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    return CLIPModel(
        CLIPConfig(
            text_config=text | {"max_position_embeddings": tokenizer.model_max_length},
            vision_config=size | {"num_hidden_layers": 3, "image_size": SIDE, "patch_size": 4},
            projection_dim=48,
        )
    )


def contrastive_loss(logits_BB: Tensor, caption_B: Tensor) -> Tensor:
    """Cross-entropy both ways, over all pairs of equal captions."""
    right_BB = (caption_B[:, None] == caption_B).float()
    right_BB /= right_BB.sum(1, keepdim=True)
    return -(right_BB * (logits_BB.log_softmax(1) + logits_BB.T.log_softmax(1))).sum(1).mean() / 2


def train(steps: int, out: Path, batch_size: int = 128) -> None:
    torch.manual_seed(0)
    data = DigitsDataModule()
    data.setup()
    tokenizer = CLIPTokenizer.from_pretrained(shipped("assets/sd_digits") / "tokenizer")
    model = make_model(tokenizer)
    averaged = copy.deepcopy(model).requires_grad_(False)
    processor = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
    processor.image_mean = processor.image_std = [0.5, 0.5, 0.5]
    print(f"{sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.98), weight_decay=0.05)
    generator, start = torch.Generator().manual_seed(1), time.time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        scenes = random_scenes(data.train, batch_size, generator)
        number = {caption: i for i, caption in enumerate(sorted(set(scenes.captions)))}
        tokens = tokenizer(scenes.captions, padding=True, return_tensors="pt")
        images = resized_to(scenes.images, (SIDE, SIDE))  # in [-1, 1] already, as mean and std of 0.5 make them
        output = model(pixel_values=images, input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        loss = contrastive_loss(output.logits_per_image, torch.tensor([number[one] for one in scenes.captions]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))  # as in CLIP
            for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
                mean.lerp_(value, 1 - min(0.998, (step + 1) / (step + 10)))
        if step % 100 == 0 or step == steps - 1:
            print(f"{step}/{steps} loss {loss.item():.4f} {time.time() - start:.0f} s", flush=True)
    averaged.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    processor.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/clip_digits"))
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    train(args.steps, args.out)


if __name__ == "__main__":
    main()
