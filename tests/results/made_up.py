"""Made-up runs: decisions without a network."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_diffclf.results.predictions import Record, to_table
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import claim, write_whole
from lightning_diffclf.results.summary import Outline
from lightning_diffclf.results.trails import Trail


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (8, 8), shade % 256).save(file, "WEBP", lossless=True)
    return file.getvalue()


def trail_of(best: int, logits: np.ndarray, spent: np.ndarray) -> Trail:
    """Of all classes, straight down after a lead of each in the first draw."""
    order = sorted(range(len(logits)), key=lambda c: (c != best, -spent[c]))[:10]
    draws = sorted({1, *spent[order].tolist()})
    slope = (logits.max() - logits) / 64
    behind = [[float(slope[c] if n > 1 else -slope[c]) for n in draws if n <= spent[c]] for c in order]
    return Trail(draws=draws, classes=order, behind=behind)


def made_up_rows(count: int, classes: int, seed: int = 0, draws: int = 20, labelled: bool = True, sharp: float = 1.0):
    """Decisions that are calibrated when temperature is ``sharp``."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99).integers(classes, size=count)
    for i in range(count):
        logits = rng.normal(size=classes)
        logits[truth[i]] += 3
        p = np.exp(logits) / np.exp(logits).sum()
        label = int(rng.choice(classes, p=p))
        best = int(logits.argmax())
        spent = rng.integers(1, draws, classes)
        spent[best] = draws
        choice = np.where(rng.random(draws) < 0.7, best, rng.integers(classes, size=draws))
        leader = np.where(np.arange(draws) < 3, choice, best)
        yield Record(
            id=str(i),
            label=label if labelled else None,
            prediction=best,
            top5=np.argsort(-logits)[:5].astype(np.int32),
            margin=float(rng.exponential(5)),
            abstained=False,
            candidates_K=np.arange(classes, dtype=np.int32),
            scores_K=(0.3 - logits * sharp / 64),
            differences_K=((logits.max() - logits) * sharp / 64).astype(np.float32),
            draws_K=spent.astype(np.int32),
            nfe=int(spent.sum()),
            dims=64,
            choice_S=choice.astype(np.int32),
            leader_S=leader.astype(np.int32),
            seconds=0.25,
            rank=i % 2,
            trail=trail_of(best, logits, spent),
            thumbnail=picture(i),
            error_map=rng.normal(size=(4, 4)).astype(np.float32) if label != best and i < 40 else None,
        )


def proposed_rows(rows, seed: int = 0):
    """The same decisions, as if a search had left out some candidates, never that decided for."""
    rng = np.random.default_rng(seed)
    for i, row in enumerate(rows):
        kept = rng.random(len(row.candidates_K)) < 0.5
        kept[row.candidates_K == row.prediction] = True
        lists = {name: getattr(row, name)[kept] for name in ("candidates_K", "scores_K", "differences_K", "draws_K")}
        search = 7 + i % 3
        spent = {"nfe": search + int(lists["draws_K"].sum()), "search_nfe": search, "dropped_draws": i % 2}
        yield replace(row, **lists, **spent)


def made_up_outline(classes: int, draws: int = 20, **settings) -> Outline:
    """Of made-up decisions."""
    names = tuple(f"kind {c} <&>" for c in range(classes))
    timesteps = tuple(np.random.default_rng(0).permutation(draws).tolist())
    return Outline(tuple(range(classes)), names, timesteps, **settings)


def made_up_run(
    folder: Path, rows, classes: int, draws: int = 20, proposes: bool = False, coverage: float | None = None, **identity
) -> Path:
    outline = made_up_outline(classes, draws, proposes=proposes, coverage=coverage)
    info = outline.to_info() | {
        "candidate_names": list(outline.class_names),
        "log_snr_S": list(range(draws)),
        "command": "evaluate.py --ckpt 'a b.ckpt'",
    }
    settings = Settings({"draws": draws, **identity}, info)
    write_whole(to_table(list(rows)), settings, claim(folder, settings))
    return folder
