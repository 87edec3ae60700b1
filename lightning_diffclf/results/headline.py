"""What a run amounts to, in words: a sentence, six numbers, and all numbers with what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from lightning_diffclf.errors import UserError
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.settings import SETTINGS, Settings
from lightning_diffclf.results.shown import SHARES
from lightning_diffclf.results.statistics import Interval

RECALL = (
    "the right class is among the candidates kept. Whether the class that all draws of all candidates decide for is, a "
    "run with a proposal cannot know: diffclf compare with one without"
)
MANY_CLASSES = 100  # from here on, the best five answers say more than a mean over classes


class Line(NamedTuple):
    """A number to show."""

    name: str
    value: str
    note: str


def percent(share: float, digits: int = 1) -> str:
    """``share``, 0 … 1, in words.

    Example:
        >>> percent(0.9722)
        '97.2 %'
    """
    return f"{100 * share:.{digits}f} %"


def between(interval: Interval, digits: int = 1) -> str:
    """The ends of an interval of shares, in words."""
    return f"{100 * interval.low:.{digits}f} to {percent(interval.high, digits)}"


def duration(seconds: float) -> str:
    """Seconds in words, to two units.

    Example:
        >>> duration(9.04), duration(425.3), duration(90_000)
        ('9.0 s', '7 min 5 s', '1 d 1 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole, parts = round(seconds), []
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, whole = divmod(whole, length)
        parts.append(f"{count} {unit}")
    first = next(i for i, part in enumerate(parts) if not part.startswith("0 "))
    return " ".join(part for part in parts[first : first + 2] if not part.startswith("0 "))


def times(factor: float) -> str:
    """A factor in words.

    Example:
        >>> times(37.04), times(3.6)
        ('37 ×', '3.6 ×')
    """
    return f"{factor:,.0f} ×" if factor >= 10 else f"{factor:.1f} ×"


# --- a sentence ------------------------------------------------------------------------------------------------------


def sentence(run: Evaluation) -> str:
    """Which model decided what by which rule, how well, at what cost, and when."""
    summary, numbers, fewer = run.summary, run.numbers, _saves(run)
    model, data, rule = names(run.settings.identity)
    what = count(summary.images, "image") + (f" of {data}" if data else "")
    by = (f"{rule} and " if fewer and rule else "") + ("at most " if fewer else "all of ")
    by += count(len(run.outline.timesteps_S), "draw")
    cost = f"{_calls(numbers)} network calls per image"
    if fewer:
        all_calls = summary.exhaustive_nfe / summary.images
        cost += f", {times(numbers['speedup'])} fewer than the {all_calls:,.0f} of all draws of all candidates"
    found = f"{cost}, on {date_of(run.path, run.settings)}."
    if run.accuracy is not None:
        found = f"{percent(run.accuracy.value)} right (95 % interval {between(run.accuracy)}), with {found}"
    return f"{model or 'A model'} classified {what} by {by} per candidate: {found}"


def date_of(run: Path, settings: Settings) -> str:
    """The day of a run, in words; of runs of earlier versions, that on which the settings were written.

    Raises:
        UserError: if the settings have something else in its place.
    """
    said = settings.info.get("date")
    try:
        day = date.fromtimestamp((run / SETTINGS).stat().st_mtime) if said is None else date.fromisoformat(said)
    except (TypeError, ValueError) as error:
        raise UserError(f"run: {SETTINGS} has date {said!r}, expected one such as '2026-11-28'") from error
    return f"{day.day} {day:%B %Y}"


def names(identity: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """Of model, data and rule, as short as people say them; None where a run's identity does not tell."""
    module, data, recipe = (_mapping(identity.get(name)) for name in ("module", "data", "recipe"))
    model = module.get("pretrained")
    named = data.get("name") if data.get("name") not in ("folder", "webdataset") else data.get("root")
    rule = _class(_mapping(recipe.get("elimination")))
    return (
        _last(model) or _class(module),
        _last(named) or (_class(data) or "").removesuffix("DataModule") or None,
        rule,
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _last(value: Any) -> str | None:
    """Of a path or a repository, the name."""
    return value.rstrip("/").rsplit("/", 1)[-1] or None if isinstance(value, str) else None


def _class(value: Mapping[str, Any]) -> str | None:
    name = value.get("class")
    return name.rsplit(".", 1)[-1] if isinstance(name, str) else None


def count(number: int, what: str) -> str:
    """So many of something, in words.

    Example:
        >>> count(1, "image"), count(1200, "image")
        ('1 image', '1,200 images')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _calls(numbers: Mapping[str, float]) -> str:
    calls = numbers["nfe_per_image"]
    return f"{calls:,.1f}".removesuffix(".0") if calls < 1000 else f"{calls:,.0f}"


def _saves(run: Evaluation) -> bool:
    return run.summary.numbers()["speedup"] > 1


# --- six numbers -----------------------------------------------------------------------------------------------------


def cards(run: Evaluation) -> list[Line]:
    """The six numbers that matter most of this run."""
    summary, numbers = run.summary, run.numbers
    draws, per_image = len(run.outline.timesteps_S), summary.exhaustive_nfe / summary.images
    calls = Line("calls per image", _calls(numbers), f"network calls, of {per_image:,.0f} at most")
    images = Line("images", f"{summary.images:,}", f"{summary.labelled:,} of them with a label")
    speed = Line("time", duration(numbers["seconds"]), f"{numbers['images_per_second']:,.1f} images per second")
    saving = []
    if _saves(run):
        saved = numbers["seconds"] * (numbers["speedup"] - 1)
        note = f"than all draws of all candidates; some {duration(saved)} saved"
        saving = [Line("fewer calls", times(numbers["speedup"]), note)]
    if run.accuracy is None:
        total = Line("network calls", f"{int(summary.sums['nfe']):,}", "of all images")
        most = Line("draws per candidate", f"{draws:,}", "at most")
        known = Line("classes", f"{run.outline.num_classes:,}", "to decide between")
        return [images, calls, *(saving or [known]), total, most, speed]
    accuracy = Line("accuracy", percent(run.accuracy.value), f"{between(run.accuracy)} (95 % interval)")
    return [accuracy, _beside_accuracy(run), calls, *(saving or [images]), _certainty(run), speed]


def _beside_accuracy(run: Evaluation) -> Line:
    """What else says how good the answers are, by what the run was asked for."""
    numbers, outline = run.summary.numbers(), run.outline
    if outline.abstains:
        note = f"with the margin asked for; {percent(numbers['answered_accuracy'])} of these answers are right"
        return Line("answered", percent(numbers["coverage"]), note)
    if outline.proposes:
        return Line("right class proposed", percent(numbers["proposal_recall"]), "it is among the candidates kept")
    if outline.num_classes >= MANY_CLASSES:
        return Line("top 5", percent(numbers["top5"]), "the right class is among the best five")
    return Line("mean per class", percent(numbers["mean_per_class"]), "each class counts equally")


def _certainty(run: Evaluation) -> Line:
    scores = run.probabilities.get("calibrated")
    if scores is None:
        return Line("images with a label", f"{run.summary.labelled:,}", "too few to say how sure answers may be")
    note = "between sureness and accuracy (ECE), with a fitted temperature"
    return Line("calibration error", percent(scores.numbers()["ece"]), note)


# --- all numbers -----------------------------------------------------------------------------------------------------


def details(run: Evaluation) -> list[Line]:
    """All numbers of the run."""
    summary, numbers = run.summary, run.numbers
    lines = []
    if run.accuracy is not None:
        source = f"of {numbers['groups']:,} groups of images" if "groups" in numbers else "Wilson"
        interval = f"95 % interval {between(run.accuracy, 2)} ({source})"
        lines.append(Line("accuracy", percent(numbers["accuracy"], 2), interval))
        occurring = int((summary.sums["confusion_CA"].sum(1) > 0).sum())
        note = f"over the {occurring} classes that occur"
        lines.append(Line(SHARES["mean_per_class"], percent(numbers["mean_per_class"], 2), note))
        for name, note in (
            ("top5", "the right class is among the best five"),
            ("proposal_recall", RECALL),
            ("coverage", "images with an answer of the margin asked for"),
            ("answered_accuracy", "among the images with such an answer"),
        ):
            if name in numbers:
                lines.append(Line(SHARES[name], percent(numbers[name], 2), note))
        if summary.unanswered:
            lines.append(Line("no answer", f"{summary.unanswered:,}", "images; they count as wrong"))
        for name, scores in reversed(run.probabilities.items()):
            found = scores.numbers()
            note = f"NLL {found['nll']:.4f} nats, Brier score {found['brier']:.4f}"
            lines.append(Line(f"ECE, {name}", f"{found['ece']:.4f}", note))
        lines += _trust(run)
    lines.append(Line("images", f"{summary.images:,}", f"{summary.labelled:,} with a label"))
    lines.append(Line("NFE / image", f"{numbers['nfe_per_image']:,.1f}", "network calls"))
    per_image = summary.exhaustive_nfe / summary.images
    note = f"of the {per_image:,.1f} NFE / image of all draws of all candidates"
    lines.append(Line("speed-up", f"{numbers['speedup']:,.2f} ×", note))
    if run.outline.proposes:
        lines += _search(numbers)
    rate = f"{numbers['images_per_second']:,.2f} images / s"
    lines.append(Line("time", f"{numbers['seconds']:,.1f} s", rate))
    return lines


def _trust(run: Evaluation) -> list[Line]:
    """What margins and conformal sets are worth."""
    selective, sets = run.sureness.selective(), run.sets
    lines = [
        Line("AURC", f"{selective['aurc']:.4f}", f"by margin; AUGRC {selective['augrc']:.4f}"),
        Line(
            SHARES["coverage_at_5_risk"],
            percent(selective["coverage_at_5_risk"], 2),
            "surest answers, at most 5 % of them wrong",
        ),
        Line(
            SHARES["risk_at_80_coverage"], percent(selective["risk_at_80_coverage"], 2), "wrong among the surest 80 %"
        ),
    ]
    if sets:
        interval = between(Interval(*(sets[f"set_coverage{end}"] for end in ("", "_low", "_high"))), 2)
        note = (
            f"contain the right class, 95 % interval {interval}; asked for {percent(run.outline.coverage or 0)}, "
            f"worst class {percent(sets['set_coverage_worst_class'])}"
        )
        sizes = f"classes; {percent(sets['sets_of_one'])} have one, {percent(sets['empty_sets'])} none"
        lines.append(Line("conformal sets", percent(sets["set_coverage"], 2), note))
        lines.append(Line("size of a set", f"{sets['set_size']:.2f}", sizes))
    return lines


def _search(numbers: dict[str, float]) -> list[Line]:
    """What a search or another proposal cost, and left to decide between."""
    lines = [Line("candidates kept", f"{numbers['kept_per_image']:,.1f}", "of an image, by the proposal")]
    if "search_nfe_per_image" not in numbers:
        return [*lines, Line("NFE of the search", "unknown", "decided by an earlier version, which did not store it")]
    search, contest = numbers["search_nfe_per_image"], numbers["contest_nfe_per_image"]
    lines += [
        Line(f"NFE of the {name}", f"{value:,.1f}", f"of an image, {percent(value / (search + contest))} of all")
        for name, value in (("search", search), ("contest", contest))
    ]
    if numbers["dropped_draws"]:
        note = "draws of the search, whose gradient was NaN or infinite"
        lines.append(Line("dropped", f"{numbers['dropped_draws']:,}", note))
    return lines
