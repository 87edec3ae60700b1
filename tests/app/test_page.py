"""The page in a real browser, where there is one."""

import json
import re
import time

import pytest

from tests.app.conftest import served
from tests.app.test_server import Slow
from tests.chromium import chromium

# Text against what is behind it: the least contrast, by WCAG 2, and where.
CONTRAST = """
const rgb = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() && !e.disabled &&
    (e.value && e.type !== "range" && e.type !== "checkbox" ||
     [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())))
  .map(e => { const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const [a, b] = [light(rgb(svg ? style.fill : style.color)), light(behind(e))].sort((a, b) => b - a);
    return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)]; }).sort((a, b) => a[0] - b[0])
"""


@pytest.fixture(scope="module")
def browser():
    with chromium("--window-size=1400,1300", "--force-prefers-reduced-motion") as found:
        yield found


@pytest.fixture(scope="module")
def slow():
    return Slow()


@pytest.fixture(scope="module")
def address(tiny, slow, digits):
    with served([tiny, slow], digits) as found:
        yield found


def until(browser, condition):
    deadline = time.monotonic() + 30
    while not browser.execute_script(f"return {condition}"):
        shown = browser.execute_script("return document.body.innerText")
        assert time.monotonic() < deadline, (condition, browser.get_log("browser"), shown)
        time.sleep(0.05)


def text(browser, name):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


@pytest.fixture
def page(browser, address):
    browser.get(address)
    until(browser, "document.documentElement.dataset.ready")
    return browser


def fill(page, name, value):
    script = "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
    page.execute_script(
        script + "e.dispatchEvent(new Event('change')); e.form.dispatchEvent(new Event('input'))", name, value
    )


def decide(page):
    page.execute_script("document.getElementById('decide').click()")


def test_labels_race_and_fall(page, address):
    decide(page)
    until(page, "!document.getElementById('map-card').hidden")
    name, share = text(page, "headline").split(": ")
    assert name == "three"
    calls = int(text(page, "n-calls").split(" ")[0])
    assert f"by {calls} network calls instead of 1,000." in text(page, "status")
    assert text(page, "n-saved") == f"{100 - calls / 10:.1f} %"
    assert text(page, "n-play") == "1 of 10"
    rows = page.execute_script(
        "return [...document.querySelectorAll('#bars li')].map(r => "
        "[r.style.transform, ...[...r.children].map(c => c.textContent)])"
    )
    rows.sort(key=lambda row: int(re.search(r"\d+", row[0])[0]))
    assert [rows[0][1], rows[0][3]] == [name, share]
    draws = [int(re.search(r"(\d+) draws?$", row[3])[1]) for row in rows[1:]]
    assert draws == sorted(draws, reverse=True)
    assert int(text(page, "n-draws").split(" ")[0]) + sum(draws) == calls  # the winner saw all draws
    assert len(page.find_elements("css selector", "#falls .fall")) == 10
    assert len(page.find_elements("css selector", "#falls .cross")) == 9
    # back to the first draw
    page.execute_script("const h = document.getElementById('head'); h.value = 1; h.dispatchEvent(new Event('input'))")
    assert text(page, "n-calls") == "10 of 1,000"
    assert text(page, "n-draws") == "1 of 100"
    assert text(page, "n-play") == f"{10 - draws.count(1)} of 10"
    assert "leads" in text(page, "headline")
    assert page.get_log("browser") == []
    urls = re.findall(r'"url":"(.*?)"', "".join(entry["message"] for entry in page.get_log("performance")))
    assert {url.partition(":")[0] for url in urls} <= {"", "http", "data", "blob", "about", "chrome"}
    assert {url for url in urls if url.startswith("http") and not url.startswith(address)} == set()


