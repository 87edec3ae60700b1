"""Class-conditional networks as others publish them, by family: what a file says, and what has to be known.

A file has weights only. That a network predicts velocities, which way its time runs and how it sees latents is in the
papers and in the repositories' documentation; here it is said once for each family.

- ``dit``: Peebles & Xie 2023. Noise, on DDPM's linear schedule.
- ``sit``: Ma et al. 2024. DiT's network; velocities of a rectified flow from noise at t = 0 to data at t = 1.
- ``repa``: Yu et al. 2025 (REPA), Leng et al. 2025 (REPA-E). The flow runs the other way, and the latents' statistics
  and the autoencoder may be in the file.
- ``lightningdit``: Yao et al. 2025. SiT's flow on latents of VA-VAE, by statistics that are a file of their own.
- ``edm2``: Karras et al. 2024. A U-Net with EDM's preconditioning, on latents or on pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_diffclf.errors import MissingFile, UserError, first_line
from lightning_diffclf.hub import AUTOENCODER, local_file
from lightning_diffclf.models.autoencoder import Autoencoder, LatentScale
from lightning_diffclf.models.dit import DiT
from lightning_diffclf.models.edm2 import EDM2, FOURIER, edm2_of
from lightning_diffclf.models.ldm_autoencoder import is_ldm, ldm_autoencoder
from lightning_diffclf.models.lightning_dit import Switches, lightning_dit, rotations
from lightning_diffclf.models.published import (
    check_measured,
    config_of,
    config_of_weights,
    fit_weights,
    read_published,
    weights_in,
    without_variance,
)
from lightning_diffclf.models.weight_files import read_file
from lightning_diffclf.schedule import NoiseSchedule

Family = Literal["dit", "sit", "repa", "lightningdit", "edm2"]
FAMILIES: tuple[str, ...] = get_args(Family)

VAVAE = "hf://hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt"
VAVAE_STATISTICS = "hf://hustvl/vavae-imagenet256-f16d32-dinov2/latents_stats.pt"
EDM2_AUTOENCODER = "stabilityai/sd-vae-ft-mse"

BATCH_NORM_EPS = 1e-4  # of REPA-E's normalisation of latents

EDM2_MEAN = (5.81, 3.25, 0.12, -2.15)  # of the latents of Stable Diffusion's autoencoder of pixels in [0, 1], …
EDM2_STD = (4.17, 4.62, 3.71, 3.28)  # … as EDM2 takes them to be, and scales them to 1/2

TRAINED_BESIDE = ("projectors.", "bn.", "feat_rope.")  # tensors in files that the network itself does not have


@dataclass(frozen=True)
class Published:
    """A class-conditional network, ready to be asked.

    Attributes:
        net: Takes noisy inputs (N, C, h, w), times (N,) and classes (N,), int64, or embeddings in place of theirs.
        schedule: What it predicts, and when.
        vae: Its autoencoder by name, or itself where it is in the file; None for a network on pixels.
        scale: How it sees the latents; None: as the autoencoder says.
    """

    net: DiT | EDM2
    schedule: NoiseSchedule
    vae: str | Autoencoder | None
    scale: LatentScale | None = None


def read_network(
    weights: str | Path,
    family: str | None = None,
    vae: str | None = None,
    latents: str | None = None,
    num_heads: int | None = None,
) -> Published:
    """Read a network and what belongs to it. Nothing is unpickled.

    Args:
        weights: A file (torch's or safetensors), a folder of diffusers with a DiT, or ``hf://OWNER/REPOSITORY/FILE``.
        family: One of :data:`FAMILIES`; told by the weights if omitted, except that DiT's and SiT's are the same.
        vae: Autoencoder in place of the family's own: a folder, a repository on the Hub, or a file.
        latents: File with the mean and the spread of each channel of the latents: ``mean`` and ``std``, or
            ``latents_bias`` and ``latents_scale``.
        num_heads: Attention heads, which weights do not show; known for the published widths.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if something cannot be read, is of another family, or belongs to another network.
    """
    if family is not None and family not in FAMILIES:
        raise UserError(f"family: {family!r}, expected one of {', '.join(FAMILIES)}")
    path = local_file(weights)
    if path.is_dir():
        if family not in (None, "dit"):
            raise UserError(f"weights: {str(weights)!r} is a folder, which only a DiT of diffusers is; expected a file")
        return _transformer("dit", read_published(path), str(weights), vae, latents, config_of(path)["num_heads"])
    if not path.is_file():
        raise MissingFile(f"weights: no file or folder {str(weights)!r}")
    try:
        return _of_file(path, str(weights), family, vae, latents, num_heads)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        reason = first_line(error)[:200]  # tensors that are missing or of strange shapes
        raise UserError(f"weights: {str(weights)!r} are of no network of these families ({reason})") from error


def _of_file(
    path: Path, where: str, family: str | None, vae: str | None, latents: str | None, num_heads: int | None
) -> Published:
    content = read_file(path)
    found = weights_in(content)
    known = family_of(found, where)
    if family not in (None, *known):
        raise UserError(f"weights: {where!r} are of family {' or '.join(known)}, not of {family}")
    if family is None and len(known) > 1:
        raise UserError(f"family: weights of {' and '.join(known)} look the same; say which {where!r} are")
    family = family or known[0]
    if family == "edm2":
        return _edm2(found, where, vae, latents)
    own: Autoencoder | str | None = vae
    if family == "repa" and vae is None and isinstance(content.get("vae"), Mapping) and is_ldm(content["vae"]):
        own = Autoencoder(ldm_autoencoder(content["vae"], where), scale_of(found, latents))
    return _transformer(family, found, where, own, latents, num_heads)


def families_in(path: Path) -> tuple[str, ...]:
    """Which families published weights may be of; a folder of diffusers has a DiT.

    Raises:
        ValueError: if they cannot be read, or are of none.
    """
    return ("dit",) if path.is_dir() else family_of(weights_in(read_file(path)), str(path))


def family_of(weights: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Which families weights may be of, by the names of their tensors.

    Raises:
        ValueError: if they are of none.
    """
    if any(str(name).endswith(FOURIER) for name in weights):
        return ("edm2",)
    check_measured(weights, where)
    if "bn.running_mean" in weights or any(name.startswith("projectors.") for name in weights):
        return ("repa",)
    return ("dit", "sit") if Switches.of(weights) == Switches() else ("lightningdit",)


def scale_of(weights: Mapping[str, Any], latents: str | None) -> LatentScale | None:
    """How latents are seen: by a file of statistics, else by those of the batch norm beside the weights, if any."""
    if latents is not None:
        return read_statistics(latents)
    if "bn.running_mean" not in weights or "bn.running_var" not in weights:
        return None
    variance = weights["bn.running_var"].float()
    return LatentScale(weights["bn.running_mean"].float(), (variance + BATCH_NORM_EPS).rsqrt())


def read_statistics(name: str) -> LatentScale:
    """Statistics of latents in a file of torch.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it holds something else.
    """
    path = local_file(name)
    if not path.is_file():
        raise MissingFile(f"latents: no file {name!r}")
    found = {key: one.float().flatten() for key, one in read_file(path).items() if isinstance(one, Tensor)}
    if found.keys() >= {"mean", "std"}:
        mean, scaling = found["mean"], 1 / found["std"]
    elif found.keys() >= {"latents_bias", "latents_scale"}:
        mean, scaling = found["latents_bias"], found["latents_scale"]
    else:
        names = sorted(map(str, found))
        raise UserError(f"latents: {name!r} has {names}, expected mean and std, or latents_bias, latents_scale")
    if mean.shape != scaling.shape or not bool((mean.isfinite() & scaling.isfinite() & (scaling > 0)).all()):
        raise UserError(f"latents: {name!r} has no mean and positive spread of each channel")
    return LatentScale(mean, scaling)


def _transformer(
    family: str,
    found: Mapping[str, Any],
    where: str,
    vae: str | Autoencoder | None,
    latents: str | None,
    num_heads: int | None,
) -> Published:
    check_measured(found, where)
    weights = {name: value.float() for name, value in found.items() if not name.startswith(TRAINED_BESIDE)}
    switches = Switches.of(found)
    if switches.rope:
        num_heads = _heads_of_rope(found["feat_rope.freqs_cos"], found["x_embedder.proj.bias"], where)
    sizes = config_of_weights(weights, where, num_heads)
    if family != "dit":  # outputs for a variance may be there, but were not trained
        weights = without_variance(weights, sizes["in_channels"], sizes["patch_size"])
        sizes["learn_sigma"] = False
    if not isinstance(sizes["input_size"], int):
        raise UserError(f"weights: {where!r} have {sizes['input_size']}, expected those of a square")
    net = DiT(**sizes) if switches == Switches() else lightning_dit(switches, **sizes)
    if switches.rope:
        _check_rope(found, sizes, where)
    fit_weights(net, weights, where)
    schedule: NoiseSchedule = NoiseSchedule.linear()
    if family != "dit":
        schedule = NoiseSchedule.rectified_flow(noise_at=1 if family == "repa" else 0)
    defaults = {4: AUTOENCODER} | ({32: VAVAE} if family == "lightningdit" else {})
    vae = vae or defaults.get(net.in_channels)
    if vae is None and net.in_channels != 3:
        raise UserError(
            f"vae: none given, expected --vae, the autoencoder of the {net.in_channels} channels of {where!r}"
        )
    scale = scale_of(found, latents or (VAVAE_STATISTICS if vae == VAVAE else None))
    return Published(net.requires_grad_(False).eval(), schedule, vae, scale)


def _heads_of_rope(cosines: Tensor, width: Tensor, where: str) -> int:
    if cosines.ndim != 2 or cosines.shape[1] == 0 or len(width) % cosines.shape[1]:
        raise UserError(f"weights: {where!r} have rotary positions of shape {tuple(cosines.shape)}, expected (L, D)")
    return len(width) // cosines.shape[1]


def _check_rope(found: Mapping[str, Any], sizes: Mapping[str, Any], where: str) -> None:
    """Rotary positions are made anew: they have to be those in the file."""
    side = sizes["input_size"] // sizes["patch_size"]
    angles = rotations(side, side, sizes["hidden_size"] // sizes["num_heads"]).repeat_interleave(2, dim=1)
    for name, expected in (("feat_rope.freqs_cos", angles.cos()), ("feat_rope.freqs_sin", angles.sin())):
        value = found.get(name)
        if value is None or value.shape != expected.shape or not torch.allclose(value.float(), expected, atol=1e-3):
            raise UserError(
                f"weights: {where!r} have other rotary positions ({name}) than a LightningDiT of their size"
            )


def _edm2(found: Mapping[str, Any], where: str, vae: str | None, latents: str | None) -> Published:
    strange = [name for name, value in found.items() if not isinstance(value, Tensor)]
    if strange:
        raise UserError(f"weights: {where!r} have {strange[0]!r}, which is no tensor")
    net, schedule = edm2_of(found, where), NoiseSchedule.edm()
    if net.in_channels == 3:
        return Published(net, schedule, None)
    mean, std = torch.tensor(EDM2_MEAN), torch.tensor(EDM2_STD)
    scale = read_statistics(latents) if latents else LatentScale(mean, 0.5 / std, zero_to_one=True)
    return Published(net, schedule, vae or EDM2_AUTOENCODER, scale)
