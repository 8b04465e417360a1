"""A real browser for the tests of pages: headless Chromium, driven over its own protocol.

Debian and Ubuntu: `apt-get install chromium chromium-driver`.
"""

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.options import Options  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip
HOSTILE = "</script><script>window.ran=1;alert(1)</script><img src=x onerror=window.ran=1>"
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}


class Browser:
    """One Chromium for all tests."""

    def __init__(self, profile: Path) -> None:
        options = Options()
        options.binary_location = str(CHROMIUM)
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.show()

    def show(self, size: str = "desktop", dark: bool = False, media: str = "") -> None:
        width, height = SIZES[size]
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        emulated = [{"name": name, "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": emulated})

    def open(self, page: Path, address: str = "") -> None:
        self.driver.get("about:blank")  # an address that differs behind the # only would not load the page
        self.driver.get_log("browser")
        self.driver.get(page.as_uri() + address)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        return self.run("return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)", selector)

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, true: Callable[[], object]) -> None:
        WebDriverWait(self.driver, 20, poll_frequency=0.02).until(lambda _: true())

    @property
    def address(self) -> str:
        return self.run("return location.hash")

    def picture(self) -> np.ndarray:
        with Image.open(io.BytesIO(self.driver.get_screenshot_as_png())) as picture:
            return np.asarray(picture.convert("RGB"))

    def said(self) -> list[str]:
        """What the console was told since the page was opened."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


UNREADABLE = """
// Text whose contrast with the ground behind it is below 4.5 (WCAG 2, AA).
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const linear = (value) => value <= 10 ? value / 3294 : ((value / 255 + .055) / 1.055) ** 2.4;
const light = (colour) => {
  const [r, g, b] = parts(colour).map(linear);
  return .2126 * r + .7152 * g + .0722 * b;
};
const ground = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const found = getComputedStyle(at).backgroundColor;
    if ((parts(found)[3] ?? 1) > .99) return found;
  }
  return "rgb(255, 255, 255)";
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
  const left = element.closest("script, style, noscript, option, :disabled");
  if (!own || left || !element.getClientRects().length) continue;
  const [a, b] = [getComputedStyle(element).color, ground(element)].map(light).sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) found.push(element.outerHTML.slice(0, 120));
}
return found;
"""
NAMELESS = """
// Controls and pictures that a screen reader has no name for.
const controls = "button, input, select, a, img, [role=img], [role=group], dialog[open]";
return [...document.querySelectorAll(controls)].filter((element) =>
  !(element.getAttribute("alt") || element.getAttribute("aria-label") || element.labels?.[0]?.textContent.trim()
    || document.getElementById(element.getAttribute("aria-labelledby"))?.textContent || element.textContent.trim()))
  .map((element) => element.outerHTML.slice(0, 120));
"""
