"""What probabilities are worth: python benchmarks/bench_calibration.py.

Replays the stored errors of all test images of two tasks (see bench_elimination.py). Every image is judged with what
was fitted to the other folds. Confidence is that of the answer: ECE in 15 bins, NLL and Brier score of "the answer is
right" (a yes or no), so that confidences without class probabilities can be compared as well:

* raw: softmax of summed errors, temperature 1.
* temperature: fitted by maximum likelihood.
* calls until the decision: sigmoid(b - n / tau) of the network calls n that an elimination rule spent, fitted by
  logistic regression (Clark & Jaini 2023, section 4.3).
* margin, votes: logistic regressions on log(margin) and on the share of draws that agree.
"""

import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from bench_elimination import stored
from sklearn.linear_model import LogisticRegression
from tasks import TASKS

from lightning_diffclf import DiffusionClassifier, Draws, Exhaustive, PairedTest, Posterior
from lightning_diffclf.results.calibration import CrossFitted, Sample, fold_of
from lightning_diffclf.results.columns import Columns
from lightning_diffclf.results.predictions import Record
from lightning_diffclf.results.replay import replay
from lightning_diffclf.results.statistics import ece
from lightning_diffclf.results.summary import Outline, judge


def rows_of(found, errors_of: dict[str, np.ndarray], classes: list[int], weights_S: np.ndarray) -> list[Record]:
    """Rows of replayed decisions, with the errors that each would have seen."""
    rows = []
    for result, label in zip(found.results, found.labels, strict=True):
        errors_KS = errors_of[result.image_id].T.copy()
        errors_KS[np.arange(errors_KS.shape[1]) >= result.draws_K.numpy()[:, None]] = np.nan
        seen = result.__class__(**{**result.__dict__, "errors_KS": torch.from_numpy(errors_KS)})
        rows.append(Record.of(seen, classes, weights_S, label, seconds=0.0, rank=0))
    return rows


def scores(confidence_B: np.ndarray, right_B: np.ndarray) -> str:
    p = np.clip(confidence_B, 1e-12, 1 - 1e-12)
    nll = -np.where(right_B, np.log(p), np.log(1 - p)).mean()
    return f"{ece(p, right_B):.4f} | {nll:.4f} | {np.square(p - right_B).mean():.4f}"


def platt(feature_B: np.ndarray, right_B: np.ndarray, fold_B: np.ndarray) -> np.ndarray:
    """Probability to be right by a logistic regression fitted to the other folds."""
    result = np.empty(len(feature_B))
    for fold in np.unique(fold_B):
        fitted = LogisticRegression(C=1e6, max_iter=1000)
        x = (feature_B - feature_B.mean()) / feature_B.std()
        fitted.fit(x[fold_B != fold, None], right_B[fold_B != fold])
        result[fold_B == fold] = fitted.predict_proba(x[fold_B == fold, None])[:, 1]
    return result


def main() -> None:
    print(f"{date.today()}\n")
    print("| task | rule | accuracy | confidence | ECE | NLL | Brier |\n| --- | --- | --- | --- | --- | --- | --- |")
    for task in (TASKS["digits"], TASKS["digit_pairs"]):
        everything = DiffusionClassifier(task.network(), Draws(task.draws))
        classes = list(everything.denoiser.candidates.classes)
        with tempfile.TemporaryDirectory() as folder:
            errors = stored(task, everything, Path(folder))
            errors_of = {image.image_id: image.errors_SK for image in errors}
            for rule in (Exhaustive(), task.stages, PairedTest(0.01)):
                rows = rows_of(replay(errors, rule), errors_of, classes, everything.weights_S)
                report(task.name, rule, rows, classes)


def report(task: str, rule: object, rows: list[Record], classes: list[int]) -> None:
    names = tuple(map(str, range(max(classes) + 1)))
    outline = Outline(tuple(classes), names, timesteps_S=())
    sample = Sample(outline)
    sample.update(rows)
    right_B = np.array([row.prediction == row.label for row in rows])
    fold_B = np.array([fold_of(row.id) for row in rows])
    crossfitted = CrossFitted(sample)
    crossfitted.update(rows)
    kinds = {
        "raw": judge(Columns(rows, Sample.COLUMNS), outline, Posterior()).confidence,
        "temperature": crossfitted.judged.confidence,
        "margin": platt(np.log([row.margin + 1e-3 for row in rows]), right_B, fold_B),
        "votes": platt(np.array([row.votes for row in rows]), right_B, fold_B),
    }
    if isinstance(rule, PairedTest):
        kinds["calls until the decision"] = platt(np.array([float(row.nfe) for row in rows]), right_B, fold_B)
    for name, confidence_B in kinds.items():
        print(f"| {task} | {rule} | {right_B.mean():.2%} | {name} | {scores(confidence_B, right_B)} |", flush=True)


if __name__ == "__main__":
    main()
