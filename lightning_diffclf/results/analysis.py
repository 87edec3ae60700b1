"""What a report shows of a run, as small tables: plain pandas frames that charts are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lightning_diffclf.classifier import Posterior
from lightning_diffclf.errors import UserError
from lightning_diffclf.results.calibration import ENOUGH_TO_SAY, Judged, crossfitted, fit, judge
from lightning_diffclf.results.predictions import Record, from_table
from lightning_diffclf.results.statistics import Interval, reliability, selective, wilson
from lightning_diffclf.results.store import Settings, read_table

POINTS = 200  # of a curve: more cannot be seen


@dataclass(frozen=True)
class RunAnalysis:
    """Everything that is known about a run.

    Args:
        path: Its folder.
        settings: What it was made with.
        rows: Its decisions.

    Raises:
        ValueError: if it has no images.
    """

    path: Path
    settings: Settings
    rows: Sequence[Record]

    @classmethod
    def read(cls, path: str | Path) -> RunAnalysis:
        """Read the run in the folder ``path``, whether it has ended or not.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it cannot be read, or has no images.
        """
        settings = Settings.read(Path(path))
        rows = from_table(read_table(Path(path), settings))
        if not rows:
            raise UserError(f"run: no image in {str(path)!r} yet")
        return cls(Path(path), settings, rows)

    # --- names -----------------------------------------------------------------------------------------------------

    @property
    def classes(self) -> list[int]:
        """Class of each candidate."""
        return list(self.settings.info["candidate_classes"])

    @property
    def class_names(self) -> list[str]:
        """Name of each class."""
        return list(self.settings.info["class_names"])

    @cached_property
    def labelled(self) -> list[Record]:
        """Rows whose class is known."""
        return [row for row in self.rows if row.label is not None]

    # --- numbers ---------------------------------------------------------------------------------------------------

    @cached_property
    def right_B(self) -> np.ndarray:
        """Whether each labelled image was decided rightly (B,), bool."""
        return np.array([row.prediction == row.label for row in self.labelled], dtype=bool)

    @property
    def accuracy(self) -> Interval | None:
        """Share of the labelled images that were decided rightly; None if there are none."""
        return wilson(int(self.right_B.sum()), len(self.right_B)) if len(self.right_B) else None

    @property
    def nfe_per_image(self) -> float:
        """Network calls for an image, on average."""
        return float(np.mean([row.nfe for row in self.rows]))

    @property
    def seconds(self) -> float:
        """Time that the classifier took: of the rank that took longest."""
        per_rank: dict[int, float] = {}
        for row in self.rows:
            per_rank[row.rank] = per_rank.get(row.rank, 0.0) + row.seconds
        return max(per_rank.values())

    def headline(self) -> list[tuple[str, str, str]]:
        """Name, value and explanation of the numbers that sum the run up."""
        lines = []
        if self.accuracy is not None:
            classes = self.per_class()
            mean = float(classes["accuracy"].mean())
            interval = f"95 % interval {self.accuracy.low:.2%} to {self.accuracy.high:.2%} (Wilson)"
            lines.append(("accuracy", f"{self.accuracy.value:.2%}", interval))
            lines.append(("mean per class", f"{mean:.2%}", f"over the {len(classes)} classes that occur"))
            if len(self.class_names) > 5:
                top5 = np.mean([row.label in row.top5 for row in self.labelled])
                lines.append(("top 5", f"{top5:.2%}", "the right class is among the best five"))
            for name, judged in self.judged.items():
                scores = judged.scores()
                note = f"NLL {scores['nll']:.4f} nats, Brier score {scores['brier']:.4f}"
                lines.append((f"ECE, {name}", f"{scores['ece']:.4f}", note))
        lines.append(("images", f"{len(self.rows):,}", f"{len(self.labelled):,} with a label"))
        lines.append(("NFE / image", f"{self.nfe_per_image:,.1f}", "network calls"))
        lines.append(("time", f"{self.seconds:,.1f} s", f"{len(self.rows) / self.seconds:,.2f} images / s"))
        return lines

    # --- probabilities ---------------------------------------------------------------------------------------------

    @cached_property
    def judged(self) -> dict[str, Judged]:
        """``raw``: probabilities by a softmax of summed errors; ``calibrated``: with temperatures of other folds."""
        kinds = {"raw": [Posterior()] * len(self.labelled)}
        if len(self.labelled) >= ENOUGH_TO_SAY:
            kinds["calibrated"] = crossfitted(self.labelled, self.classes, Posterior())
        return {name: judge(self.labelled, self.classes, posteriors) for name, posteriors in kinds.items()}

    @cached_property
    def posterior(self) -> Posterior:
        """With the temperature that suits the labelled images; 1 if they are below 50."""
        return fit(self.labelled, self.classes, Posterior()) if len(self.labelled) >= ENOUGH_TO_SAY else Posterior()

    def reliability(self) -> pd.DataFrame:
        """Confidence against accuracy in bins."""
        frames = []
        for name, judged in self.judged.items():
            bins = reliability(judged.confidence, judged.right)
            counts = bins.images.astype(int)
            intervals = [wilson(round(a * n), n) for a, n in zip(bins.accuracy.tolist(), counts.tolist(), strict=True)]
            frames.append(
                pd.DataFrame(
                    {
                        "probabilities": name,
                        "confidence": bins.confidence,
                        "accuracy": bins.accuracy,
                        "low": [i.low for i in intervals],
                        "high": [i.high for i in intervals],
                        "images": counts,
                    }
                )
            )
        return pd.concat(frames)

    def selective(self) -> pd.DataFrame:
        """Accuracy of the surest answers against their share, by margin, by probability and by vote share."""
        kinds = {
            "margin": np.array([row.margin for row in self.labelled]),
            "vote share": np.array([row.votes for row in self.labelled]),
        }
        if "calibrated" in self.judged:
            kinds["probability"] = self.judged["calibrated"].confidence
        frames = []
        for name, sureness_B in kinds.items():
            curve = selective(sureness_B, self.right_B)
            at = _thin(len(curve.coverage))
            at = at[at >= min(9, at[-1])]  # of fewer answers, the share says nothing
            frames.append(pd.DataFrame({"by": name, "coverage": curve.coverage[at], "accuracy": curve.accuracy[at]}))
        return pd.concat(frames)

    # --- classes ---------------------------------------------------------------------------------------------------

    def confusion(self) -> pd.DataFrame:
        """Counts of (true, predicted) pairs that occur; ``rank`` orders classes from the worst to the best."""
        pairs = pd.DataFrame(
            {"true": [row.label for row in self.labelled], "predicted": [_or(row.prediction) for row in self.labelled]}
        )
        counts = pairs.value_counts().reset_index(name="images").sort_values(["true", "predicted"])
        counts["share"] = counts["images"] / counts.groupby("true")["images"].transform("sum")
        order = self.per_class().sort_values(["accuracy", "class"])["class"].tolist()
        order += sorted({*counts["predicted"], *counts["true"]} - set(order))
        rank = {c: i for i, c in enumerate(order)}
        for side in ("true", "predicted"):
            counts[f"{side}_rank"] = counts[side].map(rank)
            counts[f"{side}_name"] = [self.name(c) for c in counts[side]]
        return counts

    def name(self, c: int) -> str:
        """Name of a class; of none, if the network returned nothing finite."""
        return self.class_names[c] if c >= 0 else "(none)"

    def per_class(self) -> pd.DataFrame:
        """Images, accuracy with its interval and the commonest mistake of each class that occurs."""
        rows_of: dict[int, list[Record]] = {}
        for row in self.labelled:
            rows_of.setdefault(int(row.label or 0), []).append(row)
        lines = []
        for c, rows in sorted(rows_of.items()):
            share = wilson(sum(row.prediction == c for row in rows), len(rows))
            wrong = pd.Series([_or(row.prediction) for row in rows if row.prediction != c], dtype=int).value_counts()
            lines.append(
                {
                    "class": c,
                    "name": self.name(c),
                    "images": len(rows),
                    "accuracy": share.value,
                    "low": share.low,
                    "high": share.high,
                    "taken for": "" if wrong.empty else f"{self.name(int(wrong.index[0]))} ({wrong.iloc[0]})",
                    "nfe": float(np.mean([row.nfe for row in rows])),
                }
            )
        return pd.DataFrame(lines)

    # --- draws -----------------------------------------------------------------------------------------------------

    def by_timestep(self) -> pd.DataFrame:
        """Accuracy of each draw alone, where all candidates of an image saw it."""
        timesteps = np.array(self.settings.info["timesteps_S"])
        right, judged = np.zeros(len(timesteps)), np.zeros(len(timesteps), dtype=int)
        for row in self.labelled:
            right[: row.complete] += row.choice_S[: row.complete] == row.label
            judged[: row.complete] += 1
        seen = judged > 0
        intervals = [wilson(int(r), int(n)) for r, n in zip(right[seen], judged[seen], strict=True)]
        frame = pd.DataFrame(
            {
                "timestep": timesteps[seen],
                "accuracy": [i.value for i in intervals],
                "low": [i.low for i in intervals],
                "high": [i.high for i in intervals],
                "images": judged[seen],
            }
        )
        return frame.sort_values("timestep")

    def by_cost(self) -> pd.DataFrame:
        """Accuracy of the answer so far against the network calls spent so far, after each draw."""
        total = max(len(row.leader_S) for row in self.rows)
        right, calls = np.zeros(total), np.zeros(total)
        for row in self.labelled:
            spent = len(row.leader_S)
            hits = row.leader_S == row.label
            right[:spent] += hits
            right[spent:] += hits[-1]
            alive_S = np.bincount(row.draws_K, minlength=total + 1)[::-1].cumsum()[::-1][1:]
            calls += alive_S.cumsum()
        count = max(len(self.labelled), 1)
        frame = pd.DataFrame({"draws": np.arange(1, total + 1), "nfe": calls / count, "accuracy": right / count})
        return frame.iloc[_thin(total)]

    def survivors(self) -> pd.DataFrame:
        """Candidates in play at each draw: mean, and the middle 80 % of the images."""
        total = max(len(row.choice_S) for row in self.rows)
        at = _thin(total)
        alive_BS = np.stack([_alive(row, total)[at] for row in self.rows])
        low, high = np.quantile(alive_BS, [0.1, 0.9], axis=0)
        return pd.DataFrame({"draw": at + 1, "candidates": alive_BS.mean(0), "low": low, "high": high})

    # --- images ----------------------------------------------------------------------------------------------------

    def gallery(self, most: int = 240) -> list[Record]:
        """Images to look at: wrong ones first, the surest before all; then right ones, the least sure first."""
        wrong = sorted((r for r in self.labelled if r.prediction != r.label), key=lambda row: -row.margin)
        right = sorted((r for r in self.rows if r.label in (None, r.prediction)), key=lambda row: row.margin)
        chosen = wrong[: most * 3 // 4]
        return chosen + right[: most - len(chosen)]

    def story(self, row: Record, most: int = 10) -> pd.DataFrame:
        """The best candidates of an image: class, probability, draws spent on each, and how far behind each is."""
        names = self.settings.info["candidate_names"]
        p_K = self.posterior(torch.tensor(row.differences_K)[None], row.dims)[0].numpy()
        order = np.lexsort((row.differences_K, -row.draws_K))[:most]
        return pd.DataFrame(
            {
                "candidate": [names[k] for k in row.candidates_K[order]],
                "draws": row.draws_K[order].astype(int),
                "behind": row.differences_K[order].astype(float),
                "probability": p_K[order],
            }
        ).replace(np.inf, np.nan)


def _or(prediction: int | None) -> int:
    return -1 if prediction is None else prediction


def _alive(row: Record, total: int) -> np.ndarray:
    """Candidates in play at each of ``total`` draws, 1 or 0 after the decision."""
    at_least = np.bincount(row.draws_K, minlength=total + 1)[::-1].cumsum()[::-1]
    return at_least[1 : total + 1]


def _thin(count: int) -> np.ndarray:
    """At most :data:`POINTS` positions of ``count``, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(int))
