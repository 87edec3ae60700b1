"""The report of attacks and certificates, read as data and in a real browser where there is one."""

import re

import numpy as np
import pytest

from lightning_diffclf.commands import main
from lightning_diffclf.errors import UserError
from lightning_diffclf.files import read_json
from lightning_diffclf.results.attacks import AttackedImage
from lightning_diffclf.results.certificates import CertifiedImage
from lightning_diffclf.results.report import write_report
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.statistics import wilson
from lightning_diffclf.results.store import Store, claim, finish
from lightning_diffclf.results.trial_report import page_of
from lightning_diffclf.results.trials import write_metrics
from tests.chromium import chromium
from tests.results.test_report import CONTRASTS, opened, shown_as

NAMES = ["cat <&>", "dog", "horse"]


def stored(folder, settings, rows):
    store = Store(claim(folder, settings), settings)
    for row in rows:
        store.add(row)
    store.flush()
    finish(folder, settings)
    write_metrics(folder, settings)
    return folder, settings


@pytest.fixture(scope="module")
def attack(tmp_path_factory):
    """Sixty images under two seeds: random answers, but those without attack mostly right."""
    about = {"title": "APGD, linf, eps 0.1", "calls": 6}
    identity = {"kind": "attack", "attack": {"eps": 0.1}, "module": {"class": "x.DiT"}, "data": {"name": "pets"}}
    settings = Settings(identity, {"summary": about, "class_names": NAMES, "date": "2026-11-29", "command": "attack!"})
    random, rows = np.random.default_rng(0), []
    for number in range(60):
        label = number % 3
        clean = np.where(random.random(2) < 0.9, label, (label + 1) % 3)
        found = np.where(random.random(2) < 0.5, clean, (label + 2) % 3)
        margins = 100 * random.random(), 100 * (random.random() - 0.5)
        rows.append(AttackedImage(f"{number}", label, clean, found, *margins, 0.05, 20.0, 0.5, 0))
    return *stored(tmp_path_factory.mktemp("attack") / "run", settings, rows), rows


CERTIFIED = [(0, 0.3), (0, 0.1), (1, 0.3), (2, 0.2), (None, 0.0), (1, 0.9)]  # of labels 0, 0, 1, 2, 2, 0


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    about = {"title": "certified by smoothing", "radii": [0.0, 0.15, 0.5]}
    settings = Settings({"kind": "certification"}, {"summary": about, "class_names": NAMES, "date": "2026-11-29"})
    rows = [
        CertifiedImage(f"{number}", label, answer, radius, 90, 1.0, 0)
        for number, (label, (answer, radius)) in enumerate(zip((0, 0, 1, 2, 2, 0), CERTIFIED, strict=True))
    ]
    return stored(tmp_path_factory.mktemp("certificates") / "run", settings, rows)


def data_of(chart):
    return max(chart.to_dict()["datasets"].values(), key=len)


def test_an_attack_is_shown_with_and_without_and_by_class(attack):
    folder, settings, rows = attack
    page, numbers = page_of(folder, settings), read_json(folder / "metrics.json")["metrics"]
    right = [all(row.clean_S == row.label) for row in rows]
    robust = [one and all(row.attacked_S == row.label) for one, row in zip(right, rows, strict=True)]
    cards = {line.name: line.value for line in page.cards}
    counted = {
        "without attack": ("right without", "accuracy", sum(right)),
        "under attack": ("right under attack", "robust_accuracy", sum(robust)),
    }
    for name, (card, key, count) in counted.items():
        share = wilson(count, 60)
        assert (numbers[key], numbers[f"{key}_low"], numbers[f"{key}_high"]) == share
        assert cards[card] == f"{100 * share.value:.1f} %"
        [line] = [line for line in page.numbers if line.name == name]
        assert line.note == f"95 % interval {100 * share.low:.2f} to {100 * share.high:.2f} % (Wilson)"
    assert cards["fooled"] == str(sum(right) - sum(robust))
    assert cards["queries per image"] == "20.0"
    assert page.sentence.endswith("without: DiT, 60 images of pets, APGD, linf, eps 0.1, on 29 November 2026.")
    bars = {row["what"]: row for row in data_of(page.charts["shares"])}
    for seed in range(2):  # each seed judges for itself
        alone = sum(row.clean_S[seed] == row.attacked_S[seed] == row.label for row in rows)
        assert tuple(bars[f"under attack, seed {seed} alone"].values())[1:] == wilson(alone, 60)
    points = [one["what"] for one in data_of(page.charts["margins"])]
    assert [points.count(what) for what in ("withstands", "fooled", "wrong anyway")] == [
        sum(robust),
        sum(right) - sum(robust),
        60 - sum(right),
    ]
    assert [row[0].text for row in page.classes] == NAMES
    for label, (_, images, clean, under, *_, mistake) in enumerate(page.classes):
        of_class = [number for number in range(60) if number % 3 == label]
        assert (images.value, clean.value) == (20, np.mean([right[number] for number in of_class]))
        assert under.value == np.mean([robust[number] for number in of_class])
        answers = [answer for number in of_class for answer in rows[number].attacked_S if answer != label]
        commonest = max(set(answers), key=answers.count)
        assert mistake.text == f"{NAMES[commonest]} ({answers.count(commonest)})"


