"""What charts and tables of an evaluation are made of: small pandas frames."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lightning_diffclf.results.curves import Costs, Sureness, Survivors, thin
from lightning_diffclf.results.statistics import Judged, Scores, selective_accuracy, wilson
from lightning_diffclf.results.summary import Summary

MOST_PAIRS = 10_000  # of classes in a confusion matrix: drawing takes some 10 kB each


def classes(summary: Summary) -> pd.DataFrame:
    """Images, accuracy with its interval, network calls and the commonest mistake of each class that occurs."""
    confusion_CA, name = summary.sums["confusion_CA"], summary.outline.name
    lines = []
    for c in np.flatnonzero(confusion_CA.sum(1)).tolist():
        answers_A = confusion_CA[c]
        images = int(answers_A.sum())
        share = wilson(int(answers_A[c]), images)
        wrong_A = np.where(np.arange(len(answers_A)) == c, 0, answers_A)
        commonest = int(wrong_A.argmax())
        lines.append(
            {
                "class": c,
                "name": name(c),
                "images": images,
                "accuracy": share.value,
                "low": share.low,
                "high": share.high,
                "taken for": f"{name(commonest)} ({wrong_A[commonest]})" if wrong_A[commonest] else "",
                "nfe": float(summary.sums["nfe_C"][c] / images),
            }
        )
    return pd.DataFrame(lines)


def confusion(summary: Summary) -> pd.DataFrame:
    """Counts of (true, predicted) pairs that occur, the commonest ones. The last predicted class, C, is no answer."""
    confusion_CA = summary.sums["confusion_CA"]
    true, predicted = confusion_CA.nonzero()
    commonest = np.argsort(-confusion_CA[true, predicted], kind="stable")[:MOST_PAIRS]
    true, predicted = true[np.sort(commonest)], predicted[np.sort(commonest)]
    counts, name = confusion_CA[true, predicted], summary.outline.name
    rank_A = class_ranks(summary)
    return pd.DataFrame(
        {
            "true": true,
            "predicted": predicted,
            "true_rank": rank_A[true],
            "predicted_rank": rank_A[predicted],
            "true_name": [name(c) for c in true.tolist()],
            "predicted_name": [name(c) for c in predicted.tolist()],
            "images": counts,
            "share": counts / confusion_CA.sum(1)[true],
        }
    )


def class_ranks(summary: Summary) -> np.ndarray:
    """Place of each class from the worst to the best (C + 1,): then those that do not occur, and no answer."""
    accuracy_C = summary.per_class
    order = np.argsort(np.where(np.isnan(accuracy_C), np.inf, accuracy_C), kind="stable")
    rank_A = np.arange(len(accuracy_C) + 1)
    rank_A[order] = np.arange(len(accuracy_C))
    return rank_A


def class_names(summary: Summary) -> pd.DataFrame:
    """Number, rank and name of each class, and of no answer where that occurs."""
    no_answer = bool(summary.sums["confusion_CA"][:, -1].any())
    numbers = range(summary.outline.num_classes + no_answer)
    names = [summary.outline.name(c) for c in numbers]
    return pd.DataFrame({"class": numbers, "rank": class_ranks(summary)[: len(names)], "name": names})


def timesteps(summary: Summary) -> pd.DataFrame:
    """Accuracy of each draw alone, where all candidates of an image saw it, with its interval."""
    right_S, judged_S = summary.sums["right_S"], summary.sums["judged_S"]
    seen_S = judged_S > 0
    intervals = [wilson(r, n) for r, n in zip(right_S[seen_S].tolist(), judged_S[seen_S].tolist(), strict=True)]
    frame = pd.DataFrame(
        {
            "timestep": np.array(summary.outline.timesteps_S)[seen_S],
            "accuracy": [i.value for i in intervals],
            "low": [i.low for i in intervals],
            "high": [i.high for i in intervals],
            "images": judged_S[seen_S],
        }
    )
    return frame.sort_values("timestep")


def costs(found: Costs) -> pd.DataFrame:
    """Accuracy of the answer so far against the network calls spent so far, after each draw."""
    at = thin(found.draws)
    return pd.DataFrame({"draws": at + 1, "nfe": found.nfe_S[at], "accuracy": found.accuracy_S[at]})


def survivors(found: Survivors) -> pd.DataFrame:
    """Candidates in play at each draw: mean, and the middle 80 % of the images."""
    low, high = found.quantile(0.1), found.quantile(0.9)
    return pd.DataFrame({"draw": found.draw, "candidates": found.mean, "low": low, "high": high})


def reliability(probabilities: dict[str, Scores]) -> pd.DataFrame:
    """Confidence against accuracy in the bins that have images, for each kind of ``probabilities``."""
    frames = []
    for name, scores in probabilities.items():
        images, confidence, right = scores.bins_M3[scores.bins_M3[:, 0] > 0].T
        intervals = [wilson(int(r), int(n)) for r, n in zip(right, images, strict=True)]
        frames.append(
            pd.DataFrame(
                {
                    "probabilities": name,
                    "confidence": confidence / images,
                    "accuracy": right / images,
                    "low": [i.low for i in intervals],
                    "high": [i.high for i in intervals],
                    "images": images.astype(int),
                }
            )
        )
    return pd.concat(frames)


def selective(sureness: Sureness, calibrated: Judged | None) -> pd.DataFrame:
    """Accuracy of the surest answers against their share: by margin, vote share and calibrated probability."""
    known_B = sureness.label >= 0
    right_B = sureness.right[known_B]
    kinds: dict[str, Sequence[np.ndarray]] = {
        "margin": (sureness.margin[known_B], right_B),
        "vote share": (sureness.votes[known_B], right_B),
    }
    if calibrated is not None:
        kinds["probability"] = (calibrated.confidence, calibrated.right)
    frames = []
    for name, (sure_B, kind_right_B) in kinds.items():
        curve = selective_accuracy(sure_B, kind_right_B)
        at = thin(len(curve.coverage))
        at = at[at >= min(9, at[-1])]  # of fewer answers, the share says nothing
        frames.append(pd.DataFrame({"by": name, "coverage": curve.coverage[at], "accuracy": curve.accuracy[at]}))
    return pd.concat(frames)
