"""Turn any conditional denoiser into a classifier, and train one with PyTorch Lightning."""

from lightning_diffclf.lazy import members

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = members(__name__)
