"""The method: turns any conditional denoiser into a classifier. Needs torch, numpy and scipy only."""

from lightning_diffclf.lazy import members

__getattr__, __dir__, __all__ = members(__name__)
