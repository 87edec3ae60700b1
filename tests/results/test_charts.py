"""Colors of charts and pages that can be read."""

import pytest

from lightning_diffclf.results.charts import DARK, LIGHT, theme


def contrast(a: str, b: str) -> float:
    """Of two colors, by WCAG 2.1."""

    def luminance(color: str) -> float:
        shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_and_grids_are_quiet(colors):
    look = theme(colors)
    texts = [look["title"]["color"], look["title"]["subtitleColor"], look["text"]["color"]]
    texts += [look[where][what] for where in ("axis", "legend") for what in ("labelColor", "titleColor")]
    for background in (colors["page"], colors["card"]):
        for text in (*texts, colors["accent"], colors["right"], colors["wrong"]):
            assert contrast(text, background) >= 4.5
        for line in look["range"]["category"]:
            assert contrast(line, background) >= 3
        assert contrast(look["axis"]["gridColor"], background) < 1.4