def test_certified_accuracy_falls_at_each_radius_of_a_right_answer(certificates):
    folder, settings = certificates
    page = page_of(folder, settings)
    curve = [(row["radius"], row["accuracy"], row["low"], row["high"]) for row in data_of(page.charts["certified"])]
    expected = [(0.0, 4), (0.1, 4), (0.2, 3), (0.3, 2), (1.02 * 0.3, 0)]  # the wrong one with 0.9 never counts
    assert curve == [(radius, *wilson(count, 6)) for radius, count in expected]
    cards = {line.name: line.value for line in page.cards}
    assert [cards[name] for name in ("right", "certified at 0.15", "answered")] == ["66.7 %", "50.0 %", "83.3 %"]
    assert cards["median radius"] == "0.15"  # of 0.3, 0.1, 0.3, 0.2, 0 and 0
    certain = [line.value for line in page.numbers if line.name.startswith("right and certified at")]
    assert certain == ["66.67 %", "50.00 %", "0.00 %"]
    assert [(row[0].text, row[1].value, row[5].value, row[6].text) for row in page.classes] == [
        (NAMES[0], 3, 0.1, "dog (1)"),
        (NAMES[1], 1, 0.3, ""),
        (NAMES[2], 2, 0.1, ""),
    ]


def test_mistakes(attack, tmp_path):
    folder, settings, rows = attack
    for command in (["compare", str(folder), str(folder)], ["leaderboard", str(folder), "--out", str(tmp_path)]):
        with pytest.raises(SystemExit, match=r"of the kind 'attack', expected an evaluation; .* by `diffclf report`$"):
            main(command)
    claim(tmp_path / "empty", settings)
    with pytest.raises(UserError, match=r"^run: no image in '.*empty' yet$"):
        write_report(tmp_path / "empty")
    few = Settings(settings.identity, settings.info | {"class_names": NAMES[:1]})
    with pytest.raises(UserError, match=r"names \['cat <&>'\], expected a class for each label"):
        page_of(*stored(tmp_path / "few", few, rows[:3]))
    page_of(*stored(tmp_path / "one", settings, rows[:1]))


@pytest.fixture(scope="module")
def browser():
    with chromium("--window-size=1250,1600", "--proxy-server=http://127.0.0.1:9") as found:
        yield found


@pytest.mark.parametrize("kind", ["attack", "certificates"])
def test_the_page_works_in_a_browser(browser, kind, request, capsys):
    from selenium.webdriver.common.by import By

    folder = request.getfixturevalue(kind)[0]
    main(["report", str(folder)])
    report = folder / "report.html"
    assert capsys.readouterr().out == f"report: {report}\n"
    figures = {"shares", "margins"} if kind == "attack" else {"certified"}
    assert {path.stem for path in (folder / "figures").iterdir()} == figures
    page = re.sub(r"<script.*?</script>", "", report.read_text(), flags=re.DOTALL)
    assert "cat &lt;&amp;&gt;" in page
    assert "<&>" not in page
    for scheme in ("light", "dark"):
        with shown_as(browser, 390, scheme):
            opened(browser, report)
            browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
            found = browser.execute_script(CONTRASTS)
            assert len(found) > 50
            assert min(found)[0] >= 4.5, min(found)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    opened(browser, report)
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('.chart canvas')].map(c => c.width * c.height)"
    )
    assert len(sizes) == len(figures)
    assert min(sizes) > 10_000
    browser.find_elements(By.CSS_SELECTOR, "#class-table th button")[2].click()
    shares = browser.execute_script(
        "return [...document.querySelectorAll('#class-table tbody tr')].map(row => row.cells[2].dataset.value)"
    )
    assert shares == sorted(shares, key=float)
    assert browser.get_log("browser") == []
