"""Accuracy of images that come in groups, such as those of a patient: an interval that knows that they are alike."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_diffclf.results.columns import Chunk, Columns
from lightning_diffclf.results.statistics import Clusters, Interval, wilson


class Grouped:
    """Images and right answers of each group, counted over all decisions; those without a label are left out.

    An image without a group is one by itself.
    """

    COLUMNS = ("group", "label", "prediction")

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}  # images, right ones
        self._single = [0, 0]  # wrong, right: images without a group

    def update(self, chunk: Chunk) -> None:
        """Count more images."""
        columns = Columns.of(chunk, self.COLUMNS)
        if columns.table["group"].null_count == len(columns):
            known = columns.labelled
            right = int((known.numbers("label") == known.numbers("prediction")).sum())
            self._single[0] += len(known) - right
            self._single[1] += right
            return
        known_B = columns.numbers("label") >= 0
        right_B = columns.numbers("label") == columns.numbers("prediction")
        for group, known, right in zip(columns.strings("group"), known_B.tolist(), right_B.tolist(), strict=True):
            if known and group is None:
                self._single[right] += 1
            elif known:
                counts = self._counts.setdefault(group, [0, 0])
                counts[0] += 1
                counts[1] += right

    @property
    def clusters(self) -> Clusters | None:
        """Right answers by group; None if no image has one."""
        if not self._counts:
            return None
        sizes, sums = np.array(list(self._counts.values()), dtype=np.float64).T
        alone = np.repeat([0.0, 1.0], self._single)
        return Clusters(np.append(sums, alone), np.append(sizes, np.ones(len(alone))))

    def numbers(self) -> dict[str, Any]:
        """What replaces the interval of independent images, and the design effect; nothing without groups.

        The design effect is how many times the variance is that of as many independent images; it is left out where
        that is 0.
        """
        clusters = self.clusters
        if clusters is None:
            return {}
        interval, images = clusters.share(), float(clusters.sizes_G.sum())
        found = {"accuracy_low": interval.low, "accuracy_high": interval.high, "groups": len(clusters.sums_G)}
        alone = clusters.mean * (1 - clusters.mean) / images
        return found | ({"design_effect": clusters.error**2 / alone} if alone and len(clusters.sums_G) > 1 else {})

    def accuracy(self, right: int, labelled: int) -> Interval:
        """With its interval: by groups if there are some, else Wilson's."""
        clusters = self.clusters
        return wilson(right, labelled) if clusters is None else clusters.share()
