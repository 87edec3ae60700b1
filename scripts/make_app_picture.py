"""Make docs/images/app.png: the page of `diffclf app` after a decision, as the README shows it. Needs Chromium.

python scripts/make_app_picture.py [--dark] [--width 1200] [--digit 9] [--whole] [--out docs/images/app.png]
"""

import argparse
import asyncio
import base64
import shutil
import threading
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from lightning_diffclf.app.decision import scenes_of_digits
from lightning_diffclf.app.networks import TextToImage
from lightning_diffclf.app.server import make_app, serve

DECIDED = "return !document.getElementById('map-card').hidden && document.getElementById('picture').complete"


def photograph(address: str, given: argparse.Namespace) -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
    ):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if given.dark else "light"}
        media = [scheme, {"name": "prefers-reduced-motion", "value": "reduce"}]
        size = {"width": given.width, "height": 900, "deviceScaleFactor": 1, "mobile": given.width < 500}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        wait = WebDriverWait(browser, 120)
        browser.get(address)
        wait.until(lambda b: b.execute_script("return document.documentElement.dataset.ready"))
        button = f"document.querySelector('#examples [data-number=\"{given.digit}\"]')"
        browser.execute_script(f"{button}.click()")
        wait.until(lambda b: b.execute_script(f"return {button}.ariaPressed === 'true'"))
        for _ in range(2):  # the first one also prepares the network
            wait.until(lambda b: b.execute_script("return !document.getElementById('decide').disabled"))
            browser.execute_script("document.getElementById('decide').click()")
            wait.until(lambda b: b.execute_script(DECIDED))
        last = "document.documentElement" if given.whole else "document.getElementById('falls-card')"
        height = browser.execute_script(f"return {last}.getBoundingClientRect().bottom + scrollY + 16")
        clip = {"x": 0, "y": 0, "width": given.width, "height": height, "scale": 1}
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
        given.out.write_bytes(base64.b64decode(shot["data"]))
    finally:
        browser.quit()


async def main(given: argparse.Namespace) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    app = make_app([TextToImage(device="cpu")], scenes_of_digits())

    def visit(address: str) -> None:
        try:
            photograph(address, given)
        finally:
            loop.call_soon_threadsafe(stop.set)

    def ready(address: str) -> None:
        threading.Thread(target=visit, args=(address,)).start()

    await serve(app, "127.0.0.1", 0, ready, stop)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dark", action="store_true", help="as browsers in dark mode show it")
    parser.add_argument("--width", type=int, default=1200, help="of the window, in pixels")
    parser.add_argument("--digit", type=int, default=9, help="the example")
    parser.add_argument("--whole", action="store_true", help="the whole page, not only to the end of the chart")
    parser.add_argument("--out", type=Path, default=Path("docs/images/app.png"), help="the file")
    asyncio.run(main(parser.parse_args()))