def test_labels_are_text(page):
    evil = "<img src=x>"  # the tokenizer takes 16 tokens
    fill(page, "labels", f"{evil}, three")
    decide(page)
    until(page, "!document.getElementById('map-card').hidden")
    names = page.execute_script("return [...document.querySelectorAll('#bars .name')].map(e => e.textContent)")
    assert sorted(names) == sorted([evil, "three"])
    assert page.title == "diffclf: which label fits?"
    assert page.find_elements("css selector", "[src=x]") == []
    assert page.get_log("browser") == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", "three", "labels: only 'three', expected at least two, with commas between them"),
        ("labels", "one, two, one", "labels: 'one' occurs twice, as 0 and 2"),
    ],
)
def test_what_is_wrong_is_said_in_the_page(page, name, value, message):
    fill(page, name, value)
    decide(page)
    until(page, "document.getElementById('message').textContent && !document.getElementById('decide').disabled")
    assert text(page, "message") == message
    assert text(page, "headline") == "Nothing decided yet"
    fill(page, name, "two, three")
    decide(page)
    until(page, "document.getElementById('headline').textContent.startsWith('three: ')")
    assert text(page, "message") == ""


def test_files_are_chosen_and_bad_ones_refused(page, tmp_path):
    path = tmp_path / "no <b>image.png"
    path.write_bytes(b"GIF89a, but no more")
    page.find_element("id", "file").send_keys(str(path))
    decide(page)
    until(page, "document.getElementById('message').textContent")
    assert text(page, "message").startswith("picture cannot be read (")


def test_a_decision_is_stopped(page, slow):
    fill(page, "network", "slow")
    assert page.execute_script("return document.getElementById('labels').value").startswith("class 0, class 1")
    page.execute_script("document.querySelector('#examples button').click()")
    before = slow.denoiser.calls
    decide(page)
    for call in (1, 2, 3):
        deadline = time.monotonic() + 30
        while slow.denoiser.calls < before + call:
            assert time.monotonic() < deadline, text(page, "message")
            time.sleep(0.02)
        if call < 3:
            slow.denoiser.let.release()
    until(page, "document.getElementById('n-draws').textContent === '2 of 100'")
    page.execute_script("document.getElementById('stop').click()")
    until(page, "document.getElementById('status').textContent === 'Stopped.'")
    assert page.execute_script("return document.getElementById('stop').hidden")
    time.sleep(0.2)
    slow.denoiser.let.release()
    time.sleep(0.2)
    assert slow.denoiser.calls == before + 3
    assert page.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_fits_and_can_be_read(browser, address, scheme, width):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme},
                          {"name": "prefers-reduced-motion", "value": "reduce"}]}  # fmt: skip
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        browser.get(address)
        until(browser, "document.documentElement.dataset.ready")
        fill(browser, "labels", "a label that is much longer than there is room for in a row of the race, eight")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        fill(browser, "labels", "three, three left of a five, three right of a five, eight")
        decide(browser)
        until(browser, "!document.getElementById('map-card').hidden")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        beyond = "[...document.querySelectorAll('.card')].filter(c => c.scrollWidth > c.clientWidth + 1).map(c => c.id)"
        assert browser.execute_script(f"return {beyond}") == []
        found = browser.execute_script(CONTRAST)
        assert len(found) > 30
        assert found[0][0] >= 4.5, json.dumps(found[:3])
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_an_example_that_does_not_come_is_told(page):
    page.execute_script(
        "const ask = window.fetch; window.fetch = async (url, ...rest) => {"
        "if (String(url).startsWith('/examples/5')) throw new TypeError('gone'); return ask(url, ...rest); };"
        "document.querySelector('#examples button[data-number=\"5\"]').click()"
    )
    until(page, "document.getElementById('message').textContent === 'the example did not come (gone)'")
    decide(page)  # about the one that was chosen before
    until(page, "!document.getElementById('map-card').hidden")
    assert text(page, "headline").startswith("three: ")
    # of two choices, the later one counts, even if it comes first
    page.execute_script(
        "const ask = window.fetch; window.fetch = async (url, ...rest) => {"
        "if (String(url).startsWith('/examples/7')) await new Promise(done => setTimeout(done, 300));"
        "return ask(url, ...rest); };"
        'for (const n of [7, 1]) document.querySelector(`#examples button[data-number="${n}"]`).click()'
    )
    time.sleep(0.5)
    chosen = "[...document.getElementById('examples').children].filter(b => b.ariaPressed === 'true')"
    assert page.execute_script(f"return {chosen}.map(b => b.dataset.number)") == ["1"]
