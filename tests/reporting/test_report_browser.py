"""The page in a real browser without a network: it loads, is clicked, draws, and the console stays silent.

Skipped without Chromium, its driver or selenium (apt install chromium chromium-driver; pip install selenium).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import made_up
import pytest

from medseg.reporting.report import render_report

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:selenium.*", "ignore::ResourceWarning")

DRIVER = shutil.which("chromedriver")
BROWSER = next(
    (p for p in ("/usr/lib/chromium/chromium", shutil.which("chromium") or "") if p and Path(p).is_file()), None
)
COUNT_COLOURS = """
const canvas = document.querySelector(`[data-part="${arguments[0]}"]`);
const copy = document.createElement("canvas");
copy.width = canvas.width;
copy.height = canvas.height;
const context = copy.getContext("2d", { willReadFrequently: true });
context.drawImage(canvas, 0, 0);
const data = context.getImageData(0, 0, copy.width, copy.height).data;
const colours = {};
for (let i = 0; i < data.length; i += 4) {
  const colour = `${data[i]},${data[i + 1]},${data[i + 2]}`;
  colours[colour] = (colours[colour] || 0) + 1;
}
return colours;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_report(made_up.content(prefix="<b onclick=alert(1)>")), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver")
    if DRIVER is None or BROWSER is None:
        pytest.skip("no Chromium here")
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for argument in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "force-prefers-reduced-motion", "disable-dev-shm-usage",
        "host-resolver-rules=MAP * ~NOTFOUND",
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    """The page, loaded afresh and with its viewer drawn."""
    browser.set_window_size(1280, 900)
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(page.as_uri())
    drawn_after(browser, 0)
    yield browser
    assert browser.get_log("browser") == []  # no error, no warning, nothing refused by the policy


def drawn_after(browser, number: int) -> int:
    from selenium.webdriver.support.ui import WebDriverWait

    def drawn(b):
        return int(b.execute_script("return document.getElementById('viewer').dataset.drawn || 0"))

    WebDriverWait(browser, 60).until(lambda b: drawn(b) > number)
    return drawn(browser)


def part(browser, name: str):
    return browser.find_element("css selector", f'[data-part="{name}"]')


def rgb(index: int) -> str:
    from medseg.reporting import style

    colour = style.hex_colour(index)
    return ",".join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))


def test_the_viewer_draws_image_and_outlines_in_every_plane(opened):
    for plane in ("axial", "coronal", "sagittal"):
        colours = opened.execute_script(COUNT_COLOURS, plane)
        greys = [c for c in colours if len(set(c.split(","))) == 1]
        assert len(greys) > 20
        assert colours[rgb(1)] > 100
    solid = opened.execute_script(COUNT_COLOURS, "solid")
    assert len(solid) > 10  # shaded


