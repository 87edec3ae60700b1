"""The report, read and used in a real browser where there is one."""

import dataclasses
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from lightning_diffclf.cli import main
from lightning_diffclf.results import tables
from lightning_diffclf.results.curves import Costs
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.report import write_report
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import claim
from tests.results.made_up import made_up_outline, made_up_rows, made_up_run

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    run = made_up_run(tmp_path_factory.mktemp("report") / "run", made_up_rows(300, 8), 8)
    main(["report", str(run)])
    return run / "report.html"


def test_nothing_comes_from_elsewhere(report):
    """No element loads anything; addresses only occur in text and in names of schemas."""
    html = report.read_text()
    page = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "@import" not in page
    assert "url(" not in page
    assert len(html) < 10_000_000
    assert "<&>" not in page  # names are escaped
    assert "kind 0 &lt;&amp;&gt;" in page


def test_figures_are_files(report):
    names = {"confusion", "reliability", "coverage", "timesteps", "cost", "survivors"}
    figures = report.parent / "figures"
    # With candidates dropped after one draw there is little to say by timestep.
    found = {path.stem for path in figures.iterdir()}
    assert names - {"timesteps"} <= found <= names
    for name in found:
        assert (figures / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (figures / f"{name}.svg").read_text().startswith("<svg")


def test_numbers_are_those_of_the_rows(report):
    run = Evaluation.read(report.parent)
    rows = list(made_up_rows(300, 8))
    right = sum(row.prediction == row.label for row in rows)
    numbers = run.summary.numbers()
    assert numbers["accuracy"] == right / 300
    assert f"{right / 300:.2%}" in report.read_text()
    classes = tables.classes(run.summary)
    assert classes["images"].sum() == 300
    assert (classes["accuracy"] * classes["images"]).sum() == pytest.approx(right)
    confusion = tables.confusion(run.summary)
    assert confusion["images"].sum() == 300
    assert confusion[confusion["true"] == confusion["predicted"]]["images"].sum() == right
    cost = tables.costs(run.costs)
    assert cost["accuracy"].iloc[-1] == pytest.approx(right / 300)
    assert cost["nfe"].iloc[-1] == pytest.approx(numbers["nfe_per_image"])
    assert cost["nfe"].iloc[0] == 8  # every candidate sees the first draw
    assert numbers["seconds"] == 150 * 0.25


def test_curves_are_those_of_a_plain_loop(report):
    run, rows = Evaluation.read(report.parent), list(made_up_rows(300, 8))
    alive_BS = np.array([[(row.draws_K > s).sum() for s in range(20)] for row in rows])
    alive = tables.survivors(run.survivors)
    assert alive["draw"].tolist() == list(range(1, 21))
    np.testing.assert_allclose(alive["candidates"], alive_BS.mean(0))
    np.testing.assert_allclose(alive[["low", "high"]].T, np.quantile(alive_BS, [0.1, 0.9], axis=0))
    right_BS = np.array([row.leader_S == row.label for row in rows])
    cost = tables.costs(run.costs)
    np.testing.assert_allclose(cost["accuracy"], right_BS.mean(0))
    np.testing.assert_allclose(cost["nfe"], alive_BS.mean(0).cumsum())
    sure = run.sureness
    np.testing.assert_allclose(sure.votes, [row.votes for row in rows])
    np.testing.assert_allclose(sure.margin, [row.margin for row in rows])
    assert sure.right.tolist() == [row.prediction == row.label for row in rows]


def test_answers_stay_after_the_decision():
    """Images that are decided early count at every later draw."""
    outline = made_up_outline(4)
    rows = [
        dataclasses.replace(row, draws_K=np.minimum(row.draws_K, 3 + i), leader_S=row.leader_S[: 3 + i])
        for i, row in enumerate(made_up_rows(12, 4))
    ]
    costs = Costs(outline)
    costs.update(rows)
    for s in range(14):
        right = [row.leader_S[min(s, len(row.leader_S) - 1)] == row.label for row in rows]
        assert costs.accuracy_S[s] == pytest.approx(np.mean(right))
    assert costs.draws == 14


def test_wrong_and_sure_comes_first(report):
    shown = Evaluation.read(report.parent).gallery(40)
    assert len(shown) == 40
    wrong = [row.prediction != row.label for row in shown]
    assert wrong == sorted(wrong, reverse=True)
    margins = [row.margin for row in shown[: sum(wrong)]]
    assert margins == sorted(margins, reverse=True)
    assert margins[0] == max(row.margin for row in made_up_rows(300, 8) if row.prediction != row.label)


@pytest.mark.parametrize(
    ("count", "classes", "labelled"),
    [(1, 2, True), (10, 1000, True), (60, 1, True), (5, 3, False)],
    ids=["one image", "1000 classes", "one class", "no labels"],
)
def test_small_and_strange_runs(count, classes, labelled, tmp_path):
    run = made_up_run(tmp_path / "run", made_up_rows(count, classes, labelled=labelled), classes)
    html = write_report(run).read_text()
    assert html.count("data-number=") == count


def test_no_images_no_pixels_no_folder(tmp_path):
    settings = Settings({"draws": 1}, {})
    claim(tmp_path / "empty", settings)
    with pytest.raises(ValueError, match=r"run: no image in '.*empty' yet"):
        write_report(tmp_path / "empty")
    with pytest.raises(SystemExit, match=r"error: run: no settings.json in '.*nowhere'"):
        main(["report", str(tmp_path / "nowhere")])
    rows = [dataclasses.replace(row, thumbnail=None) for row in made_up_rows(5, 3)]
    run = made_up_run(tmp_path / "latents", rows, 3)
    assert "5 have no picture: what was classified were not pixels" in write_report(run).read_text()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"figure: '.*file/figures/.*' cannot be written"):
        write_report(run, tmp_path / "file" / "r.html")


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver (Debian: chromium, chromium-driver)")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # Root cannot use Chromium's sandbox. The proxy leads nowhere: a report that asks the network fails.
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1600"):
        options.add_argument(flag)
    options.add_argument("--proxy-server=http://127.0.0.1:9")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def opened(browser, report: Path):
    browser.get(report.as_uri())
    deadline = time.monotonic() + 60
    while not browser.execute_script("return document.documentElement.dataset.ready"):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)
    return browser


