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
CLIPPED = """
// Text that is cut off without an ellipsis, lies beside the page where nothing scrolls to it, or lies on other text.
// Of an open dialog alone, if there is one. The link that skips to the content waits outside the page;
// accents of formulas lie on their letters.
const root = document.querySelector("dialog[open]") || document.body;
const found = [];
const named = (node) => `${node.parentElement.outerHTML.slice(0, 80)} (${node.textContent.trim().slice(0, 40)})`;
const forReaders = (style) => style.clip === "rect(0px, 0px, 0px, 0px)" || style.clipPath === "inset(50%)";
const visible = (node, box) => {  // the part of a box that is not scrolled away; null if there is none
  let [left, top, right, bottom] = [box.left, box.top, box.right, box.bottom], scrolled = false;
  for (let at = node.parentElement; at && at !== document.body; at = at.parentElement) {
    const style = getComputedStyle(at), own = at.getBoundingClientRect();
    if (forReaders(style)) return null;
    const overflow = style.overflowX + style.overflowY;
    const shortened = style.textOverflow === "ellipsis" || style.webkitLineClamp !== "none";
    if (/auto|scroll/.test(overflow) || (/hidden|clip/.test(overflow) && shortened)) {
      scrolled = true;
      [left, right] = [Math.max(left, own.left), Math.min(right, own.right)];
      [top, bottom] = [Math.max(top, own.top), Math.min(bottom, own.bottom)];
    } else if (/hidden|clip/.test(overflow)) {
      const [x, y] = [Math.max(own.left - left, right - own.right), Math.max(own.top - top, bottom - own.bottom)];
      if (x > 1 || y > .25 * box.height) found.push(`cut off: ${named(node)}`);
    }
    if (at === root) break;
  }
  if (!scrolled && (left < -1 || right > document.documentElement.clientWidth + 1)) {
    found.push(`beside the page: ${named(node)}`);
  }
  return right - left > 1 && bottom - top > 1 ? {left, top, right, bottom} : null;
};
const boxes = [];
const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, parent = node.parentElement;
  if (!node.textContent.trim() || parent.closest("script, style, noscript, option, select, svg, math, .skip")) continue;
  if (!parent.checkVisibility({opacityProperty: true, visibilityProperty: true, contentVisibilityAuto: true})) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  for (const box of range.getClientRects()) {
    const seen = box.width > 1 && box.height > 1 && visible(node, box);
    if (seen) boxes.push([node, seen]);
  }
}
boxes.sort((a, b) => a[1].top - b[1].top);
for (let i = 0; i < boxes.length; i++) {
  const [node, a] = boxes[i];
  for (let j = i + 1; j < boxes.length && boxes[j][1].top < a.bottom; j++) {
    const [other, b] = boxes[j];
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    const most = .4 * Math.min(a.bottom - a.top, b.bottom - b.top);
    if (other !== node && across > 2 && down > most) found.push(`on other text: ${named(node)}, ${named(other)}`);
  }
}
return [...new Set(found)].slice(0, 20);
"""
