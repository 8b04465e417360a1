"""The page of attributions in a real browser, as `test_report_browser.py` tests the other pages."""

import time
from pathlib import Path

import numpy as np
import pytest
from attribution_results import write_attributions
from browsing import CLIPPED, HOSTILE, NAMELESS, SIZES, UNREADABLE, Browser
from PIL import Image
from report_results import write_results
from selenium.common.exceptions import NoAlertPresentException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from pipeline.config.report import Figures
from pipeline.plan.stage import PageModule
from pipeline.report.experiment import Experiment, Made
from pipeline.stages.report.site import build

PAGES = [
    PageModule("pipeline.stages.dissect.page", 10, here=True),
    PageModule("pipeline.stages.attribute.page", 75, here=True),
]
METHODS = {"saliency": "saliency", "ig": "integrated_gradients", "hires": "hires_cam", "grad_cam": "grad_cam"}
RESIDUALS = {"ig": [0.001, 0.02, 0.3, 0, 0.01, 0.02], "hires": 1e-7}
SLOTS = (2, 3, 5, 8, 9, 10)


def report_of(root: Path, *experiments: str, dissected: bool = True) -> Path:
    made = [Made("attribute", "scenes", network, "a1", 1.0, {}, name) for network in ("cnn", "cnn-untrained") for name in experiments]  # fmt: skip # noqa: E501
    made = [one for one in made if (root / "scenes" / str(one.network) / "attributions" / str(one.experiment)).exists()]
    if dissected:
        made.append(Made("dissect", "scenes", "cnn", seconds=2.0))
    experiment = Experiment(root, root / "report", "A report", tuple(made), figures=Figures(formats=[]))
    build(experiment, PAGES)
    return experiment.out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_results(tmp_path_factory.mktemp("plain"), {"cnn": [("stem", 6)]})
    target = np.array([[0, 1], [1, 0], [0, 1], [0, 1], [1, 0], [1, 0]])  # labels are 0, 1, 1, 0, 1, 0
    how = {"residuals": RESIDUALS, "settings": {"ig": {"tolerance": 0.05}}}
    write_attributions(root, METHODS, slots=SLOTS, targets={"top": 2}, target=target, **how)
    write_attributions(root, METHODS, slots=SLOTS[:3], targets={"top": 2}, target=target[:3], network="cnn-untrained")
    write_attributions(root, {"saliency": "saliency"}, slots=(0, 4), targets="label", experiment="second")
    return report_of(root, "explained", "second")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_results(
        tmp_path_factory.mktemp("hostile"),
        {"cnn": [(f"layer {HOSTILE}", 3)]},
        classes=[HOSTILE, '" onload="window.ran=1'],
        ids=[f"{number}/{HOSTILE}" for number in range(12)],
    )
    write_attributions(root, METHODS, slots=SLOTS, residuals=RESIDUALS, note=HOSTILE)
    return report_of(root, "explained")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand images and sixteen methods, drawn from images of few pixels."""
    root = write_results(tmp_path_factory.mktemp("many"), {}, images=1100, side=4, classes=["a", "b", "c"])
    methods = {f"m{number}": "integrated_gradients" for number in range(16)}
    slots = range(1050)
    residuals = dict.fromkeys(methods, np.arange(1050) / 5000)
    write_attributions(root, methods, slots=slots, residuals=residuals, target=np.arange(1050) % 3, shard=512)
    return report_of(root, "explained", dissected=False)


def page_of(report: Path) -> Path:
    return report / "attribution-scenes-cnn.html"


def test_filter_and_sort(browser: Browser, plain: Path) -> None:
    browser.open(page_of(plain))
    assert browser.find("#count").text == "6 of 6 images" and len(browser.texts(".card")) == 6
    assert len(browser.texts(".card:first-child .map")) == 4
    Select(browser.find("[name=verdict]")).select_by_visible_text("wrong (2)")
    said = browser.texts(".card .place")
    assert len(said) == 2 and all(each.endswith(", wrong") for each in said)
    Select(browser.find("[name=label]")).select_by_visible_text("beach (1)")
    assert browser.texts(".card h3") == ["beach"] and browser.texts(".card .place") == ["most probable: road, wrong"]
    browser.find("button[type=reset]").click()
    browser.wait(lambda: browser.find("#count").text == "6 of 6 images")
    Select(browser.find("[name=law]")).select_by_visible_text("missed (1)")
    assert browser.texts(".card .missed figcaption b") == ["≠ residual 0.3"]
    assert browser.texts(".card .missed figcaption span") == ["Integrated gradients"]
    browser.find("button[type=reset]").click()
    browser.wait(lambda: browser.find("#count").text == "6 of 6 images")
    Select(browser.find("[name=sort]")).select_by_value("residual")
    assert browser.texts(".card:first-child .missed b") == ["≠ residual 0.3"]
    browser.find("[name=method][value=saliency]").click()
    assert browser.texts(".card:first-child figcaption span") == ["Integrated gradients", "HiResCAM", "Grad-CAM"]
    browser.find("[name=q]").send_keys("00008 BEACH")
    found = browser.texts(".card h3")
    assert found == ["beach"]
    shared = browser.address
    browser.open(page_of(plain), shared)  # the address holds the filters
    assert browser.texts(".card h3") == found and not browser.find("[name=method][value=saliency]").is_selected()
    Select(browser.find("[name=experiment]")).select_by_visible_text("second")
    browser.find("button[type=reset]").click()
    browser.wait(lambda: browser.find("#count").text == "6 of 6 images")
    Select(browser.find("[name=experiment]")).select_by_visible_text("second")
    assert browser.find("#count").text == "2 of 2 images" and browser.address == "#experiment=second"
    assert not browser.find("[name=verdict]").is_displayed()  # nothing is known of predictions
    assert browser.said() == []


def test_an_image_in_full(browser: Browser, plain: Path) -> None:
    browser.open(page_of(plain), "#image=000003")
    browser.wait(browser.find("dialog").is_displayed)
    words = browser.find("dialog").text
    assert all(word in words for word in ("000003", "road", "right", "logit of the baseline", "residual 0.02"))
    assert "beach, logit" in words and "The same network untrained" in words
    assert browser.texts("dialog .layer")[:2] == ["residual 0.02", "features"]
    assert len(browser.texts("dialog .map")) == 4 * 3
    loaded = (
        "return [...document.querySelectorAll('dialog img')].every((image) => image.complete && image.naturalWidth)"
    )
    browser.wait(lambda: browser.run(loaded))
    widths = browser.run("return [...document.querySelectorAll('dialog img')].map((image) => image.naturalWidth / 128)")
    assert set(widths) == {5, 4}  # the image and its maps; those of the other class, and of the untrained network
    before = browser.address
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    browser.wait(lambda: browser.address != before)
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    browser.wait(lambda: browser.address == before)
    browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    browser.wait(lambda: not browser.find("dialog").is_displayed())
    assert "image=" not in browser.address
    browser.open(page_of(plain), "#image=000010")
    assert "untrained" not in browser.find("dialog").text
    browser.open(page_of(plain), "#image=000004")  # explained by the second experiment alone
    assert "second" in browser.find("dialog").text
    browser.open(page_of(plain), "#image=no")
    assert not browser.find("dialog").is_displayed() and browser.said() == []


def test_each_map_is_its_own(browser: Browser, plain: Path) -> None:
    """The picture that a place shows is that of its method, not of a neighbour."""
    browser.open(page_of(plain), "#image=000003")
    browser.wait(lambda: browser.run("return [...document.querySelectorAll('dialog img')].every((i) => i.complete)"))
    file = str(browser.find("dialog .map img").get_attribute("src")).removeprefix("file://")
    with Image.open(file) as opened:
        strip = np.asarray(opened).astype(float)
    picture = browser.picture().astype(float)
    for at in range(4):
        box = browser.run(
            "return document.querySelectorAll('dialog .map .tile')[arguments[0]].getBoundingClientRect()", at
        )
        left, top, side = (round(box[name]) for name in ("left", "top", "width"))
        shown = picture[top + 3 : top + side - 3, left + 3 : left + side - 3]
        own = [strip[:, (each + 1) * 128 : (each + 2) * 128].mean((0, 1)) for each in range(4)]
        differences = [np.abs(shown.mean((0, 1)) - each).sum() for each in own]
        assert np.argmin(differences) == at, differences


def test_keyboard_alone(browser: Browser, plain: Path) -> None:
    browser.open(page_of(plain))
    browser.run("document.querySelector('.card a').focus()")
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.wait(browser.find("dialog").is_displayed)
    assert browser.run("return document.querySelector('dialog').contains(document.activeElement)")
    browser.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    browser.wait(lambda: not browser.find("dialog").is_displayed())
    assert browser.run("return document.activeElement === document.querySelector('.card a')")


def test_links_from_and_to_units(browser: Browser, plain: Path) -> None:
    browser.open(plain / "network-scenes-cnn.html", "#unit=stem/1")
    link = browser.find("dialog .captions a")
    image = link.find_element(By.CSS_SELECTOR, "span").text
    link.click()
    browser.wait(lambda: browser.driver.current_url == f"{page_of(plain).as_uri()}#image={image}")
    browser.wait(browser.find("dialog").is_displayed)
    assert image in browser.find("dialog header").text
    browser.find("dialog .note a").click()
    browser.wait(lambda: browser.driver.current_url == (plain / "network-scenes-cnn.html").as_uri())


def test_a_unit_shows_the_images_of_its_highest_relevance(browser: Browser, tmp_path: Path) -> None:
    root = write_results(tmp_path, {"cnn": [("stem", 6)]})
    relevance = np.arange(36).reshape(6, 6).astype(float)
    relevance[:, 2] = -1
    write_attributions(root, {"lrp": "lrp"}, slots=SLOTS, units={"lrp": {"stem": relevance}}, signs=["lrp"])
    report = report_of(root, "explained")
    for size in SIZES:
        browser.show(size)
        browser.open(report / "network-scenes-cnn.html", "#unit=stem/1")
        assert "Relevance" in browser.texts("dialog h3")
        picture = browser.find("dialog img[src$='-relevance.jpg']")
        browser.wait(lambda picture=picture: browser.run("return arguments[0].naturalWidth", picture) == 5 * 112)
        assert "speaks most for what the network says" in picture.get_attribute("alt")
        ids = browser.texts("dialog .captions:last-of-type span")
        assert ids == [f"{slot:06d}" for slot in SLOTS[::-1][:5]]
        assert browser.run(CLIPPED) == [] and browser.run(NAMELESS) == [] and browser.run(UNREADABLE) == []
    browser.open(report / "network-scenes-cnn.html", "#unit=stem/2")
    assert "Relevance" not in browser.texts("dialog h3") and browser.said() == []
    assert not (report / "units/scenes-cnn/00-0002-relevance.jpg").exists()


def test_hostile_names_are_text(browser: Browser, hostile: Path) -> None:
    for address in ("", f"#image=2/{HOSTILE}"):
        browser.open(page_of(hostile), address)
        assert HOSTILE in browser.find("body").text
        if not address:
            browser.find(".card a").click()
        browser.wait(browser.find("dialog").is_displayed)
        assert HOSTILE in browser.find("dialog").text
        with pytest.raises(NoAlertPresentException):
            _ = browser.driver.switch_to.alert
        assert browser.run("return window.ran") is None and browser.said() == []
        counts = "return [document.scripts.length, document.querySelectorAll('[onerror], [onload]').length]"
        assert browser.run(counts) == [2, 0]
    browser.open(hostile / "network-scenes-cnn.html")
    browser.find("[name=all]").click()
    browser.find(".card").click()
    browser.find("dialog .captions a").click()
    browser.wait(lambda: browser.driver.current_url.startswith(page_of(hostile).as_uri()))
    browser.wait(browser.find("dialog").is_displayed)


def test_a_thousand_images(browser: Browser, many: Path) -> None:
    browser.open(page_of(many))
    assert browser.find("#count").text == "1\u202f000 of 1\u202f000 images" and len(browser.texts(".card")) == 24
    assert "1\u202f000 images of 1\u202f050 images" in browser.find("main").text
    loaded = browser.run(
        "return performance.getEntriesByType('resource').filter((e) => e.name.endsWith('.jpg')).length"
    )
    assert loaded <= 24  # lazy
    measure = """
        const fields = document.getElementById("browser").elements;
        const steps = [["label", "1"], ["label", ""], ["law", "1"], ["sort", "residual"], ["q", "00012"]];
        return steps.map(([name, value]) =>
          Math.min(...[...Array(3)].map(() => {
            fields[name].value = value;
            const began = performance.now();
            fields[name].dispatchEvent(new Event(name === "q" ? "input" : "change", { bubbles: true }));
            document.body.offsetHeight;
            return performance.now() - began;
          })));
        """
    spent = browser.run(measure)
    for _ in range(4):  # other processes may take the machine for a second or two
        if max(spent) >= 150:
            time.sleep(2)
            spent = [min(pair) for pair in zip(spent, browser.run(measure), strict=True)]
    assert max(spent) < 150, spent


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_and_can_be_read(browser: Browser, plain: Path, tmp_path: Path, size: str, dark: bool) -> None:
    browser.show(size, dark)
    for address in ("", "#image=000003"):
        browser.open(page_of(plain), address)
        browser.run("document.querySelector('.card').scrollIntoView()")
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
        assert browser.run(UNREADABLE) == [] and browser.run(NAMELESS) == []
        assert browser.run(CLIPPED) == []
        browser.wait(lambda: browser.run("return [...document.querySelectorAll('.card:first-child img')].every((i) => i.complete)"))  # fmt: skip # noqa: E501
        picture = browser.picture()
        Image.fromarray(picture).save(tmp_path / f"{size}-{'dark' if dark else 'light'}{address[1:6]}.png")
        assert picture.std() > 5 and browser.said() == []
    # A map without values has the colour of the ground, whichever it is.
    filtered = browser.run("return getComputedStyle(document.querySelector('.values img')).filter")
    assert (filtered != "none") == dark


def test_print_and_without_scripts(browser: Browser, plain: Path) -> None:
    browser.show(media="print")
    browser.open(page_of(plain))
    assert not browser.find("#browser").is_displayed() and browser.find(".card").is_displayed()
    browser.show()
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(page_of(plain))
        assert not browser.find("#browser").is_displayed()
        assert len(browser.driver.find_elements(By.CSS_SELECTOR, "noscript tbody tr")) == 8
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
