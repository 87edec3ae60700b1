"""``diffclf export``: a trained network as a folder of diffusers."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from lightning_diffclf.errors import UserError
from lightning_diffclf.hub import AUTOENCODER, local_file
from lightning_diffclf.models.export import export_pipeline
from lightning_diffclf.models.families import families_in
from lightning_diffclf.models.published import is_published
from lightning_diffclf.modules.checkpoints import network_of, trained_module


def export_command(given: Namespace) -> None:
    """``diffclf export``: a DiTPipeline that others load without this package."""
    path = local_file(given.ckpt)
    if path.exists() and is_published(path):
        families = families_in(path)
        if "dit" not in families:
            raise UserError(
                f"export: {given.ckpt!r} has weights of {' or '.join(families)}, of which diffusers has no pipeline: "
                "its DiTPipeline takes a DiT's only"
            )
        module = network_of(given.ckpt, given.vae, "linear")
    else:
        module = trained_module(given.ckpt, raw=given.weights == "raw")
    if not module.hparams["latents"]:
        raise UserError(f"export: {given.ckpt!r} works on pixels, but diffusers' DiTPipeline works on latents")
    vae = given.vae or module.hparams["vae"] or AUTOENCODER
    export_pipeline(module.net, module.schedule, Path(given.out), vae, module.candidates.names)
    print(f"DiTPipeline: {given.out}")
