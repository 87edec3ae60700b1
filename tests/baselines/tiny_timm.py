"""A small network of timm with random weights, saved as for the Hub."""

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf


def write_timm(folder: Path, num_classes: int = 1000, seed: int = 0) -> str:
    """Its name for timm; prepares images of 48 pixels in a way of its own."""
    torch.manual_seed(seed)
    own = {"num_classes": num_classes, "input_size": (3, 48, 48), "crop_pct": 0.8, "interpolation": "bilinear"}
    own |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}
    model = timm.create_model("test_vit", num_classes=num_classes, img_size=48, pretrained_cfg_overlay=own)
    torch.nn.init.normal_(model.head.weight, std=1.0)  # as made, all classes are alike
    save_for_hf(model, str(folder), model_args={"img_size": 48})
    return f"local-dir:{folder}"
