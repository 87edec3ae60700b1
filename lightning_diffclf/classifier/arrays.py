"""Numbers as tensors or as arrays: stored results are read without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Values = TypeVar("Values", "Tensor", np.ndarray)
"""Numbers as a tensor or as an array; what is made of them is of the same kind, a tensor on the same device."""


def as_array(values: Any, kind: type = np.float64) -> np.ndarray:
    """A tensor or an array as an array; not a copy, if it is of that kind already."""
    if not isinstance(values, np.ndarray):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    return np.asarray(values, kind)


def like(given: Values, found: np.ndarray) -> Values:
    """``found`` as ``given`` was: a tensor, or an array."""
    if isinstance(given, np.ndarray):
        return found
    import torch  # whoever has tensors has imported it

    return torch.from_numpy(found).to(given.device)
