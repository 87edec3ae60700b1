"""``diffclf export``: a trained network as a folder of diffusers."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from lightning_diffclf.errors import UserError
from lightning_diffclf.hub import AUTOENCODER
from lightning_diffclf.models.export import export_pipeline
from lightning_diffclf.modules.checkpoints import trained_module


def export_command(given: Namespace) -> None:
    """``diffclf export``: a DiTPipeline that others load without this package."""
    module = trained_module(given.ckpt, raw=given.weights == "raw")
    if not module.hparams["latents"]:
        raise UserError(f"export: {given.ckpt!r} works on pixels, but diffusers' DiTPipeline works on latents")
    vae = given.vae or module.hparams["vae"] or AUTOENCODER
    export_pipeline(module.net, module.schedule, Path(given.out), vae, module.candidates.names)
    print(f"DiTPipeline: {given.out}")
