"""The report, read and used in a real browser where there is one."""

import csv
import dataclasses
import re
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lightning_diffclf.cli import main
from lightning_diffclf.results import tables
from lightning_diffclf.results.curves import Costs
from lightning_diffclf.results.evaluation import Evaluation
from lightning_diffclf.results.report import chart_library, make_figures, write_report
from lightning_diffclf.results.settings import Settings
from lightning_diffclf.results.store import claim
from tests.chromium import chromium
from tests.results.made_up import made_up_outline, made_up_rows, made_up_run


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


def test_the_library_of_the_charts_is_bundled_once(monkeypatch, tmp_path):
    made = []
    monkeypatch.setattr("vl_convert.javascript_bundle", lambda: made.append(None) or "let π = 3\r\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert [chart_library() for _ in range(3)] == ["let π = 3\r\n"] * 3
    assert len(made) == 1
    (kept,) = (tmp_path / "cache" / "lightning_diffclf").iterdir()
    kept.write_bytes(b"\xff")  # damaged
    assert [chart_library() for _ in range(2)] == ["let π = 3\r\n"] * 2
    assert len(made) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # where nothing can be kept
    assert chart_library() == "let π = 3\r\n"
    assert len(made) == 3


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
    assert f"{100 * right / 300:.2f} %" in report.read_text()
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


def test_charts_that_say_nothing_are_left_out(tmp_path):
    """Without elimination, all candidates stay in play; with few draws, images or no mistake, curves are a point."""
    rows = [dataclasses.replace(row, draws_K=np.full(5, 20, np.int32), nfe=100) for row in made_up_rows(80, 5)]
    everything = make_figures(Evaluation.read(made_up_run(tmp_path / "all", rows, 5)))
    assert {"confusion", "timesteps", "reliability", "coverage", "cost"} == everything.keys()
    right = [dataclasses.replace(row, label=row.prediction) for row in made_up_rows(80, 5)]
    assert "coverage" not in make_figures(Evaluation.read(made_up_run(tmp_path / "right", right, 5)))
    unknown = list(made_up_rows(80, 5, labelled=False))
    assert make_figures(Evaluation.read(made_up_run(tmp_path / "unknown", unknown, 5))).keys() == {"survivors"}


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
    # The proxy leads nowhere: a report that asks the network fails.
    with chromium("--window-size=1200,1600", "--proxy-server=http://127.0.0.1:9") as found:
        yield found


def opened(browser, report: Path, state: str = ""):
    browser.get("about:blank")  # another fragment alone would not load it again
    browser.get(report.as_uri() + state)
    waited(browser, lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    return browser


def waited(browser, done):
    deadline = time.monotonic() + 60
    while not (found := done()):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)
    return found


@contextmanager
def shown_as(browser, width: int, scheme: str):
    metrics = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    try:
        yield
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


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


def test_the_table_is_saved_as_csv(browser, report, tmp_path):
    from selenium.webdriver.common.by import By

    download = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", download)
    opened(browser, report)
    browser.find_elements(By.CSS_SELECTOR, "#class-table th button")[1].click()  # in the order shown
    table = browser.execute_script("""return [...document.querySelectorAll("#class-table tr")]
        .map(row => [...row.cells].map(cell => cell.textContent.trim()))""")
    browser.find_element(By.ID, "class-csv").click()
    waited(browser, lambda: (tmp_path / "classes.csv").is_file())
    with open(tmp_path / "classes.csv", newline="") as file:
        saved = list(csv.reader(file))
    assert saved[0] == table[0]
    assert len(saved) == len(table) == 9
    for cells, shown in zip(saved[1:], table[1:], strict=True):
        assert [cells[0], cells[1], cells[6]] == [shown[0], shown[1], shown[6]]
        assert [f"{100 * float(cell):.1f} %" for cell in cells[2:5]] == shown[2:5]
        assert f"{float(cells[5]):.1f}" == shown[5]
    browser.find_element(By.CSS_SELECTOR, '[data-figure="cost"][data-kind="png"]').click()
    browser.find_element(By.CSS_SELECTOR, '[data-figure="confusion"][data-kind="svg"]').click()
    waited(browser, lambda: {"cost.png", "confusion.svg"} <= {path.name for path in tmp_path.iterdir()})
    with Image.open(tmp_path / "cost.png") as picture:
        assert picture.width > 800
    assert "Confusion matrix" in (tmp_path / "confusion.svg").read_text()
    assert browser.get_log("browser") == []


def gallery(browser) -> list[dict[str, str]]:
    """What the cards that are shown say."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#gallery li:not([hidden])')].map(card => ({...card.dataset}))"
    )


def test_the_gallery_has_pages_and_filters_that_are_in_the_address(browser, report):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select

    opened(browser, report)
    first = gallery(browser)
    assert len(first) == 24
    assert {card["kind"] for card in first} == {"wrong"}
    sure = [float(card["sure"]) for card in first]
    assert sure == sorted(sure, reverse=True)  # wrong and sure comes first
    assert browser.find_element(By.ID, "page-number").text == "page 1 of 10"
    browser.find_element(By.ID, "page-on").click()
    second = gallery(browser)
    assert not {card["id"] for card in first} & {card["id"] for card in second}
    assert browser.current_url.endswith("#images?page=2")
    Select(browser.find_element(By.ID, "image-kind")).select_by_value("right")
    Select(browser.find_element(By.ID, "image-class")).select_by_value("kind 2 <&>")
    Select(browser.find_element(By.ID, "image-order")).select_by_value("calls")
    few = gallery(browser)
    assert {card["kind"] for card in few} == {"right"}
    assert {card["prediction"] for card in few} == {"kind 2 <&>"}
    calls = [int(card["nfe"]) for card in few]
    assert calls == sorted(calls, reverse=True)
    rows = [row for row in Evaluation.read(report.parent).gallery(240) if row.prediction == row.label == 2]
    assert browser.find_element(By.ID, "image-count").text == f"{len(rows)} images"
    assert len(few) == min(len(rows), 24)
    assert calls[0] == max(row.nfe for row in rows)
    state = browser.current_url.partition("#")[2]
    assert state == "images?class=kind+2+%3C%26%3E&show=right&first=calls"
    opened(browser, report, f"#{state}")
    assert gallery(browser) == few
    opened(browser, report, "#images?class=nobody&page=99")  # of another run
    assert len(gallery(browser)) == 24
    assert browser.find_element(By.ID, "page-number").text == "page 10 of 10"
    assert browser.get_log("browser") == []


def test_an_image_tells_its_story_and_arrows_turn_pages(browser, report):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    opened(browser, report)
    cards = browser.find_elements(By.CSS_SELECTOR, "#gallery li:not([hidden]) button")
    words = cards[0].text
    first = gallery(browser)
    assert f"image {first[0]['id']}" in words
    assert re.search(r"\d+ % sure", words)
    assert "nats" not in words
    cards[0].send_keys(Keys.ENTER)
    dialog = browser.find_element(By.ID, "detail")
    assert dialog.get_attribute("open") is not None
    assert browser.find_element(By.ID, "detail-title").text == (
        f"Taken for {first[0]['prediction']}, but is {first[0]['label']}"
    )
    facts = browser.find_element(By.ID, "detail-facts").text
    assert f"image {first[0]['id']} · " in facts
    assert f" · {first[0]['nfe']} network calls · " in facts
    candidates = browser.execute_script("""return [...document.querySelectorAll("#detail-candidates li")]
        .map(row => [...row.querySelectorAll("span")].map(one => one.textContent))""")
    assert len(candidates) == 8
    assert candidates[0][0] == first[0]["prediction"]
    assert candidates[0][3] == "saw all 20 draws"
    assert all(re.fullmatch(r"dropped after \d+ draws?", until) for *_, until in candidates[1:])
    waited(browser, lambda: dialog.find_elements(By.CSS_SELECTOR, "#detail-lines canvas"))
    assert browser.current_url.endswith(f"#images?image={first[0]['id']}")
    titles = [browser.find_element(By.ID, "detail-title").text]
    for _ in range(24):  # to the next page of the gallery
        browser.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    assert browser.find_element(By.ID, "detail-place").text == "25 of 240"
    assert browser.find_element(By.ID, "page-number").text == "page 2 of 10"
    for _ in range(30):  # and back, to the first at most
        browser.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert browser.find_element(By.ID, "detail-place").text == "1 of 240"
    assert [browser.find_element(By.ID, "detail-title").text] == titles
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert dialog.get_attribute("open") is None
    assert browser.execute_script("return document.activeElement.closest('li').dataset.id") == first[0]["id"]
    opened(browser, report, f"#images?image={first[3]['id']}")
    assert browser.find_element(By.ID, "detail").get_attribute("open") is not None
    assert browser.find_element(By.ID, "detail-place").text == "4 of 240"
    assert browser.get_log("browser") == []


def test_the_error_map_lies_over_its_image(browser, report):
    from selenium.webdriver.common.by import By

    with_map = next(row for row in Evaluation.read(report.parent).gallery(240) if row.error_map is not None)
    opened(browser, report, f"#images?image={with_map.id}")
    under, over = (browser.find_element(By.ID, f"detail-{name}") for name in ("under", "map"))
    waited(browser, lambda: browser.execute_script("return arguments[0].naturalWidth", over) == 4)
    assert (
        under.rect
        == over.rect
        == browser.find_element(By.ID, "detail-map-box").find_element(By.CLASS_NAME, "stack").rect | {}
    )
    assert under.rect["width"] == browser.find_element(By.ID, "detail-picture").rect["width"] > 150


CONTRASTS = """
const parse = color => color.match(/[\\d.]+/g).map(Number);
const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const light = color => color.slice(0, 3).map(v => linear(v / 255))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
function behind(element) {
  for (; element; element = element.parentElement) {
    const color = parse(getComputedStyle(element).backgroundColor);
    if (color.length < 4 || color[3] === 1) return color;
  }
  return [255, 255, 255];
}
const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, text = walker.currentNode.textContent.trim();
  if (!text || !element.checkVisibility() || element.closest("script, .skip")) continue;
  const [a, b] = [light(parse(getComputedStyle(element).color)), light(behind(element))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), text]);
}
return found;
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_fits_a_phone(browser, report, scheme):
    with shown_as(browser, 390, scheme):
        first = Evaluation.read(report.parent).gallery(1)[0].id
        for state in ("", f"#images?image={first}"):
            opened(browser, report, state)
            browser.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
            found = browser.execute_script(CONTRASTS)
            assert len(found) > 100
            assert min(found)[0] >= 4.5, min(found)
            assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        clipped = """const texts = "h1, h2, h3, .lead, .cards div, .chart p, .facts, nav, dialog, .detail";
            return [...document.querySelectorAll(texts)]
                .filter(one => one.scrollWidth > one.clientWidth + 1).map(one => one.textContent)"""
        assert browser.execute_script(clipped) == []
        wide = """return [...document.querySelectorAll(".chart canvas, #detail-lines canvas")]
            .filter(one => one.getBoundingClientRect().width > one.closest(".plot").clientWidth + 1).length"""
        assert browser.execute_script(wide) == 0
        assert browser.get_log("browser") == []


def test_six_numbers_fill_their_row(browser, report):
    for width, rows in ((1400, 1), (900, 2), (390, 3)):
        with shown_as(browser, width, "light"):
            opened(browser, report)
            boxes = browser.execute_script(
                "return [...document.querySelectorAll('.cards > div')].map(one => one.getBoundingClientRect().toJSON())"
            )
            whole = browser.execute_script("return document.querySelector('.cards').getBoundingClientRect().right")
            assert len(boxes) == 6
            tops = sorted({round(box["top"]) for box in boxes})
            assert len(tops) == rows
            for top in tops:
                assert max(box["right"] for box in boxes if round(box["top"]) == top) == pytest.approx(whole, abs=1)
