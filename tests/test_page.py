"""The report and the comparison in a real Chromium: what is drawn, on a desk and on a phone, in light and in dark."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import compare, report

ROOT = Path(__file__).parent.parent
SCREENSHOTS = ROOT / "tests/screenshots"
WIDTHS = {"desk": 1280, "phone": 360}  # CSS pixels
pytestmark = pytest.mark.slow

# Everything that is shown with its box, but what scrolls inside a table's or a picture's own frame.
BEYOND = """return [...document.querySelectorAll('body *')].filter(e => !e.closest('.wide *, figure *'))
    .filter(e => { const box = e.getBoundingClientRect(); return box.right > innerWidth + 1 || box.left < 0 })
    .map(e => e.outerHTML.slice(0, 80))"""
BOXES = """return [...document.querySelectorAll('figure svg')].map(e => { const b = e.getBoundingClientRect();
    return [b.left + scrollX, b.top + scrollY, b.width, b.height] })"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages as the real code makes them from the committed report; the second run is twice as long."""
    folder = tmp_path_factory.mktemp("pages")
    first = report.load(ROOT / "eval/reports/demo.json")
    second = copy.deepcopy(first)
    second["run"] = "twice as long"
    for stage in second["stages"].values():
        for point in stage["training"] or []:
            point["tokens"] = point["tokens"] and 2 * point["tokens"]
    page = report.write(first, folder).with_suffix(".html")
    report.write(report.load(ROOT / "eval/reports/demo3.json"), folder)
    both = folder / "compare.html"
    both.write_text(compare.html([first, second]), encoding="utf-8")
    return {"report": page, "compare": both}


def test_the_committed_pages_are_those_of_their_json(pages: dict[str, Path]) -> None:
    made = sorted(pages["report"].parent.glob("demo*.*"))
    assert len(made) == 6 + 4  # pages and plots; the second curriculum has none for readers, and no plot of memory
    for path in made:
        same = path.read_bytes() == (ROOT / "eval/reports" / path.name).read_bytes()
        assert same, f"{path.name}: run python eval/report.py eval/reports/{path.name.split('.')[0]}.json"


def requests(browser: Any) -> list[str]:
    """The addresses asked for since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


def show(browser: Any, page: Path, width: int, scheme: str, height: int = 1000) -> np.ndarray:
    """The whole page as drawn: its pixels, (height, width, 3). Nothing is asked of anybody, and nothing complained of."""

    def size(pixels: int) -> None:
        metrics = {"width": width, "height": pixels, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    requests(browser)
    size(height)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    size(browser.execute_script("return document.documentElement.scrollHeight"))
    picture = np.asarray(Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB"))
    assert requests(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []
    return picture


def luminance(colour: Any) -> float:
    """Relative luminance of an sRGB colour of 0 to 255, as WCAG 2 defines it."""
    part = np.asarray(colour, dtype=float)[..., :3] / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    return float((linear * [0.2126, 0.7152, 0.0722]).sum(-1).mean())


def contrast(one: Any, other: Any) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def style(browser: Any, selector: str, key: str) -> list[int]:
    """A computed colour, as [red, green, blue]."""
    text = browser.execute_script(
        "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]", selector, key
    )
    return [int(part) for part in text.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize(
    ("name", "device", "scheme"),
    [
        ("report", "desk", "light"),
        ("report", "phone", "dark"),
        ("compare", "desk", "dark"),
        ("compare", "phone", "light"),
    ],
)
def test_what_is_drawn(browser: Any, pages: dict[str, Path], name: str, device: str, scheme: str) -> None:
    seen = show(browser, pages[name], WIDTHS[device], scheme)
    SCREENSHOTS.mkdir(exist_ok=True)
    Image.fromarray(seen).save(SCREENSHOTS / f"{name}-{device}-{scheme}.png")

    assert browser.execute_script("return document.documentElement.scrollWidth") == WIDTHS[device]
    assert browser.execute_script(BEYOND) == []

    # The paper is what most of the page is, and the words stand out from it.
    paper = np.median(seen[:, :8].reshape(-1, 3), axis=0)
    assert luminance(paper) < 0.03 if scheme == "dark" else luminance(paper) > 0.8
    assert contrast(style(browser, "body", "color"), paper) > 10
    assert contrast(style(browser, ".faint", "color"), paper) > 4.5  # WCAG's AA
    assert luminance(seen) < 0.1 if scheme == "dark" else luminance(seen) > 0.7  # pictures too

    boxes = browser.execute_script(BOXES)
    assert len(boxes) == {"report": 3, "compare": 1}[name]
    for left, top, width, height in boxes:
        assert width > 500 and height > 150
        inside = seen[round(top) : round(top + height), round(left) : round(left + width)]
        drawn = inside.reshape(-1, 3).astype(int)
        background = np.median(drawn, axis=0)
        marks = drawn[np.abs(drawn - background).max(axis=1) > 60]
        assert len(marks) > 0.005 * len(drawn)  # axes, words, curves
        assert len(np.unique(marks // 32, axis=0)) > 15  # in colours
        assert contrast(marks[np.abs(marks - background).sum(axis=1).argmax()], background) > 7


@pytest.mark.parametrize(("device", "scheme"), [("desk", "light"), ("phone", "dark")])
def test_samples_are_side_by_side_and_copied_words_are_marked(
    browser: Any, pages: dict[str, Path], device: str, scheme: str
) -> None:
    """On a desk what the four stages wrote first after a prompt is one row, on a phone a column. Every copied run of the JSON,
    and it alone, has a background of its own on which it can be read."""
    seen = show(browser, pages["report"], WIDTHS[device], scheme)
    places = browser.execute_script(
        "return [...document.querySelector('.samples').children].slice(0, 4).map(e => { const b = e.getBoundingClientRect();"
        "return [e.querySelector('.label').textContent.split(',')[0], Math.round(b.left), Math.round(b.top)] })"
    )
    names, lefts, tops = map(list, zip(*places, strict=True))
    assert names == ["base", "2a", "2b", "2c"]
    assert (len(set(lefts)), len(set(tops))) == {"desk": (4, 1), "phone": (1, 4)}[device]

    evidence = report.load(ROOT / "eval/reports/demo.json")
    copied = sorted(
        sample["text"][sample["copied"]["start"] : sample["copied"]["end"]]
        for stage in evidence["stages"].values()
        for sample in stage["samples"]
        if sample["copied"]["words"]
    )
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.sample mark')].map(e => { const b = e.getClientRects()[0];"
        "return [e.textContent, b.left + scrollX, b.top + scrollY, b.width, b.height] })"
    )
    assert copied and sorted(text for text, *_ in marks) == copied
    card = style(browser, ".sample", "backgroundColor")
    for _, left, top, width, height in marks:
        inside = seen[round(top) + 2 : round(top + height) - 2, round(left) : round(left + width)]
        ground = np.median(inside.reshape(-1, 3), axis=0)
        assert np.abs(ground - card).max() > 30
        assert contrast(style(browser, "mark", "color"), ground) > 4.5
