"""A DiT as an estimator of scikit-learn: trained and asked on arrays."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import Tags, check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_diffclf.callbacks.ema import EMA
from lightning_diffclf.classifier import Classification, DiffusionClassifier, Elimination, LikelihoodRatio, Recipe
from lightning_diffclf.data.batch import content_ids
from lightning_diffclf.errors import UserError
from lightning_diffclf.modules.class_conditional_dit import ClassConditionalDiT

TOGETHER = 1024  # images that are on the device before the first of them is decided


class DiTClassifier(ClassifierMixin, BaseEstimator):
    """Trains a class-conditional DiT, and classifies by how well it predicts noise under each class.

    Takes images (n, H, W) or (n, H, W, C), or features (n, d): with ``image_shape``, those are images as well, as
    ``sklearn.datasets.load_digits`` has them, otherwise one token each, of standardized features. Values may have any
    range: training data say how they are scaled. Predictions depend on a row alone, not on the others of its batch.

    Args:
        image_shape: (H, W) or (H, W, C) of the images in rows of features.
        hidden_size: Width of the transformer.
        depth: Number of blocks.
        num_heads: Attention heads; must divide ``hidden_size``.
        patch_size: Side of a patch; if omitted 2 where that divides both sides of the images, else 1.
        max_steps: Optimizer steps.
        batch_size: Rows of a step, or all if there are fewer.
        lr: Highest learning rate; it rises for an eighth of the steps and falls along a cosine.
        ema_decay: Decay of the average of the weights, which is what predicts.
        draws: Draws for each row at most.
        elimination: Rule that drops classes early; :class:`LikelihoodRatio` if omitted.
        temperature: Of the probabilities; see :class:`~lightning_diffclf.Posterior`.
        microbatch: Rows (image, class, draw) of a network call.
        device: Where it runs; ``auto`` is the GPU if there is one.
        random_state: Seed of weights, order and noise.
        verbose: Show the progress of training.

    Attributes:
        classes_: The classes, sorted.
        module_: The network, a :class:`~lightning_diffclf.ClassConditionalDiT`.
        shape_: (C, H, W) of what it sees.
        offset_: What is taken from values before they are divided by ``scale_``; a number, or one for each feature.
        scale_: See ``offset_``.
        n_features_in_: Number of features; of images, their height.

    Example:
        >>> from sklearn.datasets import load_digits
        >>> from sklearn.model_selection import cross_val_score
        >>> X, y = load_digits(return_X_y=True)
        >>> model = DiTClassifier(image_shape=(8, 8), random_state=0)
        >>> cross_val_score(model, X, y, cv=3).round(3)  # doctest: +SKIP
        array([0.967, 0.973, 0.965])
    """

    def __init__(
        self,
        image_shape: Sequence[int] | None = None,
        *,
        hidden_size: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        patch_size: int | None = None,
        max_steps: int = 800,
        batch_size: int = 256,
        lr: float = 4e-3,
        ema_decay: float = 0.995,
        draws: int = 100,
        elimination: Elimination | None = None,
        temperature: float = 1.0,
        microbatch: int = 256,
        device: str = "auto",
        random_state: Any = None,
        verbose: bool = False,
    ) -> None:
        self.image_shape = image_shape
        self.hidden_size = hidden_size
        self.depth = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.lr = lr
        self.ema_decay = ema_decay
        self.draws = draws
        self.elimination = elimination
        self.temperature = temperature
        self.microbatch = microbatch
        self.device = device
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    def fit(self, X: Any, y: Any) -> DiTClassifier:
        """Train.

        Args:
            X: Images or features; see the class.
            y: Class of each (n,): numbers or text.

        Raises:
            ValueError: if shapes, values or settings are wrong, or training diverges.
        """
        X, y = validate_data(self, X, y, allow_nd=True, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, target_N = np.unique(y, return_inverse=True)
        x_NCHW = self._images(X)
        self.shape_ = x_NCHW.shape[1:]
        if self._has_pixels(X):
            low, high = x_NCHW.min(), x_NCHW.max()
            self.offset_, scale = np.asarray((low + high) / 2), np.asarray((high - low) / 2)
        else:
            self.offset_, scale = x_NCHW.mean(0), x_NCHW.std(0)
        self.scale_ = np.where(scale > 0, scale, 1.0)
        self.seed_ = seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self._recipe(seed)  # raises before training
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module_ = self._make(seed)
            rows = TensorDataset(self._scaled(x_NCHW), torch.from_numpy(target_N.reshape(-1)).long())
            self._train(rows, torch.Generator().manual_seed(seed))
        if not all(bool(weight.isfinite().all()) for weight in self.module_.parameters()):
            raise UserError(f"lr: {self.lr} makes training diverge, expected less")
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each class (n, classes), float64, in the order of ``classes_``."""
        check_is_fitted(self)
        return np.stack([result.probabilities_K.numpy() for result in self._classify(X)])

    def predict(self, X: Any) -> np.ndarray:
        """The class of each (n,)."""
        likeliest_N = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest_N]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _recipe(self, seed: int) -> Recipe:
        rule = LikelihoodRatio() if self.elimination is None else self.elimination
        return Recipe(draws=self.draws, seed=seed, elimination=rule, temperature=self.temperature)

    def _has_pixels(self, X: np.ndarray) -> bool:
        return X.ndim > 2 or self.image_shape is not None

    def _images(self, X: np.ndarray) -> np.ndarray:
        """Rows as (n, C, H, W)."""
        if X.ndim == 2 and self.image_shape is not None:
            if len(self.image_shape) not in (2, 3) or np.prod(self.image_shape) != X.shape[1]:
                raise UserError(f"image_shape: {self.image_shape}, expected (H, W) or (H, W, C) of {X.shape[1]} values")
            X = X.reshape(-1, *self.image_shape)
        if X.ndim == 2:
            return X[:, :, None, None]
        if X.ndim == 3:
            return X[:, None]
        if X.ndim == 4:
            return X.transpose(0, 3, 1, 2)
        raise UserError(f"X: shape {X.shape}, expected (n, d), (n, H, W) or (n, H, W, C)")

    def _scaled(self, x_NCHW: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray((x_NCHW - self.offset_) / self.scale_, dtype=np.float32))

    def _make(self, seed: int) -> ClassConditionalDiT:
        channels, height, width = self.shape_
        patch_size = (2 if height % 2 == width % 2 == 0 else 1) if self.patch_size is None else self.patch_size
        return ClassConditionalDiT(
            input_size=[height, width],
            in_channels=channels,
            num_classes=len(self.classes_),
            class_names=[str(name) for name in self.classes_],
            hidden_size=self.hidden_size,
            depth=self.depth,
            num_heads=self.num_heads,
            patch_size=patch_size,
            learn_sigma=False,
            schedule="rectified_flow",
            lr=self.lr,
            warmup_steps=self.max_steps // 8,
            decay="cosine",
            seed=seed,
        )

    def _train(self, rows: TensorDataset, order: torch.Generator) -> None:
        batch_size = min(self.batch_size, len(rows))
        place = torch.device(self._device)
        with quiet():
            trainer = L.Trainer(
                accelerator=place.type,
                devices=1 if place.index is None else [place.index],
                max_steps=self.max_steps,
                max_epochs=-1,
                logger=False,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=self.verbose,
                callbacks=[EMA(self.ema_decay)],
            )
            trainer.fit(self.module_, DataLoader(rows, batch_size, shuffle=True, generator=order))
        self.module_.eval().cpu()

    @property
    def _device(self) -> str:
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    def _classify(self, X: Any) -> Iterator[Classification]:
        X = validate_data(self, X, reset=False, allow_nd=True, dtype=np.float64)
        x_NCHW = self._images(X)
        if x_NCHW.shape[1:] != self.shape_:
            raise UserError(f"X: images of (C, H, W) {x_NCHW.shape[1:]}, expected {self.shape_}, as in fit")
        module: Any = self.module_.to(self._device)
        run = DiffusionClassifier(module, self._recipe(self.seed_), microbatch=self.microbatch).run()
        for part in self._scaled(x_NCHW).split(TOGETHER):
            run.add(part.to(self._device), content_ids(part))
            yield from run.work()
        yield from run.finish()
        self.module_.cpu()  # so that it can be unpickled anywhere


@contextmanager
def quiet() -> Iterator[None]:
    """Without what Lightning says about hardware and workers: an estimator is silent."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
