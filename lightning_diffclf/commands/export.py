"""``diffclf export``: a trained network as a folder of diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_diffclf.commands.parser import Parser
from lightning_diffclf.errors import UserError
from lightning_diffclf.models.autoencoder import DEFAULT
from lightning_diffclf.models.published import export_pipeline
from lightning_diffclf.modules.checkpoints import trained_module


def export_command(args: Sequence[str]) -> None:
    """``diffclf export``: a DiTPipeline that others load without this package."""
    parser = Parser(
        prog="diffclf export",
        description="Write a trained DiT as a DiTPipeline folder of diffusers, to publish or to sample from.",
    )
    parser.add_argument("--ckpt", type=str, required=True, help="checkpoint of a training")
    parser.add_argument("--out", type=str, required=True, help="folder for the pipeline; new or empty")
    parser.add_argument(
        "--vae", type=str | None, default=None, help=f"autoencoder (default: the network's own, else {DEFAULT})"
    )
    parser.add_argument(
        "--weights",
        type=Literal["ema", "raw"],
        default="ema",
        help="the average, if there is one, or those in training",
    )
    given = parser.parse_args(list(args))
    module = trained_module(given.ckpt, raw=given.weights == "raw")
    if not module.hparams["latents"]:
        raise UserError(f"export: {given.ckpt!r} works on pixels, but diffusers' DiTPipeline works on latents")
    vae = given.vae or module.hparams["vae"] or DEFAULT
    export_pipeline(module.net, module.schedule, Path(given.out), vae, module.candidates.names)
    print(f"DiTPipeline: {given.out}")