def test_clicks_sliders_and_keys_move_through_the_volume(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def caption(name):
        return part(opened, f"{name}-caption").text

    number = drawn_after(opened, 0)
    before = {name: caption(name) for name in ("axial", "coronal", "sagittal")}
    opened.execute_script("document.getElementById('viewer-section').scrollIntoView()")
    ActionChains(opened).move_to_element_with_offset(part(opened, "axial"), 25, 30).click().perform()
    number = drawn_after(opened, number)
    assert caption("axial") == before["axial"]
    assert caption("coronal") != before["coronal"]
    assert caption("sagittal") != before["sagittal"]
    part(opened, "axial").send_keys(Keys.ARROW_UP)
    number = drawn_after(opened, number)
    assert int(caption("axial").split()[0]) == int(before["axial"].split()[0]) + 1
    part(opened, "axial-slider").send_keys(Keys.HOME)
    drawn_after(opened, number)
    assert caption("axial").startswith("1 of")


def test_outlines_can_be_hidden_by_kind_and_by_label(opened):
    number = drawn_after(opened, 0)
    for name in ("prediction", "reference"):
        part(opened, name).click()
        number = drawn_after(opened, number)
    assert rgb(1) not in opened.execute_script(COUNT_COLOURS, "axial")
    part(opened, "prediction").click()
    number = drawn_after(opened, number)
    assert rgb(1) in opened.execute_script(COUNT_COLOURS, "axial")
    opened.find_element("css selector", ".labels input").click()
    drawn_after(opened, number)
    assert rgb(1) not in opened.execute_script(COUNT_COLOURS, "axial")


SET = """
const slider = document.querySelector(`[data-part="${arguments[0]}"]`);
slider.value = arguments[1];
slider.dispatchEvent(new Event("input"));
"""


def test_labels_can_be_filled_with_a_share_of_their_colour(opened):
    number = drawn_after(opened, 0)
    plain = opened.execute_script(COUNT_COLOURS, "axial")
    opened.execute_script(SET, "fill", 100)
    number = drawn_after(opened, number)
    assert opened.execute_script(COUNT_COLOURS, "axial")[rgb(1)] > 2 * plain[rgb(1)]
    opened.execute_script(SET, "fill", 50)
    drawn_after(opened, number)
    coloured = [c for c in opened.execute_script(COUNT_COLOURS, "axial") if len(set(c.split(","))) > 1]
    assert len(coloured) > 20  # grey shines through


def test_planes_zoom_around_the_crosshair_and_back_by_slider_and_keys(opened):
    number = drawn_after(opened, 0)
    before = opened.execute_script(COUNT_COLOURS, "axial")
    part(opened, "axial").send_keys("+++")
    number = drawn_after(opened, number)
    assert float(part(opened, "zoom").get_attribute("value")) == pytest.approx(1.95, abs=0.03)
    assert opened.execute_script(COUNT_COLOURS, "axial") != before
    opened.execute_script(SET, "zoom", 1)
    drawn_after(opened, number)
    assert opened.execute_script(COUNT_COLOURS, "axial") == before


def test_a_click_lands_where_it_was_made_in_a_zoomed_and_moved_plane_too(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    number = drawn_after(opened, 0)
    opened.execute_script("document.getElementById('viewer-section').scrollIntoView()")
    opened.execute_script(SET, "zoom", 3)
    number = drawn_after(opened, number)
    canvas = part(opened, "axial")
    moved = ActionChains(opened).key_down(Keys.SHIFT).move_to_element(canvas).click_and_hold()
    moved.move_by_offset(20, 15).release().key_up(Keys.SHIFT).perform()
    number = drawn_after(opened, number)
    ActionChains(opened).move_to_element_with_offset(canvas, 30, 40).click().perform()
    drawn_after(opened, number)
    place = opened.execute_script(CROSSHAIR, "axial")
    scale = opened.execute_script("return arguments[0].width / arguments[0].clientWidth", canvas)
    expected = [(canvas.size["width"] / 2 + 30) * scale, (canvas.size["height"] / 2 + 40) * scale]
    assert place == pytest.approx(expected, abs=40)  # within a voxel of the threefold size


CROSSHAIR = """
const canvas = document.querySelector(`[data-part="${arguments[0]}"]`);
const [w, h] = [canvas.width, canvas.height], data = canvas.getContext("2d").getImageData(0, 0, w, h).data;
const columns = new Array(w).fill(0), rows = new Array(h).fill(0);
const grey = (x, y) => data[4 * (y * w + x) + 1];
for (let y = 2; y < h - 2; y++) for (let x = 2; x < w - 2; x++) { // brighter than what lies on both sides
  columns[x] += Math.max(0, grey(x, y) - Math.max(grey(x - 2, y), grey(x + 2, y)));
  rows[y] += Math.max(0, grey(x, y) - Math.max(grey(x, y - 2), grey(x, y + 2)));
}
return [columns, rows].map((sums) => sums.indexOf(Math.max(...sums)));
"""


def test_one_view_can_be_made_large_and_small_again(opened):
    number = drawn_after(opened, 0)
    small = part(opened, "axial").size["width"]
    button = opened.find_element("css selector", '[data-enlarge="axial"]')
    opened.execute_script("arguments[0].click()", button)
    number = drawn_after(opened, number)
    assert part(opened, "axial").size["width"] > 2 * small
    assert button.get_attribute("aria-pressed") == "true"
    opened.execute_script("arguments[0].click()", button)
    drawn_after(opened, number)
    assert part(opened, "axial").size["width"] == small


def test_what_is_black_and_white_is_told_in_the_values_of_the_file(opened):
    number = drawn_after(opened, 0)
    before = part(opened, "window").text
    assert "is black" in before
    opened.execute_script(SET, "contrast", 128)
    drawn_after(opened, number)
    assert part(opened, "window").text != before


def test_the_button_at_a_case_opens_it_in_the_viewer(opened):
    number = drawn_after(opened, 0)
    opened.execute_script(
        "document.querySelector('[data-view]').scrollIntoView({block: 'center', behavior: 'instant'})"
    )
    opened.find_element("css selector", "[data-view]").click()
    drawn_after(opened, number)
    assert "voxels of" in part(opened, "status").text


def test_a_name_with_tags_is_shown_as_it_is(opened):
    assert opened.find_element("css selector", "h1").text == "<b onclick=alert(1)>title"
    assert "<b onclick=alert(1)>organ" in part(opened, "labels").text
    assert not opened.find_elements("css selector", "[onclick]")


def test_nothing_is_asked_of_the_network(opened):
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked
    assert all(url.startswith(("file:///", "data:")) for url in asked)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_is_never_wider_than_the_screen(opened, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_what_is_folded_is_open_in_print(opened):
    opened.execute_cdp_cmd("Page.printToPDF", {})
    assert opened.execute_script("return [...document.querySelectorAll('details')].every((d) => d.open)")
