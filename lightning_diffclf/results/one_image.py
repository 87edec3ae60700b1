"""What a report shows of a single image: its picture, in words how it was decided, and how its candidates fell."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.headline import percent
from lightning_diffclf.results.predictions import Record
from lightning_diffclf.results.summary import NO_ANSWER

RED, BLUE = (214, 40, 40), (30, 110, 220)


def page(run: Evaluation, row: Record) -> dict[str, Any]:
    """What the gallery shows, and as ``story`` what opens.

    How sure a decision is, is its probability by the fitted temperature; where there were too few labels to fit one,
    a probability would mean little, and the share of the draws that alone would decide likewise takes its place.
    """
    kind = "" if row.label is None else "right" if row.label == row.prediction else "wrong"
    candidates = run.story(row)
    if row.prediction is None:
        sure, how_sure = 0.0, "no answer"
    elif "calibrated" in run.probabilities:
        sure = float(candidates[0]["probability"])
        how_sure = f"{percent(sure, 0)} sure" if sure < 0.995 else "over 99 % sure"
    else:
        sure, how_sure = row.votes, f"{percent(row.votes, 0)} of draws agree"
    return {
        "id": row.id,
        "label": None if row.label is None else run.outline.name(row.label),
        "prediction": NO_ANSWER if row.prediction is None else run.outline.name(row.prediction),
        "kind": kind,
        "sure": sure,
        "how_sure": how_sure,
        "nfe": row.nfe,
        "search_nfe": row.search_nfe or 0,
        "picture": None if row.thumbnail is None else data_uri("webp", row.thumbnail),
        "story": {
            "candidates": candidates,
            "draws": int(row.draws_K.max()),
            "votes": percent(row.votes, 0),
            "lines": lines(run, row),
            "map": None if row.error_map is None else data_uri("png", error_map_picture(row.error_map)),
        },
    }


def lines(run: Evaluation, row: Record) -> list[dict[str, Any]] | None:
    """How the best classes of an image fell: name, role, draws and evidence in nats by then; None if not stored.

    Evidence is that for the class decided for (see :attr:`~.Record.margin`), with a minus: classes fall below zero, and
    are above while they were ahead.
    """
    if row.trail is None or row.prediction is None:
        return None
    winner_K = np.asarray(run.outline.classes)[row.candidates_K] == row.prediction
    scale = -row.dims / (2 * float(row.scores_K[winner_K].min()) + 1e-300)
    found = []
    for c, behind in zip(row.trail["classes"], row.trail["behind"], strict=True):
        draws = np.array([0, *row.trail["draws"][: len(behind)]])  # all begin alike
        role = "chosen" if c == row.prediction else "right" if c == row.label else "other"
        evidence = [float(f"{one:.4g}") for one in scale * draws * np.array([0.0, *behind])]
        found.append({"name": run.outline.name(c), "role": role, "draws": draws.tolist(), "evidence": evidence})
    return found


def error_map_picture(difference: np.ndarray) -> bytes:
    """An error map (h, w) as PNG to lie over its image: red where the chosen class fits better, blue where worse.

    Where both fit alike, the image shines through.
    """
    strength = difference / max(float(np.abs(difference).max()), 1e-12)
    pixels = np.empty((*difference.shape, 4), dtype=np.uint8)
    pixels[..., :3] = np.where(strength[..., None] > 0, RED, BLUE)
    pixels[..., 3] = (np.abs(strength) * 230).round()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_uri(kind: str, content: bytes) -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
