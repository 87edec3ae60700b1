"""Tasks of bench_elimination.py, bench_calibration.py and make_errors.py: images, networks, stored errors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from safetensors.torch import load_file
from torch import Tensor

from lightning_diffclf import ClassConditionalDiT, ConditionalDenoiser, GradientSearch, Stages, ZeroShotStableDiffusion
from lightning_diffclf.classifier.draws import nested_order
from lightning_diffclf.commands.configs import CONFIGS
from lightning_diffclf.data.digit_scenes import caption_of_two
from lightning_diffclf.data.digits import DigitPairsDataModule, DigitsDataModule, DigitTriplesDataModule

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Task:
    """Images to classify, and how.

    Attributes:
        name: What its files in benchmarks/data/ are called.
        data: Makes the data module.
        draws: Draws of all candidates.
        stages: The paper's rule with its numbers for so many classes.
        search: What proposes without labels.
        exhaustive: Images whose errors of all candidates are stored; of the first ones.
        inflation: Of ``LikelihoodRatio``.
        top: Candidates that the linear probe proposes; 0 for no probe.
        images: Test images to use, spread over the classes; all if omitted.
        learns: Training images that a ``CovarianceSearch`` is fitted to, without their labels; 0 for no such search.
        pipeline: Folder of a text-to-image pipeline, which classifies by captions; otherwise the DiT of
            ``dit_NAME.yaml`` classifies.
    """

    name: str
    data: Callable[..., DigitsDataModule]
    draws: int
    stages: Stages
    search: GradientSearch
    exhaustive: int
    inflation: float = 1.0
    top: int = 0
    images: int | None = None
    learns: int = 0
    pipeline: str | None = None

    def network(self) -> ConditionalDenoiser:
        """The trained network."""
        if self.pipeline:
            captions = [caption_of_two(*divmod(label, 10)) for label in range(100)]
            return ZeroShotStableDiffusion(str(ROOT / self.pipeline), "{}", captions, dtype="float32")
        config = yaml.safe_load((CONFIGS / f"dit_{self.name}.yaml").read_text())
        network = ClassConditionalDiT(**config["model"]["init_args"])
        network.load_state_dict(load_file(DATA / f"{self.name}.safetensors"))
        return network.eval()

    def test(self) -> tuple[Tensor, Tensor, list[int]]:
        """Test images, labels and ids."""
        data = self.data()
        data.setup()
        # Where only some are used, they are spread: images of pairs and triples are in the order of their classes.
        some = slice(None) if self.images is None else nested_order(len(data.test))[: self.images]
        images, labels, ids = (data.test.parts[name][some] for name in ("image", "label", "id"))
        return (images.expand(-1, 3, -1, -1) if self.pipeline else images), labels, ids.tolist()

    def unlabelled(self) -> Tensor:
        """Images that a ``CovarianceSearch`` learns from."""
        data = self.data()
        data.setup()
        images = data.train.parts["image"][nested_order(len(data.train))[: self.learns]]
        return images.expand(-1, 3, -1, -1) if self.pipeline else images

    def errors(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stored errors (B, K, S), labels (B,) and timesteps (S,)."""
        with np.load(DATA / f"{self.name}.npz") as file:
            codes, least, spread = file["codes"].astype(np.float64), file["least"], file["range"]
            return least[:, None] + spread[:, None] * (codes / 255) ** 2, file["labels"], file["timesteps"]


def compress(errors_BKS: np.ndarray) -> dict[str, np.ndarray]:
    """One byte for an error: 255 · sqrt((e - least) / range) of each (image, draw). Close calls keep their digits.

    What matters is which candidates are best and by how much; the errors of hopeless ones may be off by a percent.
    """
    least_BS, range_BS = errors_BKS.min(1), np.ptp(errors_BKS, 1)
    codes = np.rint(255 * np.sqrt((errors_BKS - least_BS[:, None]) / range_BS[:, None]))
    return {"codes": codes.astype(np.uint8), "least": least_BS.astype(np.float32), "range": range_BS.astype(np.float32)}


TASKS = {
    task.name: task
    for task in (
        Task("digits", DigitsDataModule, 100, Stages((10, 100), (5, 1)), GradientSearch(), 360, top=3),
        Task(
            "digit_pairs",
            DigitPairsDataModule,
            64,
            Stages((2, 6, 12, 64), (20, 10, 5, 1)),
            GradientSearch(),
            500,
            top=20,
            learns=100,
        ),
        Task(
            "digit_triples",
            partial(DigitTriplesDataModule, train_triples=1000),
            64,
            Stages((1, 4, 8, 64), (100, 20, 5, 1)),
            GradientSearch(draws=16, timesteps=(0.2, 0.6)),
            exhaustive=100,
            inflation=2.0,
            images=275,
            learns=100,
        ),
        Task(
            "captions",
            partial(DigitPairsDataModule, train_pairs=1000),
            100,
            Stages((4, 10, 20, 100), (20, 10, 5, 1)),
            GradientSearch(),
            100,
            inflation=5.0,
            learns=100,
            pipeline="assets/sd_digits",
        ),
    )
}
