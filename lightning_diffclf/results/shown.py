"""Numbers of an evaluation as text for the terminal: shares in per cent, in the words of docs/results.md."""

from __future__ import annotations

from collections.abc import Mapping

SHARES = {
    "mean_per_class": "mean per class",
    "top5": "top 5",
    "proposal_recall": "proposal recall",
    "coverage": "coverage",
    "answered_accuracy": "accuracy of these",
    "coverage_at_5_risk": "coverage at 5 % risk",
    "risk_at_80_coverage": "risk at 80 % coverage",
}

WITH_OTHERS = {
    "accuracy_low",
    "accuracy_high",
    "temperature",
    "images_per_second",
    "speedup",
    "set_size",
}  # in a line of theirs

DETAILS = {  # of metrics.json and the report
    *("nll", "brier", "ece", "calibrated_nll", "calibrated_brier", "aurc", "augrc"),
    *("set_coverage_low", "set_coverage_high", "set_coverage_worst_class", "sets_of_one", "empty_sets"),
    *("set_thresholds", "set_images", "design_effect"),
}


def shown(numbers: Mapping[str, float]) -> dict[str, str]:
    """The headline numbers, by their title.

    Args:
        numbers: Those of :meth:`~lightning_diffclf.results.summary.Summary.numbers`, of a
            :class:`~lightning_diffclf.results.calibration.Calibration`, and of a data set's own; details are left out.

    Example:
        >>> shown({"accuracy": 0.9833, "accuracy_low": 0.9641, "accuracy_high": 0.9923, "ece": 0.13, "images": 360})
        {'accuracy': '98.33%, 95 % interval 96.41 to 99.23%', 'images': '360'}
        >>> shown({"nfe_per_image": 27.04, "speedup": 37.0, "seconds": 2.44, "images_per_second": 147.3})
        {'network calls': '27.0 an image, 97.3% less than all', 'time': '2.4 s, 147.30 images/s'}
    """
    lines = {}
    for name, value in numbers.items():
        if name == "accuracy":
            interval = f"{100 * numbers['accuracy_low']:.2f} to {numbers['accuracy_high']:.2%}"
            lines["accuracy"] = f"{value:.2%}, 95 % interval {interval}"
        elif name in SHARES:
            lines[SHARES[name]] = f"{value:.2%}"
        elif name == "calibrated_ece":
            lines["calibration error"] = f"{value:.2%}, by a fitted temperature of {numbers['temperature']:.3g}"
        elif name == "set_coverage":
            size = f"{numbers['set_size']:.2f} classes on average"
            lines["conformal sets"] = f"{value:.2%} contain the right class, {size}"
        elif name == "nfe_per_image":
            saved = 1 - 1 / (numbers.get("speedup") or 1)
            lines["network calls"] = f"{value:,.1f} an image" + (f", {saved:.1%} less than all" if saved > 0 else "")
        elif name == "reused_per_image":
            lines["reused errors"] = f"{value:,.1f} an image, of an earlier run"
        elif name == "seconds":
            lines["time"] = f"{value:,.1f} s, {numbers['images_per_second']:,.2f} images/s"
        elif name not in WITH_OTHERS | DETAILS:
            lines[name] = f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return lines