def test_it_opens_without_network_and_errors(browser, report):
    opened(browser, report)
    assert browser.get_log("browser") == []
    requests = re.findall(r'"url":"(.*?)"', "".join(entry["message"] for entry in browser.get_log("performance")))
    assert {url.split(":")[0] for url in requests} <= {"file", "data", "blob", "about"}
    charts = browser.execute_script(
        "return [...document.querySelectorAll('.chart canvas')].map(c => c.width * c.height)"
    )
    assert len(charts) >= 5
    assert min(charts) > 10_000
    picture = browser.get_screenshot_as_png()
    assert len(picture) > 30_000  # something is drawn


def test_tables_sort_and_filter(browser, report):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, report)

    def column(index):
        script = """return [...document.querySelectorAll("#class-table tbody tr")].filter(r => !r.hidden)
            .map(r => r.cells[arguments[0]].textContent)"""
        return browser.execute_script(script, index)

    names = column(0)
    accuracies = [float(a.rstrip("%")) for a in column(2)]
    assert len(names) == 8
    heading = browser.find_elements(By.CSS_SELECTOR, "#class-table th button")[2]
    heading.send_keys(Keys.ENTER)  # by keyboard
    assert [float(a.rstrip("%")) for a in column(2)] == sorted(accuracies)
    assert heading.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    heading.send_keys(Keys.ENTER)
    assert [float(a.rstrip("%")) for a in column(2)] == sorted(accuracies, reverse=True)
    browser.find_element(By.ID, "class-filter").send_keys("KIND 3")
    assert column(0) == ["kind 3 <&>"]


def test_the_gallery_filters_and_tells_the_story(browser, report):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    opened(browser, report)

    def shown():
        return [card for card in browser.find_elements(By.CSS_SELECTOR, "#gallery li") if card.is_displayed()]

    total = len(shown())
    assert total == 240
    assert "wrong" in shown()[0].get_attribute("data-kind")
    Select(browser.find_element(By.ID, "image-kind")).select_by_value("right")
    assert {card.get_attribute("data-kind") for card in shown()} == {"right"}
    Select(browser.find_element(By.ID, "image-class")).select_by_value("kind 2 <&>")
    assert 0 < len(shown()) < total / 2
    assert {card.get_attribute("data-prediction") for card in shown()} == {"kind 2 <&>"}
    assert browser.find_element(By.ID, "image-count").text == f"{len(shown())} shown"
    Select(browser.find_element(By.ID, "image-kind")).select_by_value("")
    Select(browser.find_element(By.ID, "image-class")).select_by_value("")
    browser.execute_script("document.querySelector('#gallery button').focus()")
    browser.switch_to.active_element.send_keys("\n")
    dialog = browser.find_element(By.ID, "detail")
    assert dialog.get_attribute("open") is not None
    assert "but is" in browser.find_element(By.ID, "detail-title").text
    deadline = time.monotonic() + 20
    while not dialog.find_elements(By.CSS_SELECTOR, "#detail-chart canvas"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert browser.get_log("browser") == []
    browser.find_element(By.CSS_SELECTOR, "#detail form button").click()
    assert dialog.get_attribute("open") is None


def test_it_fits_a_phone(browser, report):
    opened(browser, report)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        time.sleep(0.3)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
